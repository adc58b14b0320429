"""Runs of one file copied into another: lives that were lived apart (on another machine, by another worker) become one record.

    merge(Memory.open("runs.db"), "from-worker-3.db")

Rows get new ids, what names them stays (agent, run, version, position, request, hash), and content that both files have is stored once.
Nothing is decided: a run that both have must be the same one. Where one file has everything the other has, and more, it went on from
there and wins; merging twice changes nothing. Two different lives of one name are refused.

What was pruned or forgotten there is gone here, too, with its tombstones: of the run itself all of it, of the messages that runs
share what no call needs here. Such a file is copied in one transaction, as its runs' tombstones may stand for each other's messages.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cod_agent.errors import UsageError
from cod_agent.memory import lease, rows
from cod_agent.memory.content import Node, store_child, store_head
from cod_agent.memory.database import Memory
from cod_agent.memory.readonly import look
from cod_agent.memory.references import References
from cod_agent.memory.tombstones import PARTS
from cod_agent.memory.verify import verify

Row = dict[str, Any]
Named = tuple[str, str]
"""Agent and name of a run."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What came of it, in runs."""

    added: int
    extended: int
    """Which the other file had lived further."""
    known: int
    """Where it had nothing new."""


def merge(
    memory: Memory, source: str | Path, *, only: Collection[Named] | None = None, verified: bool = False
) -> Merged:
    """Copy runs from a file, which is only read; each run in a transaction of its own.

    Args:
        memory: where to. It may be in use.
        only: (agent, name) of the runs to copy; those that the file has not are none. None: all of them.
        verified: the file is known to agree with itself, and not looked through again.

    Raises:
        VerificationFailed: the file does not agree with itself.
        UsageError: there is no such file; a run of that name is another life; a run was forked from one that is in neither.
        RunLeased: a process lives a run that the file would extend.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
    """
    if not verified:
        verify(source).require()
    done = {"added": 0, "extended": 0, "known": 0}
    with look(source) as there:
        chosen = _rows(there, "SELECT * FROM runs ORDER BY id")
        copies = [
            _Copy(there, memory, str(source), run)
            for run in chosen
            if only is None or (run["agent"], run["name"]) in only
        ]
        if there.execute("SELECT EXISTS (SELECT 1 FROM tombstones)").fetchone()[0]:
            came = memory.write_sync(lambda conn: _together(conn, copies))
        else:
            came = [memory.write_sync(copy) for copy in copies]
    for what in came:
        done[what] += 1
    return Merged(**done)


def _together(conn: sqlite3.Connection, copies: list[_Copy]) -> list[str]:
    """Inside a transaction: all of these, and nothing that was taken out there stays here unneeded. Raises: UsageError."""
    came = [copy.copy(conn) for copy in copies]
    for copy in copies:  # a run may have adopted a version of one that began after it
        copy.link()
    references = References(conn)
    for part in ("message", "head"):
        table = PARTS[part][0]
        stones = "SELECT 1 FROM tombstones s WHERE s.part = ? AND s.row_id = m.id"
        there = f"SELECT m.id FROM {table} m WHERE m.body IS NOT NULL AND EXISTS ({stones})"
        for (row_id,) in conn.execute(there, (part,)).fetchall():
            if not references.needed(part, row_id):
                rows.update(conn, table, row_id, {"body": None})
        gone = f"SELECT EXISTS (SELECT 1 FROM {table} m WHERE m.body IS NULL AND NOT EXISTS ({stones}))"
        if conn.execute(gone, (part,)).fetchone()[0]:
            raise UsageError(
                "texts of these runs were pruned or forgotten together with others: merge all runs of the file"
            )
    return came


class _Copy:
    """One run's way into the other file: a job of `Memory.write`."""

    def __init__(self, there: sqlite3.Connection, memory: Memory, source: str, run: Row) -> None:
        self._there, self._cache, self._run = there, memory.cache, run
        self._what = f"run {run['name']!r} of agent {run['agent']!r}"
        self._source, self._path = source, memory.path
        self._nodes: dict[int, int] = {}
        self._ids: dict[str, dict[int, int]] = {table: {} for table in ("contexts", "tasks", "calls", "effects")}
        """New ids by old ones."""
        self._adopted: dict[int, int] = {}
        """Contexts here whose parents, rows there, were not here yet."""

    def __call__(self, conn: sqlite3.Connection) -> str:
        """Inside a transaction: what happened, as a field of `Merged`."""
        came = self.copy(conn)
        self.link()
        return came

    def copy(self, conn: sqlite3.Connection) -> str:
        """All but the links to runs that are yet to come."""
        self._here, run = conn, self._run
        named = (run["agent"], run["name"])
        row = conn.execute("SELECT id FROM runs WHERE agent = ? AND name = ?", named).fetchone()
        if row is None:
            self._copy()
            return "added"
        ours, theirs = _said(conn, row[0]), _said(self._there, run["id"])
        if theirs <= ours:
            return "known"
        if not ours < theirs:
            raise UsageError(
                f"{self._what} is another life in {self._source} than in {self._path}: keep the files apart, or live under another "
                "agent's name"
            )
        held = lease.ours(conn, row[0])
        lease.take(conn, row[0], *named)
        self._copy()
        if not held:
            lease.release(conn, row[0])
        return "extended"

    def link(self) -> None:
        """Raises: UsageError, where a run that this one comes from is in neither file."""
        for made, parent in self._adopted.items():
            above = self._forked_from(parent)
            if above is None:
                raise self._alone(parent)
            rows.update(self._here, "contexts", made, {"parent_id": above})

    def _copy(self) -> None:
        run_id = self._run["id"]
        new_run = self._put("runs", self._run, "agent, name")
        contexts = self._contexts(run_id, new_run)
        for row in self._of("tasks", "run_id", run_id):
            self._ids["tasks"][row["id"]] = self._put("tasks", {**row, "run_id": new_run}, "run_id, position")
        episodes: dict[int, int] = {}
        for row in self._of("episodes", "run_id", run_id):
            moved = {**row, "run_id": new_run, "context_id": contexts[row["context_id"]]}
            episodes[row["id"]] = self._put("episodes", moved, "run_id, position, kind")
            self._episode(row["id"], episodes[row["id"]])
        for row in self._of("contexts", "run_id", run_id):
            wrote = episodes.get(row["episode_id"])
            rows.update(self._here, "contexts", contexts[row["id"]], {"episode_id": wrote})
        for row in self._of("commits", "run_id", run_id, "seq"):
            self._put("commits", {**row, "run_id": new_run}, "run_id, seq", gives="seq")
        for row in self._of("tombstones", "run_id", run_id):
            self._put(
                "tombstones", {**row, "run_id": new_run, "row_id": self._stands_for(row)}, "part, row_id, run_id, seq"
            )

    def _stands_for(self, stone: Row) -> int:
        """The row here that a tombstone there stands for."""
        if stone["part"] == "message":
            return int(self._node(stone["row_id"]) or 0)
        if stone["part"] == "head":
            return self._head(stone["row_id"])
        return self._ids[PARTS[stone["part"]][0]][stone["row_id"]]

    def _contexts(self, run_id: int, new_run: int) -> dict[int, int]:
        """New ids by old ones. The episodes that wrote them come later: they refer to contexts, too."""
        ids = self._ids["contexts"]
        for row in self._of("contexts", "run_id", run_id):
            parent = row["parent_id"]
            above = parent if parent is None else ids.get(parent) or self._forked_from(parent)
            moved = {**row, "run_id": new_run, "parent_id": above, "episode_id": None}
            ids[row["id"]] = self._put("contexts", moved, "run_id, version")
            if parent is not None and above is None:
                self._adopted[ids[row["id"]]] = parent
        return ids

    def _forked_from(self, parent: int) -> int | None:
        """The row here of another run's version there."""
        query = "SELECT c.id, r.agent, r.name, c.version, c.hash FROM contexts c JOIN runs r ON r.id = c.run_id WHERE "
        _, agent, name, version, hashed = self._there.execute(f"{query} c.id = ?", (parent,)).fetchone()
        same = (agent, name, version, hashed)
        row = self._here.execute(
            f"{query} r.agent = ? AND r.name = ? AND c.version = ? AND c.hash = ?", same
        ).fetchone()
        return row and int(row[0])

    def _alone(self, parent: int) -> UsageError:
        query = "SELECT c.version, r.name FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?"
        version, name = self._there.execute(query, (parent,)).fetchone()
        return UsageError(
            f"{self._what} was forked from version {version} of run {name!r}, which {self._path} has not: merge that too"
        )

    def _episode(self, episode: int, new: int) -> None:
        calls: dict[int | None, int | None] = {None: None}
        for row in self._of("calls", "episode_id", episode):
            moved = {
                **row,
                "episode_id": new,
                "head_id": self._head(row["head_id"]),
                "prompt_id": self._node(row["prompt_id"]),
                "answer_id": self._node(row["answer_id"]),
                "prompt_base_id": calls[row["prompt_base_id"]],
            }
            calls[row["id"]] = self._ids["calls"][row["id"]] = self._put(
                "calls", moved, "episode_id, request, occurrence"
            )
        for row in self._of("effects", "episode_id", episode):
            moved = {**row, "episode_id": new, "call_id": calls[row["call_id"]]}
            self._ids["effects"][row["id"]] = self._put("effects", moved, "episode_id, request, occurrence")
        # Nothing names an attempt: those of the file that lived further are all there are.
        self._here.execute("DELETE FROM attempts WHERE episode_id = ?", (new,))
        for row in self._of("attempts", "episode_id", episode):
            self._insert("attempts", {**row, "episode_id": new})

    def _head(self, head: int) -> int:
        hashed, body = self._there.execute("SELECT hash, body FROM heads WHERE id = ?", (head,)).fetchone()
        return store_head(self._here, self._cache, hashed, body)

    def _node(self, leaf: int | None) -> int | None:
        """A message and those before it, which come first."""
        above, at = list[tuple[int, Node]](), leaf
        while at is not None and at not in self._nodes:
            row = self._there.execute("SELECT parent_id, hash, body, labels FROM messages WHERE id = ?", (at,))
            parent, *node = row.fetchone()
            above.append((at, Node(*node)))
            at = parent
        new = None if at is None else self._nodes[at]
        for old, made in reversed(above):
            new = self._nodes[old] = store_child(self._here, self._cache, new, made)
        return new

    def _of(self, table: str, owner: str, owner_id: int, order: str = "id") -> Iterator[Row]:
        return _rows(self._there, f"SELECT * FROM {table} WHERE {owner} = ? ORDER BY {order}", owner_id)

    def _put(self, table: str, row: Row, key: str, gives: str = "id") -> int:
        """Write a row, over the one of that key if there is one; returns its id."""
        others = [name for name in row if name not in ("id", *key.split(", "))]
        over = ", ".join(f"{name} = excluded.{name}" for name in others)
        return self._insert(table, row, f"ON CONFLICT ({key}) DO UPDATE SET {over} RETURNING {gives}")

    def _insert(self, table: str, row: Row, then: str = "RETURNING id") -> int:
        row = {**row, "guard": rows.guard_of(row)} if table in rows.GUARDED else row
        names = [name for name in row if name != "id"]
        marks = ", ".join("?" * len(names))
        query = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) {then}"
        return int(self._here.execute(query, [row[name] for name in names]).fetchone()[0])


def _rows(conn: sqlite3.Connection, query: str, *values: Any) -> Iterator[Row]:
    cursor = conn.execute(query, values)
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


def _said(conn: sqlite3.Connection, run_id: int) -> set[tuple[Any, ...]]:
    """Everything a run says, by its hashes: of two files the one that has more lived further."""
    said: set[tuple[Any, ...]] = set()
    for what, query in _CONTENT.items():
        said |= {(what, *row) for row in conn.execute(query, (run_id,))}
    return said


_CONTENT = {
    "commit": "SELECT seq, chain FROM commits WHERE run_id = ?",
    "context": "SELECT version, hash FROM contexts WHERE run_id = ?",
    "task": "SELECT position, fingerprint FROM tasks WHERE run_id = ?",
    "call": "SELECT e.position, e.kind, c.request, c.occurrence, c.hash FROM calls c "
    "JOIN episodes e ON e.id = c.episode_id WHERE e.run_id = ?",
    "effect": "SELECT e.position, e.kind, x.request, x.occurrence, x.hash FROM effects x "
    "JOIN episodes e ON e.id = x.episode_id WHERE e.run_id = ?",
}
