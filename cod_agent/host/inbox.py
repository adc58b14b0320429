"""Tasks that were accepted and are not begun: on disk before the client hears of it, in the run database itself.

A position is given out in the transaction that keeps the task, so that what a client was told still holds after kill -9.
`host_inbox` holds a task until the run has it; `host_keys` keeps which position an Idempotency-Key meant. The tables belong to
the service alone: the runtime does not read them.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from cod_agent.errors import TaskMismatch, UsageError
from cod_agent.memory import lease
from cod_agent.tasks import Feedback, Task

_TABLES = (
    """CREATE TABLE IF NOT EXISTS host_inbox (
      agent TEXT NOT NULL, run TEXT NOT NULL, position INTEGER NOT NULL, fingerprint TEXT NOT NULL, body TEXT NOT NULL,
      created REAL NOT NULL, PRIMARY KEY (agent, run, position)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE IF NOT EXISTS host_keys (
      agent TEXT NOT NULL, run TEXT NOT NULL, key TEXT NOT NULL, position INTEGER NOT NULL,
      PRIMARY KEY (agent, run, key)) STRICT, WITHOUT ROWID""",
)

MARK = "host"
"""The key in a run's settings by which the service knows its own."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a task stands that was handed in."""

    position: int
    state: str
    """queued, or the state its run has it in."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Something to go on with: a task to solve, or an update that is due."""

    agent: str
    run: str
    position: int
    task: Task
    feedback: Feedback | None = None


def make(conn: sqlite3.Connection) -> None:
    """The tables, if the file has none yet."""
    for table in _TABLES:
        conn.execute(table)


def accept(
    conn: sqlite3.Connection,
    agent: str,
    run: str,
    task: Task,
    *,
    environment: str | None,
    position: int | None = None,
    key: str | None = None,
) -> Kept:
    """Keep a task at its position: the one asked for, the one its key meant before, or else the next.

    Raises:
        UsageError: the position is further than the next one, or the run belongs to another world.
        TaskMismatch: another task stands there, or the key meant another position.
        RunLeased: another process lives the run.
    """
    known = conn.execute("SELECT id, environment FROM runs WHERE agent = ? AND name = ?", (agent, run)).fetchone()
    begun, run_id = -1, None if known is None else int(known[0])
    if run_id is not None:
        if known[1] != environment:
            raise UsageError(
                f"run {run!r} of agent {agent!r} lives in {known[1] or 'no world'}, and this service in "
                f"{environment or 'none'}: name another run"
            )
        if not lease.ours(conn, run_id):
            lease.take(conn, run_id, agent, run)
        begun = conn.execute("SELECT coalesce(max(position), -1) FROM tasks WHERE run_id = ?", (run_id,)).fetchone()[0]
    where = (agent, run)
    conn.execute("DELETE FROM host_inbox WHERE agent = ? AND run = ? AND position <= ?", (*where, begun))
    last = conn.execute("SELECT max(position) FROM host_inbox WHERE agent = ? AND run = ?", where).fetchone()[0]
    following = (begun if last is None else last) + 1
    meant = None if key is None else _meant(conn, where, key, position)
    at = meant if meant is not None else position if position is not None else following
    if at > following:
        raise UsageError(f"run {run!r} has not come to position {at} yet: the next one is {following}")
    if at < following:
        kept = _standing(conn, where, run_id, at, task)
    else:
        row = (*where, at, task.fingerprint, task.model_dump_json(), time.time())
        conn.execute("INSERT INTO host_inbox VALUES (?, ?, ?, ?, ?, ?)", row)
        kept = Kept(at, "queued")
    if key is not None and meant is None:
        conn.execute("INSERT INTO host_keys VALUES (?, ?, ?, ?)", (*where, key, at))
    return kept


def _meant(conn: sqlite3.Connection, where: tuple[str, str], key: str, position: int | None) -> int | None:
    row = conn.execute(
        "SELECT position FROM host_keys WHERE agent = ? AND run = ? AND key = ?", (*where, key)
    ).fetchone()
    if row is None:
        return None
    if position is not None and position != row[0]:
        raise TaskMismatch(
            f"this Idempotency-Key meant position {row[0]} before, not {position}: a task has a key of its own"
        )
    return int(row[0])


def _standing(conn: sqlite3.Connection, where: tuple[str, str], run_id: int | None, at: int, task: Task) -> Kept:
    """What stands at a position that was given out before."""
    row = (
        conn.execute(
            "SELECT fingerprint, state, name FROM tasks WHERE run_id = ? AND position = ?", (run_id, at)
        ).fetchone()
        or conn.execute(
            "SELECT fingerprint, 'queued', '' FROM host_inbox WHERE agent = ? AND run = ? AND position = ?",
            (*where, at),
        ).fetchone()
    )
    if row[0] != task.fingerprint:
        raise TaskMismatch(
            f"another task stands at position {at} of run {where[1]!r}{f' ({row[2]!r})' if row[2] else ''}, not this {task.id!r}: "
            "repeat a request as it was, or leave position and Idempotency-Key out for a new task"
        )
    return Kept(at, row[1])


def waiting(conn: sqlite3.Connection, agent: str, run: str, position: int) -> Task | None:
    """The task that waits at a position."""
    row = conn.execute(
        "SELECT body FROM host_inbox WHERE agent = ? AND run = ? AND position = ?", (agent, run, position)
    ).fetchone()
    return _task(row[0]) if row else None


def unfinished(conn: sqlite3.Connection, environment: str | None) -> list[Unfinished]:
    """What a service that died, or was stopped, left to be done in the same world; by run, in order."""
    begun = conn.execute(
        "SELECT r.agent, r.name, t.position, t.body, t.feedback FROM tasks t JOIN runs r ON r.id = t.run_id "
        "WHERE t.state IN ('open', 'judged') AND json_type(r.settings, ?) IS NOT NULL AND r.environment IS ? "
        "ORDER BY r.id, t.position",
        (f"$.{MARK}", environment),
    )
    due = [
        Unfinished(agent, run, position, _task(body), feedback and Feedback.model_validate_json(feedback))
        for agent, run, position, body, feedback in begun
    ]
    queued = conn.execute(
        "SELECT i.agent, i.run, i.position, i.body FROM host_inbox i "
        "LEFT JOIN runs r ON r.agent = i.agent AND r.name = i.run "
        "LEFT JOIN tasks t ON t.run_id = r.id AND t.position = i.position "
        "WHERE t.id IS NULL AND (r.id IS NULL OR r.environment IS ?) ORDER BY i.agent, i.run, i.position",
        (environment,),
    )
    return due + [Unfinished(agent, run, position, _task(body)) for agent, run, position, body in queued]


def _task(body: str) -> Task:
    return Task.model_validate_json(body)


def writable(conn: sqlite3.Connection) -> None:
    """Write and take back a row, so that a full disk is found out before a client finds it out."""
    conn.execute("INSERT INTO host_keys VALUES ('', '', '', 0)")
    conn.execute("DELETE FROM host_keys WHERE agent = ''")
