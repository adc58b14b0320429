"""What `cod eval` prints of a study: for each part reward by position and arm, what the context is worth, what it took.

A terminal is narrow and arms are many: at most four stand beside each other, fewer where there is less room, and the main one in
every table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from cod_agent.cli.output import console, say

if TYPE_CHECKING:
    from cod_agent.evaluation import Comparison, Evaluation, Study
    from cod_agent.evaluation.tables import Cell

MOST = 4
"""Arms beside each other."""
_CELL, _FIRST = 20, 14
"""Characters of a cell with rewards between 0 and 1, and of the column of tasks."""
_NUMBER, _NAME = 10, 22
"""The same of a column of measures, and of their names."""


def tell(study: Study) -> None:
    """Print all of it, but for where the files are."""
    for found in study.evaluations:
        if study.evaluations[1:]:
            say(f"{found.world}, {found.amount}")
        _tell(found)
    if study.evaluations[1:]:
        _together(study)


def _tell(found: Evaluation) -> None:
    from cod_agent.evaluation import tables, words
    from cod_agent.evaluation.result import MAIN

    screen = console()
    for table in by_position(found, screen.width):
        screen.print(table)
    say("mean reward [95% interval]")
    if found.comparison is not None:
        say(f"\n{words.short(MAIN, found)} minus {words.short(found.arms[-1].name, found)}:")
        screen.print(_ahead(found.comparison))
    if tables.beside(found):
        say("\nWhat the context is worth at the last task, beside each arm:")
        screen.print(_worth(found))
    if found.arms[0].measures:
        say("What it took:")
        screen.print(_took(found, screen.width))
    for said in (*words.answers([found]), *tables.refusals(found)):
        say(said)
    say(f"{found.amount}, {words.seeds(found)}, {found.seconds:.1f} s, {found.calls} calls.")


def _together(study: Study) -> None:
    """The parts below each other, at their last task."""
    from cod_agent.evaluation import tables, words

    parts = tables.overview(study.evaluations)
    made = _table((parts.head[0], *(words.cut(name, 24) for name in parts.head[1:-1])), left=True)
    for row in parts.rows:
        made.add_row(Text(row.label), *map(_both, row.cells[:-1]))
    say(f"\n{parts.caption}")
    console().print(made)
    for said in words.answers(study.evaluations):
        say(said)


def by_position(found: Evaluation, width: int = 120) -> Iterator[Table]:
    """Reward by position, a column for each arm; several tables where they do not fit into `width` characters."""
    from cod_agent.evaluation.tables import change, curves_of, reward
    from cod_agent.evaluation.words import cut, short

    cells: dict[str, list[str]] = {}
    for name, curve in curves_of(found).items():
        cells[name] = [_both(cell) for cell in (*map(reward, curve.points), change(curve.gain))]
    room = max([_CELL, *(len(cell) for column in cells.values() for cell in column)])
    main, *rest = cells
    beside = min(MOST, (width - _FIRST) // (room + 3)) - 1
    starts = range(0, max(1, len(rest)), max(1, beside))
    # Where rewards are so large that no two arms fit, each has a table of its own.
    groups = [(main, *rest[at : at + beside]) for at in starts] if beside > 0 else [(name,) for name in cells]
    for names in groups:
        made = _table(("task", *("\n".join(wrap(cut(short(name, found), 3 * room), room)) for name in names)), bold=1)
        for position in range(found.pack_size):
            made.add_row(str(position + 1), *(cells[name][position] for name in names))
        made.add_section()
        made.add_row("last - first", *(cells[name][-1] for name in names))
        yield made


def _ahead(found: Comparison) -> Table:
    """One model minus the other, by position and over all tasks."""
    from cod_agent.evaluation.tables import change

    made = _table(("task", "difference"))
    for point in found.positions:
        made.add_row(str(point.position + 1), _both(change(point)))
    made.add_section()
    made.add_row("all tasks", _both(change(found.overall)))
    return made


def _worth(found: Evaluation) -> Table:
    """What the main arm is ahead of each other one, at the last task."""
    from cod_agent.evaluation.result import MAIN
    from cod_agent.evaluation.tables import beside, change
    from cod_agent.evaluation.words import cut, short

    made = _table(("arm", f"{cut(short(MAIN, found), 24)} minus it"), left=True)
    for arm in beside(found):
        made.add_row(Text(arm.name), _both(change(arm.difference[-1] if arm.difference else None)))
    return made


def _took(found: Evaluation, width: int) -> Table:
    """What the main arm took, by position; of many positions as many as fit, from the first to the last."""
    from cod_agent.evaluation.tables import measures

    said = measures(found)
    last, room = len(said.head) - 2, max(2, (width - _NAME) // _NUMBER)
    shown = [*range(last + 1)] if last < room else sorted({round(last * at / (room - 1)) for at in range(room)})
    made = _table((said.head[0], *(said.head[at + 1] for at in shown)), left=True)
    for row in said.rows:
        made.add_row(row.label, *(row.cells[at].mean for at in shown))
    return made


def _table(head: Sequence[str], *, left: bool = False, bold: int | None = None) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        side: Literal["left", "right"] = "left" if left and not number else "right"
        made.add_column(
            Text(name), justify=side, style="bold" if number == bold else "", no_wrap=bold is not None, overflow="fold"
        )
    return made


def _both(cell: Cell) -> str:
    return f"{cell.mean} {cell.range}".rstrip()
