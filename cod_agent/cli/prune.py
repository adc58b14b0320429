"""`cod prune`: old tasks give up the words of their episodes, and what was committed stays."""

from __future__ import annotations

import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cod_agent.cli.output import counted, print_json, say
from cod_agent.errors import UsageError

_SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def prune(
    db: Annotated[Path, typer.Argument(metavar="DB", help="A run database.")],
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Settled at least so long ago: 12h, 30d, 8w.")
    ],
    trained: Annotated[
        list[Path] | None,
        typer.Option("--trained", metavar="REGISTRY", help="What its checkpoints were trained on may go; repeatable."),
    ] = None,
    even_untrained: Annotated[
        bool, typer.Option("--even-untrained", help="Take what could still be trained on, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and write nothing.")] = False,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Write the file anew afterwards: smaller, the old texts nowhere in it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Take requests, answers, tokens and tool results of old tasks out of a run database.

    Tasks, rewards, contexts, hashes and chains stay, so that runs go on and `cod verify` passes. What training could still read stays,
    too, unless a registry shows that it was trained on.

    Example: cod prune lake.db --older-than 30d --trained runs/registry.db --dry-run
    """
    from rich.filesize import decimal

    from cod_agent.memory.database import Memory
    from cod_agent.memory.prune import prune as take_out
    from cod_agent.memory.prune import would_prune
    from cod_agent.memory.readonly import look

    before = time.time() - _age(older_than)
    chains = {chain for registry in trained or () for chain in _chains(registry)}
    with look(db) as conn:  # it is there, and ours
        done = would_prune(conn, before, trained=chains, even_untrained=even_untrained) if dry_run else None
    if done is None:
        memory = Memory.open(db)
        try:
            done = take_out(memory, before, trained=chains, even_untrained=even_untrained)
            if vacuum:
                memory.vacuum()
        finally:
            memory.close()
    if as_json:
        return print_json({"path": str(db), "dry_run": dry_run, **done.json()})
    rows = ", ".join(counted(count, part) for part, count in done.rows.items() if count)
    verb = "would give" if dry_run else "gave"
    say(f"{counted(done.tasks, 'task')} {verb} up {decimal(done.size)}{f' ({rows})' if rows else ''}.")
    for why, count in done.kept.items():
        say(f"{counted(count, 'task')} {'keeps' if count == 1 else 'keep'} all: {why}.")
    if done.kept["could still be trained on"]:
        say("Name a registry whose checkpoints were trained on them by --trained, or say --even-untrained.")
    if done.tasks and not (dry_run or vacuum):
        say("The room is used again by what comes; --vacuum gives it back to the disk.")
    return None


def _age(said: str) -> float:
    """Seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", said.strip())
    if found is None:
        raise UsageError(f"{said!r} is no age: say a number and m, h, d or w, as in 30d")
    return float(found[1]) * _SECONDS[found[2]]


def _chains(registry: Path) -> list[str]:
    """Chain hashes of the runs that a registry's checkpoints were trained on. (This package knows no more of it than that table.)"""
    from cod_agent.memory.readonly import connect

    try:
        with closing(connect(registry)) as conn:
            return [row[0] for row in conn.execute("SELECT DISTINCT chain FROM training_runs WHERE chain <> ''")]
    except sqlite3.Error as error:
        raise UsageError(f"{registry} is no registry of checkpoints ({error}): check the path") from error
