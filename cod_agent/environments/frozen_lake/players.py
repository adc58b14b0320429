"""Scripted players of the frozen lake: clean explorers, one of whom takes notes, `Up: Direction 3`, one line a known direction.

Both keep the set of assignments (of 24) that fit what they know. A step tells which move a direction is; a bump tells
that it is a move over an edge of that cell. Each turn they press the direction that is most likely to be a step on a
shortest path, and say which; equal chances are drawn. That is a good player, not an upper bound: it never leaves a
shortest path to explore more safely.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import permutations

from cod_agent.context import Message
from cod_agent.environments.frozen_lake.maps import FAR, MOVES, distances, neighbours
from cod_agent.environments.players import after_note, not_compact, note_in, players_of
from cod_agent.errors import UsageError

Assignment = tuple[str, ...]
"""The move of direction 1, 2, 3, 4."""

_ALL: tuple[Assignment, ...] = tuple(permutations(MOVES))
_FACT = re.compile(r"^(Up|Down|Left|Right|blocked): Direction ([1-4])$", re.MULTILINE)


def read_lake(text: str) -> tuple[int, str]:
    """Side and cells of the map a compact observation ends with.

    Raises:
        UsageError: there is none.
    """
    rows = text.rstrip("\n").split("\n")
    size = len(rows[-1])
    rows = rows[-size:] if size else []
    cells = "".join(rows)
    if len(cells) != size**2 or size < 2 or set(cells) - set("@*#.") or cells.count("@") != 1 or cells.count("*") != 1:
        raise not_compact("frozen-lake")
    return size, cells


def facts_in(text: str) -> list[tuple[str, int]]:
    """Every `Move: Direction n` line of `text` as (move, n), `blocked` among the moves."""
    return [(found[1], int(found[2])) for found in _FACT.finditer(text)]


def known(assignments: Sequence[Assignment]) -> dict[str, int]:
    """What all `assignments` agree on: direction of each such move, in the fixed order of the moves."""
    agreed = {
        seen.pop(): n for n, seen in enumerate((set(at) for at in zip(*assignments, strict=True)), 1) if len(seen) == 1
    }
    return {move: agreed[move] for move in MOVES if move in agreed}


def lines_of(facts: dict[str, int]) -> str:
    """The note that holds `facts`: one line each, in the fixed order of the moves."""
    return "\n".join(f"{move}: Direction {facts[move]}" for move in MOVES if move in facts)


def _trusted(note: str, assignments: Sequence[Assignment]) -> Sequence[Assignment]:
    """Those that the whole note fits; all, if none does: then the directions were dealt anew, and none of it is worth anything."""
    facts = [(move, direction) for move, direction in facts_in(note) if move in MOVES]
    return [fits for fits in assignments if all(fits[n - 1] == move for move, n in facts)] or assignments


def _narrowed(assignments: Sequence[Assignment], moves: set[str], direction: int) -> Sequence[Assignment]:
    """Those where `direction` is one of `moves`; all, if that would leave none."""
    return [fits for fits in assignments if fits[direction - 1] in moves] or assignments


def _from_facts(text: str) -> Sequence[Assignment]:
    assignments: Sequence[Assignment] = _ALL
    for move, direction in facts_in(text):
        if move in MOVES:
            assignments = _narrowed(assignments, {move}, direction)
    return assignments


def believed(observations: Sequence[str], note: str) -> Sequence[Assignment]:
    """The assignments that fit what a solve episode has seen, and the note, if it does not contradict that."""
    assignments: Sequence[Assignment] = _ALL
    for before, after in zip(observations, observations[1:], strict=False):
        facts = facts_in(after.partition("\n")[0])
        if facts and facts[0][0] == "blocked":
            size, cells = read_lake(before)
            edges = MOVES.keys() - neighbours(size)[cells.index("@")].keys()
            assignments = _narrowed(assignments, set(edges), facts[0][1])
        elif facts:
            assignments = _narrowed(assignments, {facts[0][0]}, facts[0][1])
    return _trusted(note, assignments)


def options(messages: Sequence[Message], *, remember: bool = True) -> list[tuple[str, int]]:
    """What a player may answer in a solve episode: equally good (wanted move, direction) pairs.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    if not seen:
        raise UsageError("a player needs a prompt: there is no user message")
    size, cells = read_lake(seen[-1])
    at, goal = cells.index("@"), cells.index("*")
    steps = distances(size, goal, frozenset(i for i, cell in enumerate(cells) if cell == "#"))
    around = neighbours(size)[at]
    wanted = [move for move, near in around.items() if steps[near] < min(steps[at], FAR)] or list(around)
    assignments = believed(seen, note_in(seen[0]) if remember else "")
    chances = {
        (move, direction): sum(fits[direction - 1] == move for fits in assignments)
        for move in wanted
        for direction in (1, 2, 3, 4)
    }
    best = max(chances.values())
    return [pair for pair, chance in chances.items() if chance == best]


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """`options`, as answers."""
    return [f"{move}? Direction {direction}" for move, direction in options(messages, remember=remember)]


def noted(prompt: str) -> dict[str, int]:
    """What a perfect player knows after a task: what happened, and the note before it, if that still fits."""
    return known(_trusted(note_in(prompt), _from_facts(after_note(prompt))))


PLAYERS = players_of(choices, lambda prompt: lines_of(noted(prompt)))
