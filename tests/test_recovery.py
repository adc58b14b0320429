"""What a crash in the middle means to environments, tools and leases; each declares it, and gets what it declared."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_agent import Counting, Steps, lived, table

from cod_agent import CoDAgent, Memory, Message, Task, idempotency_key, recorded_tool, tool
from cod_agent.context import message
from cod_agent.errors import (
    ModelError,
    ReplayDiverged,
    RunLeased,
    StoreFull,
    ToolFailed,
    ToolInDoubt,
    UnknownName,
    VerificationFailed,
)
from cod_agent.memory import lease

TASK = Task(id="t", prompt="a question")


class Interrupted(Exception):
    """What stands for a crash here: the run ends, a new agent resumes it."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


def agent_on(path: Path, model: Any = None, **options: Any) -> CoDAgent:
    return CoDAgent("a", model=model or Counting(), memory=path, **options)


class Failing(Counting):
    """A model that fails at its n-th answer."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _play(self, messages: Sequence[Message]) -> str:
        if self.asked + 1 == self.at:
            raise ModelError("interrupted")
        return super()._play(messages)


# ---- environments ----


async def interrupted(path: Path, environment: Steps, at: int) -> None:
    async with agent_on(path, Failing(at), environment=environment) as agent:
        with pytest.raises(ModelError, match="interrupted"):
            await lived(agent, [TASK])


async def test_a_deterministic_environment_takes_its_recorded_steps_again(path: Path) -> None:
    environment = Steps("deterministic")
    await interrupted(path, environment, 3)
    environment.taken.clear()
    async with agent_on(path, environment=environment) as agent:
        assert [o.reward for o in await lived(agent, [TASK])] == [1.0]
    assert environment.taken == ["reset", "answer 1", "answer 2", "answer 1"]


async def test_a_finished_episode_is_not_taken_again(path: Path) -> None:
    environment = Steps("deterministic")
    await interrupted(path, environment, 4)
    environment.taken.clear()
    async with agent_on(path, environment=environment) as agent:
        assert [o.version for o in await lived(agent, [TASK])] == [1]
    assert environment.taken == [], "only the update was left to do"


async def test_an_environment_that_is_not_deterministic_after_all_is_found_out(path: Path) -> None:
    await interrupted(path, Steps("deterministic"), 3)
    async with agent_on(path, environment=Steps("deterministic", shown="something else")) as agent:
        with pytest.raises(
            ReplayDiverged, match="not deterministic, or it changed. Declare its recovery as 'snapshot' or 'abort'"
        ):
            await lived(agent, [TASK])


async def test_a_snapshot_is_restored(path: Path) -> None:
    environment = Steps("snapshot")
    await interrupted(path, environment, 3)
    environment.taken.clear()
    async with agent_on(path, environment=environment) as agent:
        assert [o.reward for o in await lived(agent, [TASK])] == [1.0]
        assert (
            table(agent, "SELECT snapshot FROM effects WHERE kind = 'act' ORDER BY id")[1] == '["answer 1","answer 2"]'
        )
    assert environment.taken == ["restored 2", "answer 1"]


async def test_an_environment_that_cannot_be_resumed_ends_the_task_without_a_reward(path: Path) -> None:
    environment = Steps("abort")
    await interrupted(path, environment, 3)
    model = Counting()
    async with agent_on(path, model, environment=environment) as agent:
        outcomes = await lived(agent, [TASK, TASK])
        assert math.isnan(outcomes[0].reward) and "cannot be resumed" in outcomes[0].reason
        assert (outcomes[0].update, outcomes[0].version, outcomes[1].reward, outcomes[1].version) == ("none", 0, 1.0, 1)
        assert table(agent, "SELECT state FROM episodes ORDER BY id") == ["aborted", "done", "done"]


async def test_an_environment_that_cannot_be_resumed_but_was_not_begun_is_begun(path: Path) -> None:
    class Late(Steps):
        def start(self, task: Task) -> Any:
            raise Interrupted

    async with agent_on(path, environment=Late("abort")) as agent:
        with pytest.raises(Interrupted):
            await lived(agent, [TASK])
    async with agent_on(path, environment=Steps("abort")) as agent:
        assert [o.reward for o in await lived(agent, [TASK])] == [1.0]


# ---- tools ----


class Shop:
    """A tool that is interrupted at its n-th run, and a solver that calls it twice with the same arguments."""

    def __init__(self, policy: Any, dies_at: int = 0, parallel: bool = False) -> None:
        self.ran, self.keys, self.dies_at, self.parallel = 0, [], dies_at, parallel
        self.pay = tool(self._pay, on_crash=policy)

    @property
    def _pay(self) -> Any:
        async def pay(amount: int) -> str:
            self.ran += 1
            self.keys.append(idempotency_key())
            await asyncio.sleep(0)
            if self.ran == self.dies_at:
                raise asyncio.CancelledError
            return f"paid {amount}"

        return pay

    async def solve(self, task: Task, context: str, tools: Any) -> str:
        async def pay() -> str:
            try:
                return str(await tools[0](5))
            except ToolFailed as error:
                return str(error)

        if self.parallel:
            return " and ".join(await asyncio.gather(pay(), pay()))
        return f"{await pay()} and {await pay()}"


async def shopped(path: Path, shop: Shop, **options: Any) -> str:
    async with agent_on(path, solver=shop.solve, tools=[shop.pay], **options) as agent:
        return (await agent.solve(TASK)).answer


async def killed(path: Path, shop: Shop) -> None:
    with pytest.raises(asyncio.CancelledError):
        await shopped(path, shop)


async def test_a_tool_that_may_be_repeated_is_and_the_recorded_one_is_not(path: Path) -> None:
    first, second = Shop("repeat", dies_at=2), Shop("repeat")
    await killed(path, first)
    assert await shopped(path, second) == "paid 5 and paid 5"
    assert (first.ran, second.ran) == (2, 1)
    assert second.keys == first.keys[1:], "a repeated call has the key it had"
    assert first.keys[0] != first.keys[1], "another call of the same tool is another payment"


async def test_idempotency_keys_differ_between_files_and_runs(tmp_path: Path) -> None:
    keys = []
    for name in "ab":
        shop = Shop("repeat")
        await shopped(tmp_path / f"{name}.db", shop)
        keys += shop.keys
    assert len(set(keys)) == 4 and all(keys)
    assert idempotency_key() == ""


async def test_a_tool_in_doubt_waits_for_a_decision(path: Path) -> None:
    await killed(path, Shop("ask", dies_at=2))
    shop = Shop("ask")
    for _ in range(2):
        with pytest.raises(
            ToolInDoubt, match="'pay' was running when the process died.*on_doubt=... deciding 'repeat' or 'fail'"
        ):
            await shopped(path, shop)
    assert shop.ran == 0
    asked = []
    assert (
        await shopped(path, shop, on_doubt=lambda name, said: asked.append((name, said)) or "repeat")
        == "paid 5 and paid 5"
    )
    assert shop.ran == 1 and asked == [("pay", {"amount": 5})]


@pytest.mark.parametrize(("policy", "options"), [("fail", {}), ("ask", {"on_doubt": lambda name, said: "fail"})])
async def test_a_tool_in_doubt_may_be_given_up(path: Path, policy: Any, options: dict[str, Any]) -> None:
    await killed(path, Shop(policy, dies_at=1))
    shop = Shop(policy)
    said = await shopped(path, shop, **options)
    assert (
        said == "pay: the process died while this ran; whether it took effect is unknown and paid 5" and shop.ran == 1
    )


@pytest.mark.parametrize("said", ["maybe", None, True])
async def test_a_decision_that_is_none_leaves_the_tool_in_doubt(path: Path, said: Any) -> None:
    await killed(path, Shop("ask", dies_at=1))
    shop = Shop("ask")
    with pytest.raises(ToolInDoubt, match=f"on_doubt said {said!r}"):
        await shopped(path, shop, on_doubt=lambda name, arguments: said)
    assert shop.ran == 0


async def test_a_decision_may_take_its_time(path: Path) -> None:
    async def decide(name: str, said: Any) -> str:
        await asyncio.sleep(0)
        return "fail"

    await killed(path, Shop("ask", dies_at=1))
    shop = Shop("ask")
    assert "unknown" in await shopped(path, shop, on_doubt=decide)
    assert shop.ran == 1, "the second call only"


def test_a_policy_nobody_knows_is_refused_where_it_is_declared() -> None:
    with pytest.raises(UnknownName, match="did you mean repeat"):
        tool(on_crash="repeated")  # type: ignore[arg-type]


async def test_a_context_that_somebody_changed_in_the_file_is_not_acted_on(path: Path) -> None:
    async with agent_on(path, model=Counting(), environment=Steps()) as agent:
        outcomes = [outcome async for outcome in agent.run([TASK])]
    assert outcomes[0].version == 1
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE contexts SET body = 'Up: EVIL' WHERE version = 1")
    async with agent_on(path, model=Counting(), environment=Steps()) as agent:
        with pytest.raises(VerificationFailed, match="version 1 of run 'life'.*is not the text that was written"):
            [outcome async for outcome in agent.run([TASK, TASK])]


async def test_every_run_of_a_tool_in_doubt_is_asked_about(path: Path) -> None:
    """Two at once died; the second is in doubt even after the first was decided and done."""
    await killed(path, Shop("ask", dies_at=2, parallel=True))
    asked: list[str] = []
    shop = Shop("ask")
    await shopped(path, shop, on_doubt=lambda name, said: asked.append(name) or "repeat")
    assert len(asked) == 2


async def test_a_tool_in_doubt_stops_even_a_solver_that_swallows_errors(path: Path) -> None:
    await killed(path, Shop("ask", dies_at=1))
    shop = Shop("ask")

    async def swallows(task: Task, context: str, tools: Any) -> str:
        try:
            return str(await tools[0](5))
        except Exception:
            return "never mind"

    async with agent_on(path, solver=swallows, tools=[shop.pay]) as agent:
        with pytest.raises(ToolInDoubt):
            await agent.solve(TASK)
    assert await shopped(path, shop, on_doubt=lambda name, said: "repeat") == "paid 5 and paid 5"


async def test_a_tool_that_raises_does_the_same_on_replay(path: Path) -> None:
    ran = []

    def broken(x: int) -> int:
        ran.append(x)
        raise ValueError(f"no {x}")

    def solver(stop: bool) -> Any:
        async def solve(task: Task, context: str, tools: Any) -> str:
            with pytest.raises(ToolFailed, match="^ValueError: no 3$"):
                await tools[0](3)
            if stop:
                raise Interrupted
            return "went on"

        return solve

    async with agent_on(path, solver=solver(True), tools=[broken]) as agent:
        with pytest.raises(Interrupted):
            await agent.solve(TASK)
    async with agent_on(path, solver=solver(False), tools=[broken]) as agent:
        assert (await agent.solve(TASK)).answer == "went on" and ran == [3]


async def test_a_function_of_the_applications_own_can_be_recorded(path: Path) -> None:
    ran = []

    @recorded_tool
    def weather(city: str) -> dict[str, Any]:
        ran.append(city)
        return {"city": city, "odd": {1, 2} and (1, 2)}

    async def solve(task: Task, context: str, tools: Any) -> str:
        return str(await weather("Ulm"))

    for _ in range(2):
        async with agent_on(path, solver=solve) as agent:
            said = [o.answer async for o in agent.run([TASK])]
    assert said == ["{'city': 'Ulm', 'odd': [1, 2]}"] and ran == ["Ulm"]
    assert await weather("Bonn") == {"city": "Bonn", "odd": (1, 2)}, "outside of an episode it just runs"


# ---- a call that failed and was worked around ----


async def test_a_solver_that_lives_with_a_failed_call_can_be_resumed(path: Path) -> None:
    """As with a prompt that is too long: refused, shortened, asked again. The refusal is no record to replay, and no divergence."""

    def solver(stop: bool) -> Any:
        async def solve(task: Task, context: str, tools: Any) -> str:
            try:
                return (await tools.ask([message("user", ("application", "too long"))])).text
            except ModelError:
                answer = await tools.ask([message("user", ("application", "short"))])
                if stop:
                    raise Interrupted from None
                return answer.text

        return solve

    class Picky(Counting):
        def _play(self, messages: Sequence[Message]) -> str:
            if messages[0].content == "too long":
                raise ModelError("too long")
            return super()._play(messages)

    model = Picky()
    async with agent_on(path, model, solver=solver(True)) as agent:
        with pytest.raises(Interrupted):
            await agent.solve(TASK)
    async with agent_on(path, model, solver=solver(False)) as agent:
        assert (await agent.solve(TASK)).answer == "answer 1" and model.asked == 1


async def test_a_full_disk_stops_even_a_solver_that_swallows_errors(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, write = [], Memory.write

    async def full(memory: Memory, job: Any) -> Any:
        if ran:
            raise StoreFull("the disk is full")
        return await write(memory, job)

    async def swallows(task: Task, context: str, tools: Any) -> str:
        for number in range(3):
            with contextlib.suppress(Exception):
                await tools[0](number)
        return "done"

    monkeypatch.setattr(Memory, "write", full)
    async with agent_on(path, solver=swallows, tools=[lambda number: ran.append(number)]) as agent:
        with pytest.raises(StoreFull):
            await agent.solve(TASK)
    assert ran == [0], "after a failed commit nothing more is done"


async def test_a_write_that_fails_when_nobody_waits_for_it_any_more_stops_the_episode_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, commit, unheard = [], Memory._commit, list[Any]()

    def full(memory: Memory, jobs: list[Any]) -> Any:
        if not ran:
            return commit(memory, jobs)
        time.sleep(0.1)
        return [(None, StoreFull("the disk is full"))] * len(jobs)

    async def gives_up(task: Task, context: str, tools: Any) -> str:
        for number in range(3):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(tools[0](number), 0.03)
        return "done"

    monkeypatch.setattr(Memory, "_commit", full)
    monkeypatch.setattr(Memory, "_free", lambda memory: False)  # a worker commits, as where the disk is slow
    asyncio.get_running_loop().set_exception_handler(lambda _, said: unheard.append(said))
    async with agent_on(path, solver=gives_up, tools=[lambda number: ran.append(number)]) as agent:
        with pytest.raises(StoreFull):
            await agent.solve(TASK)
    gc.collect()
    assert ran == [0] and not unheard


# ---- leases ----

OTHER = """
    import asyncio, sys, time
    from cod_agent import CoDAgent, Task
    from cod_agent.memory import Memory, lease

    async def solver(task, context, tools):
        return "solved by the other"

    agent = CoDAgent("a", memory=sys.argv[1], solver=solver, updates=False)
    print(agent.solve_sync(Task(id="t", prompt="a question")).position, flush=True)
    if len(sys.argv) > 2:
        agent.close()
    else:
        time.sleep(60)
"""


def other(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """Another process that lives a task of the same run, then waits (or closes)."""
    made = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OTHER), str(path), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert made.stdout is not None
    made.stdout.readline()
    return made


def expire(conn: Any) -> None:
    """As if this process had been silent for long, on another machine."""
    conn.execute("UPDATE leases SET expires = ?, host = 'elsewhere'", (time.time() - 1,))


async def test_a_run_is_lived_by_one_process_and_taken_over_from_a_dead_one_at_once(path: Path) -> None:
    living = other(path)
    try:
        async with agent_on(path) as agent:
            with pytest.raises(
                RunLeased,
                match=rf"run 'life' of agent 'a' is being lived by process {living.pid}.*stop it, or wait \d+ s",
            ):
                await agent.solve(TASK)
            assert (await agent.solve(TASK, run="another")).position == 0, "another run is free"
            living.kill()
            living.wait()
            assert (await agent.solve(TASK)).position == 1
    finally:
        living.kill()
        living.wait()


async def test_a_silent_process_loses_its_lease_and_finds_out_at_its_next_commit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        if task.id == "slow":
            await agent.memory.write(expire)
            assert await asyncio.to_thread(lambda: other(path, "close").wait()) == 1, "it meets an unfinished task"
        return "solved here"

    async with agent_on(path, solver=solver, updates=False) as agent:
        await agent.solve(TASK)
        with pytest.raises(RunLeased, match="another one took over its run; nothing was overwritten"):
            await agent.solve(Task(id="slow"))
        assert table(agent, "SELECT name, state FROM tasks") == [("t", "solved"), ("slow", "open")]


async def test_a_run_another_process_lived_in_between_is_taken_again(path: Path) -> None:
    async with agent_on(path, updates=False) as agent:
        assert (await agent.solve(TASK)).position == 0
        await agent.memory.write(expire)
        assert await asyncio.to_thread(lambda: other(path, "close").wait()) == 0
        assert (await agent.solve(TASK)).position == 2


async def test_a_lease_is_renewed_while_a_solver_takes_its_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.3)

    async def solver(task: Task, context: str, tools: Any) -> str:
        await asyncio.sleep(0.7)
        (left,) = await agent.memory.read(lambda conn: conn.execute("SELECT expires FROM leases").fetchone())
        assert left > time.time()
        return "done"

    async with agent_on(path, solver=solver) as agent:
        await agent.solve(TASK)
    memory = Memory.open(path)
    assert memory.read_sync(lambda conn: conn.execute("SELECT count(*) FROM leases").fetchone()) == (0,), (
        "given up at the end"
    )
    memory.close()


async def test_many_processes_share_a_file(path: Path) -> None:
    code = """
        import sys
        from cod_agent import CoDAgent
        from cod_agent.environments import FrozenLake
        lake = FrozenLake("tiny", seed=1, form="compact")
        for index in range(6):
            with CoDAgent(sys.argv[2], model="scripted:perfect", memory=sys.argv[1], environment=lake) as agent:
                assert len(list(agent.run_sync(lake.pack(3, index)))) == 3
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = [[sys.executable, "-c", textwrap.dedent(code), str(path), name] for name in "bcd"]
    running = [subprocess.Popen(arguments, env=environment) for arguments in given]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    memory = Memory.open(path)
    assert memory.read_sync(
        lambda conn: conn.execute("SELECT count(*) FROM tasks WHERE state IN ('updated', 'closed')").fetchone()
    ) == (54,)
    memory.close()
