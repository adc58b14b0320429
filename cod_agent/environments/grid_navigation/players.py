"""Scripted players of grid navigation: good planners, one of whom takes notes, `a1: 5`, one line a known cell.

Both plan the rest of the trip as if they knew every cost: of a cell they have not seen they expect what fields are like there (hills
add up in the middle, so that the edges are cheap) and what the cells near it let expect. The plan is the way with the least mean
cost, by dynamic programming over rounds and cells; as a mean is a ratio, it is found as the least sum of (cost - price), the price
being the mean of the way found before (Dinkelbach). Ways that are equally good are drawn. That is a good player, not an upper bound:
it never goes to see a cell for the sake of later tasks.

The compact form does not say how large the field is: players take the smallest that fits what they see and the rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cod_agent.context import Message
from cod_agent.environments.grid_navigation.fields import PRESETS, name_of, way
from cod_agent.environments.players import after_note, not_compact, note_in, players_of
from cod_agent.errors import UsageError

Cell = tuple[int, int]
"""Row and column, from 0."""

Grid = NDArray[np.float64]
"""A number for each cell, shape [rows, columns]."""

EDGE, MIDDLE = 2.3, 7.8
"""Square roots of what a cell costs on average at a corner and in the middle of a field; in between they grow evenly, by row times by
column. Fitted to the means of fields of 3, 6 and 8 cells of the train split. Without them who remembers nothing gets .07 less in `tiny`."""
REACH = 1.0
"""How far, in cells, a known cost tells something about others."""
DOUBT = 0.5
"""How many known costs right here the average outweighs."""
TIMES = 1
"""How often the price is set, from the mean of the field on. Never is clearly worse, four times no better."""
_SAME = 1e-9
"""Sums nearer than this are the same."""

_A = ord("a")
_TRIP = re.compile(r"^@([a-z])([1-9][0-9]?) \*([a-z])([1-9][0-9]?) ([0-9]+)$", re.MULTILINE)
_COST = re.compile(r"^([a-z])([1-9][0-9]?): ([0-9])$", re.MULTILINE)
_TURNS: tuple[Callable[[Grid], Grid], ...] = (
    lambda grid: grid,
    lambda grid: grid[:, ::-1],
    lambda grid: grid.T,
    lambda grid: grid.T[:, ::-1],
)
"""Views of a grid in which a move right is one to the right, left, down and up."""


def read_trip(text: str) -> tuple[Cell, Cell, int]:
    """Where one is in a compact observation, the goal, and the rounds left.

    Raises:
        UsageError: it does not say.
    """
    found = _TRIP.search(text)
    if found is None:
        raise not_compact("grid-navigation")
    at, goal = (int(found[2]) - 1, ord(found[1]) - _A), (int(found[4]) - 1, ord(found[3]) - _A)
    return at, goal, int(found[5])


def costs_in(text: str) -> dict[Cell, int]:
    """Every `a1: 5` line of `text`: the tens of a cell's cost, by cell. Of two lines of a cell the later one counts."""
    return {(int(row) - 1, ord(column) - _A): int(tens) for column, row, tens in _COST.findall(text)}


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player may answer in a solve episode: the cells where equally good plans go next.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    if not seen:
        raise UsageError("a player needs a prompt: there is no user message")
    note, seen[0] = note_in(seen[0]) if remember else "", after_note(seen[0])
    known = _known(note, "\n".join(seen))
    trip = _Trip.of([read_trip(text) for text in seen], known)
    return [name_of(*divmod(cell, len(trip.costs))) for cell in _next(trip)]


def noted(prompt: str) -> str:
    """The note after a task: what was known before, and what was seen in it, row by row."""
    known = _known(note_in(prompt), after_note(prompt))
    return "\n".join(f"{name_of(*cell)}: {known[cell]}" for cell in sorted(known))


PLAYERS = players_of(choices, noted)


def _known(note: str, shown: str) -> dict[Cell, int]:
    """The costs that are known: those shown, and those noted, unless one of them is another now: then the note is of another field."""
    noted, seen = costs_in(note), costs_in(shown)
    fits = all(noted.get(cell, tens) == tens for cell, tens in seen.items())
    return noted | seen if fits else seen


@dataclass(frozen=True, slots=True)
class _Trip:
    """A trip as a player sees it. Cells are numbered row by row."""

    at: int
    goal: int
    rounds: int
    costs: Grid
    """As expected."""
    entered: list[int]
    """The cells entered so far."""

    @classmethod
    def of(cls, told: Sequence[tuple[Cell, Cell, int]], known: dict[Cell, int]) -> _Trip:
        """From what `read_trip` says of each observation, and the known costs."""
        places, (_, goal, rounds) = [at for at, _, _ in told], told[-1]
        size = max(_least_size(told[0][2]), *(1 + max(cell) for cell in (goal, *places, *known)))
        numbers = [row * size + column for row, column in places]
        moves = zip(numbers, numbers[1:], strict=False)
        entered = [cell for at, to in moves for cell in way(size, at, to) or ()]
        return cls(numbers[-1], goal[0] * size + goal[1], rounds, _expected(size, known), entered)


def _next(trip: _Trip) -> list[int]:
    """The cells to go to with which the least mean can still be had."""
    costs = trip.costs.ravel()
    price = float(costs.mean())
    for _ in range(TIMES):
        price = float(costs[[*trip.entered, *_planned(trip, trip.costs - price)]].mean())
    gains = trip.costs - price
    return _ends(gains, _after(gains, trip.goal, trip.rounds)[-1], trip.at)


def _planned(trip: _Trip, gains: Grid) -> list[int]:
    """The cells that the way with the least sum of `gains` enters."""
    at = trip.at
    entered: list[int] = []
    for after in reversed(_after(gains, trip.goal, trip.rounds)):
        to = _ends(gains, after, at)[0]
        entered += way(len(gains), at, to) or ()
        at = to
    return entered


def _after(gains: Grid, goal: int, rounds: int) -> list[Grid]:
    """What is still to come after a move, with 0, 1, ... rounds left then: for each cell the least sum of `gains` of so many moves
    to the goal, infinite where none lead there."""
    least = np.full(gains.shape, np.inf)
    least.flat[goal] = 0
    found, sums = [least], [turn(gains).cumsum(1) for turn in _TURNS]
    while len(found) < rounds:
        least = np.full(gains.shape, np.inf)
        for turn, upto in zip(_TURNS, sums, strict=True):
            # A move from here to an end enters upto[end] - upto[here]; ends[here] is the best end not left of here.
            ends = np.minimum.accumulate((upto + turn(found[-1]))[:, ::-1], 1)[:, ::-1]
            here = turn(least)[:, :-1]
            np.minimum(here, ends[:, 1:] - upto[:, :-1], out=here)
        found.append(least)
    return found


def _ends(gains: Grid, after: Grid, at: int) -> list[int]:
    """The cells where the best moves from `at` end: least sum of the `gains` entered and of what comes after."""
    size = len(gains)
    row, column = divmod(at, size)
    along = _totals(gains[row], after[row], column)
    down = _totals(gains[:, column], after[:, column], row)
    best = min(along.min(), down.min()) + _SAME
    return [row * size + int(i) for i in np.flatnonzero(along <= best)] + [
        int(i) * size + column for i in np.flatnonzero(down <= best)
    ]


def _totals(gains: Grid, after: Grid, at: int) -> Grid:
    """For each end on a line, shape [cells]: the sum of the `gains` on the way there and of what comes after."""
    totals = np.full(len(gains), np.inf)
    totals[at + 1 :] = gains[at + 1 :].cumsum() + after[at + 1 :]
    totals[:at] = gains[:at][::-1].cumsum()[::-1] + after[:at]
    return totals


def _expected(size: int, known: dict[Cell, int]) -> Grid:
    """What each cell is expected to cost: the middle of its tens, or what is usual there, times how much more than usual known ones
    cost, the nearer the more they count."""
    costs, seen = np.zeros((size, size)), np.zeros((size, size))
    for cell, tens in known.items():
        costs[cell], seen[cell] = 10 * tens + 4.5, 1
    near, usual = _nearness(size), _usual(size)
    more = (DOUBT + near @ (costs / usual) @ near) / (DOUBT + near @ seen @ near)
    return np.where(seen > 0, costs, usual * more)


@cache
def _usual(size: int) -> Grid:
    """What each cell costs on average over many fields, shape [size, size]."""
    line = np.arange(size)
    inwards = (np.minimum(line, size - 1 - line) + 0.5) / (size / 2)
    root = EDGE + (MIDDLE - EDGE) * inwards
    return np.outer(root, root)


@cache
def _nearness(size: int) -> Grid:
    """How much lines i and j of a field have to do with each other, 1 if they are the same; shape [size, size]."""
    apart = np.subtract.outer(np.arange(size), np.arange(size)) / REACH
    return np.exp(-(apart**2) / 2)


@cache
def _least_size(rounds: int) -> int:
    """The side of the smallest field on which a trip may have so many rounds."""
    return min((kind.size[0] for kind in PRESETS.values() if kind.rounds[0] <= rounds <= kind.rounds[1]), default=2)
