"""What clients may look at: agents, runs, versions of contexts, places. Nothing here writes, nothing reads without a bound."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

from cod_agent.errors import UnknownName
from cod_agent.host import inbox, schema
from cod_agent.memory import read, runs
from cod_agent.trust import review


def agents(conn: sqlite3.Connection, after: str, limit: int) -> schema.Agents:
    """Agents by name, after one of them."""
    rows = conn.execute(
        "SELECT agent, count(*), sum((SELECT count(*) FROM tasks t WHERE t.run_id = r.id)) FROM runs r "
        "WHERE agent > ? GROUP BY agent ORDER BY agent LIMIT ?",
        (after, limit + 1),
    ).fetchall()
    lines = [schema.AgentLine(agent=name, runs=n, tasks=tasks) for name, n, tasks in rows[:limit]]
    return schema.Agents(agents=lines, next=lines[-1].agent if len(rows) > limit else None)


def runs_of(conn: sqlite3.Connection, agent: str, after: int, limit: int, waiting: Callable[[str], int]) -> schema.Runs:
    """An agent's runs in the order they began.

    Raises:
        UnknownName: no such agent.
    """
    _known(conn, agent)
    rows = conn.execute(
        "SELECT r.id, r.name, r.environment, (SELECT count(*) FROM tasks t WHERE t.run_id = r.id),"
        " (SELECT avg(t.reward) FROM tasks t WHERE t.run_id = r.id),"
        " (SELECT count(*) - 1 FROM contexts c WHERE c.run_id = r.id)"
        " FROM runs r WHERE r.agent = ? AND r.id > ? ORDER BY r.id LIMIT ?",
        (agent, after, limit + 1),
    ).fetchall()
    lines = [
        schema.RunLine(run=name, environment=world, tasks=tasks, mean_reward=mean, versions=n, waiting=waiting(name))
        for _, name, world, tasks, mean, n in rows[:limit]
    ]
    return schema.Runs(agent=agent, runs=lines, next=rows[limit - 1][0] if len(rows) > limit else None)


def contexts(conn: sqlite3.Connection, agent: str, run: str, after: int, limit: int) -> schema.Contexts:
    """The versions of a run's context, each with the weights that wrote it.

    Raises:
        UnknownName: no such agent or run.
    """
    rows = _versions(conn, agent, run, "c.version > ? ORDER BY c.version LIMIT ?", (after, limit + 1))
    lines = [schema.VersionLine(**row) for row, _ in rows[:limit]]
    return schema.Contexts(agent=agent, run=run, versions=lines, next=lines[-1].version if len(rows) > limit else None)


def context(conn: sqlite3.Connection, agent: str, run: str, version: int | None) -> schema.Context:
    """One version, the newest in force if no number is given.

    Raises:
        UnknownName: no such agent, run or version.
    """
    rows = _versions(
        conn,
        agent,
        run,
        "(c.version = ? OR (? IS NULL AND c.held = '')) ORDER BY c.version DESC LIMIT 1",
        (version, version),
    )
    if not rows:
        raise read.unknown_version(conn, runs.find_run(conn, agent, run).id, version)
    return schema.Context(agent=agent, run=run, context=rows[0][1], **rows[0][0])


def held(conn: sqlite3.Connection, agent: str, run: str, after: int, limit: int) -> schema.HeldVersions:
    """The versions of a run that wait for a decision, oldest first.

    Raises:
        UnknownName: no such agent or run.
    """
    _known(conn, agent)
    found = [one for one in review.held(conn, runs.find_run(conn, agent, run)) if one.version > after]
    names = ("version", "position", "reason", "head", "diff", "moved_on")
    lines = [schema.HeldLine(context=one.body, **{name: getattr(one, name) for name in names}) for one in found[:limit]]
    return schema.HeldVersions(agent=agent, run=run, held=lines, next=lines[-1].version if len(found) > limit else None)


def place(conn: sqlite3.Connection, agent: str, run: str, position: int) -> schema.Place:
    """A position, lived, under way or waiting.

    Raises:
        UnknownName: nothing stands there.
    """
    where: dict[str, Any] = {"agent": agent, "run": run, "position": position, "trouble": None}
    queued = inbox.waiting(conn, agent, run, position)
    try:
        found = runs.find_run(conn, agent, run)
        known = read.position(conn, found, position)
    except UnknownName:
        if queued is None:
            _known(conn, agent)
            raise
        given = schema.GivenTask(**queued.model_dump())
        return schema.Place(**where, state="queued", task=given, outcome=None)
    lived = None if known.state == "open" else schema.lived(agent, read.outcome(conn, found, position))
    given = schema.GivenTask(**known.task.model_dump())
    return schema.Place.model_validate({**where, "state": known.state, "task": given, "outcome": lived})


def _known(conn: sqlite3.Connection, agent: str) -> None:
    if conn.execute("SELECT 1 FROM runs WHERE agent = ? LIMIT 1", (agent,)).fetchone() is None:
        few = [row[0] for row in conn.execute("SELECT DISTINCT agent FROM runs ORDER BY id DESC LIMIT 20")]
        raise UnknownName.among("agent", agent, few)


def _versions(
    conn: sqlite3.Connection, agent: str, run: str, which: str, values: tuple[Any, ...]
) -> list[tuple[dict[str, Any], str]]:
    _known(conn, agent)
    found = runs.find_run(conn, agent, run)
    rows = conn.execute(
        "SELECT c.version, e.position, p.version, c.hash, c.weights, c.created, c.held, c.decided, c.body FROM contexts c "
        "LEFT JOIN episodes e ON e.id = c.episode_id LEFT JOIN contexts p ON p.id = c.parent_id "
        f"WHERE c.run_id = ? AND {which}",
        (found.id, *values),
    )
    names = ("version", "position", "parent", "hash", "weights", "created", "held", "decided")
    return [(dict(zip(names, row, strict=False)), row[8] or "") for row in rows]
