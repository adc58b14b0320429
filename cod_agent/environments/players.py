"""Scripted players: what can be had in a world without remembering, and by remembering everything.

A player is a pure function of the messages (and its dice), so it goes through the same prompts, journal and updates as a language
model, and knows nothing but what the prompt shows. It reads the compact form.

    memoryless   plays as well as it can within a task, ignores the note and always writes `null`
    perfect      the same, and reads and writes the note

A world makes the two of them from what to answer and what to note (`players_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Protocol

from cod_agent.context import CLOSE, COMPACT, OPEN, Message
from cod_agent.environments.draws import below
from cod_agent.errors import UsageError

Player = Callable[[Sequence[Message]], str]
"""Messages -> answer."""

Players = Mapping[str, Callable[[Random], Player]]
"""By name, made from a source of randomness that only they draw from."""

_UPDATE = f"Update\n{OPEN}\n"


class Choices(Protocol):
    """What a player may answer in a solve episode: equally good answers, none twice."""

    def __call__(self, messages: Sequence[Message], *, remember: bool = True) -> Sequence[str]: ...


def players_of(choices: Choices, noted: Callable[[str], str]) -> Players:
    """The two players of a world.

    Args:
        choices: what they choose from, with even chances; `remember=False` ignores the note.
        noted: the prompt of an update -> the note after it, "" if there is nothing to note.
    """

    def made(remember: bool) -> Callable[[Random], Player]:
        def make(dice: Random) -> Player:
            def play(messages: Sequence[Message]) -> str:
                if is_update(messages):
                    return write_note(noted(messages[0].content) if remember else "")
                answers = choices(messages, remember=remember)
                return answers[below(dice, len(answers))]

            return play

        return make

    return {"memoryless": made(False), "perfect": made(True)}


def not_compact(world: str) -> UsageError:
    """What a player of `world` raises when it is shown something else than the compact form."""
    return UsageError(f"the scripted players of {world} read its compact form only: make the world with form='compact'")


def is_update(messages: Sequence[Message]) -> bool:
    """Whether the messages ask for a new note."""
    return bool(messages) and messages[0].content.startswith(_UPDATE)


def note_in(prompt: str) -> str:
    """The context a compact prompt shows, "" if it shows none."""
    note = prompt.partition(f"{OPEN}\n")[2].partition(f"\n{CLOSE}\n")[0]
    return "" if note == COMPACT.nothing else note


def after_note(prompt: str) -> str:
    """What stands behind the note of a compact prompt: of an update what happened, of a solve episode the first observation."""
    return prompt.partition(f"\n{CLOSE}\n")[2]


def write_note(note: str) -> str:
    """The answer to an update that notes this; `null` for nothing."""
    return f"{OPEN}\n{note or COMPACT.nothing}\n{CLOSE}"
