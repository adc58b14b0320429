"""The command tool: what a command cannot do in its sandbox, shown by the same command doing it without one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Task
from cod_agent.errors import UsageError
from cod_agent.tools import command_tool, sandbox

try:
    sandbox.require_bubblewrap()
    REFUSED = ""
except UsageError as refused:
    REFUSED = str(refused)

boxed = pytest.mark.skipif(bool(REFUSED), reason=REFUSED)
PYTHON = "/usr/bin/python3"


def run(command: str, folder: Path, **options: Any) -> str:
    return str(asyncio.run(command_tool(folder, **options)(command)))


@pytest.fixture
def listener() -> Iterator[int]:
    """A server of this machine, as a database or a metadata service would be."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    conn, _ = server.accept()
                    conn.sendall(b"the crown jewels\n")
                    conn.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


@boxed
@pytest.mark.parametrize(
    ("hole", "seen"),
    [
        ("bash -c 'exec 3<>/dev/tcp/127.0.0.1/PORT; cat <&3'", "the crown jewels"),
        ("cat OUTSIDE/secret.txt", "hunter2"),
        ("cat /etc/passwd", "root:x:"),
        ("env", "PLANTED=hunter2"),
        ("cat /proc/NEIGHBOUR/environ | tr '\\0' '\\n'", "PLANTED=hunter2"),
        ("echo hunter3 > OUTSIDE/made.txt; cat OUTSIDE/made.txt", "hunter3"),
        ("ln -s OUTSIDE/secret.txt link; cat link", "hunter2"),
        ("kill -0 NEIGHBOUR && echo alive", "alive"),
        ("head -c 15 OUTSIDE/life.db", "SQLite format 3"),
        ("ls /proc | grep -x NEIGHBOUR", "NEIGHBOUR"),
        ("hostname", socket.gethostname()),
    ],
)
def test_a_command_reaches_nothing_but_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: int, hole: str, seen: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("hunter2\n")
    sqlite3.connect(outside / "life.db").executescript("CREATE TABLE t (x)")
    monkeypatch.setenv("PLANTED", "hunter2")
    with subprocess.Popen(["sleep", "20"]) as neighbour:  # whose environment, too, is what it began with
        for name, value in {"PORT": listener, "OUTSIDE": outside, "NEIGHBOUR": neighbour.pid}.items():
            hole, seen = hole.replace(name, str(value)), seen.replace(name, str(value))
        boxed_in = run(hole, tmp_path / "work")
        free = run(hole, tmp_path / "work", sandbox="none")
        neighbour.kill()
    assert seen not in boxed_in
    assert seen in free or hole == "env", "this hole is none: the test shows nothing"


@boxed
def test_the_folder_lasts_and_everything_else_is_gone(tmp_path: Path) -> None:
    assert run("echo kept > a; echo lost > /tmp/b; cat a /tmp/b", tmp_path) == "kept\nlost\n"
    assert run("cat a; ls /tmp/b", tmp_path).startswith("kept\nls: cannot access '/tmp/b'")
    assert (tmp_path / "a").read_text() == "kept\n"
    assert "Read-only file system" in run("touch /usr/x /x", tmp_path)


@boxed
@pytest.mark.parametrize(
    ("command", "said", "options"),
    [
        (f"{PYTHON} -c 'bytearray(10 << 30)'", "MemoryError", {}),
        (
            f"for i in 1 2 3 4 5 6; do {PYTHON} -c 'import time; x = b\"x\" * (100 << 20); time.sleep(9)' & done; wait",
            "killed: more than 300 MiB of memory",
            {"memory": 300},
        ),
        # Not one that doubles: where root runs this, no limit of the system holds it, and the machine is shared.
        ("for i in $(seq 200); do sleep 9 & done; wait", "killed: more than 30 processes", {"processes": 30}),
        ("sleep 9", "killed: it took longer than 0.4 s", {"seconds": 0.4}),
        ("yes", "killed: it printed more than", {}),
        ("head -c 900000000 /dev/zero > /dev/shm/x; stat -c %s /dev/shm/x", "\n314572800\n", {"memory": 300}),
        ("exit 3", "[exit 3]", {}),
        ("printf 'a\\377b'", "a�b", {}),
    ],
)
def test_a_command_has_limits_and_says_how_it_ended(
    tmp_path: Path, command: str, said: str, options: dict[str, Any]
) -> None:
    began = time.monotonic()
    answer = run(command, tmp_path, output=2000, **{"seconds": 8, **options})
    assert said in answer and len(answer) < 2300
    assert time.monotonic() - began < 5


@boxed
@pytest.mark.parametrize("leave", ["sleep 77.5 & echo left", "(setsid sleep 77.5 &) ; echo left"])
def test_nothing_a_command_started_outlives_it(tmp_path: Path, leave: str) -> None:
    assert "left" in run(leave, tmp_path, seconds=2)
    assert subprocess.run(["pgrep", "-f", "sleep 77.5"], capture_output=True).stdout == b""


@boxed
def test_a_cancelled_call_leaves_no_process(tmp_path: Path) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await command_tool(tmp_path)("sleep 78.5")

    asyncio.run(give_up())
    assert subprocess.run(["pgrep", "-f", "sleep 78.5"], capture_output=True).stdout == b""


def test_the_first_and_the_last_of_a_long_output_are_kept(tmp_path: Path) -> None:
    said = run("seq 1 5000", tmp_path, output=100, sandbox="none")
    assert said.startswith("1\n2\n3\n") and said.endswith("4999\n5000\n") and "bytes left out" in said
    assert len(said) < 160


def test_without_a_sandbox_the_tool_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox.require_bubblewrap.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="install it .*or give sandbox='none'"):
        command_tool(tmp_path / "work")
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho No permissions to create new namespace >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    sandbox.require_bubblewrap.cache_clear()
    with pytest.raises(UsageError, match="No permissions to create new namespace"):
        command_tool(tmp_path / "work")
    sandbox.require_bubblewrap.cache_clear()
    assert run("echo yes", tmp_path / "work", sandbox="none") == "yes\n"


@pytest.mark.parametrize("folder", ["/", "~", "/etc", "/etc/ssl", "/tmp", "/home", "/dev/shm", "/proc/self"])
def test_no_folder_of_the_system_is_handed_out(folder: str) -> None:
    with pytest.raises(UsageError, match="Name one of its own"):
        command_tool(Path(folder).expanduser(), sandbox="none")


def test_a_folder_that_a_link_took_the_place_of_is_not_run_in(tmp_path: Path) -> None:
    work, theirs = tmp_path / "work", tmp_path / "theirs"
    theirs.mkdir()
    run_command = command_tool(work, sandbox="none")
    work.rmdir()
    work.symlink_to(theirs)
    with pytest.raises(UsageError, match="leads somewhere else"):
        asyncio.run(run_command("touch x"))
    assert not list(theirs.iterdir())


@pytest.mark.parametrize(
    "options", [{"seconds": "5"}, {"memory": -1}, {"processes": 0}, {"output": True}, {"readable": "/etc"}]
)
def test_a_limit_that_is_none_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        command_tool(tmp_path, sandbox="none", **options)


def test_a_file_is_no_folder_to_work_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file"):
        command_tool(tmp_path / "file", sandbox="none")


def test_a_command_is_recorded_and_not_run_again(tmp_path: Path) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        (run_command,) = tools
        return str(await run_command("echo x >> log; wc -l < log"))

    option = "none" if REFUSED else "bubblewrap"
    for _ in range(2):
        kit = [command_tool(tmp_path / "work", sandbox=option)]
        with CoDAgent("ops", memory=tmp_path / "ops.db", solver=solver, tools=kit, updates=False) as agent:
            outcome = next(iter(agent.run_sync([Task(id="t", prompt="Count.")])))
            assert outcome.answer.strip() == "1"
