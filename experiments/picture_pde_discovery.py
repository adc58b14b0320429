"""The picture of PDE Discovery: a rod and where it is looked at, what that leaves open about the reaction, and what its players make of it.

python experiments/picture_pde_discovery.py       # a minute; writes docs/images/pde-discovery.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from figures import FAINT, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cod_agent.environments.pde_discovery import TERMS, PdeDiscovery
from cod_agent.environments.pde_discovery.equations import Equation, read_equation, values
from cod_agent.environments.pde_discovery.reaction import Start, solution
from cod_agent.environments.pde_discovery.world import _drawn
from cod_agent.evaluation.players import floor_and_ceiling

CEILING, FLOOR, TRUE = "#2c9c6a", "#c47f2a", "#0b6fb8"
PACKS, TASKS, UNTIL = 256, 4, 30
PLACES = (0.15, 0.3, 0.5)
OUT = Path(__file__).parent.parent / "docs" / "images" / "pde-discovery.png"


def looked(world: PdeDiscovery) -> tuple[list[np.ndarray], list[list[Equation]], Equation, Start]:
    """The points of each task of a pack, the two-term candidates of the first, the truth, and the first task's start."""
    seen, fits, pack = list[np.ndarray](), list[list[Equation]](), world.pack(TASKS)
    for task in pack:
        session = world.start(task)
        session.reset()
        lines = session.step("sample " + "; ".join(f"{x} .01" for x in PLACES)).summary.splitlines()
        seen.append(np.array([line.split(" ") for line in lines], dtype=float))
        found = [line.split(" ", 1)[1] for line in session.step("regress").summary.splitlines()[3:]]
        fits.append([read_equation(text, list(TERMS)) for text in found])
    rod = _drawn(world.place(pack[0]))
    return seen, fits, rod.equation, rod.start


def show_rod(axes: Any, equation: Equation, start: Start) -> None:
    u = solution(equation, start, UNTIL)
    extent = (0, 1, 0, UNTIL / 100)
    axes.imshow(u, origin="lower", aspect="auto", extent=extent, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.plot(PLACES, [0.01] * len(PLACES), "o", color=INK, markersize=4, clip_on=False)
    axes.set(xticks=[0, 0.5, 1], yticks=[0, 0.1, 0.2, 0.3])
    axes.set_xlabel("x", color=FAINT, size=9)
    axes.set_ylabel("t", color=FAINT, size=9)
    axes.tick_params(colors=FAINT, length=0, labelsize=8.5)
    axes.set_title("task 1: u(x, t), sampled at the dots", loc="left", size=10, color=INK)


def show_reaction(axes: Any, seen: list[np.ndarray], fits: list[Equation], true: Equation) -> None:
    u = np.linspace(-1.5, 1.0, 200)
    for fit in fits:
        axes.plot(u, values(fit, u), color=FLOOR, linewidth=1.2, alpha=0.7)
    axes.plot(u, values(true, u), color=TRUE, linewidth=2)
    for points in seen[1:]:
        axes.plot(*points.T, "o", color="white", markeredgecolor=CEILING, markeredgewidth=1.5, markersize=5)
    axes.plot(*seen[0].T, "o", color=INK, markersize=5)
    axes.set(ylim=(-1.2, 1.6), xlim=(-1.5, 1.0))
    for y, text, color in (
        (1.4, "hidden, the same for the pack", TRUE),
        (1.19, "three fits to task 1 alone", FLOOR),
        (0.98, "points of tasks 2 to 4", CEILING),
    ):
        axes.annotate(text, (0.97, y), ha="right", size=8.5, color=color)
    axes.set_xlabel("u", color=FAINT, size=9)
    axes.tick_params(colors=FAINT, length=0, labelsize=8.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title("the reaction f(u)", loc="left", size=10, color=INK)


def show_players(axes: Any) -> None:
    floor, ceiling = floor_and_ceiling(PdeDiscovery("small", 1, form="compact"), PACKS, TASKS) or (None, None)
    if floor is None or ceiling is None:
        raise SystemExit("this world has lost its players")
    at = range(1, TASKS + 1)
    for found, name, color, off in ((ceiling, "remembers", CEILING, 0.04), (floor, "remembers nothing", FLOOR, -0.1)):
        axes.plot(at, [point.mean for point in found.points], color=color, linewidth=2, marker="o", markersize=4)
        low, high = [point.low for point in found.points], [point.high for point in found.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.annotate(name, (TASKS, found.points[-1].mean + off), ha="right", size=9, color=color)
    axes.set(xlim=(0.8, TASKS + 0.2), ylim=(0, 1.1), xticks=list(at), yticks=[0, 0.25, 0.5, 0.75, 1])
    finish_players(axes, f"small: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    seen, fits, true, start = looked(PdeDiscovery("small", 13, form="compact"))
    made = Figure(figsize=(12.6, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    show_rod(made.add_axes((0.045, 0.16, 0.23, 0.7)), true, start)
    show_reaction(made.add_axes((0.325, 0.16, 0.29, 0.7)), seen, fits[0], true)
    show_players(made.add_axes((0.67, 0.16, 0.32, 0.7)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
