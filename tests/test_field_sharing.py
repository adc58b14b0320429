"""Processes that share a file: nothing is lost, nobody hears of a lock, nobody is kept out. `benchmarks/sharing.py` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cod_agent import Memory
from cod_agent.memory import database
from cod_agent.memory.database import wal_fault
from cod_agent.memory.lease import take

SHARING = Path(__file__).parent.parent / "benchmarks" / "sharing.py"


def shared(tmp_path: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(SHARING), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_four_processes_of_eight_agents_share_a_file(tmp_path: Path) -> None:
    found = shared(tmp_path, "--processes", "4", "--tasks", "160")
    assert (found["errors"], found["lost"]) == ([], 0)
    assert found["tasks"] >= 160 and found["commits"] == 3 * found["tasks"] + 32, "verified, and all of it there"
    assert found["shares"]["least"] > 0


@pytest.mark.parametrize(
    ("version", "fault"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
    ],
)
def test_versions_with_the_wal_reset_fault_are_known(version: tuple[int, ...], fault: bool) -> None:
    assert wal_fault(version) == fault


@pytest.mark.parametrize("fault", [True, False])
def test_writers_take_turns_exactly_on_versions_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    """While somebody else has the turn (as another process would), no transaction begins, and it goes on at once afterwards."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(database, "wal_fault", lambda: fault)
    memory = Memory(tmp_path / "life.db", durable=False)
    written = threading.Event()

    def write() -> None:
        memory.write_sync(lambda conn: conn.execute("DELETE FROM attempts").rowcount)
        written.set()

    (tmp_path / "life.db.lock").touch()
    with (tmp_path / "life.db.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=write)
        writer.start()
        assert written.wait(0.3) == (not fault)
    assert written.wait(10)
    writer.join()
    memory.close()


def test_a_process_that_dies_in_its_turn_leaves_the_turn_to_others(tmp_path: Path) -> None:
    path = tmp_path / "life.db"
    memory = Memory(path, durable=False)
    memory.write_sync(
        lambda conn: (
            conn.execute(
                "INSERT INTO runs (agent, name, model, settings, created, guard) VALUES ('a', 'r', '', '{}', 0, 0)"
            ).rowcount
        )
    )
    pid = os.fork()
    if pid == 0:
        other = Memory(path, durable=False)
        other.write_sync(lambda conn: (take(conn, 1, "a", "r"), os._exit(9)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    started = time.monotonic()
    count = memory.write_sync(lambda conn: conn.execute("SELECT count(*) FROM leases").fetchone()[0])
    assert count == 0 and time.monotonic() - started < 5
    memory.close()
