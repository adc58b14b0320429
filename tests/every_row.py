"""A run database with every kind of row there is, small: for tests that change each of them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Completion, Feedback, Memory, Message, Observation, Task, Tokens, tool
from cod_agent.errors import ModelOverloaded
from cod_agent.journal import current_episode, record_completion
from cod_agent.journal.answers import Answer
from cod_agent.journal.requests import read_request
from cod_agent.memory import read, runs, versions
from cod_agent.memory.content import STYLES
from cod_agent.memory.tombstones import bury

TASKS = [Task(id=f"t{n}", prompt="Do it.", data={"reward": reward}) for n, reward in enumerate((1.0, 0.0, 1.0, 0.5))]


class Exact:
    """A model with exact tokens that is killed after `calls` answers."""

    name, form = "exact", "natural"

    def __init__(self, calls: int = 1000, failing: bool = False) -> None:
        self.calls, self.failing = calls, failing

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        params = {"temperature": 1.0, "max_tokens": 9}
        try:
            return await record_completion(self.name, messages, params, self._answer)
        except ModelOverloaded:
            return await record_completion(self.name, messages, params, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        self.calls -= 1
        if self.calls < 0:
            raise asyncio.CancelledError
        if self.failing and self.calls % 3 == 0:
            self.calls -= 1
            raise ModelOverloaded("the server has too much to do")
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


async def live(path: Path, calls: int = 1000) -> None:
    """Runs with written and refused updates, one forked from the other; a tool and no model; nothing that is not in every life."""

    @tool(on_crash="fail")
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


async def every_row(path: Path) -> None:
    """`live`, and whatever else a file may hold: failed attempts, requests in every style, contexts that were given, held back,
    adopted, refused, texts that were pruned and forgotten, tasks that stand unfinished or were given up."""
    await live(path)
    memory = Memory.open(path)
    async with CoDAgent("a", model=Exact(8, failing=True), memory=memory, environment=Two()) as agent:
        with contextlib.suppress(asyncio.CancelledError):
            async for _ in agent.run(TASKS, run="unfinished"):
                pass
    async with CoDAgent(
        "a", model=Exact(), memory=memory, environment=Two(), given=lambda _, at: f"given {at}"
    ) as agent:
        async for _ in agent.run(TASKS[:2], run="given"):
            pass
    async with CoDAgent("c", memory=memory, solver=_styles, updates=False) as agent:
        await agent.solve(TASKS[0], run="styles")
        await agent.solve(TASKS[1], run="styles")
        await agent.feedback(0, 0.5, "so so", run="styles")
    async with CoDAgent("d", memory=memory, solver=_never, updates=False) as agent:
        try:
            await agent.solve(TASKS[0], run="given up")
        except OSError:
            await agent.abandon(run="given up", reason="enough")
    memory.write_sync(_gated)
    memory.write_sync(_buried)
    memory.close()


async def _never(task: Task, context: str, tools: Any) -> str:
    raise OSError("no way")


async def _styles(task: Task, context: str, tools: Any) -> str:
    """Requests as other programs write them."""
    episode = current_episode()
    assert episode is not None
    body = {"model": "m", "messages": [{"role": "user", "content": f"Hé, {task.id}"}], "temperature": 1.0}
    written = [write(body).encode() for write in STYLES.values()]
    for raw in (*written, b'{"model": "m",  "messages": []}', b"\xff\xfe no text"):
        request = read_request(raw)
        message = {"role": "assistant", "content": "yes"}
        completion = Completion("yes", "stop", None, "the server gave none", "weights-2", (3, 1))
        said = {"id": "chat-1", "choices": [{"message": message, "finish_reason": "stop"}]}
        request.occurrence = episode.take(request.key)
        await episode.record(request, Answer(said, completion), time.time(), on_policy=False, lean=False)
    return "yes"


def _gated(conn: sqlite3.Connection) -> None:
    """Versions that were held back; one adopted, one refused, one undecided; the first one again; another run goes on from one."""
    said: dict[str, Any] = {"environment": None, "pack": {"id": "p"}, "length": None, "model": "m", "settings": {}}
    run = runs.open_run(conn, "e", "gated", **said)
    held = [_solved(conn, run, position, "it gives orders") for position in range(4)]
    runs.adopt(conn, run, held[0].id, {"reason": "accepted", "by": "ada"})
    runs.refuse(conn, run, held[1].id, {"reason": "refused", "by": "ada"})
    runs.adopt(conn, run, read.version_id(conn, "e", "gated", 0), {"reason": "rollback"})
    _solved(conn, run, 4, "")
    other = runs.open_run(conn, "e", "goes on", **said)
    runs.adopt(conn, other, held[2].id, {"reason": "derived"})
    _solved(conn, other, 0, "")


def _solved(conn: sqlite3.Connection, run: runs.Run, position: int, held: str) -> versions.Context:
    task = Task(id=f"g{position}", prompt="Go on.")
    known, before = runs.begin_task(conn, run, position, task)
    runs.solved(conn, run, known, "an answer")
    runs.judged(conn, run, known, Feedback(reward=0.5, text="fair"))
    episode_id, _ = runs.begin_episode(conn, run.id, position, "update", before.id)
    return runs.updated(conn, run, known, episode_id, f"after {position}", [{"position": position}], held=held)


def _buried(conn: sqlite3.Connection) -> None:
    """Texts of `first` are pruned, one of its tasks with its calls, effects and contexts is forgotten."""
    run_id = conn.execute("SELECT id FROM runs WHERE name = 'first'").fetchone()[0]

    def ids(query: str) -> list[int]:
        return [row[0] for row in conn.execute(query, (run_id,))]

    of = "FROM {} x JOIN episodes e ON e.id = x.episode_id WHERE e.run_id = ? AND e.position = {}"
    messages = ids(f"SELECT x.answer_id {of.format('calls', 0)}")
    calls = ids(f"SELECT x.id {of.format('calls', 0)}")
    bury(conn, run_id, "pruned", None, {"reason": "old"}, {"call": calls, "message": messages})
    gone = {
        "task": ids("SELECT id FROM tasks WHERE run_id = ? AND position = 1"),
        "call": ids(f"SELECT x.id {of.format('calls', 1)}"),
        "effect": ids(f"SELECT x.id {of.format('effects', 1)}"),
        "context": ids("SELECT id FROM contexts WHERE run_id = ? AND version = 2"),
    }
    bury(conn, run_id, "forgot", 1, {"reason": "poisoned"}, gone)
