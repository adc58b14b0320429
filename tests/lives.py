"""Lives that tests kill: `Lives(name, ...)` starts a process that lives one, again and again, until it is killed.

A life is a function `(url, database)` that runs the same tasks however often it is called; its tools write a line each
time they run (`ran`). The process imports what is heavy once and forks for every attempt: a kill costs little.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from cod_agent import CoDAgent, Observation, Task, tool
from cod_agent.memory.content import conversation, write_request
from cod_agent.tasks import Feedback

FRUITS = {"task-0": "apples", "task-1": "pears", "task-2": "plums"}
TASKS = [Task(id=name, prompt=f"Sum up the {fruit} of {name}.") for name, fruit in FRUITS.items()]


def ran(line: str) -> None:
    """Put on record, outside of the database, that a tool runs: one line, one write."""
    log = os.open(os.environ["LIVES_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, f"{line}\n".encode())
    os.close(log)


async def count(fruit: str) -> int:
    """Count fruit.

    Args:
        fruit: which.
    """
    ran(f"count {fruit}")
    await asyncio.sleep(0.06)
    return len(fruit)


async def price(fruit: str) -> float:
    """What one costs."""
    ran(f"price {fruit}")
    await asyncio.sleep(0.01)
    return 0.25


@tool(on_crash="repeat")
async def order(fruit: str, number: int) -> str:
    """Order some."""
    ran(f"order {fruit} {number}")
    await asyncio.sleep(0.03)
    return f"ordered {number} {fruit}"


class Stall:
    """Three steps, judged at the end."""

    name, recovery = "stall", "deterministic"

    def start(self, task: Task) -> Any:
        return _Visit(task)


class _Visit:
    def __init__(self, task: Task) -> None:
        self.task, self.steps = task, 0

    def reset(self) -> Observation:
        self.steps = 0
        return Observation(f"You stand at a stall ({self.task.id}).")

    def step(self, answer: str) -> Observation:
        self.steps += 1
        done = self.steps == 3
        feedback = Feedback(reward=1.0) if done else None
        return Observation(f"step {self.steps}: you said {answer}", done=done, feedback=feedback)


class SlowStall(Stall):
    """Every other step is so slow that it is recorded by itself."""

    def start(self, task: Task) -> Any:
        return _SlowVisit(task)


class _SlowVisit(_Visit):
    def step(self, answer: str) -> Observation:
        time.sleep(0.03 * (self.steps % 2))
        return super().step(answer)


def reply(request: dict[str, Any], n: int) -> Any:
    """A scripted model: two tools at once, one after them, steps where it can, an answer; a function of the request."""
    from servers import Answer, spoken

    messages = request["messages"]
    if "Write the new note." in spoken(messages[-1]):
        read = sum(map(len, map(spoken, messages)))
        return Answer(f"<context>\nlearned from {read} characters\n</context>", delay=0.02)
    turn = sum(message["role"] == "assistant" for message in messages)
    said = " ".join(map(spoken, messages))
    fruit = next(name for task, name in FRUITS.items() if task in said)
    if turn == 0:
        return Answer("Let me see.", [("count", {"fruit": fruit}), ("price", {"fruit": fruit})], delay=0.02)
    if turn == 1:
        return Answer(None, [("order", {"fruit": fruit, "number": 4})], delay=0.02)
    if any(said["function"]["name"] == "act" for said in request.get("tools", [])) and turn < 4:
        return Answer(None, [("act", {"answer": f"move {turn}"})], delay=0.02)
    return Answer("Four pears.", delay=0.02)


def agentscope(url: str, database: str) -> None:
    from cod_agent.models.openai import OpenAIModel
    from cod_agent.solvers import AgentScopeSolver

    solver = AgentScopeSolver("m", base_url=url, exact=True, stream=bool(os.environ.get("LIVES_STREAM")))
    _live(database, OpenAIModel("m", base_url=url), solver)


def sdk(url: str, database: str) -> None:
    """A loop of an application's own, on the OpenAI SDK."""
    from own_solver import sdk_solver

    from cod_agent.models.openai import OpenAIModel

    _live(database, OpenAIModel("m", base_url=url), sdk_solver(url))


def _live(database: str, model: Any, solver: Any) -> None:
    async def live() -> None:
        kit = [count, price, order]
        async with CoDAgent("a", model=model, memory=database, environment=Stall(), solver=solver, tools=kit) as agent:
            async for _ in agent.run(TASKS):
                pass

    asyncio.run(live())


def text(url: str, database: str) -> None:
    """The default dialogue, streamed and exact, in an environment that takes its time."""
    from cod_agent.models.openai import OpenAIModel

    async def live() -> None:
        model = OpenAIModel("m", base_url=url, exact=True, stream=True)
        async with CoDAgent("a", model=model, memory=database, environment=SlowStall()) as agent:
            async for _ in agent.run(TASKS):
                pass

    asyncio.run(live())


def tools(url: str, database: str) -> None:
    """The default solver with tools."""
    from cod_agent.models.openai import OpenAIModel

    _live(database, OpenAIModel("m", base_url=url), None)


LIVES: dict[str, Callable[[str, str], None]] = {"agentscope": agentscope, "sdk": sdk, "text": text, "tools": tools}


class Lives:
    """A life and the process that lives it.

    Args:
        name: in `LIVES`.
        url: the scripted server.
        folder: where its database and its log go.
    """

    def __init__(self, name: str, url: str, folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.database, self.log = folder / "life.db", folder / "ran.log"
        self._process = subprocess.Popen(
            [sys.executable, __file__, name, url, str(self.database)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment, "LIVES_LOG": str(self.log)},
        )

    def live(self, seconds: float = 60.0) -> bool:
        """Live until it is done (True) or, after so many seconds, killed (False).

        Raises:
            RuntimeError: it failed.
        """
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline().strip()
        if said not in ("done", "killed"):
            raise RuntimeError(f"the life failed: {said}")
        return said == "done"

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Lives:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def runs(self) -> Counter[str]:
        """How often each tool ran with each of its arguments."""
        return Counter(self.log.read_text().splitlines()) if self.log.exists() else Counter()

    def recorded(self) -> tuple[set[bytes], set[str]]:
        """(bodies of the recorded calls, recorded tool runs as the lines they wrote)."""
        with sqlite3.connect(self.database) as conn:
            if not conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'effects'").fetchone():
                return set(), set()  # killed before there was anything to lose
            known = conn.execute("SELECT name, arguments FROM effects WHERE kind = 'tool'").fetchall()
        tools = {" ".join([name, *map(str, json.loads(said).values())]) for name, said in known}
        return set(sent(self.database)), tools


def killed_often(life: Lives, server: Any, dice: Random, longest: float = 0.25) -> int:
    """Kill a life at random moments until it is done; how often it was.

    Every call and every tool run of these lives is unlike the others: what is recorded at a kill may not happen later.
    """
    kills: list[tuple[set[bytes], set[str], int, Counter[str]]] = []
    while not life.live(dice.uniform(0.02, longest * (1 + len(kills) / 10))):
        kills.append((*life.recorded(), server.count, life.runs()))
    final = life.runs()
    for calls, tools, asked, runs in kills:
        assert not calls.intersection(server.bodies[asked:]), "a recorded call was made again"
        for line in tools:
            assert final[line] == runs[line], f"a recorded run was repeated: {line}"
    return len(kills)


def sent(database: Path) -> list[bytes]:
    """The bodies of all recorded calls, rebuilt from their parts."""
    with sqlite3.connect(database) as conn:
        calls = conn.execute(
            "SELECT h.body, c.prompt_id, c.style FROM calls c JOIN heads h ON h.id = c.head_id ORDER BY c.id"
        ).fetchall()
        return [
            write_request(head, [body or "" for _, body, _ in conversation(conn, leaf)], style)
            for head, leaf, style in calls
        ]


def projection(database: Path) -> dict[str, list[Any]]:
    """What two databases of one life must agree on: everything but attempts, leases, times and row ids."""
    at = "JOIN episodes e ON e.id = x.episode_id ORDER BY e.position, e.kind, x.request, x.occurrence"
    queries = {
        "calls": f"SELECT e.position, e.kind, x.request, x.occurrence, x.hash FROM calls x {at}",
        "effects": f"SELECT e.position, e.kind, x.kind, x.name, x.request, x.occurrence, x.hash FROM effects x {at}",
        "tasks": "SELECT position, fingerprint, state, answer, reward, feedback, reason FROM tasks ORDER BY position",
        "episodes": "SELECT position, kind, state, reason, digest FROM episodes ORDER BY position, kind",
        "contexts": "SELECT version, body, hash FROM contexts ORDER BY version",
        "commits": "SELECT seq, what, position, hash, chain FROM commits ORDER BY seq",
        "messages": "SELECT hash, body, labels FROM messages ORDER BY hash",
    }
    with sqlite3.connect(database) as conn:
        return {name: conn.execute(query).fetchall() for name, query in queries.items()}


def _serve(name: str, url: str, database: str) -> None:
    # What is heavy: once, before the forks.
    import openai.resources.chat  # noqa: F401

    if name == "agentscope":
        import cod_agent.solvers._agentscope  # noqa: F401
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                LIVES[name](url, database)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        end, status = time.monotonic() + float(line), None
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = code
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
            else:
                time.sleep(0.002)
        said = "done" if status == 0 else "killed" if os.WIFSIGNALED(status) else f"exit {status}"
        print(said, flush=True)


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parent / "examples")]
    _serve(*sys.argv[1:4])
