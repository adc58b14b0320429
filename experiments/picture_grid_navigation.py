"""The picture of Grid Navigation: a hidden field, what the first trip sees of it, what is known before the sixth, and what that pays.

python experiments/picture_grid_navigation.py       # a minute; writes docs/images/grid-navigation.png
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from figures import FAINT, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from cod_agent.context import COMPACT, Trajectory, Turn, message
from cod_agent.environments.grid_navigation import PLAYERS, GridNavigation
from cod_agent.environments.grid_navigation.players import Cell, costs_in, noted, read_trip
from cod_agent.evaluation.players import floor_and_ceiling
from cod_agent.tasks import Pack

PLAYER, GOAL = "#0b6fb8", "#2c9c6a"
CEILING, FLOOR = "#2c9c6a", "#c47f2a"
COST = LinearSegmentedColormap.from_list("cost", ["#f2f6fa", "#f3d9a8", "#c2703d", "#5b2a33"])
UNKNOWN = "#dfe4e9"
PACKS, TASKS, SEED, PACK = 512, 8, 7, 14
LONG = 40
"""Tasks after which a player has seen the whole field."""
OUT = Path(__file__).parent.parent / "docs" / "images" / "grid-navigation.png"

Trip = tuple[dict[Cell, int], list[Cell], Cell]
"""What the player knows in the end, the cells where it was, the goal."""


def lived(pack: Pack) -> list[Trip]:
    """The trips of the player that remembers."""
    player, note, trips = PLAYERS["perfect"](Random(0)), "", []
    for task in pack:
        session = pack.environment.start(task)
        first = seen = session.reset()
        said, turns, places = COMPACT.solve(task, note, first), [], [read_trip(first.text)[0]]
        while not seen.done:
            answer = player(said)
            seen = session.step(answer)
            turns.append(Turn(answer, seen))
            places.append(read_trip(seen.text)[0])
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
        note = noted(COMPACT.update(task, note, Trajectory(first, tuple(turns)), seen.feedback)[0].content)
        trips.append((costs_in(note), places, read_trip(first.text)[1]))
    return trips


def show_field(axes: Any, size: int, known: dict[Cell, int], title: str, places: list[Cell]) -> None:
    for row in range(size):
        for column in range(size):
            tens = known.get((row, column))
            color = UNKNOWN if tens is None else COST(tens / 9)
            axes.add_patch(Rectangle((column, size - 1 - row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.5))
            told, ink = ("?", FAINT) if tens is None else (str(tens), "white" if tens > 5 else INK)
            axes.annotate(told, (column + 0.22, size - 0.28 - row), ha="center", va="center", size=7, color=ink)
    middles = [(column + 0.5, size - 0.5 - row) for row, column in places]
    if middles:
        axes.plot(*zip(*middles, strict=True), color=PLAYER, linewidth=2.4, marker="o", markersize=4, zorder=3)
        for middle, color, name in ((middles[0], PLAYER, "you"), (middles[-1], GOAL, "goal")):
            axes.add_patch(Circle(middle, 0.34, facecolor=color, zorder=4))
            axes.annotate(name, middle, ha="center", va="center", color="white", size=6, zorder=5)
    axes.set(xlim=(0, size), ylim=(0, size), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", size=10, color=INK)


def show_players(axes: Any) -> None:
    found = floor_and_ceiling(GridNavigation("small", 1, form="compact"), PACKS, TASKS)
    if found is None:
        raise SystemExit("this world has lost its players")
    at = range(1, TASKS + 1)
    for curve, name, color in ((found[1], "remembers", CEILING), (found[0], "remembers nothing", FLOOR)):
        axes.plot(at, [point.mean for point in curve.points], color=color, linewidth=2, marker="o", markersize=3.5)
        low, high = [point.low for point in curve.points], [point.high for point in curve.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        last = curve.points[-1].mean
        axes.annotate(f"{name}  {last:.2f}", (TASKS, last + 0.025), ha="right", size=9, color=color)
    axes.set(xlim=(0.8, TASKS + 0.1), ylim=(0.5, 1), xticks=range(1, TASKS + 1), yticks=[0.5, 0.6, 0.7, 0.8, 0.9, 1])
    finish_players(axes, f"small: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    world = GridNavigation("small", SEED, form="compact")
    trips = lived(world.pack(LONG, PACK))
    field = trips[-1][0]
    size = 1 + max(max(cell) for cell in field)
    made = Figure(figsize=(12.4, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    shown: tuple[tuple[Any, str, list[Any]], ...] = (
        (field, "hidden: the tens of each cost", []),
        (trips[0][0], "task 1: what was seen", trips[0][1]),
        (trips[4][0], "task 6: what was known before", trips[5][1]),
    )
    for at, (known, title, places) in enumerate(shown):
        show_field(made.add_axes((0.015 + 0.205 * at, 0.1, 0.19, 0.72)), size, known, title, places)
    show_players(made.add_axes((0.665, 0.16, 0.325, 0.66)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
