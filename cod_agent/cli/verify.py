"""`cod verify`: does the file still say what was recorded? `cod anchor`: what tells it, from outside, how far the file had come."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cod_agent.cli.options import Db, Json
from cod_agent.cli.output import counted, print_json, say


def verify(
    db: Db,
    anchor: Annotated[
        Path | None, typer.Option("--anchor", metavar="FILE", help="Also compare with what `cod anchor` noted there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rebuild every request from its parts and check every row, hash and chain of a run database.

    Exit code 0: all agrees; 1: something does not, and what it is comes first. Nothing is written.

    Example: cod verify lake.db --anchor /mnt/elsewhere/lake.anchor
    """
    from cod_agent.memory.verify import verify as check

    report = check(db, anchor)
    if as_json:
        print_json(report.json())
        if not report.ok:
            raise typer.Exit(1)
        return
    report.require()
    counts = ", ".join(counted(count, table.removesuffix("s")) for table, count in report.counts.items())
    say(f"{db} agrees with itself: {counts}; {counted(report.requests, 'request')} rebuilt.")
    if report.pruned:
        say(f"{counted(report.pruned, 'part')} pruned or forgotten: hashes stand for what is gone.")
    if anchor is not None:
        say(f"It holds all that {anchor} knows: {counted(report.anchored, 'link')}.")


def anchor(
    db: Db,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to note it: on another disk or machine.")],
    as_json: Json = False,
) -> None:
    """Note how far each run of a file has come, in a text file elsewhere, which `cod verify --anchor` compares it with.

    Nothing inside a file can tell that its newest commits were cut off, or that all of it was exchanged. Call it from time to time, or
    let `cod run --anchor FILE` do it after each task. Runs that did not move since are left out.

    Example: cod anchor lake.db /mnt/elsewhere/lake.anchor
    """
    from cod_agent.memory.anchor import Anchor, check_place
    from cod_agent.memory.readonly import look

    check_place(file, db)
    with look(db) as conn:
        noted = Anchor(file).note(conn)
    if as_json:
        return print_json({"db": str(db), "anchor": str(file), "runs": noted})
    say(f"{counted(noted, 'run')} noted in {file}." if noted else f"{file} knows all of it already.")
    return None
