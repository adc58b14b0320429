"""What lanes cost and what went wrong in them, from the run database alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from cod_agent import CoDAgent, Feedback, Memory, Observation, Pack, Task
from cod_agent.context import CLOSE, OPEN, Message
from cod_agent.environments.base import MALFORMED
from cod_agent.evaluation.measures import measured
from cod_agent.models.base import Completion

NOTE = "one line"


class Coin:
    """A world of one question each; what is neither heads nor tails is malformed, and `lost` is the infrastructure's fault."""

    name, form = "coin", "compact"

    def pack(self, n: int, index: int) -> Pack:
        return Pack(f"coin/{index}", tuple(Task(id=f"toss-{i}", data={"pack": index}) for i in range(n)), self)

    def start(self, task: Task) -> Coin:
        return self

    def reset(self) -> Observation:
        return Observation("heads or tails?")

    def step(self, answer: str) -> Observation:
        ending = answer if answer in ("heads", "tails") else MALFORMED
        reward = float("nan") if answer == "lost" else float(answer == "heads")
        return Observation("", done=True, feedback=Feedback(reward=reward, text="tossed", ending=ending))


class Says:
    """A model that says one thing to each question and another to each update; its tokens are counted unless told otherwise."""

    name, form = "says", "compact"

    def __init__(self, solve: str, update: str, *, counted: bool = True) -> None:
        self.solve, self.update, self.counted = solve, update, counted

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
        from cod_agent.journal import record_completion

        async def answer(messages: Sequence[Message]) -> Completion:
            said = self.update if messages[0].content.startswith("Update") else self.solve
            usage = (10, 3) if self.counted else None
            return Completion(said, inexact="not a language model", weights=self.name, usage=usage)

        return await record_completion(self.name, messages, {}, answer)


async def live(memory: Memory, model: Says, pack: int, agent: str = "agent", tasks: int = 3) -> str:
    name = f"coin/{pack}"
    async with CoDAgent(agent, model=model, memory=memory, max_context=20) as one:
        async for _ in one.run(Coin().pack(tasks, pack)):
            pass
    return name


GOOD = f"{OPEN}\n{NOTE}\n{CLOSE}"


async def test_failures_are_counted_where_they_happened(memory: Memory) -> None:
    runs = [
        await live(memory, Says("heads", GOOD), 0),
        await live(memory, Says("the edge", "no context at all"), 1),
        await live(memory, Says("tails", f"{OPEN}\n{'long ' * 9}\n{CLOSE}"), 2),
        await live(memory, Says("tails", "again none"), 3),
    ]
    first, second, last = measured(memory, "agent", runs)
    assert [m.position for m in (first, second, last)] == [0, 1, 2] and {m.tasks for m in (first, second, last)} == {4}
    assert (first.malformed, first.written, first.refused) == (1, 1, 3)
    assert first.reasons == {"unparsable": 2, "oversized": 1}
    assert (last.malformed, last.written, last.refused, last.reasons) == (1, 0, 0, {})
    assert (first.shown, second.shown, last.shown) == (0, len(NOTE) / 4, len(NOTE) / 4)


async def test_calls_and_tokens_are_means_over_tasks(memory: Memory) -> None:
    runs = [await live(memory, Says("heads", GOOD), pack) for pack in range(2)]
    first, _, last = measured(memory, "agent", runs)
    assert (first.calls, first.prompt_tokens, first.sampled_tokens) == (2, 20, 6), "solve and update"
    assert (last.calls, last.prompt_tokens, last.sampled_tokens) == (1, 10, 3), "no update after the last task"
    assert 0 < last.seconds < 60


async def test_tokens_that_nobody_counted_are_not_nought(memory: Memory) -> None:
    runs = [await live(memory, Says("heads", GOOD), 0), await live(memory, Says("heads", GOOD, counted=False), 1)]
    assert {(m.prompt_tokens, m.sampled_tokens) for m in measured(memory, "agent", runs)} == {(None, None)}
    assert measured(memory, "agent", runs[:1])[0].prompt_tokens == 20


async def test_a_lost_reward_is_not_malformed(memory: Memory) -> None:
    run = await live(memory, Says("lost", GOOD), 0, tasks=1)
    (only,) = measured(memory, "agent", [run])
    assert (only.tasks, only.malformed, only.written) == (1, 0, 0)
    assert only.lost == {MALFORMED: 1}, "as it ended"


async def test_a_task_that_was_given_up_is_lost_as_aborted(memory: Memory) -> None:
    class Down(Says):
        async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Completion:
            raise ConnectionError("no answer")

    async with CoDAgent("agent", model=Down("", ""), memory=memory) as one:
        with pytest.raises(ConnectionError):
            _ = [outcome async for outcome in one.run(Coin().pack(1, 0), run="left")]
        await one.abandon(run="left", reason="nobody came back")
    (only,) = measured(memory, "agent", ["left"])
    assert only.lost == {"aborted": 1} and only.json()["lost"] == {"aborted": 1}


async def test_other_agents_and_other_runs_do_not_count(memory: Memory) -> None:
    ours = await live(memory, Says("heads", GOOD), 0)
    await live(memory, Says("the edge", GOOD), 0, agent="agent/other")
    await live(memory, Says("the edge", GOOD), 1)
    assert [(m.tasks, m.malformed) for m in measured(memory, "agent", [ours, "never lived"])] == [(1, 0)] * 3
    assert measured(memory, "nobody", [ours]) == ()


async def test_a_measure_is_json(memory: Memory) -> None:
    run = await live(memory, Says("heads", "none"), 0)
    said = json.loads(json.dumps(measured(memory, "agent", [run])[0].json(), allow_nan=False))
    assert said["updates"] == {"written": 0, "refused": 1, "reasons": {"unparsable": 1}}
    assert said["calls"] == 2 and said["context_characters"] == 0


async def test_tries_of_one_task_are_one_task(memory: Memory) -> None:
    first, second = Coin().pack(2, 0)

    async def tries(run: str, *tasks: Task) -> None:
        model = Says("the edge", GOOD)
        async with CoDAgent("agent", model=model, memory=memory, environment=Coin(), updates=False) as one:
            async for _ in one.run(list(tasks), run=run):
                pass

    await tries("one", first, first, first, second)
    await tries("two", first, second, second)
    once, then = measured(memory, "agent", ["one", "two"], again=True)
    assert [(m.position, m.tasks, m.tries, m.malformed, m.calls) for m in (once, then)] == [
        (0, 2, 4, 4, 2),
        (1, 2, 3, 3, 1.5),
    ]
    assert (once.prompt_tokens, then.sampled_tokens, once.shown) == (20, 4.5, 0)
    assert [m.position for m in measured(memory, "agent", ["one", "two"])] == [0, 1, 2, 3]
