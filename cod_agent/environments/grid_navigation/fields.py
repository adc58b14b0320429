"""Where fields and trips come from: hills of cost, drawn alike on every machine, and of one split only.

A field is a sum of stretched Gaussian hills, brought to [0, 1], squared, times 99 and rounded. Only +, -, *, / and square roots
are used, one array operation each: those give the same bits everywhere, which exponentials and sines of the C library do not.

The split is a property of the field itself, a hash of the smallest image of its tens under rotation and reflection, so no field of
an evaluation, not even turned or mirrored, and in neither form, ever occurs in training.

Source: Grid Navigation of arXiv 2606.20002 (`paper` and what begins with it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import sqrt
from random import Random

import numpy as np
from numpy.typing import NDArray

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, between, of_eval, uniform

DEAREST = 99
"""The highest cost; the lowest is 0. Every field has both."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of fields and trips a world has. Ranges are inclusive."""

    size: tuple[int, int]
    """Cells along one side, drawn for each pack."""
    hills: int
    scale: tuple[float, float]
    """How far a hill reaches (its standard deviations), as a part of the side."""
    rounds: tuple[int, int]
    """Moves of a trip, drawn for each task."""
    radius: int
    """How far one sees from the start and from every cell entered, diagonals as near as sides."""
    remembers: bool = False
    """Whether what was seen stays visible in the later tasks of a run."""
    across: bool = False
    """Whether start and goal always differ in row and column."""


_PAPER = Preset(size=(8, 12), hills=4, scale=(0.1, 0.35), rounds=(4, 6), radius=2, remembers=True)
_HARD = replace(_PAPER, size=(10, 14), hills=5)

PRESETS: dict[str, Preset] = {
    "tiny": Preset(size=(3, 3), hills=2, scale=(0.15, 0.45), rounds=(2, 2), radius=0, across=True),
    "small": Preset(size=(6, 6), hills=3, scale=(0.15, 0.45), rounds=(3, 3), radius=0),
    "paper": _PAPER,
    "paper-27b": replace(_PAPER, scale=(0.15, 0.45), rounds=(3, 5), radius=1),
    "paper-hard": _HARD,
    "paper-large": replace(_PAPER, size=(12, 16), hills=6, rounds=(6, 10), radius=1),
    "paper-forgets": replace(_PAPER, remembers=False),
    "paper-hard-forgets": replace(_HARD, remembers=False),
}


@dataclass(frozen=True, slots=True)
class Field:
    """What entering each cell costs. Cells are numbered row by row from the top left."""

    size: int
    costs: tuple[int, ...]
    """0 to 99, of size * size cells."""


@dataclass(frozen=True, slots=True)
class Trip:
    """One task: from where to where, in exactly how many moves."""

    start: int
    goal: int
    rounds: int


def name_of(row: int, column: int) -> str:
    """A cell in the compact form: column letter and row number, `a1` top left."""
    return f"{chr(ord('a') + column)}{row + 1}"


def way(size: int, at: int, to: int) -> range | None:
    """The cells a rook's move from `at` to `to` enters, in order, `to` the last of them; None: that is no rook's move."""
    if at == to or not 0 <= to < size**2:
        return None
    if at // size == to // size:
        step = 1 if to > at else -1
    elif at % size == to % size:
        step = size if to > at else -size
    else:
        return None
    return range(at + step, to + step, step)


@cache
def around(size: int, radius: int) -> tuple[tuple[int, ...], ...]:
    """For each cell those at most `radius` rows and columns away, itself among them."""
    near = [range(max(0, i - radius), min(size, i + radius + 1)) for i in range(size)]
    return tuple(tuple(row * size + column for row in rows for column in columns) for rows in near for columns in near)


def split_of(size: int, costs: Sequence[int]) -> Split:
    """The split a field belongs to: one quarter of all fields is for evaluation, with everything symmetric to it.

    It looks at the tens only, which are what the compact form shows.
    """
    tens = (np.array(costs, np.uint8) // 10).reshape(size, size)
    canonical = min(np.rot90(side, turns).tobytes() for side in (tens, tens.T) for turns in range(4))
    return "eval" if of_eval(f"{size}:{canonical.hex()}") else "train"


def draw_field(rng: Random, preset: Preset, split: Split) -> Field:
    """A field of `split`, by rejection."""
    size = between(rng, *preset.size)
    while True:
        heights = _hills(rng, size, preset)
        low, high = heights.min(), heights.max()
        if high > low:
            part = (heights - low) / (high - low)
            costs = tuple(int(cost) for cost in np.rint(part * part * DEAREST).ravel())
            if split_of(size, costs) == split:
                return Field(size, costs)


def draw_trip(rng: Random, size: int, preset: Preset) -> Trip:
    """A trip that can be made: the goal is where a random walk of as many rook's moves ends."""
    rounds = between(rng, *preset.rounds)
    while True:
        start = goal = below(rng, size**2)
        for _ in range(rounds):
            goal = _moved(rng, size, goal)
        apart = (goal // size != start // size) + (goal % size != start % size)
        if apart == 2 or (apart and not preset.across):
            return Trip(start, goal, rounds)


def _moved(rng: Random, size: int, at: int) -> int:
    """Where a random rook's move leads: row or column with even chances, then any other cell of it."""
    row, column = divmod(at, size)
    sideways, other = rng.random() < 0.5, below(rng, size - 1)
    if sideways:
        return row * size + other + (other >= column)
    return (other + (other >= row)) * size + column


def _hills(rng: Random, size: int, preset: Preset) -> NDArray[np.float64]:
    """The sum of the hills at each cell, shape [rows, columns]."""
    rows, columns = np.arange(size, dtype=float)[:, None], np.arange(size, dtype=float)[None, :]
    heights = np.zeros((size, size))
    for _ in range(preset.hills):
        down, right = rows - uniform(rng, 0, size - 1), columns - uniform(rng, 0, size - 1)
        long = uniform(rng, *preset.scale)
        short = uniform(rng, preset.scale[0], long)
        x, y = _direction(rng)
        along, across = (x * right + y * down) / (long * size), (x * down - y * right) / (short * size)
        heights = heights + uniform(rng, 0.8, 1.2) / _exp((along * along + across * across) / 2)
    return heights


def _direction(rng: Random) -> tuple[float, float]:
    """A random unit vector: a point drawn in the disk, brought to length 1."""
    while True:
        x, y = uniform(rng, -1, 1), uniform(rng, -1, 1)
        length = sqrt(x * x + y * y)
        if 0 < length <= 1:
            return x / length, y / length


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e to the power of x, for x from 0 to 100: ten terms of the series at x / 64, then squared six times."""
    part, out = x / 64, np.ones_like(x)
    for n in range(10, 0, -1):
        out = out * part / n + 1
    for _ in range(6):
        out = out * out
    return out
