"""A long life in one run: does anything grow with the tasks behind it?

    python benchmarks/long_life.py [--tasks 2000]

Two lives. `application`: tasks are solved one by one by a scripted model, their feedback comes afterwards, and after each one a note of
2,000 characters is written anew. `frozen-lake`: one pack of that many tasks, lived by the world's remembering player. After every
hundred tasks: milliseconds of wall and CPU time a task, of a commit (half and 95 % of them are quicker), steps of SQLite's machine a
task, bytes the file grew by a task, megabytes of memory and of the write-ahead log, characters of the context. Then what it takes to
open the file again and read every outcome, to list the contexts, and to verify. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import resource
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Memory, Message, Task
from cod_agent.environments import FrozenLake
from cod_agent.memory import history
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel

LIVES = ("application", "frozen-lake")
T_95 = 2.101
"""Student's t with 18 degrees of freedom: a line through twenty points."""


def clerk() -> ScriptedModel:
    """Answers in a sentence, and writes a note of about 2,000 characters, of other words each time."""
    dice = random.Random(3)

    def say(messages: Sequence[Message]) -> str:
        if "new note" not in messages[-1].content:
            return f"Answer {dice.randrange(10**6)}: we open at nine."
        words = ("".join(dice.choice("etaoinshrdlu") for _ in range(dice.randint(2, 9))) for _ in range(310))
        return f"<context>\n{' '.join(words)[:2000]}\n</context>"

    return ScriptedModel("clerk", say, form="natural")


async def application(memory: Memory, tasks: int) -> AsyncIterator[int]:
    """Solve, feedback, update, as a program does whose users say later how it went; yields the context's length after each task."""
    async with CoDAgent("desk", model=clerk(), memory=memory) as agent:
        for number in range(tasks):
            outcome = await agent.solve(Task(id=f"ticket-{number}", prompt=f"When do you open on day {number}?"))
            outcome = await agent.feedback(outcome, 1.0, "The customer was content.")
            yield len(outcome.context)


async def frozen_lake(memory: Memory, tasks: int) -> AsyncIterator[int]:
    """One pack that does not end for a long time."""
    pack = FrozenLake("small", seed=7, form="compact").pack(tasks)
    async with CoDAgent("lake", model="scripted:perfect", memory=memory, environment=pack.environment) as agent:
        async for outcome in agent.run(pack):
            yield len(outcome.context)


WAYS = {"application": application, "frozen-lake": frozen_lake}


class Gauge:
    """What the tasks since the last reading took."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._commit = memory, memory._commit
        self.commits: list[float] = []
        self.steps = 0
        memory._commit = self._timed  # type: ignore[method-assign]
        memory._conn.set_progress_handler(self._stepped, 100)
        self._begin()

    def _timed(self, jobs: list[Any]) -> Any:
        started = time.perf_counter()
        try:
            return self._commit(jobs)
        finally:
            self.commits.append(time.perf_counter() - started)

    def _stepped(self) -> int:
        self.steps += 100
        return 0

    def _begin(self) -> None:
        self.commits, self.steps = [], 0
        self._wall, self._cpu, self._bytes = time.perf_counter(), time.process_time(), self._used()

    def _used(self) -> int:
        """Bytes of the pages in use."""
        (pages,), (size,) = (
            self._memory._conn.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size")
        )
        return int(pages * size)

    def read(self, tasks: int, context: int) -> dict[str, float]:
        """Figures of the `tasks` tasks since the last reading."""
        times = sorted(self.commits)
        wal = Path(f"{self._memory.path}-wal")
        found = {
            "ms": 1e3 * (time.perf_counter() - self._wall) / tasks,
            "cpu_ms": 1e3 * (time.process_time() - self._cpu) / tasks,
            "commit_p50_ms": 1e3 * statistics.median(times),
            "commit_p95_ms": 1e3 * times[int(0.95 * len(times))],
            "steps": self.steps / tasks,
            "bytes": (self._used() - self._bytes) / tasks,
            "rss_mb": _rss() / 1e6,
            "wal_mb": wal.stat().st_size / 1e6 if wal.exists() else 0.0,
            "context": float(context),
        }
        self._begin()
        return {name: round(value, 3) for name, value in found.items()}


def _rss() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def live(path: Path, kind: str, tasks: int, every: int, *, durable: bool = True) -> list[dict[str, float]]:
    """Live that many tasks in one run; a reading after each `every`."""
    readings: list[dict[str, float]] = []

    async def whole() -> None:
        memory = Memory.open(path, durable=durable)
        gauge, number = Gauge(memory), 0
        async for length in WAYS[kind](memory, tasks):
            number += 1
            if number % every == 0:
                readings.append(gauge.read(every, length))
        memory.close()

    asyncio.run(whole())
    return readings


def slope(readings: list[dict[str, float]], name: str, every: int) -> dict[str, float]:
    """By how much a figure grows in a thousand tasks, with the half-width of its 95 % interval, and its mean."""
    x, y = [every * (at + 1) for at in range(len(readings))], [one[name] for one in readings]
    fitted = statistics.linear_regression(x, y)
    errors = [value - fitted.intercept - fitted.slope * at for at, value in zip(x, y, strict=True)]
    spread = sum((at - statistics.fmean(x)) ** 2 for at in x)
    half = T_95 * (sum(error**2 for error in errors) / (len(x) - 2) / spread) ** 0.5
    return {
        "mean": round(statistics.fmean(y), 3),
        "per_1000": round(1000 * fitted.slope, 3),
        "plus_minus": round(1000 * half, 3),
    }


def afterwards(path: Path, kind: str, tasks: int) -> dict[str, float]:
    """Seconds that it takes to do something with the whole of a long run."""
    found = {}

    async def again() -> None:
        memory = Memory.open(path)
        if kind == "application":
            async with CoDAgent("desk", model=clerk(), memory=memory) as agent:
                started = time.perf_counter()
                await agent.solve(Task(id="one more", prompt="When do you open?"))
                found["open_and_solve"] = time.perf_counter() - started
        else:
            started, count = time.perf_counter(), 0
            async for _ in frozen_lake(memory, tasks):
                count += 1
            found["resume"] = time.perf_counter() - started
        memory.close()

    asyncio.run(again())
    started = time.perf_counter()
    with look(path) as conn:
        (run,) = history.find(conn)
        history.steps(conn, run)
    found["context_log"] = time.perf_counter() - started
    started = time.perf_counter()
    verify(path).require()
    found["verify"] = time.perf_counter() - started
    started = time.perf_counter()
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA integrity_check").fetchall()
    found["integrity_check"] = time.perf_counter() - started
    return {name: round(seconds, 3) for name, seconds in found.items()}


def scans(path: Path, kind: str, tasks: int) -> list[str]:
    """Statements of a life that read a whole table or index, with SQLite's plan for them."""
    asked: set[str] = set()

    async def whole() -> None:
        memory = Memory.open(path)
        memory._conn.set_trace_callback(asked.add)
        async for _ in WAYS[kind](memory, tasks):
            pass
        memory._conn.set_trace_callback(None)
        memory.close()

    asyncio.run(whole())
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return sorted(
            set(
                _scanning(
                    conn, {re.sub(r"'(?:[^']|'')*'|x'[0-9a-f]*'|\b\d+(?:\.\d+)?\b", "?", one): one for one in asked}
                )
            )
        )


def _scanning(conn: sqlite3.Connection, asked: dict[str, str]) -> Iterator[str]:
    for shape, statement in asked.items():
        if statement.lstrip().upper().startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            for *_, plan in conn.execute(f"EXPLAIN QUERY PLAN {statement}"):
                if plan.startswith("SCAN") and "CONSTANT ROW" not in plan and plan != "SCAN up":
                    yield f"{plan}: {shape}"


def whole(folder: Path, kind: str, tasks: int, every: int) -> dict[str, Any]:
    """One life with its readings, their slopes, and what its whole run takes afterwards."""
    path = folder / f"{kind}.db"
    readings = live(path, kind, tasks, every)
    return {
        "readings": readings,
        "slopes": {name: slope(readings, name, every) for name in readings[0]},
        "seconds": afterwards(path, kind, tasks),
        "file_mb": round(path.stat().st_size / 1e6, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--every", type=int, default=100)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lives = {kind: whole(Path(folder), kind, given.tasks, given.every) for kind in LIVES}
    json.dump(lives, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
