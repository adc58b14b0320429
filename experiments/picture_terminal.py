"""The picture of Terminal: the computers that the tasks of a pack share, and what its players make of them.

python experiments/picture_terminal.py       # half a minute; writes docs/images/terminal.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import FAINT, GRID, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cod_agent.environments.draws import randomness
from cod_agent.environments.terminal import Terminal
from cod_agent.environments.terminal.places import PRESETS, Estate, draw_estate
from cod_agent.evaluation.players import floor_and_ceiling

TINTS = ("#d9ebf7", "#d6eee2", "#f6e4cd", "#ecdcea", "#e3e2f3")
CEILING, FLOOR = "#2c9c6a", "#c47f2a"
PACKS, TASKS = 256, 4
OUT = Path(__file__).parent.parent / "docs" / "images" / "terminal.png"


def show_side(axes: Any, estate: Estate, side: bool, left: float) -> None:
    """The folders of one computer, those of a subject in its colour."""
    subjects = list(estate.months)
    kept = {path: subject for subject, path in estate.shelves[side].items()}
    facts = estate.remote if side else estate.local
    axes.annotate(
        f"the server, {facts.name}" if side else f"this computer, {facts.system}", (left, 4.35), color=INK, size=9
    )
    for number, path in enumerate(estate.folders[side]):
        row, column = divmod(number, PRESETS["small"].shelves)
        subject = kept.get(path)
        color = TINTS[subjects.index(subject)] if subject else "white"
        x, y = left + 1.02 * column, 3.3 - row
        axes.add_patch(Rectangle((x, y), 0.96, 0.86, facecolor=color, edgecolor=GRID, linewidth=1))
        axes.annotate("/".join(path[-2:]), (x + 0.05, y + 0.58), color=FAINT, size=6)
        axes.annotate(subject or "", (x + 0.05, y + 0.18), color=INK, size=8)


def show_estate(axes: Any, estate: Estate) -> None:
    """Both computers, and what is peculiar about them."""
    show_side(axes, estate, False, 0)
    show_side(axes, estate, True, 3.5)
    removed = "rm wants -f" if estate.remote.removal == "force" else "rm refuses -f"
    spool, subject = "/".join(estate.remote.spool or ()), next(iter(estate.months))
    lines = (
        f"account {estate.remote.user}  ·  uploads only to /{spool}  ·  {removed}  ·  packs with {estate.tool}",
        f"the {subject} of March are {estate.habit.name(subject, 3)}",
    )
    for number, line in enumerate(lines):
        axes.annotate(line, (0, -0.15 - 0.42 * number), color=INK, size=7.5, va="center")
    axes.set(xlim=(-0.05, 6.6), ylim=(-0.9, 4.7), xticks=[], yticks=[])
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.set_title(
        "hidden, the same for the pack: what lies where, and what is peculiar", loc="left", size=10, color=INK
    )


def show_players(axes: Any) -> None:
    floor, ceiling = floor_and_ceiling(Terminal("small", 1, form="compact"), PACKS, TASKS) or (None, None)
    if floor is None or ceiling is None:
        raise SystemExit("this world has lost its players")
    at = range(1, TASKS + 1)
    for found, name, color, off in ((ceiling, "remembers", CEILING, -0.1), (floor, "remembers nothing", FLOOR, -0.12)):
        axes.plot(at, [point.mean for point in found.points], color=color, linewidth=2, marker="o", markersize=4)
        low, high = [point.low for point in found.points], [point.high for point in found.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.annotate(name, (TASKS, found.points[-1].mean + off), ha="right", size=9, color=color)
    axes.set(xlim=(0.8, TASKS + 0.2), ylim=(0, 1.05), xticks=list(at), yticks=[0, 0.25, 0.5, 0.75, 1])
    finish_players(axes, f"small: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    estate = draw_estate(randomness("picture", 1), PRESETS["small"], "eval")
    made = Figure(figsize=(10.6, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    show_estate(made.add_axes((0.015, 0.03, 0.58, 0.85)), estate)
    show_players(made.add_axes((0.66, 0.16, 0.32, 0.7)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
