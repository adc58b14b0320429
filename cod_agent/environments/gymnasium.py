"""Any world of ours as a Gymnasium environment: text in, text out, one episode a task, the tasks of a pack in turn.

    env = to_gymnasium(lake, lake.pack(4))
    text, info = env.reset()                  # the next task, from the first again after the last
    text, reward, terminated, truncated, info = env.step("<answer>3</answer>")

What carries an agent from task to task, its context, is the agent's business and not in here.
"""

from __future__ import annotations

import asyncio
import inspect
import string
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

from cod_agent.environments.base import Environment, Session, started
from cod_agent.errors import MissingExtra, UsageError
from cod_agent.tasks import Observation, Pack

if TYPE_CHECKING:
    import gymnasium

CHARACTERS = string.printable
"""What the text spaces are made of. Gymnasium compares observations with them; answers may hold anything."""


def to_gymnasium(
    environment: Environment, pack: Pack, *, longest: int = 16_384, longest_answer: int = 1024
) -> gymnasium.Env[str, str]:
    """`pack` of `environment` as a `gymnasium.Env` of text observations and text actions.

    `reset(seed=k)` and `reset(options={"position": k})` start at task k (modulo the length of the pack); the hidden
    property comes from the pack, whatever the seed. `info` has the task's id, its position and prompt and, with the
    last observation, the words of the feedback. Feedback without a reward counts 0.

    Args:
        longest: bound of the observation space, in characters.
        longest_answer: bound of the action space, in characters.

    Raises:
        MissingExtra: gymnasium is not installed.
        UsageError: the pack is empty.
    """
    try:
        import gymnasium
    except ImportError:
        raise MissingExtra("a Gymnasium environment", "gymnasium") from None
    if not len(pack):
        raise UsageError("an empty pack has no task to start")

    class PackEnv(gymnasium.Env[str, str]):
        """The tasks of a pack, one an episode."""

        metadata: dict[str, Any] = {"render_modes": []}

        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Text(longest, min_length=0, charset=CHARACTERS)
            self.action_space = gymnasium.spaces.Text(longest_answer, min_length=0, charset=CHARACTERS)
            self._position = -1
            self._session: Session | None = None
            self._carried: Any = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[str, dict[str, Any]]:
            super().reset(seed=seed)
            wanted = (options or {}).get("position", seed)
            self._position = (self._position + 1 if wanted is None else int(wanted)) % len(pack)
            if self._position == 0:
                self._carried = None
            self._session = started(environment, pack[self._position], self._carried)
            seen = _now(self._session.reset())
            return seen.text, self._info(seen)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            if self._session is None:
                raise UsageError("no task is being lived: call reset() before step()")
            seen = _now(self._session.step(action))
            self._carried = seen.carried if seen.done else self._carried
            reward = seen.feedback.reward if seen.feedback and seen.feedback.reward is not None else 0.0
            return seen.text, float(reward), seen.done, False, self._info(seen)

        def _info(self, seen: Observation) -> dict[str, Any]:
            task = pack[self._position]
            told = {"task": task.id, "position": self._position, "prompt": task.prompt}
            return {**told, "feedback": seen.feedback.text} if seen.feedback else told

    return PackEnv()


def _now(seen: Observation | Awaitable[Observation]) -> Observation:
    """The observation itself: Gymnasium is synchronous, sessions may not be."""
    if not inspect.isawaitable(seen):
        return seen

    async def wait() -> Observation:
        return await seen

    return asyncio.run(wait())
