"""`cod context forget`: take everything descended from a bad task out of a file, and learn what remains again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.output import command_line, counted, print_json, say
from cod_agent.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from cod_agent.forgetting import Forgotten
    from cod_agent.memory import Memory
    from cod_agent.memory.removal import Removed
    from cod_agent.models.base import Model


def forget(
    db: options.Db,
    task: Annotated[str | None, typer.Option("--task", metavar="ID", help="The task, wherever it was lived.")] = None,
    position: Annotated[int | None, typer.Option("--position", help="Or a position of one run.")] = None,
    agent: options.Whose = None,
    run: Annotated[str | None, typer.Option("--run", help="Which of its runs; by default all that lived it.")] = None,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Kept with the removal.")] = "",
    text: Annotated[
        list[str] | None,
        typer.Option("--text", help="Take out every text that has this in it, too, wherever it stands; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Who makes the later updates again; left out: that waits.")
    ] = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    exact: options.Exact = None,
    timeout: options.Timeout = None,
    vacuum: Annotated[
        bool, typer.Option(help="Write the file anew, so that nothing is left in its free room either.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and write nothing.")] = False,
    as_json: options.Json = False,
) -> None:
    """Forget a task: its texts, every version of the context that comes from it, and what the model said with one of those in view.

    The runs go on from their last clean version. With a model, the updates of the tasks after it are made again from what was recorded;
    without one that waits, and the same command with --model does it. Rewards, hashes and chains stay: `cod verify` passes.

    Example: cod context forget lake.db --task ticket-17 --reason "an attack" --model openai:gpt-5
    """
    from cod_agent.forgetting import places
    from cod_agent.memory import Memory
    from cod_agent.memory.descent import places_of
    from cod_agent.memory.readonly import look
    from cod_agent.memory.removal import Removal

    if (task is None) == (position is None) and (task is not None or not text):
        raise UsageError("say which task: --task ID, or --position N with --run; or --text TEXT alone")
    asked = position if task is None else task
    with look(db) as conn:
        found = places_of(conn, task, agent, run) if task is not None else None
        owners = _owners(conn, db, agent, run, found, at_all=position is not None)
        if dry_run:
            where = [place for owner in owners for place in places(conn, owner, asked, run)]
            return _would(Removal(conn, where, text or ()).removed, as_json)
    wanted = _Wanted(model, temperature, max_tokens, base_url, api_key, exact, timeout)
    memory = Memory.open(db)
    try:
        done = [
            asyncio.run(_forget(memory, owner, asked, run, reason, tuple(text or ()), wanted, vacuum))
            for owner in owners
        ]
    finally:
        memory.close()
    if as_json:
        return print_json({"db": str(db), "forgotten": [one.json() for one in done]})
    for owner, one in zip(owners, done, strict=True):
        _told(db, one, f"{owner}: " if len(owners) > 1 else "")
    return None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The flags of the model."""

    model: str | None
    temperature: float | None
    max_tokens: int | None
    base_url: str | None
    api_key: str | None
    exact: bool | None
    timeout: float | None


def _owners(
    conn: Any, db: Path, agent: str | None, run: str | None, found: list[tuple[int, int]] | None, *, at_all: bool
) -> list[str]:
    """Whose tasks are forgotten; where it is about a text and no task at all, any agent does."""
    from cod_agent.memory import history

    if found is not None:
        query = "SELECT agent FROM runs WHERE id = ?"
        return sorted({conn.execute(query, (run_id,)).fetchone()[0] for run_id, _ in found})
    chosen = history.find(conn, agent, run)
    if len(chosen) != 1 and (at_all or not chosen):
        raise UsageError(
            f"{db} has {len(chosen)} such runs: say whose position by --agent and --run; "
            f"{command_line('cod', 'context', 'log', db)} lists them"
        )
    return [chosen[0].agent]


async def _forget(
    memory: Memory,
    owner: str,
    task: str | int | None,
    run: str | None,
    reason: str,
    quoting: tuple[str, ...],
    wanted: _Wanted,
    vacuum: bool,
) -> Forgotten:
    from cod_agent import CoDAgent
    from cod_agent.evaluation import release
    from cod_agent.forgetting import places

    def kept(conn: Any) -> tuple[str, str | None, dict[str, Any]]:
        found = places(conn, owner, task, run)
        query = (
            "SELECT name, environment, settings FROM runs WHERE agent = ? AND id = coalesce(?, id) ORDER BY id LIMIT 1"
        )
        row = conn.execute(query, (owner, found[0][0] if found else None)).fetchone()
        return row[0], row[1], json.loads(row[2])

    name, environment, settings = memory.read_sync(kept)
    world, model = _model(environment, wanted)
    known = {key: settings[key] for key in ("max_context", "gate") if key in settings}
    agent = CoDAgent(owner, model=model, memory=memory, environment=world, **known)
    try:
        return await agent.forget(
            task, run=run or (name if isinstance(task, int) else None), reason=reason, quoting=quoting, vacuum=vacuum
        )
    finally:
        await agent.aclose()
        if model is not None:
            await release(model)


def _model(environment: str | None, wanted: _Wanted) -> tuple[Any, Model | None]:
    """The world of the run, as the model talks, if it is one of ours; and the model."""
    from cod_agent.environments import make_world
    from cod_agent.models import resolve
    from cod_agent.models.base import Sampling

    try:
        world = make_world(environment, form="compact") if environment else None
    except UnknownName:
        world = None
    if wanted.model is None:
        return world, None
    given = {"temperature": wanted.temperature, "max_tokens": wanted.max_tokens}
    sampling = Sampling(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    model = resolve(
        wanted.model,
        world=world,
        sampling=sampling,
        base_url=wanted.base_url,
        api_key=wanted.api_key,
        exact=bool(wanted.exact),
        timeout=wanted.timeout,
    )
    if world is not None and environment and model.form != "compact":
        world = make_world(environment, form=model.form)
    return world, model


def _would(found: Removed, as_json: bool) -> None:
    if as_json:
        return print_json({"tasks": found.tasks, "runs": found.runs, "rows": dict(found.rows)})
    say(f"{_tasks(found)} would be forgotten: {_rows(found)}.")
    return None


def _told(db: Path, done: Forgotten, whose: str) -> None:
    say(f"{whose}{_tasks(done.removed)} forgotten: {_rows(done.removed)}.")
    for (agent, run), version in done.derived.items():
        say(f"{agent}, {run}: what remains was learnt again; version {version} is in force.")
    for (agent, run), what in done.waiting.items():
        say(f"{agent}, {run}: it goes on from its last clean version; its later updates wait for {what}.")
    if done.waiting:
        say("Give the same command again with --model, and they are made.")
    if done.lingering:
        say(f"Another program keeps an older state of {db} open: do the same again when it has gone.")


_WORDS = {"feedback": "feedback", "asked": "arguments"}
"""Parts that take no s."""


def _tasks(found: Removed) -> str:
    """How many, and in how many runs they left something."""
    return f"{counted(len(found.tasks), 'task')} in {counted(len(found.runs), 'run')}"


def _rows(found: Removed) -> str:
    rows = (f"{count} {_WORDS[part]}" if part in _WORDS else counted(count, part) for part, count in found.rows.items())
    return ", ".join(rows) or "everything is gone already"
