"""Scripted players of learn2ask: both reckon with every protocol a clinic may have, one of them also with its notes.

What a player believes is exact: how likely each protocol is, given the topics that came up here and, for the one that remembers, given
what happened to earlier patients. It then does what is worth most on average for this patient. That is a good player, not an upper
bound: it never asks for the sake of later tasks.

A note has one line for each patient: what came of it and which topics had come up.

    direct c | b d f          asking about c was direct; so c is in the protocol, and it was not complete
    early | a b e             stopping was wrong
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from cod_agent.context import Message
from cod_agent.environments.learn2ask.clinic import PRESETS, STOPPING, Preset
from cod_agent.environments.players import after_note, not_compact, note_in, players_of

Masks = NDArray[np.int64]
"""Sets of topics, a bit each."""
Weights = NDArray[np.float64]
"""How likely each protocol is; not normalised."""

MOST = 100
"""Lines of a note: the oldest go first."""
_SAME = 1e-9
"""Worths nearer than this are the same."""

_A = ord("a")
_TOPICS = "[a-n](?: [a-n])*"
_VIEW = re.compile(rf"^[a-z]+ ([0-9]+) \| ({_TOPICS})$", re.MULTILINE)
_FACT = re.compile(rf"^(?:(direct|related|irrelevant) ([a-n])|(late|early|stopped)) \| ({_TOPICS})$", re.MULTILINE)
_HAPPENED = re.compile(
    rf"^(?:ask ([a-n])|ask {_TOPICS}|stop) \| ({_TOPICS})\n(direct|related|irrelevant|late|early|stopped) ",
    re.MULTILINE,
)

_KINDS: dict[int, Preset] = {preset.topics: preset for preset in PRESETS.values()}


@dataclass(frozen=True, slots=True)
class Clinics:
    """All protocols that a kind of clinic may have. Arrays have an element for each, shape [protocols]."""

    protocols: Masks
    chance: Weights
    """Of each, before anything is known."""
    ways: NDArray[np.int64]
    """Of each, by the number of topics that came up: how many such sets hold it; shape [topics + 1, protocols]."""


@cache
def clinics(topics: int) -> Clinics:
    """Those of the kind with so many topics."""
    low, high = _KINDS[topics].wanted
    every = np.arange(1 << topics)
    sizes = np.zeros_like(every)
    for topic in range(topics):
        sizes += every >> topic & 1
    kept = (sizes >= low) & (sizes <= high)
    protocols, sizes = every[kept], sizes[kept]
    chance = np.array([1 / comb(topics, size) for size in sizes.tolist()])
    ways = [[comb(topics - size, n - size) if n >= size else 0 for size in sizes.tolist()] for n in range(topics + 1)]
    return Clinics(protocols, chance, np.array(ways))


def belief(topics: int, covered: int, note: str) -> Weights:
    """How likely each protocol is where these topics came up and the note is right; where it cannot be, without the note."""
    known = clinics(topics)
    likely = known.chance * _seen(topics, covered)
    noted = likely.copy()
    for content, asked, ending, said in _FACT.findall(note):
        if not _mask(f"{asked} {said}") >> topics:  # or else it is of another clinic
            noted *= _seen(topics, _mask(said)) * _fits(known.protocols, _mask(said), content, asked, ending)
    return noted if noted.any() else likely


def _seen(topics: int, covered: int) -> Weights:
    """How likely a dialogue with these topics is, by protocol, but for factors that are the same for all."""
    known, size = clinics(topics), covered.bit_count()
    ways = known.ways[size]
    held = known.protocols & ~covered == 0
    with np.errstate(divide="ignore"):
        return np.where(held, STOPPING / np.maximum(ways, 1), (1 - STOPPING) / (comb(topics, size) - ways))


def _fits(protocols: Masks, covered: int, content: str, asked: str, ending: str) -> NDArray[np.bool_]:
    """Which protocols a fact is true of."""
    missing = protocols & ~covered
    if not content:
        return (missing != 0) == (ending == "early")
    topic = ord(asked) - _A
    direct, related = missing >> topic & 1 == 1, missing >> (topic ^ 1) & 1 == 1
    if content == "direct":
        return direct
    return ~direct & related if content == "related" else ~direct & ~related & (missing != 0)


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player may do in a solve episode: equally good answers.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    found = _VIEW.search(after_note(seen[0])) if seen else None
    if found is None or int(found[1]) not in _KINDS or _mask(found[2]) >> int(found[1]):
        raise not_compact("learn2ask")
    topics, covered = int(found[1]), _mask(found[2])
    note = note_in(seen[0]) if remember and _KINDS[topics].shared else ""
    likely, missing = belief(topics, covered, note), clinics(topics).protocols & ~covered
    worth = {"stop": 4 * float(likely[missing == 0].sum())}
    asking = float(likely[missing != 0].sum())
    direct = [float(likely[missing >> topic & 1 == 1].sum()) for topic in range(topics)]
    both = [float(likely[(missing >> (topic & ~1)) & 3 == 3].sum()) for topic in range(topics)]
    for topic in range(topics):
        related = direct[topic ^ 1] - both[topic]
        worth[f"ask {chr(_A + topic)}"] = 2 * asking + 2 * direct[topic] + related
    best = max(worth.values())
    return [answer for answer, value in worth.items() if value >= best * (1 - _SAME)]


def noted(prompt: str) -> str:
    """The note after a task: a line more, if there is one to write."""
    lines = [found[0] for found in _FACT.finditer(note_in(prompt))]
    happened = _HAPPENED.search(after_note(prompt))
    if happened is not None:
        asked, covered, how = happened.groups()
        if how in ("late", "early", "stopped"):
            lines.append(f"{how} | {covered}")
        elif asked:
            lines.append(f"{how} {asked} | {covered}")
    return "\n".join(lines[-MOST:])


def _mask(letters: str) -> int:
    """Of `a b d`."""
    return sum(1 << ord(letter) - _A for letter in set(letters.split()))


PLAYERS = players_of(choices, noted)
