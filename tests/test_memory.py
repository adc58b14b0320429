"""The run database as a file: its schema, how it opens, how it commits, what happens when the disk or another process is in the way."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from cod_agent.errors import NotADatabase, SchemaTooNew, StoreBusy, StoreError, StoreFull
from cod_agent.memory import Memory, database, schema
from cod_agent.memory.database import wal_fault
from cod_agent.memory.verify import verify

TABLES = {
    "runs",
    "contexts",
    "tasks",
    "episodes",
    "heads",
    "messages",
    "calls",
    "effects",
    "attempts",
    "commits",
    "tombstones",
    "leases",
}


@pytest.fixture
def memory(tmp_path: Path) -> Any:
    made = Memory.open(tmp_path / "a.db")
    yield made
    made.close()


def add(name: str) -> Any:
    """A job that stores one row."""

    def job(conn: sqlite3.Connection) -> int:
        made = conn.execute("INSERT INTO heads (hash, body) VALUES (?, ?)", (name.encode(), name))
        return int(made.lastrowid or 0)

    return job


def names(conn: sqlite3.Connection) -> list[str]:
    return [row[0] for row in conn.execute("SELECT body FROM heads ORDER BY id")]


def program(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Python code in a process of its own."""
    given = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


# ---- the schema ----


def test_every_table_is_strict_and_the_file_says_whose_it_is(memory: Memory) -> None:
    def look(conn: sqlite3.Connection) -> tuple[dict[str, int], int, int]:
        strict = {row[1]: row[5] for row in conn.execute("PRAGMA table_list") if row[1] in TABLES}
        return (
            strict,
            conn.execute("PRAGMA application_id").fetchone()[0],
            conn.execute("PRAGMA user_version").fetchone()[0],
        )

    strict, application, version = memory.read_sync(look)
    assert strict == dict.fromkeys(TABLES, 1)
    assert (application, version) == (schema.APPLICATION_ID, len(schema.MIGRATIONS))


def test_a_wrong_type_is_refused(memory: Memory) -> None:
    with pytest.raises(StoreError, match="cannot store TEXT value"):
        memory.write_sync(lambda conn: conn.execute("INSERT INTO heads (hash, body) VALUES ('not a blob', 'x')"))


def test_migrations_are_on_record_and_applied_once(tmp_path: Path) -> None:
    for _ in range(2):
        Memory.open(tmp_path / "a.db").close()
    with sqlite3.connect(tmp_path / "a.db") as conn:
        applied = conn.execute("SELECT migration_set, name FROM _sqlite_migrations").fetchall()
    assert applied == [("cod_agent", f"v{number}") for number in range(1, len(schema.MIGRATIONS) + 1)]


def test_an_older_file_is_brought_up_to_date_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = Memory.open(tmp_path / "a.db")
    old.write_sync(add("kept"))
    old.close()
    monkeypatch.setattr(
        schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE later (id INTEGER PRIMARY KEY) STRICT;\n")
    )
    new = Memory.open(tmp_path / "a.db")
    assert new.read_sync(names) == ["kept"]
    assert new.read_sync(lambda conn: conn.execute("SELECT count(*) FROM later").fetchone()[0]) == 0
    new.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory.open(tmp_path / "a.db").close()
    with monkeypatch.context() as patched:
        patched.setattr(
            schema, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE half (id INTEGER);\nNO SUCH STATEMENT;\n")
        )
        with pytest.raises(StoreError):
            Memory.open(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as conn:
        assert conn.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone()[0] == 0
        assert conn.execute("PRAGMA user_version").fetchone()[0] == len(schema.MIGRATIONS)


def test_a_file_whose_making_was_interrupted_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", ("NO SUCH STATEMENT;\n",))
        with pytest.raises(StoreError):
            Memory.open(tmp_path / "a.db")
    with sqlite3.connect(tmp_path / "a.db") as conn:
        assert conn.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,), "made as a whole or not at all"
    memory = Memory.open(tmp_path / "a.db")
    memory.write_sync(add("x"))
    memory.close()


def test_a_file_an_earlier_version_was_killed_over_is_made(tmp_path: Path) -> None:
    with sqlite3.connect(
        tmp_path / "a.db"
    ) as conn:  # that made the record of migrations by itself, and its index after it
        conn.execute(
            "CREATE TABLE _sqlite_migrations (id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT)"
        )
    Memory.open(tmp_path / "a.db").close()
    assert verify(tmp_path / "a.db").ok


# ---- opening ----


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    Memory.open(path).close()
    with sqlite3.connect(path) as conn:
        conn.execute("PRAGMA user_version = 999")
    before = path.read_bytes()
    with pytest.raises(SchemaTooNew, match=r"schema 999.*pip install -U connect-the-dots"):
        Memory.open(path)
    assert path.read_bytes() == before


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE theirs (x)")
    conn.close()
    before = path.read_bytes()
    with pytest.raises(NotADatabase, match="another program: choose another file"):
        Memory.open(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"garbage\n" * 100, b"x", b"SQLite format 3\0" + b"\xff" * 500])
def test_what_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(content)
    with pytest.raises(NotADatabase, match="check the path, or restore a backup"):
        Memory.open(path)
    assert path.read_bytes() == content


def test_a_damaged_file_is_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    made = Memory.open(path)
    for number in range(200):
        made.write_sync(add(f"{number} " + "x" * 200))
    made.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xaa" * (len(whole) - 4096))
    with pytest.raises(NotADatabase, match="damaged"):
        broken = Memory.open(path)
        try:
            broken.read_sync(names)
        finally:
            broken.close()


@pytest.mark.parametrize(
    ("where", "kind", "said"),
    [
        ("a_file/a.db", StoreFull, "cannot be opened.*mend its permissions"),
        ("a_directory", NotADatabase, "is a directory"),
    ],
)
def test_a_path_that_cannot_be_a_file_is_a_clear_error(tmp_path: Path, where: str, kind: Any, said: str) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_directory").mkdir()
    with pytest.raises(kind, match=said):
        Memory.open(tmp_path / where)


def test_a_directory_that_takes_no_files_is_a_clear_error() -> None:
    with pytest.raises(StoreFull, match="mend its permissions"):
        Memory.open("/proc/self/a.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    Memory.open(path).close()
    path.chmod(0o400)
    with pytest.raises(StoreFull, match="mend its permissions"):
        Memory.open(path).write_sync(add("x"))


def test_a_locked_file_is_a_clear_error_and_fine_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    memory = Memory.open(tmp_path / "a.db")
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy, match=r"locked by another program for 0.2 s: close it, then resume"):
        memory.write_sync(add("x"))
    other.execute("COMMIT")
    other.close()
    memory.write_sync(add("y"))
    assert memory.read_sync(names) == ["y"]
    memory.close()


def test_a_file_locked_from_the_start_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.2)
    other = sqlite3.connect(tmp_path / "a.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreBusy, match="close it, then resume"):
        Memory.open(tmp_path / "a.db")
    other.close()


def test_one_file_has_one_memory_in_a_process(tmp_path: Path) -> None:
    first, second = Memory.open(tmp_path / "a.db"), Memory.open(tmp_path / "." / "a.db")
    assert first is second
    first.close()
    second.write_sync(add("still open"))
    second.close()
    third = Memory.open(tmp_path / "a.db")
    assert third is not first and third.read_sync(names) == ["still open"]
    third.close()


def test_a_closed_memory_says_so(tmp_path: Path) -> None:
    memory = Memory.open(tmp_path / "a.db")
    memory.close()
    memory.close()
    with pytest.raises(StoreError, match="closed"):
        memory.write_sync(add("x"))
    with pytest.raises(StoreError, match="closed"):
        asyncio.run(memory.read(names))


# ---- committing ----


def held_up(memory: Memory) -> threading.Event:
    """Keeps the writer busy until the event is set, so that what is asked meanwhile is committed together."""
    go = threading.Event()
    threading.Thread(target=memory.read_sync, args=(lambda conn: go.wait(10),)).start()
    return go


async def test_one_jobs_failure_does_not_touch_its_neighbours(memory: Memory) -> None:
    def fails(conn: sqlite3.Connection) -> None:
        add("half done")(conn)
        raise ValueError("no")

    go = held_up(memory)
    asked = [asyncio.ensure_future(memory.write(job)) for job in (add("a"), fails, add("a2"), add("a"), add("b"))]
    await asyncio.sleep(0.05)
    go.set()
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(value) for value in done] == [int, ValueError, int, StoreError, int]
    assert memory.read_sync(names) == ["a", "a2", "b"]


async def test_what_waits_is_committed_together(memory: Memory) -> None:
    statements: list[str] = []
    memory.read_sync(lambda conn: conn.set_trace_callback(statements.append))
    go = held_up(memory)
    asked = [asyncio.ensure_future(memory.write(add(f"{number}"))) for number in range(50)]
    await asyncio.sleep(0.05)
    go.set()
    await asyncio.gather(*asked)
    assert statements.count("COMMIT") == 1
    assert len(memory.read_sync(names)) == 50


async def test_a_lock_is_one_while_anybody_has_it_and_is_forgotten_then(memory: Memory) -> None:
    order: list[str] = []

    async def hold(name: str) -> None:
        async with memory.lock("run"):
            order.append(f"{name} in")
            await asyncio.sleep(0)
            order.append(f"{name} out")

    await asyncio.gather(*map(hold, "abc"))
    assert order == [f"{name} {where}" for name in "abc" for where in ("in", "out")]
    for number in range(100):
        async with memory.lock(f"run {number}"):
            pass
    assert not memory._locks[asyncio.get_running_loop()]


async def test_content_that_was_rolled_back_is_not_taken_for_stored(memory: Memory) -> None:
    from cod_agent.memory.content import link, store_nodes

    node = link(b"", '{"role":"user","content":"x"}', "[]")

    def fails(conn: sqlite3.Connection) -> None:
        store_nodes(conn, memory.cache, [node])
        raise ValueError

    for together in (False, True):
        go = held_up(memory) if together else None
        asked = [asyncio.ensure_future(memory.write(job)) for job in ([fails, add("x")] if together else [fails])]
        await asyncio.sleep(0.05)
        if go:
            go.set()
        await asyncio.gather(*asked, return_exceptions=True)
        row = await memory.write(lambda conn: store_nodes(conn, memory.cache, [node]))
        assert memory.read_sync(
            lambda conn, row=row: conn.execute("SELECT hash FROM messages WHERE id = ?", (row,)).fetchone()
        ) == (node.hash,)
        memory.write_sync(lambda conn: conn.execute("DELETE FROM messages"))
        memory.cache.clear()


async def test_a_cancelled_writer_leaves_a_whole_commit(memory: Memory) -> None:
    go = held_up(memory)
    asked = asyncio.ensure_future(memory.write(add("a")))
    await asyncio.sleep(0.5)
    asked.cancel()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert await memory.read(names) == ["a"]


async def test_a_cancelled_writer_hears_when_it_is_done_and_why_it_failed(memory: Memory) -> None:
    def fails(conn: sqlite3.Connection) -> None:
        raise ValueError("no")

    go = held_up(memory)
    asked = asyncio.ensure_future(memory.write(fails))
    await asyncio.sleep(0.05)
    for _ in range(2):
        asked.cancel()
        await asyncio.sleep(0.05)
        assert not asked.done()
    go.set()
    with pytest.raises(asyncio.CancelledError) as cut:
        await asked
    assert isinstance(cut.value.__cause__, ValueError)


def test_a_full_disk_fails_a_batch_whole_and_loses_nothing(tmp_path: Path) -> None:
    said = finished(
        program(
            """
            import asyncio, json, resource, sys, threading
            from pathlib import Path
            from cod_agent.errors import StoreFull
            from cod_agent.memory import Memory

            path = sys.argv[1]
            memory = Memory.open(path)
            def add(name, size):
                return lambda conn: conn.execute("INSERT INTO heads (hash, body) VALUES (?, ?)", (name.encode(), "x" * size)).lastrowid
            acknowledged, refused, sentences = [], [], set()
            async def attempt(name, size):
                try:
                    await memory.write(add(name, size))
                    acknowledged.append(name)
                except StoreFull as error:
                    refused.append(name)
                    sentences.add(str(error))
            async def main():
                for number in range(20):
                    await attempt(f"before {number}", 1000)
                limit = Path(path + "-wal").stat().st_size + 30_000
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                await asyncio.gather(*(attempt(f"full {number}", 20_000) for number in range(30)))
                for number in range(5):
                    await attempt(f"still {number}", 50_000)
                assert refused, "the disk never got full"
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                await attempt("after", 1000)
            asyncio.run(main())
            memory.close()
            print(json.dumps([acknowledged, refused, sorted(sentences)]))
            """,
            tmp_path / "a.db",
        )
    )
    acknowledged, refused, sentences = json.loads(said)
    with sqlite3.connect(tmp_path / "a.db") as conn:
        stored = [row[0].decode() for row in conn.execute("SELECT hash FROM heads")]
        assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert sorted(stored) == sorted(acknowledged)
    assert "after" in acknowledged and len(refused) > 5
    assert all("free space or mend its permissions, then resume" in sentence for sentence in sentences)


# ---- several processes ----


@pytest.mark.parametrize(
    ("version", "faulty"),
    [
        ((3, 6, 23), False), ((3, 7, 0), True), ((3, 40, 1), True), ((3, 44, 5), True), ((3, 44, 6), False), ((3, 44, 9), False),
        ((3, 45, 0), True), ((3, 49, 1), True), ((3, 50, 6), True), ((3, 50, 7), False), ((3, 51, 0), True), ((3, 51, 2), True),
        ((3, 51, 3), False), ((3, 52, 0), False), ((4, 0, 0), False),
    ],
)  # fmt: skip
def test_the_wal_fault_is_known_by_version(version: tuple[int, ...], faulty: bool) -> None:
    assert wal_fault(version) is faulty


@pytest.mark.parametrize("faulty", [True, False])
def test_writers_take_turns_where_sqlite_has_the_wal_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: bool
) -> None:
    import fcntl

    monkeypatch.setattr(database, "wal_fault", lambda: faulty)
    memory = Memory.open(tmp_path / "a.db")
    with open(tmp_path / "a.db.lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writing = threading.Thread(target=memory.write_sync, args=(add("mine"),))
        writing.start()
        writing.join(0.3)
        assert writing.is_alive() is faulty
        assert memory.path and (
            not faulty or sqlite3.connect(memory.path).execute("SELECT count(*) FROM heads").fetchone() == (0,)
        )
    writing.join(10)
    assert memory.read_sync(names) == ["mine"]
    memory.close()


@pytest.mark.parametrize("faulty", [True, False])
def test_without_file_locks_a_faulty_sqlite_gets_a_rollback_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faulty: bool
) -> None:
    monkeypatch.setattr(database, "fcntl", None)
    monkeypatch.setattr(database, "wal_fault", lambda: faulty)
    memory = Memory.open(tmp_path / "a.db")
    memory.write_sync(add("x"))
    mode = memory.read_sync(lambda conn: conn.execute("PRAGMA journal_mode").fetchone()[0])
    assert mode == ("truncate" if faulty else "wal")
    memory.close()


@pytest.mark.parametrize("faulty", ["as it is", "False"])
def test_many_processes_write_and_none_is_locked_out(tmp_path: Path, faulty: str) -> None:
    code = """
        import asyncio, sys
        from cod_agent.memory import Memory, database
        path, name, faulty = sys.argv[1:]
        if faulty == "False":
            database.wal_fault = lambda: False
        memory = Memory.open(path)
        def job(number):
            def bump(conn):  # read, then write: what a deferred transaction gets "database is locked" for
                row = conn.execute("SELECT body FROM heads WHERE hash = x'00'").fetchone()
                if row is None:
                    conn.execute("INSERT INTO heads (hash, body) VALUES (x'00', '1')")
                else:
                    conn.execute("UPDATE heads SET body = ? WHERE hash = x'00'", (str(int(row[0]) + 1),))
            return bump
        async def main():
            for number in range(300):
                await memory.write(job(number))
        asyncio.run(main())
        memory.close()
    """
    for process in [program(code, tmp_path / "a.db", name, faulty) for name in "abc"]:
        finished(process)
    with sqlite3.connect(tmp_path / "a.db") as conn:
        assert conn.execute("SELECT body FROM heads").fetchall() == [("900",)]
