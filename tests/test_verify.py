"""`verify` finds every changed value and every flipped byte that counts; `projection` is the same whichever way a run was lived."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from every_row import every_row, live

from cod_agent.errors import CodError, NotADatabase, SchemaTooNew, UsageError, VerificationFailed
from cod_agent.memory import rows
from cod_agent.memory.projection import projection
from cod_agent.memory.rows import GUARDED
from cod_agent.memory.schema import APPLICATION_ID, migrate
from cod_agent.memory.tombstones import bury
from cod_agent.memory.verify import verify

ALL = bool(os.environ.get("COD_VERIFY_ALL"))
"""Change every value of every row, and ten times the bytes (`make verify-all`)."""

TABLES = (*GUARDED, "heads", "tombstones")
"""Tables whose every value is guarded; row ids are no values. Leases are left out: they say nothing of what was lived."""


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "lived.db"
    asyncio.run(live(path))
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with every kind of row, its write-ahead log emptied into it."""
    path = tmp_path_factory.mktemp("verify") / "full.db"
    asyncio.run(every_row(path))
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection of somebody who knows nothing of guards."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.execute("PRAGMA ignore_check_constraints = ON")
        yield conn


def test_a_file_agrees_with_itself(lived: Path, full: Path) -> None:
    report = verify(lived)
    assert report.ok, report.faults
    assert report.counts["runs"] == 3
    assert report.counts["calls"] == report.requests == 18
    assert report.counts["contexts"] == 3 + 2 + 1
    report.require()
    report = verify(full)
    assert report.ok, report.faults
    assert report.requests == report.counts["calls"] - 2  # the update that read the answers pruned, one forgotten


@pytest.mark.parametrize(
    ("query", "kinds"),
    [
        ("SELECT DISTINCT style FROM calls", {"own", "compact", "ascii", "spaced", "plain", "raw", "bytes"}),
        ("SELECT DISTINCT inexact = '' FROM calls", {0, 1}),
        ("SELECT DISTINCT state FROM attempts", {"started", "failed"}),
        ("SELECT DISTINCT kind FROM effects", {"observe", "act", "tool"}),
        ("SELECT DISTINCT state FROM episodes", {"live", "done", "refused", "aborted"}),
        ("SELECT DISTINCT state FROM tasks", {"open", "solved", "updated", "closed"}),
        ("SELECT DISTINCT decided FROM contexts WHERE held <> ''", {"", "adopted", "refused"}),
        ("SELECT DISTINCT substr(sources, 1, 9) FROM contexts", {"[]", '[{"adopte', '[{"given"', '[{"positi'}),
        ("SELECT DISTINCT what FROM commits", {"began", "solved", "judged", "updated", "kept", "closed"}
         | {"adopted", "refused", "forgot", "pruned"}),
        ("SELECT DISTINCT part FROM tombstones", {"message", "call", "effect", "task", "context"}),
    ],
)  # fmt: skip
def test_the_file_that_is_changed_has_every_kind_of_row(full: Path, query: str, kinds: set[Any]) -> None:
    with writing(full) as conn:
        assert {row[0] for row in conn.execute(query)} >= kinds
        assert {table for table in TABLES if conn.execute(f"SELECT 1 FROM {table}").fetchone()} == set(TABLES)


def test_the_tables_are_those_that_are_guarded(lived: Path) -> None:
    with writing(lived) as conn:
        tables = {row[0] for row in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert {table for table in tables if not table.startswith(("_", "sqlite"))} == {*TABLES, "leases"}


def _values() -> list[tuple[str, str]]:
    """Every guarded (table, column) of the schema."""
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        migrate(conn)
        return [
            (table, row[1]) for table in TABLES for row in conn.execute(f"PRAGMA table_info({table})") if row[1] != "id"
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
def test_a_changed_value_is_found_and_its_row_named(full: Path, tmp_path: Path, table: str, column: str) -> None:
    path = tmp_path / "changed.db"
    key = "run_id, seq" if table == "commits" else "id"
    where = " AND ".join(f"{name} = ?" for name in key.split(", "))
    with writing(full) as conn:
        kind = next(row[2] for row in conn.execute(f"PRAGMA table_info({table})") if row[1] == column)
        values = conn.execute(f"SELECT {column}, {key} FROM {table} ORDER BY {key}").fetchall()
    for before, *at in values if ALL else random.Random(table + column).sample(values, 2):
        shutil.copy(full, path)
        after = _other(before, kind)
        with writing(path) as conn:
            try:
                conn.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (after, *at))
            except sqlite3.IntegrityError:
                continue  # the schema itself does not let it happen
        report = verify(path)
        assert not report.ok, f"row {at}: {before!r} -> {after!r}"
        with pytest.raises(VerificationFailed, match="does not agree"):
            report.require()
        elsewhere = table == "tombstones"  # the row it stands for is named, or the commit that put it there
        if (
            not elsewhere
            and column not in key
            and "SQLite" not in report.faults[0]
            and "refers to a row" not in report.faults[0]
        ):
            named = f"({at[0]}, {at[1]})" if table == "commits" else at[0]
            assert report.faults[0].startswith(f"row {named} of {table} "), report.faults[0]


@pytest.mark.parametrize(("table", "column"), [case for case in _values() if case[0] in GUARDED and case[1] != "guard"])
def test_a_change_whose_guard_was_made_again_is_found_in_what_was_said(
    full: Path, tmp_path: Path, table: str, column: str
) -> None:
    if column in UNCHAINED.get(table, set()):
        pytest.skip("a time, or what only the guard knows")
    path = tmp_path / "edited.db"
    shutil.copy(full, path)
    with writing(path) as conn:
        kind = next(row[2] for row in conn.execute(f"PRAGMA table_info({table})") if row[1] == column)
        cursor = conn.execute(f"SELECT * FROM {table} WHERE {WHOLE.get(table, 'true')}")
        names = [name[0] for name in cursor.description]
        row = dict(zip(names, random.Random(table + column).choice(cursor.fetchall()), strict=True))
        changed = {**row, column: _other(row[column], kind)}
        changed["guard"] = rows.guard_of(changed)
        same = {"run_id": row["run_id"], "seq": row["seq"]} if table == "commits" else {"id": row["id"]}
        with contextlib.suppress(sqlite3.IntegrityError):
            conn.execute(
                f"UPDATE {table} SET {column} = ?, guard = ? WHERE {' AND '.join(f'{name} = ?' for name in same)}",
                (changed[column], changed["guard"], *same.values()),
            )
            assert not verify(path).ok, f"{same}: {row[column]!r} -> {changed[column]!r}"


WHOLE = {
    "calls": "envelope IS NOT NULL AND episode_id IN (SELECT id FROM episodes WHERE state <> 'live')",
    "effects": "result IS NOT NULL AND episode_id IN (SELECT id FROM episodes WHERE state <> 'live')",
    "tasks": "body IS NOT NULL",
    "messages": "body IS NOT NULL",
    "episodes": "state <> 'live'",
}
"""Rows that have their texts, of episodes that ended: the others are known by less."""

UNCHAINED = {
    "runs": {"created"},
    "messages": {"parent_id", "labels"},
    "contexts": {"created", "parent_id"},
    "tasks": set(),
    "episodes": {"started", "finished", "context_id"},
    "calls": {"started", "seconds", "envelope_crc", "envelope", "prompt_base_id", "prompt_shared"},
    "effects": {"started", "seconds", "call_id", "name", "kind"},
    "attempts": {"episode_id", "kind", "request", "occurrence", "state", "detail", "started", "seconds"},
    "commits": {"created"},
}
"""What no hash covers, or not that of every row."""


@pytest.mark.parametrize("table", [table for table in GUARDED if table != "attempts"])
def test_a_missing_row_is_found(full: Path, tmp_path: Path, table: str) -> None:
    path = tmp_path / "less.db"
    shutil.copy(full, path)
    key = "run_id, seq" if table == "commits" else "id"
    with writing(path) as conn:
        conn.execute(f"DELETE FROM {table} WHERE ({key}) = (SELECT {key} FROM {table} ORDER BY {key} DESC LIMIT 1)")
    assert not verify(path).ok


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON tasks BEGIN DELETE FROM tasks; END", "trigger t on tasks is not"),
        ("DROP INDEX tasks_to_do", "index tasks_to_do is not there"),
        ("DROP VIEW steps", "view steps is not there"),
        ("ALTER TABLE tasks ADD COLUMN more TEXT", "table tasks is another"),
    ],
)
def test_a_changed_schema_is_found(lived: Path, tmp_path: Path, change: str, said: str) -> None:
    path = tmp_path / "changed.db"
    shutil.copy(lived, path)
    with writing(path) as conn:
        conn.execute("CREATE TABLE notes_of_my_own (x)")
        conn.execute("CREATE VIEW means AS SELECT avg(reward) FROM tasks")
        assert verify(path).ok
        conn.execute(change)
    assert said in verify(path).faults[0]


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


def test_no_flipped_byte_is_a_crash_and_those_that_count_are_found(full: Path, tmp_path: Path) -> None:
    """What is not found is in bytes that hold nothing: free space, and a header's bookkeeping."""
    raw, dice, path = full.read_bytes(), random.Random(7), tmp_path / "flipped.db"
    said, missed, tries = set(projection_of(full)), [], 500 if ALL else 100
    for _ in range(tries):
        at, bit = dice.randrange(len(raw)), 1 << dice.randrange(8)
        path.write_bytes(raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])
        try:
            found = not verify(path).ok
        except CodError:  # one of ours, which says what to do
            found = True
        if not found:
            missed.append(at)
            assert set(projection_of(path)) == said, f"bit {bit} of byte {at} changed what the file says"
    assert len(missed) < tries
    print(f"{tries - len(missed)} of {tries} found; the others changed nothing that is stored")


def projection_of(path: Path) -> list[tuple[Any, ...]]:
    """Every value of every table that counts."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as conn:
        conn.text_factory = bytes
        return [(table, *row) for table in TABLES for row in conn.execute(f"SELECT * FROM {table}")]


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
