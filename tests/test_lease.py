"""One run, one process: who starts at once, who is stopped and wakes up, whose clock is set, whose machine is another."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Task
from cod_agent.errors import CodError, RunLeased
from cod_agent.memory import lease, schema
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify

HOUR = 3600.0
real_time = time.time


class Told:
    """What a process was told."""

    clock = 0.0
    """How far the time of day was set forward."""
    stops = False
    """The solver waits to be told to go on."""


def live(told: Any, path: str, seconds: float) -> None:
    """A process that lives the run "life" by commands, and answers with what came of each.

    ("solve", n): the n-th task; ("stop", n): wait in the middle of it to be told to go on; ("clock", shift): set the time of day.
    """
    time.time = lambda: real_time() + Told.clock
    lease.SECONDS = seconds

    async def solver(task: Task, context: str, tools: Any) -> str:
        if Told.stops:  # the loop stands still, and with it the renewal of the lease
            told.send("in the middle")
            told.recv()
        return "solved"

    agent = CoDAgent("a", memory=path, solver=solver, updates=False)
    while True:
        command, value = told.recv()
        if command == "clock":
            Told.clock = value
            told.send("set")
            continue
        Told.stops = command == "stop"
        try:
            outcome = agent.solve_sync(Task(id=f"t{value}"))
            told.send(outcome.position)
        except CodError as error:
            told.send(f"{type(error).__name__}: {error}")


class Somebody:
    """Such a process."""

    def __init__(self, context: Any, path: Path, seconds: float = 60.0) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=live, args=(theirs, str(path), seconds), daemon=True)
        self.process.start()

    def asked(self, command: str, value: float) -> Any:
        self.pipe.send((command, value))
        return self.pipe.recv()

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.kill()
        self.process.join()


@pytest.fixture
def somebody(tmp_path: Path) -> Iterator[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_lease", "sqlite_utils"])
    made: list[Somebody] = []

    def make(seconds: float = 60.0) -> Somebody:
        made.append(Somebody(context, tmp_path / "a.db", seconds))
        return made[-1]

    yield make
    for one in made:
        if one.process.is_alive():
            one.kill()


def test_of_three_that_begin_a_run_at_once_one_lives_it(somebody: Any, tmp_path: Path) -> None:
    for _ in range(2):
        three = [somebody() for _ in range(3)]
        for one in three:
            one.pipe.send(("solve", 0))
        said = [one.pipe.recv() for one in three]
        assert sum(isinstance(answer, int) for answer in said) == 1
        assert (
            sum("RunLeased: run 'life' of agent 'a' is being lived by process" in str(answer) for answer in said) == 2
        )
        for one in three:
            one.kill()
    with closing(sqlite3.connect(tmp_path / "a.db")) as conn:
        assert conn.execute("SELECT position, state FROM tasks").fetchall() == [(n, "solved") for n in range(2)]


def test_who_is_stopped_for_long_loses_the_run_and_writes_nothing_when_it_wakes_up(
    somebody: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.db"
    stopped, other = somebody(seconds=1.0), somebody(seconds=60.0)
    assert stopped.asked("solve", 0) == 0
    assert stopped.asked("stop", 1) == "in the middle"
    os.kill(stopped.process.pid, signal.SIGSTOP)
    time.sleep(1.1)
    assert "TaskMismatch" in other.asked("solve", 9), "what was begun comes first"
    assert other.asked("solve", 1) == 1
    before = projection(path)
    stopped.pipe.send("go on")
    os.kill(stopped.process.pid, signal.SIGCONT)
    said = stopped.pipe.recv()
    assert "RunLeased: this process was silent for so long that another one took over its run" in said
    assert projection(path) == before and verify(path).ok


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "backward"])
def test_a_clock_that_is_set_loses_no_life_and_gives_none_away(somebody: Any, tmp_path: Path, jump: float) -> None:
    one, other = somebody(), somebody()
    assert one.asked("solve", 0) == 0
    for now in (jump, 0.0, jump):  # set while it lives, and set right again
        assert one.asked("clock", now) == "set"
        refused = other.asked("solve", 1)
        assert 50 < int(re.findall(r"wait (\d+) s", refused)[0]) <= 60
    assert one.asked("stop", 1) == "in the middle"
    assert "RunLeased" in other.asked("solve", 1)
    one.pipe.send("go on")
    assert one.pipe.recv() == 1
    one.kill()
    assert other.asked("solve", 2) == 2, "from a dead process at once, whatever its clock said"
    assert verify(tmp_path / "a.db").ok


# ---- what a row says ----


@pytest.fixture
def conn() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as conn:
        schema.migrate(conn)
        yield conn


def row(conn: sqlite3.Connection, host: str, pid: int, expires: float, steady: float | None) -> None:
    """Somebody else's lease, its ends in seconds from now."""
    ends = (time.time() + expires, None if steady is None else time.monotonic() + steady)
    conn.execute("PRAGMA foreign_keys = OFF")
    conn.execute(
        "INSERT INTO leases (run_id, owner, host, pid, expires, steady) VALUES (1, 'other', ?, ?, ?, ?)",
        (host, pid, *ends),
    )


BOOT = lease._boot(lease.HOST)
NEIGHBOUR = f"{os.uname().nodename}/{BOOT}/another container"
ELSEWHERE = "elsewhere/another boot/pid:[1]"
LATER = 30.0
"""A lease with half of its time left."""


@pytest.mark.parametrize(
    ("host", "expires", "steady", "held"),
    [
        (NEIGHBOUR, LATER, LATER, True),
        (NEIGHBOUR, LATER - HOUR, LATER, True),
        (NEIGHBOUR, LATER + HOUR, LATER, True),
        (NEIGHBOUR, LATER, -1.0, False),
        (ELSEWHERE, LATER, -HOUR, True),
        (ELSEWHERE, -1.0, LATER, False),
        (ELSEWHERE, LATER + HOUR, LATER, False),
        (ELSEWHERE, LATER, None, True),
    ],
    ids=[
        "a neighbour's",
        "the clock was set forward",
        "the clock was set back",
        "silent for long",
        "another machine's, whose steady clock says nothing",
        "another machine's that is over",
        "of before a reboot with a wrong clock: no lease lasts so long",
        "written by an earlier version",
    ],
)
@pytest.mark.skipif("/" not in lease.HOST, reason="this system does not tell one boot from another")
def test_whose_clock_decides(
    conn: sqlite3.Connection, host: str, expires: float, steady: float | None, held: bool
) -> None:
    row(conn, host, 1, expires, steady)
    if held:
        with pytest.raises(RunLeased, match=r"wait (29|30) s"):
            lease.take(conn, 1, "a", "life")
    else:
        lease.take(conn, 1, "a", "life")
        assert lease.ours(conn, 1)


def test_a_dead_process_that_nobody_waited_for_is_dead(conn: sqlite3.Connection) -> None:
    """As in a container whose first process does not reap its children."""
    died = subprocess.Popen(["sleep", "60"])
    row(conn, lease.HOST, died.pid, LATER, LATER)
    with pytest.raises(RunLeased):
        lease.take(conn, 1, "a", "life")
    died.kill()
    os.waitid(os.P_PID, died.pid, os.WEXITED | os.WNOWAIT)
    lease.take(conn, 1, "a", "life")
    assert lease.ours(conn, 1)
    died.wait()


def test_a_lease_is_renewed_by_whichever_clock_says_it_is_half_over(
    conn: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease.take(conn, 1, "a", "life")

    def ends() -> tuple[float, float]:
        found = conn.execute("SELECT expires, steady FROM leases").fetchone()
        return (float(found[0]), float(found[1]))

    first = ends()
    lease.hold(conn, 1)
    assert ends() == first
    monkeypatch.setattr(time, "monotonic", lambda: first[1] - lease.SECONDS / 2 + 1)
    lease.hold(conn, 1)
    assert ends()[1] > first[1]


async def test_what_an_agent_that_lost_its_lease_does_is_not_written(tmp_path: Path) -> None:
    """Neither a failed attempt nor the beginning of an episode: nothing at all."""

    async def solver(task: Task, context: str, tools: Any) -> str:
        await agent.memory.write(lambda conn: conn.execute("UPDATE leases SET owner = 'another'"))
        before.append(projection(tmp_path / "a.db"))
        await asyncio.sleep(0)
        raise RuntimeError((await tools.ask([])).text)

    class Refusing:
        name = "m"

        async def complete(self, messages: Any, *, on_delta: Any = None) -> Any:
            from cod_agent.errors import ModelError
            from cod_agent.journal import record_completion

            async def refuse(_: Any) -> Any:
                raise ModelError("no")

            return await record_completion("m", messages, {}, refuse)

    before: list[Any] = []
    async with CoDAgent("a", model=Refusing(), memory=tmp_path / "a.db", solver=solver) as agent:
        with pytest.raises(RunLeased, match="nothing was overwritten"):
            await agent.solve(Task(id="t"))
        attempts = await agent.memory.read(lambda conn: conn.execute("SELECT count(*) FROM attempts").fetchone())
    assert attempts == (0,) and projection(tmp_path / "a.db") == before[0]
