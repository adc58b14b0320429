"""Death at every write and kill -9 at random moments: nothing recorded is done twice, and the file ends as if nothing had happened."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
from lives import Lives, killed_often, reply
from servers import ScriptedServer

from cod_agent import CoDAgent, Completion, Feedback, Memory, Message, Observation, Task, tool
from cod_agent.context import message
from cod_agent.journal import episode, record_completion
from cod_agent.memory.projection import projection
from cod_agent.memory.verify import verify

TASKS = [Task(id=f"t{n}", prompt=f"question {n}") for n in range(3)]


class Death(BaseException):
    """The process is gone: nothing handles it."""


class World:
    """Model, tools and environment, with a log of what was really done. `dies` kills at the n-th write, before or after it."""

    name, form, recovery = "world", "natural", "deterministic"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies: int = 0, after: bool = False) -> None:
        self.log: Counter[str] = Counter()
        self.writes, self.dead = 0, False
        original = Memory.write

        async def write(memory: Memory, job: Any) -> Any:
            self.writes += 1
            now = self.writes == dies
            self.dead = self.dead or (now and not after)
            if self.dead:
                raise Death
            done = await original(memory, job)
            self.dead = self.dead or now
            if self.dead:
                raise Death
            return done

        monkeypatch.setattr(Memory, "write", write)

    def did(self, what: str) -> None:
        if self.dead:
            raise Death
        self.log[what] += 1

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion("world", messages, {}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        self.did("call")
        await asyncio.sleep(0)
        said = sha256("".join(m.content for m in messages).encode()).hexdigest()[:8]
        update = "Write the new note" in messages[-1].content
        return Completion(f"<context>\n{said}\n</context>" if update else said, inexact="scripted")

    def start(self, task: Task) -> Any:
        return _Visit(task)

    def tools(self) -> list[Any]:
        async def look(where: str) -> str:
            self.did("tool")
            await asyncio.sleep(0)
            return f"looked {where}"

        @tool(on_crash="ask")
        async def pay(amount: int) -> int:
            self.did("tool")
            await asyncio.sleep(0)
            return amount * 2

        return [look, pay]

    @staticmethod
    async def solve(task: Task, context: str, tools: Any) -> str:
        """Parallel tools, equal calls at once, the same tool again, two steps."""
        seen = await tools.observe()
        looked, paid = await asyncio.gather(tools[0](task.id), tools[1](7))
        question = message("user", ("application", f"{task.prompt} {context} {seen.text} {looked} {paid}"))
        one, two = await asyncio.gather(tools.ask([question]), tools.ask([question]))
        paid = await tools[1](7)
        await tools.act(one.text)
        last = await tools.ask([question, message("user", ("application", f"{two.text} {paid}"))])
        await tools.act(last.text)
        return last.text


class _Visit:
    def __init__(self, task: Task) -> None:
        self.task, self.steps = task, []

    def reset(self) -> Observation:
        return Observation(f"start {self.task.id}")

    def step(self, answer: str) -> Observation:
        self.steps.append(answer)
        done = len(self.steps) == 2
        return Observation(f"{self.steps}", done=done, feedback=Feedback(reward=0.5, text="fine") if done else None)


def live(world: World, path: Path, later: bool) -> None:
    """Live the three tasks; `later`: feedback comes from the application, newest first."""

    async def living() -> None:
        options: dict[str, Any] = {} if later else {"environment": world, "solver": world.solve, "tools": world.tools()}
        agent = CoDAgent("a", model=world, memory=path, on_doubt=lambda name, said: "repeat", **options)  # type: ignore[arg-type]
        async for _ in agent.run(TASKS):
            pass
        for position in (2, 0, 1) if later else ():
            await agent.feedback(position, 0.25 * position, "thanks")

    try:
        asyncio.run(living())
    finally:
        memory = Memory._open.pop(os.path.realpath(path))
        memory._uses = 1
        memory.close()


def recorded(path: Path) -> Counter[str]:
    with closing(sqlite3.connect(path)) as conn:
        calls = conn.execute("SELECT count(*) FROM calls").fetchone()[0]
        tools = conn.execute("SELECT count(*) FROM effects WHERE kind = 'tool'").fetchone()[0]
    return Counter({"call": calls, "tool": tools})


@pytest.mark.parametrize("quick", [True, False], ids=["quick steps", "slow steps"])
@pytest.mark.parametrize("later", [False, True], ids=["judged at once", "judged later"])
def test_death_before_or_after_any_write_leaves_a_life_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool, later: bool
) -> None:
    if later and not quick:
        pytest.skip("no environment, no steps")
    monkeypatch.setattr(episode, "QUICK", 1.0 if quick else -1.0)
    with monkeypatch.context() as patched:
        whole = World(patched)
        live(whole, tmp_path / "whole.db", later)
    expected = projection(tmp_path / "whole.db")
    assert whole.log == recorded(tmp_path / "whole.db") and whole.writes > 15
    for dies in range(1, whole.writes + 1):
        for after in (False, True):
            path, where = tmp_path / f"{dies}{after}.db", f"died {'after' if after else 'before'} write {dies}"
            with monkeypatch.context() as patched, pytest.raises(Death):
                live(World(patched, dies, after), path, later)
            known = recorded(path)
            with monkeypatch.context() as patched:
                world = World(patched)
                live(world, path, later)
            assert world.log == whole.log - known, (
                f"{where}: something recorded was done again, or something was left out"
            )
            assert projection(path) == expected, where
    assert verify(path).ok


# ---- real kills ----


@pytest.mark.parametrize("name", ["text", "tools"])
def test_killed_at_random_moments_it_goes_on_and_repeats_nothing_recorded(tmp_path: Path, name: str) -> None:
    with ScriptedServer(reply) as server:
        with Lives(name, server.url, tmp_path / "whole") as whole:
            assert whole.live()
        calls, tools = server.count, whole.runs()
        with Lives(name, server.url, tmp_path / "killed") as life:
            kills = killed_often(life, server, Random(11), 0.5 if name == "text" else 0.12)
        assert kills >= 6
        assert server.count - calls <= calls + kills, "more than what was in flight was asked again"
        assert (life.runs() - tools).total() <= 2 * kills, "more than the two tools in flight ran again"
    assert projection(life.database) == projection(whole.database)
    assert verify(life.database).ok
