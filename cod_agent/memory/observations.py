"""How an observation is stored: a JSON list, and what is rarely there takes no room."""

from __future__ import annotations

from typing import Any

from cod_agent.tasks import Feedback, Observation


def pack_observation(seen: Observation) -> list[Any]:
    """[text, summary, done, feedback] and what the environment carries on, if anything."""
    said = seen.feedback
    feedback = said and [said.reward, said.text, *([said.ending] if said.ending else [])]
    return [seen.text, seen.summary, seen.done, feedback, *([seen.carried] if seen.carried is not None else [])]


def unpack_observation(packed: list[Any]) -> Observation:
    """The observation that was packed."""
    text, summary, done, said, *carried = packed
    feedback = Feedback(reward=said[0], text=said[1], ending=said[2] if said[2:] else "") if said else None
    return Observation(text, summary, done, feedback, *carried)
