"""`cod export`: what agents lived, as JSON Lines."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from cod_agent.cli.options import Db
from cod_agent.cli.output import counted, print_json, say
from cod_agent.errors import CodError, UnknownName, UsageError


def export(
    db: Db,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write there, whole or not at all (default: print).")
    ] = None,
    agent: Annotated[str | None, typer.Option("--agent", help="Only of this agent.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Only of runs with this name.")] = None,
    layout: Annotated[
        str,
        typer.Option("--format", metavar="episodes|chat", help="An object an episode, or a conversation a model call."),
    ] = "episodes",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="With episodes: token ids and log-probabilities, where known.")
    ] = False,
    min_reward: Annotated[
        float | None, typer.Option("--min-reward", metavar="R", help="With chat: of tasks that got at least so much.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --out: say what was written as one JSON object.")
    ] = False,
) -> None:
    """Write what agents lived as JSON Lines, for analysis and for training elsewhere.

    The database is only read, in one state of it, and may be in use. What was pruned or forgotten is null, with a word that says so; with
    chat it is skipped, and standard error says how much.

    Example: cod export lake.db --format chat --min-reward 1 --out lake.jsonl
    """
    from cod_agent.memory.export import chat, episodes
    from cod_agent.memory.lines import save

    skipped: Counter[str] = Counter()
    _agree(layout, tokens, min_reward, as_json and out is None)
    found = (
        episodes(db, agent=agent, run=run, tokens=tokens)
        if layout == "episodes"
        else chat(db, skipped, agent=agent, run=run, min_reward=min_reward)
    )
    count = _print(found) if out is None else save(found, out, db)
    for why, number in sorted(skipped.items()):
        say(f"{counted(number, 'call')} skipped: {why}.", err=True)
    if as_json:
        return print_json({"db": str(db), "out": str(out), "format": layout, "lines": count, "skipped": dict(skipped)})
    if out is not None:
        say(f"{counted(count, 'episode' if layout == 'episodes' else 'conversation')} written to {out}.")
    return None


def _agree(layout: str, tokens: bool, min_reward: float | None, json_alone: bool) -> None:
    if layout not in ("episodes", "chat"):
        raise UnknownName.among("format", layout, ["episodes", "chat"])
    if tokens and layout == "chat":
        raise UsageError("--tokens goes with --format episodes: chat has texts only")
    if min_reward is not None and layout == "episodes":
        raise UsageError("--min-reward goes with --format chat: episodes are all written, with their rewards")
    if json_alone:
        raise UsageError("--json goes with --out: without it, standard output is the export itself")


def _print(found: Iterable[dict[str, Any]]) -> int:
    from cod_agent.memory.lines import write

    try:
        return write(found, sys.stdout)
    except OSError as error:
        # What is left in the buffer would be tried again at the end of the process, with a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        reason = "whoever read it has gone" if isinstance(error, BrokenPipeError) else str(error)
        raise CodError(f"the export is not whole, standard output takes no more: {reason}") from error
