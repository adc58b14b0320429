"""The picture of optimal control: one trip by three laws, and what its players make of packs.

python experiments/picture_optimal_control.py       # half a minute; writes docs/images/optimal-control.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import FAINT, GRID, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cod_agent.context import COMPACT
from cod_agent.environments.expressions import parse
from cod_agent.environments.optimal_control import Dynamics, Flight, OptimalControl, Trip, flown
from cod_agent.environments.optimal_control.dynamics import NAMES
from cod_agent.environments.optimal_control.players import choices
from cod_agent.evaluation.players import floor_and_ceiling
from cod_agent.tasks import Observation, Task

CEILING, FLOOR, LOST = "#2c9c6a", "#c47f2a", "#8a929b"
CART, TRIP = Dynamics(0.9, -0.8), Trip(-0.5, 0.2, 2.0, (0.0,) * 8)
GUESSED = "0.4 * (x_target - x) - 0.8 * v"
PACKS, TASKS = 256, 4
OUT = Path(__file__).parent.parent / "docs" / "images" / "optimal-control.png"


def law_of(note: str) -> str:
    """What the players write for the trip, with that note."""
    shown = Observation(f"x {TRIP.x:g} v {TRIP.v:g} to {TRIP.target:g} in {len(TRIP.noise)}")
    return choices(COMPACT.solve(Task(id="picture"), note, shown))[0]


def show_flights(places: Any, forces: Any) -> None:
    """Where the cart is, and below it the control."""
    laws = (
        (GUESSED, "a guess, as if b were above 0", LOST),
        (law_of(""), "finds the cart out while it flies", FLOOR),
        (law_of(f"a {CART.a} b {CART.b} vv 1 vu 0 uu 1"), "knows a and b from its note", CEILING),
    )
    for law, name, color in laws:
        flight: Flight = flown(parse(law, NAMES), CART, TRIP)
        label = f"{name}: reward {flight.reward:.2f}"
        places.plot(range(len(flight.x)), flight.x, color=color, linewidth=2, marker="o", markersize=4, label=label)
        forces.step(range(len(flight.x)), [*flight.u, flight.u[-1]], where="post", color=color, linewidth=2)
    places.axhline(TRIP.target, color=INK, linewidth=1, linestyle=":")
    places.annotate("target", (0.05, TRIP.target + 0.25), color=FAINT, size=8.5)
    places.set(ylim=(-5.2, 4.5), ylabel="x", xticks=range(9), xticklabels=[])
    places.legend(frameon=False, fontsize=8, labelcolor="linecolor", handlelength=0, markerscale=0, loc="lower right")
    places.set_title(f"one trip by three laws, a = {CART.a}, b = {CART.b}", loc="left", size=10, color=INK)
    forces.set(ylim=(-1.15, 1.15), ylabel="u", xlabel="t", xticks=range(9), yticks=[-1, 0, 1])
    for axes in (places, forces):
        axes.grid(axis="y", color=GRID)
        axes.set_axisbelow(True)
        axes.tick_params(colors=FAINT, length=0, labelsize=8.5)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)


def show_players(axes: Any) -> None:
    for preset, style in (("small", "-"), ("paper", "--")):
        curves = floor_and_ceiling(OptimalControl(preset, 1, form="compact"), PACKS, TASKS)
        if curves is None:
            raise SystemExit("this world has lost its players")
        for found, name, color in zip(curves, ("remembers nothing", "remembers"), (FLOOR, CEILING), strict=True):
            at, points = range(1, TASKS + 1), found.points
            axes.plot(at, [point.mean for point in points], style, color=color, linewidth=2, marker="o", markersize=4)
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
            if color == FLOOR:
                axes.annotate(f"{name}, {preset}", (TASKS, points[-1].low - 0.015), ha="right", size=9, color=color)
    axes.annotate("remembers, small and paper", (TASKS, 0.93), ha="right", size=9, color=CEILING)
    axes.set(xlim=(0.8, TASKS + 0.2), ylim=(0.66, 1.02), xticks=range(1, TASKS + 1), yticks=[0.7, 0.8, 0.9, 1])
    finish_players(axes, f"mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    made = Figure(figsize=(10.6, 3.8), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    show_flights(made.add_axes((0.05, 0.4, 0.45, 0.52)), made.add_axes((0.05, 0.12, 0.45, 0.22)))
    show_players(made.add_axes((0.57, 0.15, 0.41, 0.77)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
