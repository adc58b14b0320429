"""`cod backup`: a copy of a run database while agents live in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cod_agent.cli.output import Progress, counted, print_json, say


def backup(
    db: Annotated[Path, typer.Argument(metavar="DB", help="A run database, in use or not.")],
    to: Annotated[Path, typer.Argument(metavar="TO", help="The file of the copy.")],
    force: Annotated[bool, typer.Option("--force", help="Replace TO if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Copy a run database, verify the copy, and only then give it its name.

    Agents go on meanwhile; the copy says what the file said when it was begun.

    Example: cod backup lake.db copies/lake.db
    """
    from rich.filesize import decimal

    from cod_agent.memory.backup import backup as copy

    with Progress(0, "copied pages") as bar:
        report = copy(db, to, force=force, progress=bar.at)
    size = to.stat().st_size
    if as_json:
        return print_json({**report.json(), "from": str(db), "size": size})
    counts = ", ".join(counted(report.counts.get(f"{what}s", 0), what) for what in ("run", "task", "context", "call"))
    say(f"{to} is a copy of {db} ({decimal(size)}) and agrees with itself: {counts}.")
    return None
