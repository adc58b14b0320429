"""The figure of an evaluation: reward by position with its 95% band, controls beside it, named where they end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import MissingExtra

if TYPE_CHECKING:
    from cod_agent.evaluation.result import Evaluation
    from cod_agent.evaluation.statistics import Curve

INK, FAINT, GRID = "#22303c", "#6b7785", "#e6e9ed"
_MAIN = {"color": "#0b6fb8", "linewidth": 2.6, "marker": "o", "markersize": 6.5, "zorder": 4}
_STYLES: dict[str, dict[str, Any]] = {
    "no-context": {"color": "#8a929b", "linewidth": 2.0, "marker": "o", "markersize": 5, "zorder": 3},
    "perfect": {"color": "#2c9c6a", "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 2},
    "memoryless": {"color": "#c47f2a", "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 2},
}
_NAMES = {"no-context": "without context", "perfect": "perfect player", "memoryless": "memoryless player"}
_CLOSEST = 0.055
"""Labels nearer than this, in units of reward, are moved apart."""


def draw(found: Evaluation, path: str | Path) -> Path:
    """Draw `found` as a PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the figure", "local") from None

    figure = Figure(figsize=(7.6, 4.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.135, 0.655, 0.68))
    labels = [_line(axes, found.main, "with context", _MAIN)]
    for name, control in found.controls.items():
        labels.append(_line(axes, control, _NAMES.get(name, name), _STYLES.get(name, _STYLES["no-context"])))
    _name_ends(axes, labels)
    _frame(axes, found)
    figure.text(0.085, 0.925, f"{found.world}, {found.model}", size=13, weight="bold", color=INK)
    figure.text(0.085, 0.868, _subtitle(found), size=9, color=FAINT)
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": "connect-the-dots"})
    return path


def _line(axes: Any, curve: Curve, name: str, style: dict[str, Any]) -> tuple[float, float, str, str]:
    at = [point.position + 1 for point in curve.points]
    means = [point.mean for point in curve.points]
    axes.plot(at, means, **style)
    if "linestyle" not in style:
        low, high = [point.low for point in curve.points], [point.high for point in curve.points]
        axes.fill_between(at, low, high, color=style["color"], alpha=0.16, linewidth=0, zorder=1)
    ends = [(x, y) for x, y in zip(at, means, strict=True) if y == y]
    return (*(ends[-1] if ends else (0.0, float("nan"))), name, style["color"])


def _name_ends(axes: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Each line's name and last value where it ends, moved apart where they would overlap."""
    lowest = float("-inf")
    for x, y, name, color in sorted((label for label in labels if label[1] == label[1]), key=lambda label: label[1]):
        lowest = max(y, lowest + _CLOSEST)
        axes.annotate(
            f"{name}  {y:.2f}",
            (x, lowest),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            size=9.5,
            color=color,
            weight="bold" if name == "with context" else "normal",
            annotation_clip=False,
        )


def _frame(axes: Any, found: Evaluation) -> None:
    positions = found.pack_size
    axes.set_ylim(0, 1.03)
    axes.set_xlim(0.8, positions + 0.12)
    axes.set_xticks(range(1, positions + 1) if positions <= 16 else range(1, positions + 1, -(-positions // 12)))
    axes.set_xlabel("task in the pack" if found.packing == "cod" else "time the task is lived", color=FAINT, size=10)
    axes.set_ylabel("mean reward", color=FAINT, size=10)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, length=0, labelsize=9.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c3c9d0")


def _subtitle(found: Evaluation) -> str:
    return f"reward by position, {found.amount}, seed {found.seed}; bands: 95% intervals over packs"
