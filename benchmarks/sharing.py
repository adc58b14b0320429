"""Many processes with many agents each, all on one run database: how fast, how even, how long the longest commit.

    python benchmarks/sharing.py [--processes 16] [--agents 8] [--tasks 20000] [--readers 1] [--fast]

Each agent lives an open-ended life in a world of one step, with a scripted model, so that nearly all the time goes into the
record: a task has two calls, two steps and three commits (solved, judged, updated). All processes begin together and live until
there are so many tasks in all; what each got done by then is its share. Readers look at the file again and again meanwhile,
each time for a quarter of a second in one snapshot, and rest as long. A commit's time is that of the whole transaction, with the
wait for its turn. `--fast` does not wait for the disk (durable=False). Prints JSON; `verify` has passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Feedback, Memory, Observation, Task
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel


class OneStep:
    """A world whose tasks are one answer long."""

    name, recovery = "one-step", "deterministic"

    def start(self, task: Task) -> Any:
        return _Step(task)


class _Step:
    def __init__(self, task: Task) -> None:
        self._task = task

    def reset(self) -> Observation:
        return Observation(self._task.prompt)

    def step(self, answer: str) -> Observation:
        return Observation("well done", done=True, feedback=Feedback(reward=float(len(answer) % 2)))


def said(messages: Any) -> str:
    text = messages[-1].content
    return f"<context>\n{len(text)}\n</context>" if "new note" in text else f"answer {len(text)}"


def live(number: int, path: Path, agents: int, most: int, durable: bool, begin: Any, done: Any, told: Any) -> None:
    """One process: its agents live until all processes together have lived `most` tasks."""
    memory = Memory.open(path, durable=durable)
    seconds: list[float] = []
    commit = memory._commit

    def timed(jobs: list[Any]) -> Any:
        started = time.perf_counter()
        try:
            return commit(jobs)
        finally:
            seconds.append(time.perf_counter() - started)

    memory._commit = timed  # type: ignore[method-assign]

    async def life(name: str) -> int:
        lived = 0
        model = ScriptedModel("words", said, form="natural")
        async with CoDAgent(name, model=model, memory=memory, environment=OneStep()) as agent:
            while done.value < most:
                await agent.solve(Task(id=str(lived), prompt=f"{name} does {lived}"))
                lived += 1
                with done.get_lock():
                    done.value += 1
        return lived

    async def lives() -> list[int]:
        return await asyncio.gather(*(life(f"agent-{number}-{index}") for index in range(agents)))

    try:
        begin.wait()
        told.put((number, sum(asyncio.run(lives())), sorted(seconds), ""))
    except Exception as error:
        told.put((number, 0, sorted(seconds), f"{type(error).__name__}: {error}"))
    memory.close()


def read(path: Path, most: int, begin: Any, done: Any) -> None:
    """A reader, half of the time in a snapshot."""
    begin.wait()
    while done.value < most:
        with look(path) as conn:
            conn.execute("SELECT count(*) FROM messages").fetchone()
            time.sleep(0.25)
        time.sleep(0.25)


def measure(path: Path, processes: int, agents: int, tasks: int, readers: int, durable: bool) -> dict[str, Any]:
    Memory(path).close()
    begin, done, told = (
        multiprocessing.Barrier(processes + readers + 1),
        multiprocessing.Value("i", 0),
        multiprocessing.Queue(),
    )
    shared = (begin, done)
    work = [
        multiprocessing.Process(target=live, args=(number, path, agents, tasks, durable, *shared, told))
        for number in range(processes)
    ]
    work += [multiprocessing.Process(target=read, args=(path, tasks, *shared)) for _ in range(readers)]
    for process in work:
        process.start()
    begin.wait()
    started, largest = time.perf_counter(), 0
    heard = []
    while len(heard) < processes:
        wal = Path(f"{path}-wal")
        largest = max(largest, wal.stat().st_size if wal.exists() else 0)
        if not told.empty():
            heard.append(told.get())
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    for process in work:
        process.join()
    report = verify(path)
    report.require()
    shares = sorted(one[1] for one in heard)
    commits = sorted(took for one in heard for took in one[2])
    lost = sum(shares) - report.counts["tasks"]
    return {
        "processes": processes,
        "agents": processes * agents,
        "cores": os.cpu_count(),
        "durable": durable,
        "tasks": sum(shares),
        "commits": report.counts["commits"],
        "errors": [one[3] for one in heard if one[3]],
        "lost": lost,
        "tasks_per_second": round(sum(shares) / seconds, 1),
        "shares": {"least": shares[0], "most": shares[-1], "ratio": round(shares[-1] / max(shares[0], 1), 2)},
        "transactions": len(commits),
        "commit_ms": {
            "median": round(1e3 * statistics.median(commits), 1),
            "p99": round(1e3 * commits[int(0.99 * len(commits))], 1),
            "longest": round(1e3 * commits[-1], 1),
        },
        "largest_wal_mb": round(largest / 1e6, 1),
        "file_kb_per_task": round(path.stat().st_size / 1e3 / max(sum(shares), 1), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--agents", type=int, default=8, help="of each process")
    parser.add_argument("--tasks", type=int, default=20_000, help="of all together")
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="do not wait for the disk")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "shared.db"
        found = measure(path, asked.processes, asked.agents, asked.tasks, asked.readers, not asked.fast)
    sys.stdout.write(f"{json.dumps(found, indent=2)}\n")


if __name__ == "__main__":
    main()
