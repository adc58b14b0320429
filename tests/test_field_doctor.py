"""`cod doctor`: each fault of a file or of the place it lies in is told with what to do about it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cod_agent import CoDAgent, Memory
from cod_agent.cli import app
from cod_agent.environments import FrozenLake
from cod_agent.memory import health, lease, places
from cod_agent.memory.database import WAL_LIMIT, wal_fault
from cod_agent.memory.health import Finding, examine
from cod_agent.memory.readonly import connect, look
from cod_agent.models.scripted import ScriptedModel

LAKE = FrozenLake("tiny", seed=3, form="compact")
MOUNTS = r"""
/dev/vda / ext4 rw,relatime 0 0
tmpfs /tmp tmpfs rw 0 0
server:/home /home nfs4 rw,vers=4.2 0 0
/dev/vdb /home/local ext4 ro,relatime 0 0
sshfs /mnt/far fuse.sshfs rw 0 0
/dev/vdc /mnt/two\040words xfs rw 0 0
"""


@pytest.fixture
def lived(tmp_path: Path) -> Path:
    path = tmp_path / "life.db"
    model = ScriptedModel("still", lambda messages: "Direction 1")
    with CoDAgent("a", model=model, memory=path) as agent:
        list(agent.run_sync(LAKE.pack(2)))
    return path


def found(path: Path, about: str, **how: Any) -> list[Finding]:
    return [finding for finding in examine(path, **how) if finding.about == about]


def test_a_sound_file_has_no_problem_and_no_warning_but_for_its_place(lived: Path) -> None:
    levels = {finding.about: finding.level for finding in examine(lived, full=True)}
    levels.pop("file system")  # of the machine that runs the test
    levels.pop("space")
    assert set(levels.values()) == {"ok"}
    assert {"SQLite", "schema", "integrity", "record", "clock", "permissions", "WAL"} <= levels.keys()


def test_it_writes_nothing(lived: Path) -> None:
    before = lived.read_bytes()
    examine(lived, full=True)
    assert lived.read_bytes() == before


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("/var/life.db", "ext4"),
        ("/tmp/a/life.db", "tmpfs"),
        ("/home/ada/life.db", "nfs4"),
        ("/home/local/life.db", "ext4"),
        ("/mnt/far/life.db", "fuse.sshfs"),
        ("/mnt/two words/life.db", "xfs"),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(file: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text(MOUNTS.strip())
    assert places.mounted(Path(file), tmp_path / "mounts")[0] == kind


@pytest.mark.parametrize(
    ("kind", "options", "level"),
    [
        *((kind, "rw", "problem") for kind in ("nfs", "nfs4", "cifs", "9p", "fuse.sshfs")),
        ("ext4", "ro", "problem"),
        *((kind, "rw", "warning") for kind in ("tmpfs", "overlay", "fuse.mergerfs", "fuseblk")),
        *((kind, "rw", "ok") for kind in ("ext4", "xfs", "btrfs", "zfs", "")),
    ],
)
def test_a_file_system_without_reliable_locks_is_a_problem(
    lived: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, level: str
) -> None:
    monkeypatch.setattr(places, "mounted", lambda file: (kind, [options]))
    (finding,) = found(lived, "file system")
    assert finding.level == level
    assert bool(finding.do) == (level != "ok")


@pytest.mark.parametrize(("free", "level"), [(0, "problem"), (30_000_000, "warning"), (10**12, "ok")])
def test_a_disk_that_is_nearly_full_is_a_problem(
    lived: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    os.truncate(lived, 100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, free))  # type: ignore[attr-defined]
    assert found(lived, "space")[0].level == level


def test_a_new_file_is_its_owner_s_and_one_that_others_may_open_is_told(lived: Path) -> None:
    assert lived.stat().st_mode & 0o777 == 0o600
    lived.chmod(0o644)
    (finding,) = found(lived, "permissions")
    assert finding.level == "warning" and "chmod 600 life.db" in finding.do


def test_a_damaged_page_is_a_problem(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        page = conn.execute("SELECT rootpage FROM sqlite_master WHERE name = 'tasks'").fetchone()[0]
        size = conn.execute("PRAGMA page_size").fetchone()[0]
    with lived.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * 64)
    done = CliRunner().invoke(app, ["doctor", str(lived)])
    assert done.exit_code == 1 and "problem" in done.output and "restore a backup" in done.output


def test_a_row_that_refers_to_nothing_is_a_problem(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE calls SET head_id = 99 WHERE id = 1")
    (finding,) = found(lived, "integrity")
    assert finding.level == "problem" and "row 1 of calls refers to no row of heads" in finding.said


def test_an_edit_is_found_by_full(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE tasks SET answer = 'other' WHERE id = 1")
    assert found(lived, "integrity")[0].level == "ok"
    (finding,) = found(lived, "record", full=True)
    assert finding.level == "problem" and "cod verify" in finding.do


def test_schemas_are_told(lived: Path, tmp_path: Path) -> None:
    old = Path(shutil.copy(Path(__file__).with_name("golden") / "v1.db", tmp_path))
    (finding,) = found(old, "schema", full=True)
    assert (finding.level, finding.said[:2]) == ("ok", "1;") and "cod backup" in finding.do
    with sqlite3.connect(lived) as conn:
        conn.execute("PRAGMA user_version = 99")
    assert "upgrade it" in found(lived, "file")[0].said
    assert CliRunner().invoke(app, ["doctor", str(lived)]).exit_code == 1
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("no database at all" * 100)
    assert [finding.about for finding in examine(foreign)] == ["SQLite", "file", "file system"]


def test_who_lives_in_it_is_told_and_whoever_died_too(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        living = ("somebody", lease.HOST, os.getpid(), time.time() + 30, time.monotonic() + 30)
        conn.execute("INSERT INTO leases (run_id, owner, host, pid, expires, steady) VALUES (1, ?, ?, ?, ?, ?)", living)
    assert f"is being lived by process {os.getpid()}" in found(lived, "lease")[0].said
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE leases SET expires = 1, steady = 1")
    assert "whoever resumes it goes on" in found(lived, "lease")[0].said


def test_a_commit_from_the_future_is_told(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE commits SET created = created + 1000")
    (finding,) = found(lived, "clock")
    assert finding.level == "warning" and " s in the future" in finding.said


READING = """
import sys
from cod_agent.memory.readonly import look
with look(sys.argv[1]) as conn:
    conn.execute("SELECT count(*) FROM messages").fetchone()
    print("reading", flush=True)
    sys.stdin.readline()
"""


def write(memory: Memory, megabytes: int) -> None:
    query = "INSERT INTO messages (hash, body, labels) VALUES (randomblob(16), hex(randomblob(500000)), '[]')"
    for _ in range(megabytes):
        memory.write_sync(lambda conn: conn.execute(query).rowcount)


def test_a_reader_keeps_no_writer_waiting_and_is_named_and_the_wal_shrinks_when_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "LARGE_WAL", 25_000_000)
    path = tmp_path / "life.db"
    memory = Memory(path, durable=False)
    write(memory, 6)
    assert (tmp_path / "life.db-wal").stat().st_size < 10_000_000, "a WAL that nobody holds is used again"
    reading = subprocess.Popen(
        [sys.executable, "-c", READING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert reading.stdout and reading.stdout.readline() == "reading\n"
    write(memory, 30)
    (finding,) = found(path, "WAL")
    assert finding.level == "warning"
    if Path("/proc/locks").exists():
        assert f"process {reading.pid}" in finding.said and finding.do == "end what reads for so long"
    reading.communicate("\n")
    write(memory, 20)
    assert (tmp_path / "life.db-wal").stat().st_size <= WAL_LIMIT
    assert found(path, "WAL")[0].level == "ok"
    memory.close()
    assert not (tmp_path / "life.db-wal").exists()


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="Linux tells who has a lock")
def test_who_keeps_the_turn_of_writing_is_named(lived: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_LONG_TURN", 0.1)
    monkeypatch.setattr(health, "wal_fault", lambda: True)
    assert found(lived, "turn") == []
    with (lived.with_name("life.db.lock")).open("a") as lock:
        fcntl = pytest.importorskip("fcntl")
        fcntl.flock(lock, fcntl.LOCK_EX)
        (finding,) = found(lived, "turn")
    assert f"process {os.getpid()} " in finding.said and "kill -CONT" in finding.do


def test_a_reader_checkpoints_nothing_even_where_a_writer_died(tmp_path: Path) -> None:
    """So readers need no turn: the WAL-reset fault is between connections that write or checkpoint."""
    path = tmp_path / "life.db"
    pid = os.fork()
    if pid == 0:
        write(Memory(path, durable=False), 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    before = (path.read_bytes(), (tmp_path / "life.db-wal").read_bytes())
    assert len(before[1]) > 1_000_000
    for _ in range(2):
        with look(path) as conn:
            assert conn.execute("SELECT count(*) FROM messages").fetchone() == (1,)
        with contextlib.closing(connect(path)) as conn, pytest.raises(sqlite3.OperationalError):
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (path.read_bytes(), (tmp_path / "life.db-wal").read_bytes()) == before


def test_the_command_tells_the_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and told["ok"] and told["path"] is None
    abouts = {finding["about"]: finding["said"] for finding in told["findings"]}
    assert abouts["SQLite"].startswith(sqlite3.sqlite_version)
    assert ("WAL-reset fault" in abouts["SQLite"]) == wal_fault()
    assert "numpy" in abouts["packages"] and "starlette" in abouts["extra host"]
    monkeypatch.setattr(health, "wal_fault", lambda: False)
    assert health.sqlite().said == sqlite3.sqlite_version
    done = CliRunner().invoke(app, ["doctor", "none.db"])
    assert done.exit_code == 1 and "there is no file none.db" in done.output


def test_a_record_that_does_not_agree_says_which_command_lists_all_of_it(lived: Path) -> None:
    with sqlite3.connect(lived) as conn:
        conn.execute("UPDATE tasks SET answer = 'other'")
    (record,) = (found for found in examine(lived, full=True) if found.about == "record")
    assert record.level == "problem" and f"cod verify {lived} --json lists all faults" in record.do
