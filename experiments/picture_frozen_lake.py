"""The picture of FrozenLake-Obscure: two lakes of one pack, what their tasks share, and what its players make of it.

python experiments/picture_frozen_lake.py       # half a minute; writes docs/images/frozen-lake-world.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import FAINT, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from cod_agent.environments import FrozenLake
from cod_agent.environments.frozen_lake.players import read_lake
from cod_agent.evaluation.players import floor_and_ceiling
from cod_agent.tasks import Task

ICE, HOLE, PLAYER, GOAL = "#d9ebf7", "#3b4a57", "#0b6fb8", "#2c9c6a"
CEILING, FLOOR = "#2c9c6a", "#c47f2a"
ARROWS = {"Up": "↑", "Down": "↓", "Left": "←", "Right": "→"}
PACKS, TASKS = 256, 24
OUT = Path(__file__).parent.parent / "docs" / "images" / "frozen-lake-world.png"


def found_out(lake: FrozenLake, task: Task) -> dict[int, str]:
    """Number -> move, tried out where no edge is in the way."""
    moves = {}
    for number in (1, 2, 3, 4):
        session = lake.start(task)
        session.reset()
        said = session.step(f"Direction {number}").summary.partition(":")[0]
        moves[number] = said
    blocked = [number for number, move in moves.items() if move == "blocked"]
    left = [move for move in ARROWS if move not in moves.values()]
    return {**moves, **dict(zip(blocked, left, strict=True))} if len(blocked) == 1 else moves


def show_lake(axes: Any, text: str, title: str) -> None:
    size, cells = read_lake(text)
    for at, cell in enumerate(cells):
        row, column = divmod(at, size)
        axes.add_patch(Rectangle((column, size - 1 - row), 1, 1, facecolor=ICE, edgecolor="white", linewidth=2))
        middle = (column + 0.5, size - 0.5 - row)
        if cell == "#":
            axes.add_patch(Circle(middle, 0.34, facecolor=HOLE))
        elif cell in "@*":
            axes.add_patch(Circle(middle, 0.34, facecolor=PLAYER if cell == "@" else GOAL))
            axes.annotate("you" if cell == "@" else "goal", middle, ha="center", va="center", color="white", size=7)
    axes.set(xlim=(0, size), ylim=(0, size), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", size=10, color=INK)


def show_players(axes: Any) -> None:
    floor, ceiling = floor_and_ceiling(FrozenLake("small-shifting", 1, form="compact"), PACKS, TASKS) or (None, None)
    if floor is None or ceiling is None:
        raise SystemExit("this world has lost its players")
    at = range(1, TASKS + 1)
    for found, name, color, off in ((ceiling, "remembers", CEILING, 0.045), (floor, "remembers nothing", FLOOR, -0.15)):
        axes.plot(at, [point.mean for point in found.points], color=color, linewidth=2, marker="o", markersize=3.5)
        low, high = [point.low for point in found.points], [point.high for point in found.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.annotate(name, (TASKS, found.points[-1].mean + off), ha="right", size=9, color=color)
    for task in (8.5, 16.5):
        axes.axvline(task, color=FAINT, linewidth=1, linestyle=":")
    axes.annotate("dealt anew", (8.5, 0.08), xytext=(5, 0), textcoords="offset points", size=8.5, color=FAINT)
    axes.set(xlim=(0.5, TASKS + 0.5), ylim=(0, 1.1), xticks=[1, 8, 9, 16, 17, 24], yticks=[0, 0.25, 0.5, 0.75, 1])
    finish_players(axes, f"small-shifting: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    lake = FrozenLake("small", 7, form="compact")
    pack = lake.pack(8)
    known = next(moves for task in pack if "blocked" not in (moves := found_out(lake, task)).values())
    made = Figure(figsize=(10.6, 3.5), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    for left, position in ((0.02, 0), (0.235, 1)):
        axes = made.add_axes((left, 0.2, 0.19, 0.62))
        show_lake(axes, lake.start(pack[position]).reset().text, f"task {position + 1}")
    directions = "     ".join(f"{number} {ARROWS[move]}" for number, move in known.items())
    made.text(0.02, 0.075, f"hidden, the same for the pack:   {directions}", size=10, color=INK)
    show_players(made.add_axes((0.5, 0.16, 0.48, 0.66)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
