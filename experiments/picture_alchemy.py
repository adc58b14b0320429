"""The picture of Alchemy-Random: the recipes that a pack hides, the targets of its tasks, and what its players make of it.

python experiments/picture_alchemy.py       # a quarter of a minute; writes docs/images/alchemy.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import FAINT, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from cod_agent.environments.alchemy import Alchemy, Graph
from cod_agent.environments.alchemy.recipes import PRESETS, draw_graph
from cod_agent.environments.draws import randomness
from cod_agent.evaluation.players import floor_and_ceiling

TIERS = ("#dfe5ea", "#d9ebf7", "#d6eee2")
EDGES = ("#8a929b", "#0b6fb8", "#2c9c6a")
CEILING, FLOOR = "#2c9c6a", "#c47f2a"
PACKS, TASKS = 512, 4
OUT = Path(__file__).parent.parent / "docs" / "images" / "alchemy.png"


def places(graph: Graph) -> dict[int, tuple[float, float]]:
    """Where each element stands: a row for each tier, the products above what they are made of."""
    at = {element: (float(element), 0.0) for element in range(graph.base)}
    ways = graph.ways()
    for tier in range(1, max(graph.tiers) + 1):
        row = [element for element, of in enumerate(graph.tiers) if of == tier]
        row.sort(key=lambda element: sum(at[part][0] for part in ways[element][0]))
        left = (graph.base - 1 - 1.3 * (len(row) - 1)) / 2
        at.update({element: (left + 1.3 * place, 1.25 * tier) for place, element in enumerate(row)})
    return at


def show_graph(axes: Any, graph: Graph, names: tuple[str, ...], tasks: dict[int, int]) -> None:
    """Elements, and a line from each to what it is made of; a double line where it takes the same one twice."""
    at = places(graph)
    for (one, other), made in graph.recipes.items():
        for part, off in ((one, -0.05), (other, 0.05)):
            (x, y), (up, high) = at[part], at[made]
            axes.plot((x + off, up + off), (y, high), color=EDGES[graph.tiers[made]], linewidth=1.5, zorder=1)
    for element, (x, y) in at.items():
        tier = graph.tiers[element]
        axes.add_patch(Circle((x, y), 0.27, facecolor=TIERS[tier], edgecolor=EDGES[tier], linewidth=1.5, zorder=2))
        axes.annotate(names[element], (x, y), ha="center", va="center", color=INK, size=10, zorder=3)
        if element in tasks:
            axes.annotate(f"task {tasks[element]}", (x + 0.33, y + 0.14), color=FAINT, size=8, zorder=3)
    for tier in range(max(graph.tiers) + 1):
        axes.annotate(f"tier {tier}", (-0.95, 1.25 * tier), ha="right", va="center", color=FAINT, size=9)
    axes.set(
        xlim=(-1.7, graph.base - 0.1), ylim=(-0.4, 1.25 * max(graph.tiers) + 0.5), xticks=[], yticks=[], aspect="equal"
    )
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("hidden, the same for the pack: what makes what", loc="left", size=10, color=INK)


def show_players(axes: Any) -> None:
    floor, ceiling = floor_and_ceiling(Alchemy("small", 1, form="compact"), PACKS, TASKS) or (None, None)
    if floor is None or ceiling is None:
        raise SystemExit("this world has lost its players")
    at = range(1, TASKS + 1)
    for found, name, color, off in ((ceiling, "remembers", CEILING, -0.17), (floor, "remembers nothing", FLOOR, -0.1)):
        axes.plot(at, [point.mean for point in found.points], color=color, linewidth=2, marker="o", markersize=4)
        low, high = [point.low for point in found.points], [point.high for point in found.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.annotate(name, (TASKS, found.points[-1].mean + off), ha="right", size=9, color=color)
    axes.set(xlim=(0.8, TASKS + 0.2), ylim=(0, 1.05), xticks=list(at), yticks=[0, 0.25, 0.5, 0.75, 1])
    finish_players(axes, f"small: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    graph, targets = draw_graph(randomness("picture", 1), PRESETS["small"], "eval")
    made = Figure(figsize=(10.6, 3.6), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    names = (*"abcd", *"ABCDE"[: len(graph.tiers) - 4])
    show_graph(made.add_axes((0.02, 0.06, 0.46, 0.8)), graph, names, {t: i for i, t in enumerate(targets, 1)})
    show_players(made.add_axes((0.56, 0.16, 0.42, 0.7)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
