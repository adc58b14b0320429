"""Old tasks give up the words of their episodes: requests, answers, tokens, tool results. What was committed stays.

    prune(Memory.open("lake.db"), before=time.time() - 30 * DAY)

Tasks, answers, feedback, rewards, every version of the context, hashes and chains stay: a run goes on, forks and rolls back as
before, and `cod verify` passes. What goes leaves a tombstone and a `pruned` commit in its run's chain. These tasks keep all:

    not settled, or not for long enough     they may still be judged, or their updates made
    the newest of a run that goes on        what an environment remembers is taken from there
    exact ones that no training has read    they are the training set; `trained` and `even_untrained` let them go
    those of a run that is being lived      by another process

Failed attempts of a pruned episode are deleted; nothing names them.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from cod_agent.errors import RunLeased
from cod_agent.memory import lease
from cod_agent.memory.database import Memory
from cod_agent.memory.references import References
from cod_agent.memory.runs import Run
from cod_agent.memory.tombstones import PARTS, bury

DAY = 86400.0
_AT_ONCE = 10
"""Tasks of one transaction: other writers wait for it."""

UNSETTLED = "not settled, or settled later"
NEWEST = "the newest of a run that goes on"
UNTRAINED = "could still be trained on"
LIVED = "its run is being lived"


@dataclass(frozen=True, slots=True)
class Task:
    """One that may go."""

    position: int
    episodes: tuple[int, ...]
    """Rows."""


@dataclass(slots=True)
class Pruned:
    """What went, or would go."""

    tasks: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    """By part: call, effect, message, head."""
    size: int = 0
    """Bytes of the texts that went."""
    kept: Counter[str] = field(default_factory=Counter)
    """Tasks that kept their words, by reason."""

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"tasks": self.tasks, "rows": dict(self.rows), "size": self.size, "kept": dict(self.kept)}


def prune(
    memory: Memory,
    before: float,
    *,
    trained: Collection[str] = (),
    even_untrained: bool = False,
) -> Pruned:
    """Prune the tasks that were settled before a time.

    Args:
        before: seconds since 1970.
        trained: chain hashes of runs as they were trained on (`TrainingRun.chain`): what had been committed by then may go.
        even_untrained: prune what training could still read, too.

    Raises:
        StoreError: see `cod_agent.errors`; what was pruned until then is pruned.
    """
    done, spared = Pruned(), None if even_untrained else frozenset(trained)
    references = memory.read_sync(References)
    for run in memory.read_sync(_runs):
        due = memory.read_sync(lambda conn, run=run: _due(conn, run, before, spared, done.kept))  # type: ignore[misc]
        try:
            for at in range(0, len(due), _AT_ONCE):
                memory.write_sync(_Burial(run, due[at : at + _AT_ONCE], before, references, done))
        except RunLeased:
            done.kept[LIVED] += len(due) - at
    return done


def would_prune(
    conn: sqlite3.Connection, before: float, *, trained: Collection[str] = (), even_untrained: bool = False
) -> Pruned:
    """What `prune` with the same arguments would take out, if nobody lives a run; nothing is written, so that a look is enough."""
    done, spared = Pruned(), None if even_untrained else frozenset(trained)
    references = References(conn)
    for run in _runs(conn):
        if due := _due(conn, run, before, spared, done.kept):
            _Burial(run, due, before, references, done).count(conn)
    return done


def _runs(conn: sqlite3.Connection) -> list[Run]:
    return [Run(*row) for row in conn.execute("SELECT id, agent, name, length FROM runs ORDER BY id").fetchall()]


_TASKS = """
SELECT e.position, max(e.kind = 'solve' AND e.state = 'done'), group_concat(e.id),
  sum((SELECT count(*) FROM calls c WHERE c.episode_id = e.id AND c.inexact = '' AND c.on_policy AND c.sampled_ids IS NOT NULL)),
  sum((SELECT count(*) FROM calls c WHERE c.episode_id = e.id AND NOT EXISTS
    (SELECT 1 FROM tombstones s WHERE s.part = 'call' AND s.row_id = c.id)))
  + sum((SELECT count(*) FROM effects x WHERE x.episode_id = e.id AND x.result IS NOT NULL))
FROM episodes e WHERE e.run_id = ? GROUP BY e.position ORDER BY e.position
"""


def _due(
    conn: sqlite3.Connection, run: Run, before: float, trained: Collection[str] | None, kept: Counter[str]
) -> list[Task]:
    """The tasks of a run that may go; the others are counted with the reason."""
    commits = conn.execute(
        "SELECT seq, what, position, chain, created FROM commits WHERE run_id = ?", (run.id,)
    ).fetchall()
    settled = {row[2]: row for row in commits if row[1] in ("updated", "kept", "closed")}
    known = max((row[0] for row in commits if trained is not None and row[3] in trained), default=-1)
    judged = conn.execute("SELECT max(reward) FROM tasks WHERE run_id = ?", (run.id,)).fetchone()[0] is not None
    tasks = conn.execute(_TASKS, (run.id,)).fetchall()
    newest = max((row[0] for row in tasks if row[1]), default=-1)
    if run.length is not None and len(settled) == run.length:
        newest = run.length
    due = []
    for position, _, episodes, exact, there in tasks:
        commit = settled.get(position)
        if not there:
            continue
        if commit is None or commit[4] >= before:
            kept[UNSETTLED] += 1
        elif position >= newest:
            kept[NEWEST] += 1
        elif exact and judged and trained is not None and commit[0] > known:
            kept[UNTRAINED] += 1
        else:
            due.append(Task(position, tuple(map(int, episodes.split(",")))))
    return due


class _Burial:
    """A few tasks of one run: a job of `Memory.write`."""

    def __init__(self, run: Run, tasks: Sequence[Task], before: float, references: References, done: Pruned) -> None:
        self._run, self._tasks, self._before = run, tasks, before
        self._references, self._done = references, done

    def __call__(self, conn: sqlite3.Connection) -> None:
        """Inside a transaction. Raises: RunLeased."""
        run = self._run
        held = lease.ours(conn, run.id)
        lease.take(conn, run.id, run.agent, run.name)
        rows = self.count(conn)
        why = {"settled before": self._before, "positions": [task.position for task in self._tasks]}
        bury(conn, run.id, "pruned", None, why, rows)
        for task in self._tasks:
            for episode in task.episodes:
                conn.execute("DELETE FROM attempts WHERE episode_id = ?", (episode,))
        if not held:
            lease.release(conn, run.id)

    def count(self, conn: sqlite3.Connection) -> dict[str, list[int]]:
        """The rows that go, which are counted as gone."""
        self._references.update(conn)
        rows: dict[str, list[int]] = {"call": [], "effect": []}
        for task in self._tasks:
            for episode in task.episodes:
                for part, found in rows.items():
                    found += [row[0] for row in conn.execute(_THERE[part], (episode,))]
        rows |= self._references.drop(conn, rows["call"])
        self._done.tasks += len(self._tasks)
        for part, ids in rows.items():
            self._done.rows[part] += len(ids)
            self._done.size += _size(conn, part, ids)
        return rows


_THERE = {
    "call": "SELECT c.id FROM calls c WHERE c.episode_id = ? AND NOT EXISTS "
    "(SELECT 1 FROM tombstones s WHERE s.part = 'call' AND s.row_id = c.id)",
    "effect": "SELECT id FROM effects WHERE episode_id = ? AND result IS NOT NULL",
}
"""Rows of an episode that do not lie buried, by part."""


def _size(conn: sqlite3.Connection, part: str, ids: Sequence[int]) -> int:
    table, columns, _ = PARTS[part]
    query = f"SELECT {' + '.join(f'coalesce(length({column}), 0)' for column in columns)} FROM {table} WHERE id = ?"
    return sum(conn.execute(query, (row_id,)).fetchone()[0] for row_id in ids)
