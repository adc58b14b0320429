"""The picture of Learn2Ask: the protocol that a clinic hides, what came up with its patients, and what its players make of it.

python experiments/picture_learn2ask.py       # a quarter of a minute; writes docs/images/learn2ask.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from figures import FAINT, INK, finish_players, keep
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cod_agent.environments.draws import randomness
from cod_agent.environments.learn2ask import Learn2Ask
from cod_agent.environments.learn2ask.clinic import PRESETS, ClinicCase, draw_case, draw_protocol
from cod_agent.environments.learn2ask.topics import TOPICS
from cod_agent.evaluation.players import floor_and_ceiling

CAME_UP, MISSING, NOTHING = "#d6eee2", "#f6d9c9", "#f3f5f7"
CEILING, FLOOR = "#2c9c6a", "#c47f2a"
PACKS, PATIENTS = 512, 4
OUT = Path(__file__).parent.parent / "docs" / "images" / "learn2ask.png"


def show_clinic(axes: Any, cases: list[ClinicCase]) -> None:
    """A row for each topic, a column for each patient; what the protocol wants is framed."""
    kind = PRESETS["small"]
    for topic in range(kind.topics):
        y = kind.topics - 1 - topic - 0.35 * (topic // 2)
        wanted = topic in cases[0].protocol
        weight = "bold" if wanted else "normal"
        axes.annotate(TOPICS[topic].name, (-0.25, y + 0.4), ha="right", va="center", size=8.5, color=INK, weight=weight)
        for column, case in enumerate(cases):
            face = MISSING if topic in case.open else CAME_UP if topic in case.covered else NOTHING
            edge = INK if wanted else "white"
            axes.add_patch(Rectangle((column * 1.7, y), 1.5, 0.82, facecolor=face, edgecolor=edge, linewidth=1.1))
            said = "missing" if topic in case.open else "asked" if topic in case.covered else ""
            axes.annotate(said, (column * 1.7 + 0.75, y + 0.4), ha="center", va="center", size=7, color=FAINT)
    for column, case in enumerate(cases):
        right = "ask" if case.open else "stop"
        axes.annotate(
            f"{case.complaint}:\n{right}", (column * 1.7 + 0.75, -2.2), ha="center", va="top", size=8.5, color=INK
        )
    axes.set(xlim=(-6.4, 1.7 * len(cases)), ylim=(-3.6, kind.topics + 0.1), xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title("bold and framed: hidden, the same for the pack", loc="left", size=10, color=INK)


def show_players(axes: Any) -> None:
    floor, ceiling = floor_and_ceiling(Learn2Ask("small", 1, form="compact"), PACKS, PATIENTS) or (None, None)
    if floor is None or ceiling is None:
        raise SystemExit("this world has lost its players")
    at = range(1, PATIENTS + 1)
    for found, name, color, off in ((ceiling, "remembers", CEILING, 0.06), (floor, "remembers nothing", FLOOR, -0.1)):
        axes.plot(at, [point.mean for point in found.points], color=color, linewidth=2, marker="o", markersize=4)
        low, high = [point.low for point in found.points], [point.high for point in found.points]
        axes.fill_between(at, low, high, color=color, alpha=0.16, linewidth=0)
        axes.annotate(name, (PATIENTS, found.points[-1].mean + off), ha="right", size=9, color=color)
    axes.set(xlim=(0.8, PATIENTS + 0.2), ylim=(0, 1.05), xticks=list(at), yticks=[0, 0.25, 0.5, 0.75, 1])
    finish_players(axes, f"small: mean reward, {PACKS} packs, 95% bands")


def main() -> None:
    dice = randomness("picture", 14)
    protocol = draw_protocol(dice, PRESETS["small"], "eval")
    cases = [draw_case(dice, PRESETS["small"], protocol) for _ in range(PATIENTS)]
    made = Figure(figsize=(10.6, 3.9), dpi=150, facecolor="white")
    FigureCanvasAgg(made)
    show_clinic(made.add_axes((0.01, 0.03, 0.53, 0.87)), cases)
    show_players(made.add_axes((0.61, 0.16, 0.37, 0.7)))
    keep(made, OUT)


if __name__ == "__main__":
    main()
