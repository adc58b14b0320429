"""Records every call before it is visible and replays it after a crash. See `episode` for the idea, `http` and `tokens` for the taps."""

from cod_agent.journal.episode import Episode, current_episode
from cod_agent.journal.tokens import record_completion

__all__ = ["Episode", "current_episode", "record_completion"]
