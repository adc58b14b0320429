"""The tables of an evaluation as values, for a page and partly for a terminal: an arm a row, or a measure a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cod_agent.evaluation.players import CEILING, FLOOR
from cod_agent.evaluation.result import AGAINST, MAIN, NO_CONTEXT, compared, count
from cod_agent.evaluation.statistics import paired
from cod_agent.evaluation.words import HIGHEST, LOWEST, UNMEASURED, label, title, verdict

if TYPE_CHECKING:
    from cod_agent.evaluation.measures import Measure
    from cod_agent.evaluation.result import Arm, Comparison, Evaluation
    from cod_agent.evaluation.statistics import Curve, Interval


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure, and its interval if it has one."""

    mean: str
    range: str = ""
    kind: str = ""
    """`up` or `down`: a difference that is clear of zero."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row."""

    label: str
    cells: tuple[Cell, ...]
    main: bool = False
    """The one it is all about."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows below each other; `head` names all columns, that of the labels first."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]


NOTHING = Cell("none")


def reward(found: Interval | None) -> Cell:
    """A mean reward."""
    if found is None or found.mean != found.mean:
        return NOTHING
    return Cell(f"{found.mean:.2f}", f"[{found.low:.2f}, {found.high:.2f}]")


def change(found: Interval | None, *, luck: bool = False) -> Cell:
    """A difference, with its sign; one that can only be luck is never called clear of zero."""
    if found is None or found.mean != found.mean:
        return NOTHING
    kind = "" if luck else "up" if found.low > 0 else "down" if found.high < 0 else ""
    return Cell(f"{found.mean:+.2f}", f"[{found.low:+.2f}, {found.high:+.2f}]", kind)


def overview(found: Sequence[Evaluation]) -> Table:
    """The parts of a study below each other, at their last task; two models over all tasks, and over all parts."""
    whole = compared(found)
    if whole is None:
        head = ("part", "with context", "without", "worth", "floor", "ceiling", "the context")
        return Table(
            "The last task of each part: mean reward, and its 95% interval.", head, tuple(map(_at_last, found))
        )
    rows = [_of_two(one) for one in found]
    empty = Cell("")
    rows.append(Row("all parts", (empty, empty, change(whole.overall), empty, empty, Cell(_better(whole))), True))
    head = ("part", whole.model, label(f"{AGAINST}{whole.other}", found[0]), "difference", "floor", "ceiling", "better")
    return Table("All tasks of each part: mean reward, and its 95% interval.", head, tuple(rows))


def _at_last(found: Evaluation) -> Row:
    ends = [found.main, found.controls.get(NO_CONTEXT)]
    players = [curve.points[-1].mean if curve else float("nan") for curve in (found.floor, found.ceiling)]
    said = verdict(found)
    worth = Cell(UNMEASURED) if said == UNMEASURED else change(found.benefit)
    rewards = (reward(curve.points[-1] if curve else None) for curve in ends)
    return Row(title(found), (*rewards, worth, *map(_mean, players), Cell(said)))


def _of_two(found: Evaluation) -> Row:
    ours, theirs = found.main.overall, found.rival.curve.overall if found.rival else None
    players = [curve.overall.mean if curve else float("nan") for curve in (found.floor, found.ceiling)]
    ahead = change(found.comparison.overall if found.comparison else None)
    return Row(
        title(found), (reward(ours), reward(theirs), ahead, *map(_mean, players), Cell(_better(found.comparison)))
    )


def _better(found: Comparison | None) -> str:
    return (found and found.better) or "not clear"


def _mean(value: float) -> Cell:
    return Cell(f"{value:.2f}") if value == value else NOTHING


def curves_of(found: Evaluation) -> dict[str, Curve]:
    """The curve of every arm by its name, the main one first; floor and ceiling are those of the world's players."""
    curves = {arm.name: arm.curve for arm in found.arms}
    ends = ((LOWEST, found.floor), (HIGHEST, found.ceiling))
    return curves | {name: curve for name, curve in ends if curve is not None}


def rewards(found: Evaluation) -> Table:
    """Reward by position of every arm, floor and ceiling."""
    rows = (
        Row(label(name, found), (*map(reward, curve.points), change(curve.gain), reward(curve.overall)), name == MAIN)
        for name, curve in curves_of(found).items()
    )
    head = ("arm", *_tasks(found), "last - first", "all tasks")
    return Table(f"Mean reward and its 95% interval, over {count(found.packs, 'pack')}.", head, tuple(rows))


_OTHER_START = ("attempts", FLOOR, CEILING)
"""Arms that differ from the main one at the first task already: more tries, another player."""


def differences(found: Evaluation) -> Table:
    """The main arm minus each other arm, by position and over all tasks; another model has a table of its own."""
    rows = []
    for arm in beside(found):
        luck = arm.name not in _OTHER_START
        cells = [change(point, luck=luck and not point.position) for point in arm.difference or ()]
        over = change(paired(found.arms[0].rewards, arm.rewards).overall, luck=luck and found.pack_size == 1)
        rows.append(Row(label(arm.name), (*cells, over)))
    caption = (
        f"{subject(found)} minus the arm, pack by pack, and the 95% interval. At task 1 no arm has a note yet: what lies between arms "
        "of one model is luck there, but for more attempts."
    )
    return Table(caption, ("arm", *_tasks(found), "all tasks"), tuple(rows))


def subject(found: Evaluation) -> str:
    """The main arm at the beginning of a sentence."""
    return "The model with its context" if found.rival is None else found.model


def beside(found: Evaluation) -> list[Arm]:
    """The arms that say what the context is worth: all but the main one and another model's."""
    return [arm for arm in found.arms[1:] if arm.difference and arm is not found.rival]


def comparison(found: Comparison) -> Table:
    """Two models on the same packs."""
    sure = Cell(f"{found.at_least.low:+.3f}") if found.at_least.low == found.at_least.low else NOTHING
    row = Row(f"{found.model} minus {found.other}", (*map(change, found.positions), change(found.overall), sure))
    head = ("models", *(f"task {point.position + 1}" for point in found.positions), "all tasks", "at least")
    return Table("Pack by pack, with 95% intervals; at least: the one-sided 95% bound over all tasks.", head, (row,))


@dataclass(frozen=True, slots=True)
class _Quantity:
    """What is shown of a measure."""

    name: str
    value: Callable[[Measure], float | None]
    form: str
    per: Callable[[Measure], int] = lambda one: one.tasks
    """How many it is a mean of, or a share."""


def _share(one: Measure) -> float | None:
    return one.refused / _updates(one) if _updates(one) else None


def _updates(one: Measure) -> int:
    return one.written + one.refused


def _tries(one: Measure) -> int:
    return one.tries


_QUANTITIES = (
    _Quantity("malformed answers", lambda one: one.malformed / one.tries, ".1%", _tries),
    _Quantity("updates refused", _share, ".1%", _updates),
    _Quantity("given up", lambda one: one.aborted / one.tries, ".1%", _tries),
    _Quantity("context, characters", lambda one: one.shown, ",.0f", _tries),
    _Quantity("tries", lambda one: one.tries / one.tasks, ",.1f"),
    _Quantity("calls", lambda one: one.calls, ",.1f"),
    _Quantity("prompt tokens", lambda one: one.prompt_tokens, ",.0f"),
    _Quantity("sampled tokens", lambda one: one.sampled_tokens, ",.0f"),
    _Quantity("seconds", lambda one: one.seconds, ",.2f"),
)


def measures(found: Evaluation) -> Table:
    """What the main arm took, a measure a row, by position."""
    said = found.arms[0].measures
    shown = [quantity for quantity in _QUANTITIES if quantity.name != "tries"]
    rows = (Row(one.name, tuple(_cell(one.value(measure), one.form) for measure in said)) for one in shown)
    head = (label(MAIN, found), *(f"task {one.position + 1}" for one in said))
    return Table("With its context, by position: shares, and means per task.", head, tuple(rows))


def totals(found: Evaluation) -> Table:
    """What every arm took, an arm a row, all positions together."""
    rows = []
    for arm in found.arms:
        if arm.measures:
            cells = (_cell(_over(arm.measures, quantity), quantity.form) for quantity in _QUANTITIES)
            rows.append(Row(label(arm.name, found), tuple(cells), arm.name == MAIN))
    head = ("arm", *(quantity.name for quantity in _QUANTITIES))
    return Table("Each arm, all positions together: shares, and means per task.", head, tuple(rows))


def refusals(found: Evaluation) -> list[str]:
    """Why updates were refused, a sentence for each arm where any was."""
    said = []
    for arm in found.arms:
        reasons: dict[str, int] = {}
        for reason, n in (pair for one in arm.measures for pair in one.reasons.items()):
            reasons[reason] = reasons.get(reason, 0) + n
        if reasons:
            counted = ", ".join(f"{reason} {n:,}" for reason, n in reasons.items())
            said.append(f"Updates refused in the arm {label(arm.name, found)}: {counted}.")
    return said


def _over(said: Sequence[Measure], quantity: _Quantity) -> float | None:
    """All positions together, each as heavy as what it is a mean of; None where a position has none."""
    pairs = [(quantity.value(one), quantity.per(one)) for one in said if quantity.per(one)]
    known = [(value, weight) for value, weight in pairs if value is not None]
    if not known or len(known) < len(pairs):
        return None
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)


def _cell(value: float | None, form: str) -> Cell:
    return Cell("-" if value is None else format(value, form))


def _tasks(found: Evaluation) -> Iterable[str]:
    return (f"task {position + 1}" for position in range(found.pack_size))
