"""The figure of an evaluation: reward by position with its 95% band, and what it is held against, named where lines end.

What says it all is in the first panel: with context, without it, floor and ceiling. The other arms, if there are any, have a
second one below, where the model with its context stands again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import MissingExtra
from cod_agent.evaluation.chart import Line, apart, ending, others, principal, span
from cod_agent.evaluation.words import cut, seeds

if TYPE_CHECKING:
    from cod_agent.evaluation.result import Evaluation

INK, FAINT, GRID = "#22303c", "#6b7785", "#e6e9ed"
_STYLES: dict[str, dict[str, Any]] = {
    "main": {"color": "#0b6fb8", "linewidth": 2.6, "marker": "o", "markersize": 6.5, "zorder": 4},
    "bare": {"color": "#8a929b", "linewidth": 2.0, "marker": "o", "markersize": 5, "zorder": 3},
    "against": {"color": "#8a3ea8", "linewidth": 2.2, "marker": "o", "markersize": 5.5, "zorder": 3},
    "ceiling": {"color": "#2c9c6a", "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 2},
    "floor": {"color": "#c47f2a", "linewidth": 1.4, "linestyle": (0, (5, 3)), "zorder": 2},
}
_COLORS = ("#c2417a", "#1f8a8a", "#a8741a", "#6a55c2", "#5a8f29", "#c2552d", "#3f6fa8", "#8c5a3c")
_MARKERS = "svDP^X*h"
_CLOSEST = 0.055
"""Labels nearer than this share of the axis are moved apart."""
_WIDTH, _HEIGHT, _MORE = 7.6, 4.4, 3.5
"""Inches: the first panel with all around it, and what the second one adds."""


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

    lines, rest = principal(found), others(found)
    height = _HEIGHT + (_MORE if rest else 0)
    figure = Figure(figsize=(_WIDTH, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)

    def panel(bottom: float, tall: float) -> Any:
        """Axes so many inches above the figure's lower edge, and so many tall."""
        return figure.add_axes((0.085, bottom / height, 0.655, tall / height))

    top = height - _HEIGHT
    axes = panel(top + 0.6, 3.0)
    _lines(axes, list(reversed(lines)), [_STYLES[line.kind] for line in reversed(lines)])
    _frame(axes, found, lines)
    if rest:
        below = panel(0.6, 3.0)
        thin = [
            {"color": _COLORS[at % 8], "linewidth": 1.5, "marker": _MARKERS[at % 8], "markersize": 4.5, "zorder": 3}
            for at in range(len(rest))
        ]
        _lines(below, [lines[-1], *rest], [{**_STYLES["main"], "linewidth": 1.8, "markersize": 5}, *thin], bands=False)
        _frame(below, found, [*rest, lines[-1]])
    title = cut(f"{found.world}, {found.model}", 60)
    figure.text(0.085, (top + 4.07) / height, title, size=13, weight="bold", color=INK, parse_math=False)
    figure.text(0.085, (top + 3.82) / height, _subtitle(found), size=9, color=FAINT)
    path = Path(path)
    figure.savefig(path, format="png", metadata={"Software": "connect-the-dots"})
    return path


def _lines(axes: Any, lines: Sequence[Line], styles: Sequence[dict[str, Any]], *, bands: bool = True) -> None:
    """Curves, each with its name and last value where it ends; names are moved apart where they would overlap."""
    ends: list[tuple[float, float, str, dict[str, Any]]] = []
    for line, style in zip(lines, styles, strict=True):
        points = line.curve.points
        at = [point.position + 1 for point in points]
        axes.plot(at, [point.mean for point in points], **style)
        if bands and not line.dashed:
            band = ([point.low for point in points], [point.high for point in points])
            axes.fill_between(at, *band, color=style["color"], alpha=0.16, linewidth=0, zorder=1)
        ends += [(p.position + 1, p.mean, line.label, style) for p in points if p.mean == p.mean][-1:]
    low, high = span(line.curve for line in lines)
    places = apart([y for _, y, _, _ in ends], _CLOSEST * (high - low), high + 0.03 * (high - low))
    for (x, y, name, style), place in zip(ends, places, strict=True):
        axes.annotate(
            ending(name, y),
            (x, place),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            size=9.5,
            color=style["color"],
            weight="bold" if style["color"] == _STYLES["main"]["color"] else "normal",
            annotation_clip=False,
            parse_math=False,
        )


def _frame(axes: Any, found: Evaluation, lines: Sequence[Line]) -> None:
    positions = found.pack_size
    low, high = span(line.curve for line in lines)
    axes.set_ylim(low, high + 0.03 * (high - low))
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
    return f"reward by position, {found.amount}, {seeds(found)}; bands: 95% intervals over packs"
