"""`verify` finds every changed value; `projection` is the same whichever way a run was lived."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Completion, Feedback, Message, Observation, Task, Tokens
from cod_agent.errors import NotADatabase, SchemaTooNew, UsageError, VerificationFailed
from cod_agent.journal import record_completion
from cod_agent.memory.projection import projection
from cod_agent.memory.schema import APPLICATION_ID
from cod_agent.memory.tombstones import bury
from cod_agent.memory.verify import verify

UNGUARDED = {
    "runs": {"created"},
    "contexts": {"created"},
    "tasks": set(),
    "episodes": {"started", "finished"},
    "heads": set(),
    "messages": set(),
    "calls": {"started", "seconds"},
    "effects": {"started", "seconds"},
    "commits": {"created"},
}
"""By guarded table, the columns that no hash covers: times. Row ids are no values; attempts and leases are left out."""


class Exact:
    """A model with exact tokens that is killed after `calls` answers."""

    name, form = "exact", "natural"

    def __init__(self, calls: int = 1000) -> None:
        self.calls = calls

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1.0, "max_tokens": 9}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        self.calls -= 1
        if self.calls < 0:
            raise asyncio.CancelledError
        ids = [n for said in messages for n in (len(said.content), 7)]
        text = f"step {len(messages)}"
        if "Write the new note" in messages[-1].content:
            good = "Reward: 1.000" in messages[-1].content
            text = f"<context>\nnote of {len(ids)}\n</context>" if good else "no note"
        return Completion(text, "stop", Tokens(ids, [1, 2, 300], [-0.5, -0.25, -1.0]), "", "weights-1", (len(ids), 3))


class Two:
    """Two steps; the reward is the task's."""

    name, recovery = "two", "snapshot"

    def start(self, task: Task) -> Any:
        return _Session(task)


class _Session:
    def __init__(self, task: Task) -> None:
        self.task, self.at = task, 0

    def reset(self) -> Observation:
        return Observation(f"start of {self.task.id}")

    def step(self, answer: str) -> Observation:
        self.at += 1
        done = self.at == 2
        feedback = Feedback(reward=self.task.data["reward"], text="so it went") if done else None
        return Observation(f"after {answer}", "short", done, feedback)

    def snapshot(self) -> int:
        return self.at

    def restore(self, state: int) -> None:
        self.at = state


TASKS = [Task(id=f"t{n}", prompt="Do it.", data={"reward": reward}) for n, reward in enumerate((1.0, 0.0, 1.0, 0.5))]


async def live(path: Path, calls: int = 1000) -> None:
    """A run with written and refused updates, one forked from it, one with a tool and no model."""

    async def add(a: int, b: int) -> int:
        return a + b

    async def adding(task: Task, context: str, tools: Any) -> str:
        return str(await tools[0](1, 2))

    async with CoDAgent("a", model=Exact(calls), memory=path, environment=Two(), settings={"why": "a test"}) as agent:
        async for _ in agent.run(TASKS, run="first"):
            pass
        async for _ in agent.run(TASKS[:2], run="forked", fork=("first", 1)):
            pass
    async with CoDAgent("b", memory=path, solver=adding, tools=[add], updates=False) as agent:
        outcome = await agent.solve(TASKS[0], run="tools")
        await agent.feedback(outcome, 0.75, "good")


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "lived.db"
    asyncio.run(live(path))
    return path


def test_a_file_agrees_with_itself(lived: Path) -> None:
    report = verify(lived)
    assert report.ok, report.faults
    assert report.counts["runs"] == 3
    assert report.counts["calls"] == report.requests == 18
    assert report.counts["contexts"] == 3 + 2 + 1
    report.require()


def test_the_tables_are_those_that_are_guarded(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        tables = {row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    ours = {table for table in tables if not table.startswith(("_", "sqlite"))}
    assert ours == UNGUARDED.keys() | {"attempts", "leases", "tombstones"}


def _values() -> list[tuple[str, str]]:
    """Every guarded (table, column) of the schema."""
    from cod_agent.memory.schema import MIGRATIONS

    with sqlite3.connect(":memory:") as conn:
        for script in MIGRATIONS:
            conn.executescript(script)
        return [
            (table, row[1])
            for table, unguarded in UNGUARDED.items()
            for row in conn.execute(f"PRAGMA table_info({table})")
            if row[1] != "id" and row[1] not in unguarded
        ]


def _other(value: Any, kind: str) -> Any:
    """Another value of a column's type."""
    if isinstance(value, bytes):
        return bytes([value[0] ^ 1]) + value[1:]
    if isinstance(value, str):
        return f"{value[:-1]}{'x' if value[-1:] != 'x' else 'y'}"
    if isinstance(value, int | float):
        return value + 1
    return {"TEXT": "x", "BLOB": b"x", "INTEGER": 1, "REAL": 0.5}[kind]


@pytest.mark.parametrize(("table", "column"), _values())
def test_a_changed_value_is_found(lived: Path, tmp_path: Path, table: str, column: str) -> None:
    with sqlite3.connect(lived) as conn:
        kind = next(row[2] for row in conn.execute(f"PRAGMA table_info({table})") if row[1] == column)
        key = "run_id, seq" if table == "commits" else "id"
        keys = conn.execute(f"SELECT {key} FROM {table} ORDER BY {key}").fetchall()
    for at in {0, len(keys) // 2, len(keys) - 1}:
        path = tmp_path / f"{at}.db"
        shutil.copy(lived, path)
        where = " AND ".join(f"{name} = ?" for name in key.split(", "))
        conn = sqlite3.connect(path, isolation_level=None)
        conn.execute("PRAGMA ignore_check_constraints = ON")
        before = conn.execute(f"SELECT {column} FROM {table} WHERE {where}", keys[at]).fetchone()[0]
        try:
            conn.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (_other(before, kind), *keys[at]))
        except sqlite3.IntegrityError:
            continue  # the schema itself does not let it happen
        finally:
            conn.close()
        report = verify(path)
        assert not report.ok, f"row {keys[at]}: {before!r} -> {_other(before, kind)!r}"
        with pytest.raises(VerificationFailed, match="does not agree"):
            report.require()


@pytest.mark.parametrize("table", [table for table in UNGUARDED if table not in ("heads", "messages")])
def test_a_missing_row_is_found(lived: Path, tmp_path: Path, table: str) -> None:
    path = tmp_path / "less.db"
    shutil.copy(lived, path)
    conn = sqlite3.connect(path, isolation_level=None)
    key = "run_id, seq" if table == "commits" else "id"
    conn.execute(f"DELETE FROM {table} WHERE ({key}) = (SELECT {key} FROM {table} ORDER BY {key} DESC LIMIT 1)")
    conn.close()
    assert not verify(path).ok


def test_a_pruned_text_is_no_fault(lived: Path, tmp_path: Path) -> None:
    path = tmp_path / "pruned.db"
    shutil.copy(lived, path)
    with sqlite3.connect(path) as conn:
        calls = [row[0] for row in conn.execute("SELECT id FROM calls")]
        counts = bury(conn, 1, "pruned", None, {"reason": "old"}, {"message": [3], "call": calls, "task": [1]})
    assert counts == {"message": 1, "call": len(calls), "task": 1}
    report = verify(path)
    assert report.ok, report.faults
    assert report.pruned == len(calls) + 2
    assert report.requests < 18


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE messages SET body = NULL WHERE id = 4",
        "UPDATE calls SET sampled_ids = NULL WHERE id = 1",
        "UPDATE contexts SET body = NULL WHERE id = 2",
        "UPDATE messages SET body = 'x' WHERE id = 3",
        "UPDATE tombstones SET row_id = 2 WHERE part = 'message'",
        "UPDATE tombstones SET hash = 'x' WHERE part = 'task'",
        "DELETE FROM tombstones WHERE part = 'message'",
        "UPDATE tasks SET reward = 0.125 WHERE id = 1",
        "UPDATE commits SET detail = replace(detail, 'old', 'new') WHERE what = 'pruned'",
        "UPDATE commits SET detail = '{}' WHERE seq = 0",
    ],
)
def test_a_text_that_is_gone_without_a_tombstone_or_a_changed_tombstone_is_found(
    lived: Path, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "pruned.db"
    shutil.copy(lived, path)
    with sqlite3.connect(path) as conn:
        bury(conn, 1, "pruned", None, {"reason": "old"}, {"message": [3], "task": [1]})
        conn.execute(damage)
    assert not verify(path).ok


def test_a_damaged_page_is_found(lived: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.db"
    raw = bytearray(lived.read_bytes())
    at = len(raw) // 2 // 4096 * 4096
    raw[at : at + 512] = b"\xff" * 512
    path.write_bytes(raw)
    with contextlib.suppress(NotADatabase):
        assert not verify(path).ok


def test_what_is_no_run_database_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        verify(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("not a database, but long enough to look at " * 30)
    with pytest.raises(NotADatabase, match="not a run database"):
        verify(tmp_path / "text.db")
    (tmp_path / "empty.db").touch()
    with pytest.raises(NotADatabase, match="empty"):
        verify(tmp_path / "empty.db")
    with sqlite3.connect(tmp_path / "other.db") as conn:
        conn.execute("CREATE TABLE t (x)")
    with pytest.raises(NotADatabase, match="another program"):
        verify(tmp_path / "other.db")
    with sqlite3.connect(tmp_path / "newer.db") as conn:
        conn.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        conn.execute("PRAGMA user_version = 99")
    with pytest.raises(SchemaTooNew, match="pip install -U"):
        verify(tmp_path / "newer.db")
    assert not (tmp_path / "none.db").exists()


def test_looking_changes_nothing(lived: Path) -> None:
    before = lived.read_bytes()
    verify(lived)
    projection(lived)
    assert lived.read_bytes() == before


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 7, 11])
def test_a_resumed_run_projects_as_an_uninterrupted_one(lived: Path, tmp_path: Path, calls: int) -> None:
    path = tmp_path / "resumed.db"
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(live(path, calls))
    assert verify(path).ok
    assert projection(path) != projection(lived)
    asyncio.run(live(path))
    assert verify(path).ok
    assert projection(path) == projection(lived)
    assert json.dumps(projection(path))
