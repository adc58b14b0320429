"""`cod verify`: does the file still say what was recorded?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cod_agent.cli.output import print_json


def verify(
    db: Annotated[Path, typer.Argument(metavar="DB", help="A run database.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Rebuild every request from its parts and check every hash and chain of a run database.

    Exit code 0: all agrees; 1: something does not, and what it is comes first. Nothing is written.

    Example: cod verify lake.db
    """
    from cod_agent.memory.verify import verify as check

    report = check(db)
    if as_json:
        print_json(report.json())
        if not report.ok:
            raise typer.Exit(1)
        return
    report.require()
    counts = ", ".join(f"{count} {what}" for what, count in report.counts.items())
    typer.echo(f"{db} agrees with itself: {counts}; {report.requests} requests rebuilt.")
    if report.pruned:
        typer.echo(f"{report.pruned} parts were pruned: their hashes stand for them.")
