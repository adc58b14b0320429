"""Budgets: where an episode ends that spent its own, how that is judged, and that a crash changes nothing about it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import Answer, ScriptedServer

from cod_agent import CoDAgent, Completion, Message, Observation, Task
from cod_agent.budget import Budget
from cod_agent.context import message
from cod_agent.errors import BudgetSpent, UsageError
from cod_agent.journal import record_completion
from cod_agent.journal.http import recording_client
from cod_agent.memory.verify import verify
from cod_agent.models.openai import OpenAIModel


class Talker:
    """Answers "more" for ever; every answer takes what the server says, or nobody counts."""

    name, form = "talker", "natural"

    def __init__(self, usage: tuple[int, int] | None = (10, 5), die_at: int | None = None, **params: Any) -> None:
        self.usage, self.die_at, self.params, self.asked = usage, die_at, params, 0

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        return await record_completion(self.name, messages, self.params, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        self.asked += 1
        if self.die_at is not None and self.asked >= self.die_at:
            raise Died
        text = "<context>\nlearned\n</context>" if "Write the new note." in messages[-1].content else "more"
        return Completion(text, usage=self.usage)


class Died(BaseException):
    """Stands for kill -9 during a call."""


class Endless:
    """An environment that never ends by itself."""

    name = "endless"

    def start(self, task: Task) -> Any:
        return self

    def reset(self) -> Observation:
        return Observation("go on")

    def step(self, answer: str) -> Observation:
        return Observation("go on")


async def endless(task: Task, context: str, tools: Any) -> str:
    """A solver of an application, asking something new each time."""
    for turn in range(100):
        await tools.ask([message("user", ("application", f"{task.id} {turn}"))])
    return "enough"


def rows(path: Path, query: str) -> list[Any]:
    with sqlite3.connect(path) as conn:
        return [row if len(row) > 1 else row[0] for row in conn.execute(query)]


def sound(path: Path) -> None:
    report = verify(path)
    assert report.ok, report


@pytest.mark.parametrize(
    ("budget", "calls", "what"),
    [
        (Budget(calls=4), 4, "calls"),
        (Budget(tokens=60), 4, "tokens"),
        (Budget(tokens=61), 5, "tokens"),  # the last one may pass it: nobody knew how long it would be
        (Budget(money=0.6, prices=(10_000, 10_000)), 4, "money"),
        (Budget(calls=9, tokens=31), 3, "tokens"),
    ],
)
async def test_in_an_environment_what_the_policy_spends_is_judged_0_and_the_life_goes_on(
    tmp_path: Path, budget: Budget, calls: int, what: str
) -> None:
    path = tmp_path / "a.db"
    async with CoDAgent("a", model=Talker(), memory=path, environment=Endless(), budget=budget) as agent:
        outcomes = [outcome async for outcome in agent.run([Task(id="x"), Task(id="y")])]
    for outcome in outcomes:
        assert (outcome.answer, outcome.reward, outcome.update) == ("", 0.0, "written")
        assert outcome.feedback is not None and outcome.feedback.ending == f"budget-{what}"
        assert outcome.reason.startswith(f"budget-{what}: ") and outcome.calls == calls + 1
    assert rows(path, "SELECT state FROM episodes") == ["done"] * 4
    sound(path)


async def test_an_answer_may_be_as_long_as_was_asked_for_so_a_call_that_might_pass_the_limit_is_not_sent(
    tmp_path: Path,
) -> None:
    model = Talker(usage=(10, 5), max_tokens=40)
    async with CoDAgent(
        "a", model=model, memory=tmp_path / "a.db", environment=Endless(), budget=Budget(tokens=80), updates=False
    ) as agent:
        outcome = await agent.solve(Task(id="x"))
    assert (outcome.calls, model.asked) == (3, 3)  # 45 + 40 > 80
    assert outcome.reason == "budget-tokens: the episode has spent 45 of 80 tokens"


async def test_in_an_application_the_answer_is_empty_and_the_reason_says_why(tmp_path: Path) -> None:
    async with CoDAgent("a", model=Talker(), memory=tmp_path / "a.db", solver=endless, budget=Budget(calls=3)) as agent:
        outcome = await agent.solve(Task(id="x"))
        assert (outcome.answer, outcome.reward, outcome.reason) == (
            "",
            None,
            "budget-calls: the episode has spent 3 of 3 calls",
        )
        judged = await agent.feedback(outcome, 0.5)
    assert (judged.reward, judged.update, judged.reason) == (0.5, "written", outcome.reason)


async def test_tokens_nobody_counted_are_counted_as_bytes(tmp_path: Path) -> None:
    spent = []
    for die_at in (None, 3):
        path = tmp_path / f"{die_at}.db"
        for model in (Talker(usage=None, die_at=die_at), Talker(usage=None)):
            try:
                async with CoDAgent(
                    "a", model=model, memory=path, solver=endless, budget=Budget(tokens=1000), updates=False
                ) as agent:
                    spent.append((await agent.solve(Task(id="é"), position=0)).reason)
            except Died:
                pass
    (told,) = set(spent)
    calls = rows(path, "SELECT count(*) FROM calls")[0]
    assert 5 < calls < 20 and told.startswith("budget-tokens: the episode has spent 1") and "of 1000" in told


@pytest.mark.parametrize("budget", [Budget(calls=4), Budget(tokens=60), Budget(money=0.6, prices=(10_000, 10_000))])
async def test_an_episode_that_died_spends_no_more_and_ends_at_the_same_place(tmp_path: Path, budget: Budget) -> None:
    async def live(path: Path, die_at: int | None) -> int:
        model = Talker(die_at=die_at)
        async with CoDAgent("a", model=model, memory=path, environment=Endless(), budget=budget) as agent:
            async for _ in agent.run([Task(id="x"), Task(id="y")]):
                pass
        return model.asked

    whole = tmp_path / "whole.db"
    await live(whole, None)
    kept = "SELECT request, occurrence, hash FROM calls"
    chain = "SELECT hash, chain FROM commits"
    for die_at in (1, 3, 4, 5, 8):
        path = tmp_path / f"{die_at}.db"
        with pytest.raises(Died):
            await live(path, die_at)
        await live(path, None)
        assert (rows(path, kept), rows(path, chain)) == (rows(whole, kept), rows(whole, chain)), die_at


async def test_parallel_calls_never_pass_a_limit_and_die_and_go_on_alike(tmp_path: Path) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        ask = [tools.ask([message("user", ("application", str(n)))]) for n in range(8)]
        return str(len(await asyncio.gather(*ask)))

    for budget, calls in ((Budget(calls=5), 5), (Budget(tokens=46), 4)):
        found = []
        for die_at in (None, 2, 4):
            path = tmp_path / f"{calls}-{die_at}.db"
            for model in (Talker(die_at=die_at), Talker()):
                try:
                    async with CoDAgent(
                        "a", model=model, memory=path, solver=solver, budget=budget, updates=False
                    ) as agent:
                        assert (await agent.solve(Task(id="x"), position=0)).calls == calls
                except Died:
                    pass
            found.append(rows(path, "SELECT hash FROM calls ORDER BY request"))
            sound(path)
        assert found[0] == found[1] == found[2]


async def test_time_is_the_infrastructures_so_the_reward_is_lost(tmp_path: Path) -> None:
    async def slow(task: Task, context: str, tools: Any) -> str:
        await tools.ask([message("user", ("application", "hello"))])
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "I was cut off, and do not care"  # a framework that swallows cancellation
        return ""

    path = tmp_path / "a.db"
    async with CoDAgent("a", model=Talker(), memory=path, solver=slow, budget=Budget(seconds=0.3)) as agent:
        outcome = await agent.solve(Task(id="x"))
        assert (
            outcome.reward != outcome.reward and outcome.reason == "budget-seconds: the episode has spent 0.3 seconds"
        )
        assert (outcome.answer, outcome.calls, outcome.update) == ("", 1, "none")
    assert rows(path, "SELECT state FROM episodes") == ["aborted"] and rows(path, "SELECT state FROM tasks") == [
        "closed"
    ]
    sound(path)


async def test_the_time_between_two_processes_does_not_count_and_that_before_a_crash_does(tmp_path: Path) -> None:
    async def patient(task: Task, context: str, tools: Any) -> str:
        for turn in range(6):
            await tools.ask([message("user", ("application", str(turn)))])
        return "done"

    class Slow(Talker):
        async def _answer(self, messages: Sequence[Message]) -> Completion:
            await asyncio.sleep(0.1)
            return await super()._answer(messages)

    async def live(die_at: int | None, name: str, seconds: float) -> Any:
        async with CoDAgent(
            "a",
            model=Slow(die_at=die_at),
            memory=tmp_path / name,
            solver=patient,
            budget=Budget(seconds=seconds),
            updates=False,
        ) as agent:
            return await agent.solve(Task(id="x"), position=0)

    for name, seconds, reason in (("enough.db", 5, ""), ("short.db", 0.45, "budget-seconds")):
        with pytest.raises(Died):
            await live(4, name, seconds)
        await asyncio.sleep(0.5 if seconds < 1 else 0)
        assert (await live(None, name, seconds)).reason.partition(":")[0] == reason
    assert 3 <= rows(tmp_path / "short.db", "SELECT count(*) FROM calls")[0] < 6


async def test_an_update_that_spends_its_budget_keeps_the_last_good_context(tmp_path: Path) -> None:
    model = Talker(usage=(10, 5), max_tokens=20)
    path = tmp_path / "a.db"
    async with CoDAgent("a", model=model, memory=path, budget=Budget(tokens=30)) as agent:
        first = await agent.solve(Task(id="x"))
        assert (await agent.feedback(first, 1.0)).version == 1
    async with CoDAgent("a", model=model, memory=path, budget=Budget(tokens=19)) as agent:
        agent.memory.write_sync(lambda conn: conn.execute("SELECT 1"))
        second = await agent.solve(Task(id="y"))
        outcome = await agent.feedback(second, 1.0)
    assert (outcome.update, outcome.reason) == ("kept", "budget-tokens: the episode has spent 0 of 19 tokens")
    assert outcome.context == "learned"
    sound(path)


async def test_a_run_that_spent_its_budget_stands_still_until_it_may_spend_more(tmp_path: Path) -> None:
    model, path = Talker(), tmp_path / "a.db"

    async def live(run_budget: Budget) -> list[Any]:
        async with CoDAgent(
            "a", model=model, memory=path, environment=Endless(), budget=Budget(calls=3), run_budget=run_budget
        ) as agent:
            return [outcome async for outcome in agent.run([Task(id=name) for name in "xyz"])]

    for _ in range(2):
        with pytest.raises(BudgetSpent, match=r"the run has spent 6 of 6 calls.*--run-budget"):
            await live(Budget(calls=6))
    assert model.asked == 6 and rows(path, "SELECT state FROM tasks") == ["updated", "open"]
    assert len(await live(Budget(calls=12))) == 3 and model.asked == 12
    sound(path)


@pytest.mark.parametrize("stream", [False, True])
async def test_it_holds_for_an_applications_own_client(tmp_path: Path, stream: bool) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="k", http_client=recording_client()) as client:
            for turn in range(20):
                try:
                    asked: Any = [{"role": "user", "content": str(turn)}]
                    answer: Any = await client.chat.completions.create(model="m", messages=asked, stream=stream)
                    if stream:
                        async for _ in answer:
                            pass
                except openai.OpenAIError:
                    pass  # a framework that swallows everything
        return "done"

    with ScriptedServer() as server:
        async with CoDAgent(
            "a", memory=tmp_path / "a.db", solver=solver, budget=Budget(calls=5), updates=False
        ) as agent:
            outcome = await agent.solve(Task(id="x"))
    assert (server.count, outcome.calls, outcome.answer) == (5, 5, "")
    assert outcome.reason.startswith("budget-calls")


async def test_it_ends_even_a_solver_that_tries_again_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_agent.journal.episode.GRACE", 0.2)

    async def stubborn(task: Task, context: str, tools: Any) -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="k", http_client=recording_client()) as client:
            for turn in range(20):
                while True:
                    try:
                        await client.chat.completions.create(
                            model="m", messages=[{"role": "user", "content": str(turn)}]
                        )
                        break
                    except openai.OpenAIError:
                        await asyncio.sleep(0)
        return "done"

    with ScriptedServer() as server:
        async with CoDAgent(
            "a", memory=tmp_path / "a.db", solver=stubborn, budget=Budget(calls=3), updates=False
        ) as agent:
            outcome = await asyncio.wait_for(agent.solve(Task(id="x")), 10)
    assert (server.count, outcome.reason) == (3, "budget-calls: the episode has spent 3 of 3 calls")


async def test_streams_that_are_open_at_once_count_and_wait_for_nobody(tmp_path: Path) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="k", http_client=recording_client()) as client:
            asked = [[{"role": "user", "content": str(turn)}] for turn in range(4)]
            streams: list[Any] = [
                await client.chat.completions.create(model="m", messages=said, stream=True)  # type: ignore[call-overload]
                for said in asked
            ]
            for stream in streams:
                async for _ in stream:
                    pass
        return "done"

    with ScriptedServer(lambda request, n: Answer("a long answer", delay=0.01)) as server:
        async with CoDAgent(
            "a", memory=tmp_path / "a.db", solver=solver, budget=Budget(calls=3, tokens=1000), updates=False
        ) as agent:
            outcome = await asyncio.wait_for(agent.solve(Task(id="x")), 10)
    assert server.count == 3 and outcome.reason.startswith("budget-calls")


async def test_what_a_solver_left_running_is_no_part_of_its_episode(tmp_path: Path) -> None:
    left: list[Any] = []

    async def hasty(task: Task, context: str, tools: Any) -> str:
        ask: Callable[..., Any] = tools.ask
        left.append(asyncio.create_task(ask([message("user", ("application", "slow"))])))
        await asyncio.sleep(0.05)
        return "done"

    path = tmp_path / "a.db"
    with ScriptedServer(lambda request, n: Answer("late", delay=0.2)) as server:
        model = OpenAIModel("m", base_url=server.url)
        async with CoDAgent("a", model=model, memory=path, solver=hasty, updates=False) as agent:
            outcome = await agent.solve(Task(id="x"))
            assert outcome.answer == "done"
            with pytest.raises(UsageError, match="awaits every call it begins"):
                await left[0]
            await model.aclose()
    assert rows(path, "SELECT count(*) FROM calls") == [0]
    assert rows(path, "SELECT detail FROM attempts") == ["answered after its episode had ended"]
    sound(path)


def test_budgets_are_read_from_flags_and_nonsense_is_refused(tmp_path: Path) -> None:
    said = Budget.parse("calls=20, tokens=50000,seconds=600,money=0.5,prices=3/15")
    assert said == Budget(calls=20, tokens=50000, seconds=600.0, money=0.5, prices=(3.0, 15.0))
    for wrong in (
        "",
        "calls",
        "calls=x",
        "call=3",
        "money=1",
        "prices=1/2",
        "money=1,prices=nan/1",
        "money=1,prices=1/inf",
        "money=inf,prices=1/2",
        "seconds=inf",
        "calls=0",
        "seconds=-1",
        "money=1,prices=1",
    ):
        with pytest.raises(UsageError):
            Budget.parse(wrong)
    with pytest.raises(UsageError, match="a run has no limit of seconds"):
        CoDAgent("a", memory=tmp_path / "a.db", run_budget=Budget(seconds=1))


def test_a_solve_that_spent_its_calls_trains_and_one_that_spent_its_time_does_not(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from cod_agent.environments import FrozenLake
    from cod_train.rollouts import read_rollout

    path = tmp_path / "a.db"
    for run, budget in (("calls", Budget(calls=1)), ("seconds", Budget(seconds=1e-6))):
        with CoDAgent("a", model="embedded", memory=path, budget=budget) as agent:
            list(agent.run_sync(FrozenLake("small", seed=7, form="compact").pack(3), run=run))
    with sqlite3.connect(path) as conn:
        trained, lost = (read_rollout(conn, run) for run in (1, 2))
    assert trained.rewards == (0.0, 0.0, 0.0)
    assert [part.refused for part in trained.segments if part.kind == "solve"] == [""] * 3
    assert all(reward != reward for reward in lost.rewards)
    assert [part.refused for part in lost.segments] == ["the episode was given up"] * 3


def test_an_update_whose_time_ran_out_is_refused_and_costs_the_policy_nothing(tmp_path: Path) -> None:
    from cod_train.rollouts import read_rollout

    class SlowToLearn(Talker):
        async def _answer(self, messages: Sequence[Message]) -> Completion:
            await asyncio.sleep(5 if "Write the new note." in messages[-1].content else 0)
            return await super()._answer(messages)

    async def live() -> Any:
        budget = Budget(seconds=0.5, calls=2)
        async with CoDAgent(
            "a", model=SlowToLearn(), memory=tmp_path / "a.db", environment=Endless(), budget=budget
        ) as agent:
            return [outcome async for outcome in agent.run([Task(id="x"), Task(id="y")])]

    first, _ = asyncio.run(live())
    assert (first.update, first.reason) == ("kept", "budget-seconds: the episode has spent 0.5 seconds")
    with sqlite3.connect(tmp_path / "a.db") as conn:
        rollout = read_rollout(conn, 1)
    assert rollout.update_rewards[0] != rollout.update_rewards[0]
    assert [part.refused for part in rollout.segments if part.kind == "update"] == ["the episode was given up"] * 2
