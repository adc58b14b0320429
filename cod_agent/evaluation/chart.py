"""Curves and differences as inline SVG, coloured by the page they stand in: no library, no script, nothing to load.

Every figure that is drawn stands in the markup, too, as `data-` attributes and as a title that shows when it is pointed at.
Elements have a class for each kind of line (`main`, `bare`, `floor`, `ceiling`, `against`, `other`); the page says how they look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree as Tree

from cod_agent.evaluation.result import AGAINST, MAIN, NO_CONTEXT
from cod_agent.evaluation.statistics import Curve, Interval, Point
from cod_agent.evaluation.words import HIGHEST, LOWEST, cut, label, plain

if TYPE_CHECKING:
    from cod_agent.evaluation.result import Evaluation

Kind = Literal["main", "bare", "floor", "ceiling", "against", "other"]
_Place = Callable[[int], float]
_Scale = Callable[[float], float]

_HEIGHT, _TOP, _LEFT, _BELOW = 300, 14, 36, 42
_GAP = 18.0
"""Labels nearer than this, in units of the drawing, are moved apart."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a figure."""

    label: str
    kind: Kind
    curve: Curve

    @property
    def dashed(self) -> bool:
        """Floors and ceilings are lines to compare with: no band, no dots."""
        return self.kind in ("floor", "ceiling")


@dataclass(frozen=True, slots=True)
class Row:
    """One difference with its interval."""

    label: str
    found: Interval


def principal(found: Evaluation) -> list[Line]:
    """The lines that say it all: floor and ceiling, without context, the other model, with context; what there is of them."""
    arms = {arm.name: arm.curve for arm in found.arms}
    ends: tuple[tuple[Kind, str, Curve | None], ...] = (
        ("floor", LOWEST, found.floor),
        ("ceiling", HIGHEST, found.ceiling),
    )
    lines = [Line(label(name), kind, curve) for kind, name, curve in ends if curve is not None]
    if NO_CONTEXT in arms:
        lines.append(Line(label(NO_CONTEXT), "bare", arms[NO_CONTEXT]))
    lines += [Line(label(arm.name, found), "against", arm.curve) for arm in found.arms if arm.name.startswith(AGAINST)]
    return [*lines, Line(label(MAIN, found), "main", found.main)]


def others(found: Evaluation) -> list[Line]:
    """The other arms."""
    ends = (found.floor, found.ceiling)  # an arm that is one of them is drawn already
    rest = [
        arm for arm in found.arms[1:] if arm.name != NO_CONTEXT and arm is not found.rival and arm.curve not in ends
    ]
    return [Line(label(arm.name), "other", arm.curve) for arm in rest]


def span(curves: Iterable[Curve]) -> tuple[float, float]:
    """What the axis of rewards shows: 0 to 1, and more where rewards are outside of it."""
    said = [v for c in curves for p in c.points for v in (p.mean, p.low, p.high) if v == v]
    return min([0.0, *said]), max([1.0, *said])


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(n for n in (1, 2, 2.5, 5, 10) if n >= 0.8 * rough / unit)
    return [round(step * n, 10) for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def apart(wanted: Sequence[float], gap: float, most: float) -> list[float]:
    """Places for labels as near as may be to where they are wanted, `gap` apart, none beyond `most`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    for before, i in zip(order, order[1:], strict=False):
        placed[i] = max(placed[i], placed[before] + gap)
    limit = most
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def ending(name: str, value: float) -> str:
    """What stands where a line ends: its name, cut where there is no room, and its last value."""
    said = f"{value:.2f}"
    return f"{cut(name, 28 - len(said))}  {said}"


def curves(
    lines: Sequence[Line], *, width: int = 720, height: int = _HEIGHT, named: bool = True, axis: str = ""
) -> str:
    """Reward by position as SVG text.

    Args:
        lines: the last one is drawn on top; all have the same number of positions.
        width, height: of the drawing, in units that are pixels where it is shown at its own size.
        named: whether each line's name and last value stand where it ends; a page with little room has a legend instead.
        axis: what the positions are.
    """
    low, high = span(line.curve for line in lines)
    n = len(lines[0].curve.points)
    known = [(line, point) for line in lines if (point := _end(line.curve)) is not None]
    shown = [ending(line.label, point.mean) if named else f"{point.mean:.2f}" for line, point in known]
    # Room for what stands beside the drawing, however long the numbers are.
    left = max([_LEFT, *(12 + 7 * len(f"{tick:g}") for tick in ticks(low, high))])
    right = width - max([190 if named else 40, *(8 + 7 * len(text) for text in shown)])
    bottom = height - (_BELOW if axis else _BELOW - 16)

    def x(position: int) -> float:
        return left + 12 + (right - left - 24) * (position / (n - 1) if n > 1 else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - _TOP) * (value - low) / (high - low)

    said = "; ".join(f"{line.label}: {', '.join(f'{p.mean:.2f}' for p in line.curve.points)}" for line in lines)
    svg = _svg(width, height, f"Mean reward by task. {said}")
    for tick in ticks(low, high):
        _add(svg, "line", "grid", x1=left, x2=right, y1=y(tick), y2=y(tick))
        _text(svg, f"{tick:g}", "tick", left - 7, y(tick) + 4, "end")
    every = -(-n // max(1, int((right - left) / 28)))
    for position in range(0, n, every):
        _text(svg, str(position + 1), "tick", x(position), bottom + 20, "middle")
    if axis:
        _text(svg, axis, "tick", (left + right) / 2, height - 4, "middle")
    ordered = sorted(lines, key=lambda line: not line.dashed)
    for line in ordered:
        if not line.dashed:
            _band(svg, line, x, y)
    for line in ordered:
        _curve(svg, line, x, y)
    places = apart([y(point.mean) + 4 for _, point in known], _GAP if named else 14, bottom + 4)
    for (line, _), text, place in zip(known, shown, places, strict=True):
        _text(svg, text, f"name {line.kind}", right + 2, place, "start")
    return _markup(svg)


def differences(rows: Sequence[Row], *, width: int = 720, named: int = 190) -> str:
    """Differences with their intervals, one below the other around zero, as SVG text.

    Args:
        rows: from top to bottom.
        width: of the drawing.
        named: room for the names, at the left.
    """
    low, high = _around([v for row in rows for v in (row.found.low, row.found.high) if v == v])
    right, bottom = width - 14, 12 + 30 * len(rows)

    def x(value: float) -> float:
        return named + (right - named) * (value - low) / (high - low)

    said = "; ".join(f"{row.label}: {row.found.signed}" for row in rows)
    svg = _svg(width, bottom + 26, f"Differences with 95% intervals. {said}")
    for tick in ticks(low, high, 4 if width < 500 else 6):
        _add(svg, "line", "zero" if tick == 0 else "grid", x1=x(tick), x2=x(tick), y1=6, y2=bottom)
        _text(svg, f"{tick:+g}" if tick else "0", "tick", x(tick), bottom + 18, "middle")
    for number, row in enumerate(rows):
        y, found = 27 + 30 * number, row.found
        _text(svg, cut(row.label, named // 8), "row", named - 14, y + 4.5, "end")
        if found.mean == found.mean:
            sure = "up" if found.low > 0 else "down" if found.high < 0 else "open"
            group = _add(svg, "g", f"difference {sure}", **_data(row.label, found))
            _add(group, "title").text = plain(f"{row.label}: {found.signed}")
            _add(group, "line", "whisker", x1=x(found.low), x2=x(found.high), y1=y, y2=y)
            _add(group, "circle", "dot", cx=x(found.mean), cy=y, r=5)
    return _markup(svg)


# ---- inside ----


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A range that has zero and all values inside, and some air."""
    low, high = min([0.0, *values]), max([0.0, *values])
    air = max(0.04, (high - low) * 0.05)
    return low - air, high + air


def _band(svg: Tree.Element, line: Line, x: _Place, y: _Scale) -> None:
    points = [p for p in line.curve.points if p.low == p.low]
    if len(points) == 1:
        only = points[0]
        _add(
            svg,
            "line",
            f"whisker {line.kind}",
            x1=x(only.position),
            x2=x(only.position),
            y1=y(only.low),
            y2=y(only.high),
        )
    elif points:
        there = [(x(p.position), y(p.high)) for p in points]
        back = [(x(p.position), y(p.low)) for p in reversed(points)]
        _add(svg, "polygon", f"band {line.kind}", points=_path(there + back))


def _curve(svg: Tree.Element, line: Line, x: _Place, y: _Scale) -> None:
    points = [p for p in line.curve.points if p.mean == p.mean]
    _add(svg, "polyline", f"curve {line.kind}", points=_path([(x(p.position), y(p.mean)) for p in points]))
    for point in points:
        data = _data(line.label, point) | {"data-position": str(point.position)}
        dot = _add(
            svg,
            "circle",
            f"dot {line.kind}",
            cx=x(point.position),
            cy=y(point.mean),
            r=3 if line.dashed else 4.5,
            **data,
        )
        _add(dot, "title").text = plain(f"{line.label}, task {point.position + 1}: {point}")


def _end(curve: Curve) -> Point | None:
    return next((point for point in reversed(curve.points) if point.mean == point.mean), None)


def _data(label: str, found: Interval) -> dict[str, str]:
    said = {"data-arm": plain(label), "data-mean": found.mean, "data-low": found.low, "data-high": found.high}
    return {name: value if isinstance(value, str) else f"{value:.6f}" for name, value in said.items()}


def _svg(width: int, height: int, said: str) -> Tree.Element:
    svg = Tree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": plain(said)})
    svg.set("style", f"max-width:{width}px")
    return svg


def _add(parent: Tree.Element, tag: str, kind: str = "", **attributes: float | str) -> Tree.Element:
    spelled = {name: value if isinstance(value, str) else f"{value:.1f}" for name, value in attributes.items()}
    return Tree.SubElement(parent, tag, ({"class": kind} if kind else {}) | spelled)


def _text(parent: Tree.Element, said: str, kind: str, x: float, y: float, anchor: str) -> None:
    _add(parent, "text", kind, x=x, y=y, **{"text-anchor": anchor}).text = plain(said)


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _markup(svg: Tree.Element) -> str:
    return Tree.tostring(svg, encoding="unicode", short_empty_elements=False)
