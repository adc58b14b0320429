"""Where the lakes come from: presets, seeds, and maps that are solvable and of one split only.

A map is drawn, then kept if a breadth-first search finds a path of an allowed length *and* the map belongs to the
wanted split. The split is a property of the map itself, a hash of its smallest image under rotation and reflection,
so no map of an evaluation, not even turned or mirrored, ever occurs in training.

Source: FrozenLake-Obscure of arXiv 2606.20002 (`paper`, `paper-hard`); depth-first solvability and process-salted
seeds of the published code are mended here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, of_eval, shuffled

MOVES: dict[str, tuple[int, int]] = {"Up": (-1, 0), "Down": (1, 0), "Left": (0, -1), "Right": (0, 1)}
"""Name of each real movement and its (row, column) step."""

FAR = 1 << 30
"""Distance of a cell from which no path leads to the goal."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of lakes a world has. Ranges are inclusive."""

    size: tuple[int, int]
    """Cells along one side, drawn for each task."""
    safe: tuple[float, float]
    """Probability that a cell is ice and not a hole, drawn uniformly for each task."""
    path: tuple[int, int]
    """Steps of a shortest path from start to goal."""
    steps: int
    """Steps after which the episode is over."""
    length_penalty: float = 0.0
    """What a trainer may take off a success, times steps used over steps allowed. Rewards here are plain success."""
    era: int | None = None
    """Tasks after which the directions are dealt anew, and again after as many; None: never."""


PRESETS: dict[str, Preset] = {
    "tiny": Preset(size=(3, 3), safe=(0.65, 0.65), path=(2, 5), steps=6),
    "small": Preset(size=(4, 4), safe=(0.65, 0.65), path=(2, 5), steps=7),
    "small-shifting": Preset(size=(4, 4), safe=(0.65, 0.65), path=(2, 5), steps=7, era=8),
    "5x5": Preset(size=(5, 5), safe=(0.65, 0.65), path=(2, 7), steps=9),
    "6x6": Preset(size=(6, 6), safe=(0.65, 0.65), path=(2, 9), steps=11),
    "paper": Preset(size=(4, 5), safe=(0.6, 0.7), path=(1, 6), steps=6, length_penalty=0.1),
    "paper-hard": Preset(size=(6, 7), safe=(0.6, 0.7), path=(1, 8), steps=8, length_penalty=0.1),
}


@dataclass(frozen=True, slots=True)
class Lake:
    """One map. Cells are numbered row by row from the top left."""

    size: int
    start: int
    goal: int
    holes: frozenset[int]

    def cells(self, player: int | None = None) -> str:
        """The map, one character a cell: `@` player (default: at the start), `*` goal, `#` hole, `.` ice."""
        at = self.start if player is None else player
        return "".join(
            "@" if i == at else "*" if i == self.goal else "#" if i in self.holes else "." for i in range(self.size**2)
        )


@cache
def neighbours(size: int) -> tuple[dict[str, int], ...]:
    """For each cell the cell every move leads to; moves over the edge are absent."""
    return tuple(
        {
            move: (row + down) * size + column + right
            for move, (down, right) in MOVES.items()
            if 0 <= row + down < size and 0 <= column + right < size
        }
        for row in range(size)
        for column in range(size)
    )


def distances(size: int, goal: int, holes: frozenset[int]) -> list[int]:
    """Steps from each cell to the goal by breadth-first search; `FAR` for holes and cells cut off."""
    steps, queue, around = [FAR] * size**2, [goal], neighbours(size)
    steps[goal] = 0
    for cell in queue:
        for near in around[cell].values():
            if steps[near] == FAR and near not in holes:
                steps[near] = steps[cell] + 1
                queue.append(near)
    return steps


@cache
def _symmetries(size: int) -> tuple[tuple[int, ...], ...]:
    """The eight rotations and reflections of a square, each as the old place of every cell."""

    def images() -> Iterator[tuple[int, ...]]:
        places = [list(range(row * size, (row + 1) * size)) for row in range(size)]
        for _ in range(4):
            places = [list(row) for row in zip(*places[::-1], strict=True)]
            yield tuple(i for row in places for i in row)
            yield tuple(i for row in places for i in reversed(row))

    return tuple(images())


def split_of(lake: Lake) -> Split:
    """The split a map belongs to: one quarter of all maps is for evaluation, with everything symmetric to it."""
    cells = lake.cells()
    canonical = min("".join(cells[i] for i in image) for image in _symmetries(lake.size))
    return "eval" if of_eval(f"{lake.size}:{canonical}") else "train"


def draw_lake(rng: Random, preset: Preset, split: Split) -> Lake:
    """A map of `split` with a shortest path of allowed length, by rejection."""
    size = preset.size[0] + below(rng, preset.size[1] - preset.size[0] + 1)
    safe = preset.safe[0] + rng.random() * (preset.safe[1] - preset.safe[0])
    while True:
        start, goal = below(rng, size**2), below(rng, size**2 - 1)
        goal += goal >= start
        holes = frozenset(i for i in range(size**2) if i not in (start, goal) and rng.random() >= safe)
        lake = Lake(size, start, goal, holes)
        if preset.path[0] <= distances(size, goal, holes)[start] <= preset.path[1] and split_of(lake) == split:
            return lake


def draw_mapping(rng: Random) -> dict[int, str]:
    """The hidden property of a pack: which real movement each of the directions 1 to 4 is."""
    names = tuple(MOVES)
    return {number: names[i] for number, i in enumerate(shuffled(rng, range(4)), 1)}
