"""The task commit: solved, judged, updated; each one transaction, each exactly once, each a link in the run's chain.

Functions here run inside a transaction on the writer thread (`Memory.write`). They hold all the state of a run: a process
that dies leaves nothing behind but these rows, and whoever opens the run again reads them and goes on.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from typing import Any

from cod_agent.errors import TaskMismatch, UnknownName, UsageError
from cod_agent.memory import gone, lease, rows, versions
from cod_agent.memory.hashing import canonical, chain, digest, text_hash, value_hash
from cod_agent.tasks import Feedback, Task

NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Run:
    """A row of `runs`."""

    id: int
    agent: str
    name: str
    length: int | None
    """Tasks of a declared pack; None for an open-ended life."""


@dataclass(frozen=True, slots=True)
class Lived:
    """A row of `tasks`, with the episodes that belong to it."""

    id: int
    position: int
    task: Task
    state: str
    answer: str
    feedback: Feedback | None
    reason: str
    solve_id: int | None
    context_id: int | None
    """The context its solve episode started from."""
    fingerprint: str
    """Of the task as it was given: it stays when the task's text is gone."""
    fresh: bool = False
    """Whether it was begun just now: there is no record to look for."""


def open_run(
    conn: sqlite3.Connection,
    agent: str,
    name: str,
    *,
    environment: str | None,
    pack: dict[str, Any] | None,
    length: int | None,
    model: str,
    settings: dict[str, Any],
    start: int | None = None,
) -> Run:
    """The run of that name, made if it is new, with its lease taken. `start`: the context (row id) a new run begins with."""
    row = conn.execute("SELECT id, length FROM runs WHERE agent = ? AND name = ?", (agent, name)).fetchone()
    if row is not None:
        if (
            start is not None
            and conn.execute("SELECT 1 FROM contexts WHERE run_id = ? AND parent_id = ?", (row[0], start)).fetchone()
            is None
        ):
            raise UsageError(
                f"run {name!r} of agent {agent!r} exists and did not begin with that version: name another run for the fork"
            )
        lease.take(conn, row[0], agent, name)
        return Run(row[0], agent, name, row[1])
    said = {"agent": agent, "run": name, "environment": environment, "pack": pack, "length": length}
    said |= {"model": model, "settings": settings}
    row = {"agent": agent, "name": name, "environment": environment, "pack": pack and canonical(pack), "length": length}
    row |= {"model": model, "settings": canonical(settings), "created": time.time()}
    run_id = rows.insert(conn, "runs", row)
    body, origin = "", None
    if start is not None:
        body, *origin = conn.execute(
            "SELECT c.body, r.agent, r.name, c.version FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?",
            (start,),
        ).fetchone()
        if body is None:
            raise versions.lost(origin)
    versions.write(conn, run_id, start, body, [])
    lease.take(conn, run_id, agent, name)
    commit(conn, run_id, "began", None, {**said, "context": text_hash(body), "origin": origin})
    return Run(run_id, agent, name, length)


def find_run(conn: sqlite3.Connection, agent: str, name: str) -> Run:
    """Raises: UnknownName."""
    row = conn.execute("SELECT id, length FROM runs WHERE agent = ? AND name = ?", (agent, name)).fetchone()
    if row is None:
        known = [
            r[0] for r in conn.execute("SELECT name FROM runs WHERE agent = ? ORDER BY id DESC LIMIT 20", (agent,))
        ]
        raise UnknownName.among("run", name, known)
    return Run(row[0], agent, name, row[1])


def commit(
    conn: sqlite3.Connection,
    run_id: int,
    what: str,
    position: int | None,
    said: dict[str, Any],
    *,
    detailed: bool = False,
) -> int:
    """Append a link to the run's chain; returns its number.

    Args:
        detailed: keep `said` in the row: it stands nowhere else.
    """
    row = conn.execute(
        "SELECT seq, chain FROM commits WHERE run_id = ? ORDER BY seq DESC LIMIT 1", (run_id,)
    ).fetchone()
    seq, previous = (row[0] + 1, row[1]) if row else (0, "")
    entry = value_hash({"what": what, "position": position, **said})
    link = {"run_id": run_id, "seq": seq, "what": what, "position": position, "hash": entry, "created": time.time()}
    link |= {"detail": canonical(said) if detailed else None, "chain": chain(previous, entry)}
    rows.insert(conn, "commits", link)
    return int(seq)


def lived(conn: sqlite3.Connection, run_id: int, position: int) -> Lived | None:
    """What is known of a position, or None if it was never begun. Where a text is gone, a word in brackets says why."""
    row = conn.execute(
        "SELECT t.id, t.position, t.body, t.state, t.answer, t.feedback, t.reason, e.id, e.context_id, t.fingerprint, t.name, t.reward"
        " FROM tasks t "
        "LEFT JOIN episodes e ON e.run_id = t.run_id AND e.position = t.position AND e.kind = 'solve' "
        "WHERE t.run_id = ? AND t.position = ?",
        (run_id, position),
    ).fetchone()
    if row is None:
        return None
    row_id, at, body, state, answer, feedback, reason, solve_id, context_id, fingerprint, name, reward = row
    judged = None if feedback is None else Feedback.model_validate_json(feedback)
    task = Task.model_validate_json(body) if body else Task(id=name, prompt=gone.shown(conn, row_id, "task"))
    if answer is None and state != "open":
        answer = gone.shown(conn, row_id, "task", "answer")
    if judged is None and state not in ("open", "solved"):
        lost = NAN if state == "closed" else None  # closed without a reward: it was given up
        judged = Feedback(reward=lost if reward is None else reward, text=gone.shown(conn, row_id, "task", "feedback"))
    return Lived(row_id, at, task, state, answer or "", judged, reason, solve_id, context_id, fingerprint)


def next_position(conn: sqlite3.Connection, run_id: int) -> int:
    return int(
        conn.execute("SELECT coalesce(max(position), -1) + 1 FROM tasks WHERE run_id = ?", (run_id,)).fetchone()[0]
    )


def begin_task(
    conn: sqlite3.Connection, run: Run, position: int, task: Task, given: versions.Given | None = None
) -> tuple[Lived, versions.Context]:
    """The task at a position, with the context its solve episode starts from; begun if it is new.

    Args:
        given: what a new task starts from instead of the newest version; it becomes the newest, unless it says the same.

    Raises:
        TaskMismatch: another task stands there.
    """
    known = lived(conn, run.id, position)
    if known is not None:
        if known.fingerprint != task.fingerprint:
            if known.task.id == task.id:
                raise TaskMismatch(
                    f"position {position} of run {run.name!r} was lived with a task of the same name, {task.id!r}, that had another "
                    "prompt or other data: the world, a file of it or its version changed since. Bring back what it was, or start "
                    "another run"
                )
            raise TaskMismatch(
                f"position {position} of run {run.name!r} was lived with task {known.task.id!r}, not with this {task.id!r}: give "
                "the tasks in the order they had, start another run, or give up a task that stands unfinished with agent.abandon()"
            )
        if known.context_id is not None:
            return known, versions.as_written(run, versions.get(conn, known.context_id))
    lease.hold(conn, run.id)
    before = versions.as_written(run, versions.latest(conn, run.id))
    if given is not None and given.body != before.body:
        before = versions.give(conn, before, given)
    body = task.model_dump_json()
    row = {"run_id": run.id, "position": position, "name": task.id, "fingerprint": task.fingerprint}
    row_id = rows.insert(conn, "tasks", {**row, "body": body, "state": "open"})
    episode_id, _ = begin_episode(conn, run.id, position, "solve", before.id)
    begun = Lived(row_id, position, task, "open", "", None, "", episode_id, before.id, task.fingerprint, fresh=True)
    return begun, before


def begin_episode(conn: sqlite3.Connection, run_id: int, position: int, kind: str, context_id: int) -> tuple[int, bool]:
    """(row id, is it new) of the episode of that kind at that position."""
    row = conn.execute(
        "SELECT id FROM episodes WHERE run_id = ? AND position = ? AND kind = ?", (run_id, position, kind)
    ).fetchone()
    if row is not None:
        return int(row[0]), False
    lease.hold(conn, run_id)
    made = {"run_id": run_id, "position": position, "kind": kind, "context_id": context_id}
    return rows.insert(conn, "episodes", {**made, "state": "live", "started": time.time()}), True


def end_episode(conn: sqlite3.Connection, episode_id: int, state: str, reason: str = "") -> str:
    """Close an episode; returns its digest."""
    made = episode_digest(conn, episode_id)
    ended = {"state": state, "reason": reason, "digest": made, "finished": time.time()}
    rows.update(conn, "episodes", episode_id, ended)
    return made


def episode_digest(conn: sqlite3.Connection, episode_id: int) -> str:
    hashes = conn.execute(
        "SELECT hash FROM calls WHERE episode_id = ? UNION ALL SELECT hash FROM effects WHERE episode_id = ?",
        (episode_id, episode_id),
    )
    return digest(row[0] for row in hashes)


def solved(
    conn: sqlite3.Connection, run: Run, known: Lived, answer: str, *, state: str = "done", reason: str = ""
) -> None:
    """open -> solved."""
    lease.hold(conn, run.id)
    made = end_episode(conn, int(known.solve_id or 0), state, reason)
    rows.update(conn, "tasks", known.id, {"state": "solved", "answer": answer, "reason": reason})
    before = versions.get(conn, int(known.context_id or 0))
    said = {
        "fingerprint": known.fingerprint,
        "answer": text_hash(answer),
        "episode": made,
        "from": [before.version, before.hash],
        "state": state,
        "reason": reason,
        **versions.was_given(conn, before),
    }
    commit(conn, run.id, "solved", known.position, said)


def judged(conn: sqlite3.Connection, run: Run, known: Lived, feedback: Feedback) -> None:
    """solved -> judged."""
    lease.hold(conn, run.id)
    body = feedback.model_dump_json()
    # NaN is no SQL value: the column shows NULL, the feedback's JSON keeps what was said.
    reward = None if feedback.reward is None or feedback.reward != feedback.reward else feedback.reward
    rows.update(conn, "tasks", known.id, {"state": "judged", "reward": reward, "feedback": body})
    commit(conn, run.id, "judged", known.position, {"feedback": text_hash(body)})


def updated(
    conn: sqlite3.Connection,
    run: Run,
    known: Lived,
    episode_id: int,
    body: str,
    sources: list[dict[str, Any]],
    held: str = "",
) -> versions.Context:
    """judged -> updated, with a new version of the context.

    Args:
        held: why no task may be solved with it before somebody decides (`adopt`, `refuse`); "": it is the newest one now.
    """
    lease.hold(conn, run.id)
    made = end_episode(conn, episode_id, "done")
    parent = versions.started_from(conn, episode_id)
    weights = conn.execute(
        "SELECT weights FROM calls WHERE episode_id = ? ORDER BY id DESC LIMIT 1", (episode_id,)
    ).fetchone()
    wrote = {"weights": weights[0] if weights else "", "held": held}
    new = versions.write(conn, run.id, parent.id, body, sources, episode_id=episode_id, **wrote)
    rows.update(conn, "tasks", known.id, {"state": "updated"})
    said = {"episode": made, "from": [parent.version, parent.hash], "version": new.version, "context": new.hash}
    said |= {"sources": sources, "weights": wrote["weights"]}
    # Findings quote the text that was held back. Their hashes are committed, so that they can go with it.
    said |= {"held": text_hash(held), "sources": value_hash(sources)} if held else {}
    commit(conn, run.id, "updated", known.position, said)
    return new


def kept(conn: sqlite3.Connection, run: Run, known: Lived, episode_id: int, reason: str) -> versions.Context:
    """judged -> updated, the last good context staying because the update was refused."""
    lease.hold(conn, run.id)
    made = end_episode(conn, episode_id, "refused", reason)
    rows.update(conn, "tasks", known.id, {"state": "updated"})
    before = versions.started_from(conn, episode_id)
    said = {"episode": made, "from": [before.version, before.hash], "reason": reason}
    commit(conn, run.id, "kept", known.position, said)
    return versions.latest(conn, run.id)


def adopt(conn: sqlite3.Connection, run: Run, source_id: int, why: dict[str, Any]) -> versions.Context:
    """A new version that says what an old one says: one that was held back is accepted, a run goes back, or goes on from what another
    run derived. Nothing is edited: the old version stays where it is.

    Args:
        source_id: row of the version it is made from; its parent from now on. May be another run's.
        why: kept in the commit, for example {"reason": "rollback", "by": "ada"}.
    """
    lease.hold(conn, run.id)
    row = conn.execute(
        "SELECT c.body, c.hash, c.held, c.decided, r.agent, r.name, c.version FROM contexts c JOIN runs r ON r.id = c.run_id"
        " WHERE c.id = ?",
        (source_id,),
    ).fetchone()
    body, hashed, held, decided, *origin = row
    if body is None:
        raise versions.lost(origin)
    new = versions.write(conn, run.id, source_id, body, [{"adopted": origin}])
    if held and not decided:
        rows.update(conn, "contexts", source_id, {"decided": "adopted"})
    said = {"version": new.version, "context": hashed, "of": origin, **why}
    commit(conn, run.id, "adopted", None, said, detailed=True)
    return new


def refuse(conn: sqlite3.Connection, run: Run, context_id: int, why: dict[str, Any]) -> None:
    """A version that was held back will not be adopted.

    Raises:
        UsageError: it was not held back, or is decided.
    """
    lease.hold(conn, run.id)
    version, hashed, held, decided = conn.execute(
        "SELECT version, hash, held, decided FROM contexts WHERE id = ?", (context_id,)
    ).fetchone()
    if not held or decided:
        raise UsageError(
            f"version {version} of run {run.name!r} {f'was {decided}' if decided else 'was not held back'}"
        )
    rows.update(conn, "contexts", context_id, {"decided": "refused"})
    commit(conn, run.id, "refused", None, {"version": version, "context": hashed, **why}, detailed=True)


def closed(conn: sqlite3.Connection, run: Run, known: Lived) -> None:
    """judged -> closed: a task without an update, as the last of a declared pack."""
    lease.hold(conn, run.id)
    rows.update(conn, "tasks", known.id, {"state": "closed"})
    commit(conn, run.id, "closed", known.position, {})
