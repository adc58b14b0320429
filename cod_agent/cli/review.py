"""`cod context review`, `canary`, `rollback`, `fork`, `blame`: what may be in force, who decided, and where each line is from.

Deciding appends to the run's history and edits nothing; it takes the run's lease, so that nobody lives the run meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cod_agent.cli import options
from cod_agent.cli.output import command_line, console, print_json, say
from cod_agent.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from cod_agent.evaluation import Plan
    from cod_agent.memory import Memory
    from cod_agent.memory.history import RunSummary
    from cod_agent.memory.runs import Run
    from cod_agent.trust.blame import Line
    from cod_agent.trust.canary import Trial
    from cod_agent.trust.review import Held

T = TypeVar("T")
Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept with the decision.")]
Version = Annotated[int, typer.Option("--version", help="Which version.")]


def review(
    db: options.Db,
    agent: options.Whose = None,
    run: options.OfRun = None,
    accept: Annotated[int | None, typer.Option("--accept", metavar="VERSION", help="Put it in force.")] = None,
    refuse: Annotated[
        int | None, typer.Option("--refuse", metavar="VERSION", help="It will not come in force.")
    ] = None,
    why: Why = "",
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Accept it although another version came in force since: what that learned is gone."
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the versions that the write gate holds back, or decide about one.

    Example: cod context review lake.db --accept 3 --why "read it, it is so"
    """
    from cod_agent.memory import runs
    from cod_agent.memory.readonly import look
    from cod_agent.trust import review as decisions

    if accept is not None and refuse is not None:
        raise UsageError("one decision at a time: --accept or --refuse")
    if accept is not None:
        made = _decide(
            db,
            agent,
            run,
            lambda conn, of: decisions.accept(conn, of, accept, decisions.said("accepted", why), force=force),
        )
        return _told(
            as_json,
            {"accepted": accept, "version": made.version},
            f"version {accept} is in force, as version {made.version}",
        )
    if refuse is not None:
        _decide(db, agent, run, lambda conn, of: decisions.refuse(conn, of, refuse, decisions.said("refused", why)))
        return _told(as_json, {"refused": refuse}, f"version {refuse} will not come in force")
    with look(db) as conn:
        found = []
        for one in _runs(conn, agent, run):
            known = runs.find_run(conn, one.agent, one.name)
            found += [(one, waiting) for waiting in decisions.held(conn, known)]
    if as_json:
        return print_json({"held": [{"agent": one.agent, "run": one.name, **waiting.json()} for one, waiting in found]})
    for one, waiting in found:
        _show(db, one, waiting)
    return say(f"{len(found)} {'version waits' if len(found) == 1 else 'versions wait'} for a decision")


def canary(
    db: options.Db,
    agent: options.Whose = None,
    run: options.OfRun = None,
    tasks: Annotated[
        int, typer.Option("--tasks", min=1, help="How many of the run's newest tasks are lived again.")
    ] = 4,
    world: Annotated[
        str | None, typer.Option("--world", help="Of the tasks; left out: what the run was made with.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Who lives them; left out: what the run was made with.")
    ] = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    as_json: options.Json = False,
) -> None:
    """Try what is held back on tasks the run has lived, beside the version in force: adopted if its mean reward is not lower, or refused.

    Example: cod context canary lake.db --tasks 4
    """
    from cod_agent.evaluation import release, set_up
    from cod_agent.memory import Memory
    from cod_agent.memory.readonly import look

    with look(db) as conn:
        chosen = _one(conn, db, agent, run)
        again = [row[0] for row in conn.execute(_NEWEST, (chosen.id, tasks)).fetchall()][::-1]
    memory = Memory.open(db)

    async def work() -> list[Trial]:
        _, environment, found = set_up(_plan(memory, chosen, world, model, base_url), api_key=api_key)
        try:
            return await _trials(memory, chosen, again, environment, found)
        finally:
            await release(found)

    try:
        trials = asyncio.run(work())
    finally:
        memory.close()
    if as_json:
        said = [
            {"version": one.version, "rewards": one.rewards, "adopted": one.adopted, "why": one.reason}
            for one in trials
        ]
        return print_json({"trials": said})
    for trial in trials:
        what = {True: "adopted", False: "refused", None: "still held back"}[trial.adopted]
        say(f"version {trial.version}: {what} ({trial.reason})")
    return say(f"{len(trials)} tried") if len(trials) != 1 else None


_NEWEST = "SELECT body FROM tasks WHERE run_id = ? AND body IS NOT NULL ORDER BY position DESC LIMIT ?"


def rollback(
    db: options.Db,
    version: Version,
    agent: options.Whose = None,
    run: options.OfRun = None,
    why: Why = "",
    as_json: options.Json = False,
) -> None:
    """Go back to what an older version says. Nothing is lost: it becomes the newest one.

    Example: cod context rollback lake.db --version 2 --why "3 was wrong"
    """
    from cod_agent.trust import review as decisions

    made = _decide(
        db, agent, run, lambda conn, of: decisions.rollback(conn, of, version, decisions.said("rollback", why))
    )
    _told(
        as_json,
        {"rollback": version, "version": made.version},
        f"version {made.version} is in force, and says what {version} says",
    )


def fork(
    db: options.Db,
    version: Version,
    to: Annotated[str, typer.Option("--to", metavar="RUN", help="The new run's name.")],
    agent: options.Whose = None,
    run: options.OfRun = None,
    as_json: options.Json = False,
) -> None:
    """Begin another run of the agent with a version of this one, which is not touched.

    Example: cod context fork lake.db --version 2 --to trial
    """
    from cod_agent.memory import read, runs

    def begin(conn: sqlite3.Connection, of: Run) -> None:
        start = read.version_id(conn, of.agent, of.name, version)
        if conn.execute("SELECT 1 FROM runs WHERE agent = ? AND name = ?", (of.agent, to)).fetchone():
            raise UsageError(f"agent {of.agent!r} has a run {to!r} already: give the fork another name with --to")
        if conn.execute("SELECT body IS NULL FROM contexts WHERE id = ?", (start,)).fetchone()[0]:
            raise UsageError(f"version {version} of run {of.name!r} was forgotten or pruned: its text is gone")
        environment, model, settings = conn.execute(
            "SELECT environment, model, settings FROM runs WHERE id = ?", (of.id,)
        ).fetchone()
        kept = {
            name: value for name, value in json.loads(settings).items() if name in ("max_context", "updates", "gate")
        }
        made = runs.open_run(
            conn, of.agent, to, environment=environment, pack=None, length=None, model=model, settings=kept, start=start
        )
        lease.release(conn, made.id)

    from cod_agent.memory import lease

    _decide(db, agent, run, begin, leased=False)
    _told(as_json, {"run": to, "from": version}, f"run {to} begins with version {version}; live it with run={to!r}")


def blame(
    db: options.Db,
    agent: options.Whose = None,
    run: options.OfRun = None,
    version: Annotated[int | None, typer.Option("--version", help="Which; the newest in force if left out.")] = None,
    as_json: options.Json = False,
) -> None:
    """Show beside each line of a context which task it is from, and whose words it is.

    Example: cod context blame lake.db --version 3
    """
    from cod_agent.memory import history, read
    from cod_agent.memory.readonly import look
    from cod_agent.trust.blame import blame as lines_of

    with look(db) as conn:
        chosen = _one(conn, db, agent, run)
        found = history.version(conn, chosen, version)
        lines = lines_of(conn, read.version_id(conn, chosen.agent, chosen.name, found.version))
        wrote = dict(conn.execute(_WROTE, (chosen.id,)).fetchall())
    if as_json:
        said = [{**line.json(), "version": None if line.run else wrote.get(line.position)} for line in lines]
        return print_json({"agent": chosen.agent, "run": chosen.name, "version": found.version, "lines": said})
    return console().print(_blamed(lines, wrote))


_WROTE = "SELECT e.position, c.version FROM contexts c JOIN episodes e ON e.id = c.episode_id WHERE c.run_id = ?"


def _blamed(lines: tuple[Line, ...], wrote: dict[int, int]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cod_agent.trust.plain import visible

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("version", "task", "origin"):
        table.add_column(name, justify="left" if name == "origin" else "right", no_wrap=True)
    table.add_column("line", overflow="fold")
    for line in lines:
        task = "given" if line.position is None else str(line.position)
        version = "" if line.run or line.position is None else str(wrote.get(line.position, ""))
        where = f"{line.origin}, {' '.join(line.run)}" if line.run else line.origin
        table.add_row(version, task, Text(where), Text(visible(line.text)))
    return table


def _show(db: Path, one: RunSummary, waiting: Held) -> None:

    said = f"version {waiting.version} of {one.agent}, {one.name}, written after task {waiting.position}"
    say(f"{said}; version {waiting.head} is in force")
    for line in [*(map(str, waiting.findings)), *([] if waiting.findings else [waiting.reason])]:
        say(f"  {line}")
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in waiting.diff.splitlines():
        console().print(line, style=styles.get(line[:1], ""), soft_wrap=True)
    quotes = sorted({line.origin for line in waiting.lines if line.origin not in ("model", "context")})
    if quotes:
        say(f"It quotes: {', '.join(quotes)} (cod context blame --version {waiting.version} says where)")
    if waiting.moved_on:
        say(f"It was not made from version {waiting.head}: accepting it undoes that (--force)")
    base = ["cod", "context", "review", db, "--agent", one.agent, "--run", one.name]
    say(f"Decide: {command_line(*base, '--accept', waiting.version)} (or --refuse)\n")


def _told(as_json: bool, said: dict[str, Any], words: str) -> None:
    if as_json:
        print_json(said)
    else:
        say(words)


def _runs(conn: sqlite3.Connection, agent: str | None, run: str | None) -> list[RunSummary]:
    from cod_agent.memory import history

    return history.find(conn, agent, run)


def _one(conn: sqlite3.Connection, db: Path, agent: str | None, run: str | None) -> RunSummary:
    """The run that is meant. Raises: UsageError, where there are several."""
    from cod_agent.memory import history

    found = history.meant(_runs(conn, agent, run))
    if not found:
        raise UnknownName(f"{db} holds no runs yet")
    if len(found) > 1:
        names = ", ".join(f"{one.agent} {one.name}" for one in found[:3]) + (", ..." if found[3:] else "")
        raise UsageError(
            f"{db} has {len(found)} runs ({names}): say which by --agent and --run; "
            f"{command_line('cod', 'context', 'log', db)} lists them"
        )
    return found[0]


def _decide(
    db: Path,
    agent: str | None,
    run: str | None,
    decision: Callable[[sqlite3.Connection, Run], T],
    *,
    leased: bool = True,
) -> T:
    """Make a decision about the run that is meant, with its lease."""
    from cod_agent.memory import Memory, lease, runs
    from cod_agent.memory.readonly import look

    with look(db) as conn:
        chosen = _one(conn, db, agent, run)

    def work(conn: sqlite3.Connection) -> T:
        of = runs.find_run(conn, chosen.agent, chosen.name)
        if leased:
            lease.take(conn, of.id, of.agent, of.name)
        made = decision(conn, of)
        lease.release(conn, of.id)
        return made

    memory = Memory.open(db)
    try:
        return memory.write_sync(work)
    finally:
        memory.close()


def _plan(memory: Memory, chosen: RunSummary, world: str | None, model: str | None, base_url: str | None) -> Plan:
    from dataclasses import replace

    from cod_agent.evaluation import Plan, kept_plan

    flags = (("world", world), ("model", model), ("base_url", base_url))
    given: dict[str, Any] = {name: value for name, value in flags if value}
    try:
        return replace(kept_plan(memory, chosen.name), **given)
    except UsageError:
        if world is None or model is None:
            raise UsageError(
                f"run {chosen.name!r} was not made by a command, so that nothing says what its tasks act on and who lives them: give "
                "--world and --model"
            ) from None
        return Plan(**given)


async def _trials(memory: Memory, chosen: RunSummary, tasks: list[str], environment: Any, model: Any) -> list[Trial]:
    from cod_agent.agent import CoDAgent
    from cod_agent.tasks import Task
    from cod_agent.trust.write_gate import WriteGate

    gate = WriteGate(canaries=[Task.model_validate_json(body) for body in tasks])
    async with CoDAgent(chosen.agent, model=model, memory=memory, environment=environment, gate=gate) as living:
        return await living.review(run=chosen.name).try_held()


__all__ = ["blame", "canary", "fork", "review", "rollback"]
