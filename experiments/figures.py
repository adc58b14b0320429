"""The look of the pages' figures: curves with 95 % bands, one idea a panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, FAINT, GRID = "#22303c", "#6b7785", "#e6e9ed"
COLORS = ("#0b6fb8", "#c47f2a", "#2c9c6a", "#a0458e", "#8a929b", "#b23b3b", "#4f5d95")


def figure(panels: int) -> tuple[Figure, list[Any]]:
    """A figure with so many panels side by side."""
    made = Figure(figsize=(4.9 * panels if panels > 1 else 6.4, 4.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    return made, list(made.subplots(1, panels, squeeze=False)[0])


def band(
    axes: Any, curves: np.ndarray, name: str, *, start: int = 1, color: str | None = None, style: str = "-"
) -> None:
    """The mean over runs with its 95 % band (Student's t); `curves` is [runs, points]."""
    x = np.arange(start, start + curves.shape[1])
    means = curves.mean(0)
    color = color or COLORS[len({line.get_color() for line in axes.lines}) % len(COLORS)]
    axes.plot(x, means, style, color=color, linewidth=2, label=name)
    if len(curves) > 1:
        half = lab.LEVEL_95[len(curves)] * curves.std(0, ddof=1) / len(curves) ** 0.5
        axes.fill_between(x, means - half, means + half, color=color, alpha=0.15, linewidth=0)


def smooth(curves: np.ndarray, width: int) -> np.ndarray:
    """Mean of the last `width` points of each, [runs, points - width + 1]."""
    return np.apply_along_axis(lambda row: np.convolve(row, np.full(width, 1 / width), "valid"), 1, curves)


def points(axes: Any, words: str, name: str, *, color: str, style: str = "-o") -> None:
    """Reward by position of one model: means with 95 % intervals over packs."""
    made = lab.curve(lab.rewards(words)).points
    x = [point.position + 1 for point in made]
    axes.plot(x, [point.mean for point in made], style, color=color, linewidth=2, markersize=5, label=name)
    axes.fill_between(
        x, [point.low for point in made], [point.high for point in made], color=color, alpha=0.15, linewidth=0
    )


def finish(axes: Any, title: str, x: str, y: str, *, limits: Sequence[float] | None = (0, 1.02)) -> None:
    """Title, names of the axes, a light grid and a legend."""
    axes.set_title(title, loc="left", color=INK, size=11, weight="bold")
    axes.set_xlabel(x, color=FAINT)
    axes.set_ylabel(y, color=FAINT)
    if limits is not None:
        axes.set_ylim(*limits)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncol=2)


def finish_players(axes: Any, title: str) -> None:
    """The frame of a world's picture of its players: reward by task, what is drawn named beside it and not in a legend."""
    axes.set_xlabel("task in the pack", color=FAINT, size=9)
    axes.set_title(title, loc="left", size=10, color=INK)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def keep(made: Figure, path: Path) -> Path:
    """Write the figure, the same bytes for the same figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, format="png", metadata={"Software": "connect-the-dots"})
    return path
