"""`CoDAgent`: what a life looks like from outside, and that it goes on after whatever ended it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import cod_agent
from cod_agent import CoDAgent, Feedback, Memory, Message, Observation, Pack, Sampling, Task
from cod_agent.completions import Completion
from cod_agent.environments import FrozenLake
from cod_agent.errors import ModelError, NotADatabase, ReplayDiverged, StoreError, TaskMismatch, UnknownName, UsageError
from cod_agent.events import Answered, ContextKept, ContextWritten, Judged, Observed, Solved, TaskBegun, TaskEnded
from cod_agent.memory.verify import verify
from cod_agent.models import resolve
from cod_agent.models.scripted import ScriptedModel

TASKS = [Task(id=f"t{n}", prompt=f"question {n}") for n in range(4)]


class Counting:
    """A model that numbers its answers; `down` makes it fail, `note` is what an update answers."""

    form = "natural"

    def __init__(self, note: str = "<context>\nnote {n}\n</context>") -> None:
        self.note, self.asked, self.down, self.finish = note, 0, False, "stop"
        self.model = ScriptedModel("counting", self._play, "natural")
        self.name = self.model.name
        self.seen: list[str] = []

    async def complete(self, messages: Sequence[Message], *, on_delta: Any = None) -> Any:
        from cod_agent.journal import record_completion

        return await record_completion(self.name, messages, {}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Any:
        await asyncio.sleep(0)
        if self.down:
            raise ModelError("down")
        return cod_agent.Completion(self._play(messages), self.finish, inexact="scripted")

    def _play(self, messages: Sequence[Message]) -> str:
        self.asked += 1
        self.seen.append("\n".join(m.content for m in messages))
        update = "Write the new note" in messages[-1].content
        return self.note.format(n=self.asked) if update else f"answer {self.asked}"


class Steps:
    """An environment of three steps that counts how often each was really taken."""

    name = "steps"

    def __init__(self, recovery: str = "deterministic", shown: str = "", reward: float = 1.0) -> None:
        self.recovery, self.shown, self.reward, self.taken = recovery, shown, reward, []
        self.now: list[str] = []

    def start(self, task: Task) -> Steps:
        made = Steps(self.recovery, self.shown, self.reward)
        made.taken = self.taken
        return made

    def reset(self) -> Observation:
        self.taken.append("reset")
        self.now = []
        return Observation(f"start {self.shown}")

    async def step(self, answer: str) -> Observation:
        self.taken.append(answer)
        self.now.append(answer)
        done = len(self.now) == 3
        return Observation(
            f"after {self.now} {self.shown}",
            done=done,
            feedback=Feedback(reward=self.reward, text="ok") if done else None,
        )

    def snapshot(self) -> list[str]:
        return list(self.now)

    def restore(self, state: list[str]) -> None:
        self.taken.append(f"restored {len(state)}")
        self.now = list(state)


def agent_on(path: Path | Memory, model: Any = None, **options: Any) -> CoDAgent:
    return CoDAgent("a", model=model or Counting(), memory=path, **options)


def table(agent: CoDAgent, query: str) -> list[Any]:
    return agent.memory.read_sync(lambda conn: [tuple(row) if len(row) > 1 else row[0] for row in conn.execute(query)])


async def lived(agent: CoDAgent, tasks: Any, **options: Any) -> list[Any]:
    return [outcome async for outcome in agent.run(tasks, **options)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.db"


# ---- the surface ----


def test_the_public_names_are_few_and_known() -> None:
    assert cod_agent.__all__ == sorted(cod_agent.__all__) and len(cod_agent.__all__) <= 30
    assert set(cod_agent.__all__) == {
        "Boundary", "Budget", "CoDAgent", "CodError", "Completion", "Environment", "Feedback", "Memory", "Message", "Model", "Observation",
        "Outcome", "Pack", "Prompts", "Sampling", "Secrets", "Session", "Solver", "Task", "Tokens", "WriteGate", "idempotency_key",
        "recorded_tool", "tool",
    }  # fmt: skip
    assert all(hasattr(cod_agent, name) for name in cod_agent.__all__)


# ---- living ----


async def test_a_pack_is_solved_with_an_update_between_tasks_and_none_after_the_last(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        outcomes = await lived(agent, Pack("p", tuple(TASKS[:3]), Steps()))
        assert [(o.position, o.reward, o.update, o.version, o.calls) for o in outcomes] == [
            (0, 1.0, "written", 1, 4), (1, 1.0, "written", 2, 4), (2, 1.0, "none", 2, 3),
        ]  # fmt: skip
        assert agent.context == outcomes[1].context == "note 8"
        assert [state for state in table(agent, "SELECT state FROM tasks")] == ["updated", "updated", "closed"]


async def test_an_open_ended_run_updates_after_every_task(path: Path) -> None:
    async def endless() -> AsyncIterator[Task]:
        while True:
            yield TASKS[0]

    async with agent_on(path, environment=Steps()) as agent:
        living = agent.run(endless(), run="r")
        outcomes = [await anext(living) for _ in range(3)]
        await living.aclose()
        assert [o.version for o in outcomes] == [1, 2, 3] and len({o.task.fingerprint for o in outcomes}) == 1


async def test_every_episode_knows_the_context_it_started_from(path: Path) -> None:
    async with agent_on(path, environment=Steps()) as agent:
        await lived(agent, TASKS[:2])
        query = (
            "SELECT e.position, e.kind, c.version FROM episodes e JOIN contexts c ON c.id = e.context_id ORDER BY e.id"
        )
        assert table(agent, query) == [(0, "solve", 0), (0, "update", 0), (1, "solve", 1), (1, "update", 1)]
        query = (
            "SELECT c.version, p.version, e.position, e.kind FROM contexts c "
            "JOIN contexts p ON p.id = c.parent_id JOIN episodes e ON e.id = c.episode_id"
        )
        assert table(agent, query) == [(1, 0, 0, "update"), (2, 1, 1, "update")]


async def test_the_context_reaches_the_next_task(path: Path) -> None:
    model = Counting("<context>\nthe goal is east\n</context>")
    async with agent_on(path, model, environment=Steps()) as agent:
        await lived(agent, TASKS[:2])
    assert "the goal is east" not in model.seen[0] and "the goal is east" in model.seen[4]


async def test_a_resumed_run_reads_what_it_lived_and_asks_for_nothing_again(path: Path) -> None:
    first, second = Counting(), Counting()
    async with agent_on(path, first, environment=Steps()) as agent:
        before = await lived(agent, TASKS[:2])
    async with agent_on(path, second, environment=Steps()) as agent:
        assert await lived(agent, TASKS[:2]) == before and second.asked == 0
        assert len(await lived(agent, TASKS)) == 4 and second.asked == 8


async def test_another_task_at_a_lived_position_is_refused(path: Path) -> None:
    async with agent_on(path, environment=Steps()) as agent:
        await lived(agent, TASKS[:2])
        with pytest.raises(
            TaskMismatch,
            match=r"position 1 of run 'life' was lived with task 't1', not with this 't2'.*start another run",
        ):
            await lived(agent, [TASKS[0], TASKS[2]])
        assert len(await lived(agent, TASKS[:3])) == 3


async def test_a_task_that_changed_under_its_name_is_told_from_another_one(path: Path) -> None:
    async with agent_on(path, environment=Steps()) as agent:
        await lived(agent, TASKS[:1])
        changed = TASKS[0].model_copy(update={"prompt": f"{TASKS[0].prompt} Now."})
        with pytest.raises(
            TaskMismatch, match=r"a task of the same name, 't0', that had another prompt.*changed since"
        ):
            await lived(agent, [changed])


async def test_a_pack_of_another_length_is_refused(path: Path) -> None:
    async with agent_on(path) as agent:
        await lived(agent, Pack("p", tuple(TASKS[:2]), Steps()))
    async with agent_on(path) as agent:
        with pytest.raises(TaskMismatch, match="pack of 2 tasks, not 4"):
            await lived(agent, Pack("p", tuple(TASKS), Steps()))


@pytest.mark.parametrize(
    "data", [{"nan": math.nan}, {"inf": [math.inf]}, {"deep": {"1": [None, True, 1.5, "é"]}}, {"tuple": (1, 2)}]
)
async def test_a_task_with_unusual_data_can_be_resumed(path: Path, data: dict[str, Any]) -> None:
    for _ in range(2):
        async with agent_on(path, environment=Steps()) as agent:
            assert len(await lived(agent, [Task(id="t", data=data)])) == 1


async def test_the_stream_tells_everything_in_order(path: Path) -> None:
    async with agent_on(path, environment=Steps()) as agent:
        events = [event async for event in agent.stream(TASKS[:1])]
    kinds = [TaskBegun, Observed, *[Answered, Observed] * 3, Solved, Judged, Answered, ContextWritten, TaskEnded]
    assert [type(event) for event in events] == kinds
    assert events[-1].outcome.context == events[-2].context


async def test_who_watches_an_agent_hears_run_solve_and_feedback_alike(path: Path) -> None:
    heard: list[Any] = []
    async with agent_on(path, watch=heard.append) as agent:
        await agent.solve(TASKS[0])
        assert [type(event) for event in heard] == [TaskBegun, Answered, Solved, TaskEnded]
        heard.clear()
        outcome = await agent.feedback(0, 1.0)
        assert [type(event) for event in heard] == [Judged, Answered, ContextWritten, TaskEnded]
        assert heard[-1].outcome == outcome and outcome.update == "written"
        agent.watch = None
        await lived(agent, TASKS[:1], run="unheard")
        assert len(heard) == 4
    async with agent_on(path, environment=Steps(), watch=heard.append) as agent:
        heard.clear()
        await lived(agent, TASKS[:1], run="heard")
        told = [event async for event in agent.stream(TASKS[:1], run="streamed")]
    assert [type(event) for event in heard] == [type(event) for event in told], "a stream's events are its caller's"


async def test_a_stream_that_is_left_early_stops_and_can_be_resumed(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model, environment=Steps()) as agent:
        async for event in agent.stream(TASKS):
            if isinstance(event, Answered):
                break
        await asyncio.sleep(0.01)
        asked = model.asked
        await asyncio.sleep(0.05)
        assert model.asked == asked < 5
        assert len(await lived(agent, TASKS[:2])) == 2 and model.asked <= 9


async def test_a_stream_hands_on_what_goes_wrong(path: Path) -> None:
    model = Counting()
    model.down = True
    async with agent_on(path, model) as agent:
        with pytest.raises(ModelError, match="down"):
            _ = [event async for event in agent.stream(TASKS)]


# ---- solve and feedback ----


async def test_feedback_may_come_late_twice_and_out_of_order(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        solved = [await agent.solve(task) for task in TASKS[:3]]
        assert [(o.position, o.reward, o.update) for o in solved] == [
            (0, None, "none"),
            (1, None, "none"),
            (2, None, "none"),
        ]
        second = await agent.feedback(solved[1], 0.5, "half right")
        assert (second.reward, second.version, second.update) == (0.5, 1, "written") and "half right" in model.seen[-1]
        first = await agent.feedback(0, 1.0)
        assert first.version == 2
        asked = model.asked
        assert await agent.feedback(solved[1], 0.5, "half right") == second and model.asked == asked
        with pytest.raises(UsageError, match="was judged already: feedback is given once"):
            await agent.feedback(solved[1], 0.75)
    async with agent_on(path, model) as agent:
        third = await agent.feedback(2, None, "only words")
        assert (third.reward, third.version) == (None, 3)
        parents = "SELECT p.version FROM contexts c JOIN contexts p ON p.id = c.parent_id ORDER BY c.version"
        assert table(agent, parents) == [0, 1, 2], "each update starts from the newest version"
        started = "SELECT c.version FROM episodes e JOIN contexts c ON c.id = e.context_id WHERE e.kind = 'solve' ORDER BY e.position"
        assert table(agent, started) == [0, 0, 0], "credit follows what an episode really started from"


async def test_an_update_that_failed_is_made_up_for_before_the_next(path: Path) -> None:
    """Otherwise it would start from an old version, and the one written in between would be lost."""
    model = Counting()
    async with agent_on(path, model) as agent:
        for task in TASKS[:2]:
            await agent.solve(task)
        model.down = True
        with pytest.raises(ModelError):
            await agent.feedback(1, 1.0)
        model.down = False
        await agent.feedback(0, 1.0)
        await agent.feedback(1, 1.0)
        assert table(
            agent, "SELECT p.version FROM contexts c JOIN contexts p ON p.id = c.parent_id ORDER BY c.version"
        ) == [0, 1]


async def test_feedback_for_what_is_not_there_is_refused(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        with pytest.raises(UnknownName, match="no run called 'life'"):
            await agent.feedback(0, 1.0)
        await agent.solve(TASKS[0])
        for position in (1, -1):
            with pytest.raises(UnknownName, match=f"has no position {position}: it has lived 1"):
                await agent.feedback(position, 1.0)
        with pytest.raises(UnknownName, match="no run called 'lift': did you mean life"):
            await agent.feedback(0, 1.0, run="lift")
        model.down = True
        with pytest.raises(ModelError):
            await agent.solve(TASKS[1])
        with pytest.raises(UsageError, match="not solved yet: feedback comes after the answer"):
            await agent.feedback(1, 1.0)


async def test_an_unfinished_task_is_gone_on_with_or_abandoned(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        model.down = True
        with pytest.raises(ModelError):
            await agent.solve(TASKS[0])
        model.down = False
        with pytest.raises(TaskMismatch):
            await agent.solve(TASKS[1])
        await agent.abandon(reason="no longer wanted")
        assert (await agent.solve(TASKS[1])).position == 1
        lost = await agent.feedback(0, math.nan, "no longer wanted")
        assert (
            lost.reward is not None
            and math.isnan(lost.reward)
            and lost.reason == "no longer wanted"
            and lost.update == "none"
        )


async def test_an_update_that_the_model_refuses_for_good_can_be_given_up(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        await agent.solve(TASKS[0])
        model.down = True
        for _ in range(2):  # it stands in the way of the next task, too
            with pytest.raises(ModelError):
                await agent.feedback(0, 1.0)
        await agent.abandon(reason="too long to be read")
        model.down = False
        given_up = await agent.feedback(0, 1.0)
        assert (given_up.reward, given_up.update, given_up.version, given_up.reason) == (
            1.0,
            "kept",
            0,
            "too long to be read",
        )
        assert (await agent.solve(TASKS[1])).position == 1
    assert verify(path).ok


async def test_a_lost_reward_is_no_reward_and_brings_no_update(path: Path) -> None:
    async with agent_on(path, environment=Steps(reward=math.nan)) as agent:
        (outcome,) = await lived(agent, TASKS[:1])
        assert (
            outcome.reward is not None
            and math.isnan(outcome.reward)
            and (outcome.update, outcome.version) == ("none", 0)
        )
        assert table(agent, "SELECT reward, state FROM tasks") == [(None, "closed")]
    async with agent_on(path, environment=Steps()) as agent:
        (again,) = await lived(agent, TASKS[:1])
        assert again.reward is not None and math.isnan(again.reward)


async def test_the_context_is_that_of_the_run_lived_last(path: Path) -> None:
    async with agent_on(path) as agent:
        assert agent.context == ""
        for run, note in (("one", "note 2"), ("two", "note 4")):
            await agent.feedback(await agent.solve(TASKS[0], run=run), 1.0)
            assert agent.context == note
        await agent.solve(TASKS[1], run="one")
        assert agent.context == "note 2"
    async with agent_on(path) as agent:
        assert agent.context == "note 4", "a new process sees the newest"


# ---- forks ----


async def test_a_fork_begins_with_the_version_it_names(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model, environment=Steps()) as agent:
        await lived(agent, TASKS[:3])
        (first, *_) = await lived(agent, TASKS[:1], run="branch", fork=("life", 1))
        assert "note 4" in model.seen[-4]
        origin = (
            "SELECT p.version, pr.name FROM contexts c JOIN runs r ON r.id = c.run_id "
            "JOIN contexts p ON p.id = c.parent_id JOIN runs pr ON pr.id = p.run_id"
        )
        assert table(agent, f"{origin} WHERE r.name = 'branch' AND c.version = 0") == [(1, "life")]
        assert first.version == 1
        with pytest.raises(UnknownName, match="no context version 9"):
            await lived(agent, TASKS[:1], run="other", fork=("life", 9))
    async with agent_on(path, model, environment=Steps()) as agent:
        assert await lived(agent, TASKS[:1], run="branch", fork=("life", 1)) == [first]
        with pytest.raises(UsageError, match="did not begin"):
            await lived(agent, TASKS[:1], run="life", fork=("branch", 1))


# ---- bad updates ----


@pytest.mark.parametrize(
    ("note", "finish", "reason"),
    [
        ("I have no idea", "stop", "unparsable: 0 opening and 0 closing"),
        ("<context>a</context><context>b</context>", "stop", "unparsable: 2 opening"),
        ("</context>a<context>", "stop", "closing delimiter stands before"),
        ("<context>\n \n</context>", "stop", "empty"),
        ("<context>" + "x" * 101 + "</context>", "stop", "oversized: 101 characters, the limit is 100"),
        ("<context>\nlooks whole\n</context>", "length", "cut off"),
        ("<context>\ncut in the mid", "length", "cut off"),
    ],
)
async def test_a_bad_update_keeps_the_last_good_context_and_says_why(
    path: Path, note: str, finish: str, reason: str
) -> None:
    model = Counting()
    async with agent_on(path, model, environment=Steps(), max_context=100) as agent:
        await lived(agent, TASKS[:1])
        model.note, model.finish = note, finish
        events = [event async for event in agent.stream(TASKS[:2])]
        kept = [event for event in events if isinstance(event, ContextKept)]
        assert len(kept) == 1 and reason in kept[0].reason
        outcome = events[-1].outcome
        assert (outcome.update, outcome.version, outcome.context) == ("kept", 1, "note 4") and reason in outcome.reason
        model.note, model.finish = "<context>better</context>", "stop"
        assert (await lived(agent, TASKS[:3]))[2].version == 2
        assert table(agent, "SELECT state FROM episodes WHERE kind = 'update'") == ["done", "refused", "done"]
        assert table(agent, "SELECT answer_id IS NOT NULL FROM calls")[-5] == 1, "what was refused is on record"


async def test_without_updates_every_task_starts_from_nothing(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model, environment=Steps(), updates=False) as agent:
        assert [(o.update, o.version) for o in await lived(agent, TASKS[:2])] == [("none", 0)] * 2 and model.asked == 6


# ---- sync twins ----


def test_the_sync_twins_do_the_same(path: Path) -> None:
    with agent_on(path, environment=Steps()) as agent:
        assert [o.version for o in agent.run_sync(TASKS[:2])] == [1, 2]
    with CoDAgent("b", model=Counting(), memory=path) as agent:
        outcome = agent.solve_sync(TASKS[0])
        assert agent.feedback_sync(outcome, 1.0).version == 1 and agent.context == "note 2"


def test_a_sync_run_can_be_left_early(path: Path) -> None:
    with agent_on(path, environment=Steps()) as agent:
        for outcome in agent.run_sync(TASKS):
            if outcome.position == 1:
                break
        assert len(list(agent.run_sync(TASKS))) == 4


@pytest.mark.filterwarnings("error")
async def test_inside_a_running_loop_the_sync_twins_name_the_others(path: Path) -> None:
    async with agent_on(path) as agent:
        with pytest.raises(UsageError, match="`await agent.solve"):
            agent.solve_sync(TASKS[0])
        with pytest.raises(UsageError, match="`await agent.feedback"):
            agent.feedback_sync(0, 1.0)
        with pytest.raises(UsageError, match="`async for .* in agent.run"):
            next(agent.run_sync(TASKS))
        assert (await agent.solve(TASKS[0])).answer == "answer 1"


# ---- many at once ----


async def test_many_agents_share_a_file_in_one_process(path: Path) -> None:
    lake = FrozenLake("small", seed=1, form="compact")

    def player() -> Any:
        return resolve("scripted:perfect", world=lake, sampling=Sampling(seed=5))

    agents = [CoDAgent(f"a{n}", model=player(), memory=path, environment=lake) for n in range(12)]
    done = await asyncio.gather(*(lived(agent, lake.pack(3, index)) for index, agent in enumerate(agents)))
    for agent in agents:
        await agent.aclose()
    for index, outcomes in enumerate(done):
        async with CoDAgent("alone", model=player(), memory=path.with_name(f"{index}.db"), environment=lake) as alone:
            assert [o.model_dump() for o in outcomes] == [
                o.model_dump() for o in await lived(alone, lake.pack(3, index))
            ]


async def test_one_agent_lives_two_runs_at_once(path: Path) -> None:
    async with agent_on(path, environment=Steps()) as agent:
        one, two = await asyncio.gather(lived(agent, TASKS, run="one"), lived(agent, TASKS, run="two"))
    assert [o.version for o in one] == [o.version for o in two] == [1, 2, 3, 4]


async def test_two_calls_for_one_run_wait_for_each_other(path: Path) -> None:
    model = Counting()
    async with agent_on(path, model) as agent:
        outcomes = await asyncio.gather(*(agent.solve(task) for task in TASKS))
        assert sorted(o.position for o in outcomes) == [0, 1, 2, 3]
        one, two = await asyncio.gather(lived(agent, TASKS, run="r"), lived(agent, TASKS, run="r"))
        assert one == two and model.asked == 8


# ---- cancelled ----


@pytest.mark.parametrize("when", range(0, 40, 3))
async def test_a_cancelled_run_can_be_resumed_by_the_same_agent(path: Path, when: int) -> None:
    model, environment = Counting(), Steps()
    async with agent_on(path, model, environment=environment) as agent:
        living = asyncio.ensure_future(lived(agent, TASKS[:2]))
        for _ in range(when):
            await asyncio.sleep(0)
        living.cancel()
        await asyncio.gather(living, return_exceptions=True)
        outcomes = await lived(agent, TASKS[:2])
        assert [(o.position, o.reward, o.version) for o in outcomes] == [(0, 1.0, 1), (1, 1.0, 2)]
        assert model.asked <= 9, "at most what was in flight was asked again"
        assert table(agent, "SELECT what FROM commits ORDER BY seq") == ["began", *["solved", "judged", "updated"] * 2]


async def test_a_program_that_changed_is_not_followed(path: Path) -> None:
    def solver(words: str) -> Any:
        async def solve(task: Task, context: str, tools: Any) -> str:
            from cod_agent.context import message

            first = await tools.ask([message("user", ("application", words))])
            if model.down:
                raise ModelError("interrupted")
            return first.text

        return solve

    model = Counting()
    async with agent_on(path, model, solver=solver("hello")) as agent:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(model, "_answer", _then_down(model))
            with pytest.raises(ModelError, match="interrupted"):
                await agent.solve(TASKS[0])
    model.down = False
    async with agent_on(path, model, solver=solver("good morning")) as agent:
        with pytest.raises(
            ReplayDiverged,
            match="1 recorded answers wait.*Resume with the program that wrote the record, or start another run",
        ):
            await agent.solve(TASKS[0])
    async with agent_on(path, model, solver=_silent) as agent:
        with pytest.raises(ReplayDiverged, match="never asked for"):
            await agent.solve(TASKS[0])
    async with agent_on(path, model, solver=solver("hello")) as agent:
        assert (await agent.solve(TASKS[0])).answer == "answer 1" and model.asked == 1


def _then_down(model: Counting) -> Any:
    async def answer(messages: Sequence[Message]) -> Any:
        model.down = True
        return cod_agent.Completion(model._play(messages), inexact="scripted")

    return answer


async def _silent(task: Task, context: str, tools: Any) -> str:
    return "nothing"


async def test_a_caller_that_counts_has_no_position_solved_twice(tmp_path: Path) -> None:
    model = Counting()
    async with CoDAgent("a", model=model, memory=tmp_path / "a.db") as agent:
        first = await agent.solve(TASKS[0], position=0)
        again = await agent.solve(TASKS[0], position=0)
        assert again == first and model.asked == 1
        assert (await agent.solve(TASKS[1], position=1)).position == 1
        with pytest.raises(TaskMismatch):
            await agent.solve(TASKS[2], position=1)
        with pytest.raises(UsageError, match="next one is 2"):
            await agent.solve(TASKS[2], position=5)


async def test_two_agents_of_one_name_in_one_process_take_turns(tmp_path: Path) -> None:
    model, memory = Counting(), Memory.open(tmp_path / "a.db")
    async with CoDAgent("a", model=model, memory=memory) as one, CoDAgent("a", model=model, memory=memory) as other:
        outcomes = await asyncio.gather(*(agent.solve(task) for agent in (one, other) for task in TASKS))
    assert sorted(outcome.position for outcome in outcomes) == list(range(8)) and model.asked == 8
    memory.close()


async def test_a_model_that_speaks_the_compact_form_is_not_spoken_to_in_sentences(tmp_path: Path) -> None:
    lake = FrozenLake("small", seed=1)
    players = resolve("scripted:perfect", world=FrozenLake("small", seed=1, form="compact"))
    async with CoDAgent("a", model=players, memory=tmp_path / "a.db", environment=lake) as agent:
        with pytest.raises(UsageError, match='form="compact"'):
            [outcome async for outcome in agent.run(lake.pack(2))]
        with pytest.raises(UsageError, match='form="compact"'):
            await agent.solve(lake.pack(1)[0])


async def test_a_plain_function_is_a_solver_and_none_is_no_answer(tmp_path: Path) -> None:
    answers = iter(["as it is", None])
    async with CoDAgent("a", memory=tmp_path / "a.db", solver=lambda *_: next(answers), updates=False) as agent:
        assert [(await agent.solve(task)).answer for task in TASKS[:2]] == ["as it is", ""]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda agent: agent.feedback(0, "good"), "a finite number and words"),
        (lambda agent: anext(agent.run(["a text"])), "made of Tasks"),
        (lambda agent: anext(agent.run(TASKS, run="shown")), "not an Observation"),
    ],
)
async def test_what_is_handed_over_wrongly_is_said_in_one_sentence(tmp_path: Path, wrong: Any, said: str) -> None:
    class Talker:
        name = "talker"

        def start(self, task: Task) -> Any:
            return self

        def reset(self) -> Any:
            return "just text"

    async with CoDAgent("a", model=Counting(), memory=tmp_path / "a.db") as agent:
        await agent.solve(TASKS[0])
    async with CoDAgent("a", model=Counting(), memory=tmp_path / "a.db", environment=Talker()) as agent:
        with pytest.raises(UsageError, match=said):
            await wrong(agent)
    with pytest.raises(ValueError, match="JSON"):
        Task(id="x", data={"when": object()})


@pytest.mark.parametrize("recovery", ["deterministic", "snapshot"])
async def test_what_json_cannot_hold_is_not_taken_from_an_environment(tmp_path: Path, recovery: str) -> None:
    class Hoarder:
        name, remembers = "hoarder", True

        def __init__(self) -> None:
            self.recovery = recovery

        def start(self, task: Task, carried: Any = None) -> Any:
            return self

        def reset(self) -> Observation:
            return Observation("hello")

        def step(self, answer: str) -> Observation:
            carried = {1, 2} if self.recovery == "deterministic" else None
            return Observation("bye", done=True, feedback=Feedback(reward=1.0), carried=carried)

        def snapshot(self) -> Any:
            return {1, 2}

        def restore(self, state: Any) -> None: ...

    async with CoDAgent("a", model=Counting(), memory=tmp_path / "a.db", environment=Hoarder()) as agent:
        with pytest.raises(UsageError, match="must be what JSON can hold"):
            await agent.solve(TASKS[0])


async def test_a_model_answers_with_text(tmp_path: Path) -> None:
    class Mute:
        name = "mute"

        async def complete(self, messages: Any, *, on_delta: Any = None) -> Completion:
            return Completion(None)  # type: ignore[arg-type]

    async with CoDAgent("a", model=Mute(), memory=tmp_path / "a.db") as agent:
        with pytest.raises(UsageError, match="a text that is NoneType"):
            await agent.solve(TASKS[0])


async def test_an_agent_that_was_closed_says_so(tmp_path: Path) -> None:
    async with CoDAgent("a", model=Counting(), memory=tmp_path / "a.db") as agent:
        await agent.solve(TASKS[0])
    with pytest.raises(StoreError, match="closed by this program"):
        await asyncio.wait_for(agent.solve(TASKS[1]), 5)


async def test_feedback_that_could_not_be_learned_from_is_refused_before_it_is_stored(tmp_path: Path) -> None:
    async with CoDAgent("a", memory=tmp_path / "a.db", solver=lambda *_: "x") as agent:
        outcome = await agent.solve(TASKS[0])
        for reward, text in ((None, ""), (math.inf, "")):
            with pytest.raises(UsageError):
                await agent.feedback(outcome, reward, text)
        with pytest.raises(UsageError, match="no model to write it"):
            await agent.feedback(outcome, 1.0)
    async with CoDAgent("a", memory=tmp_path / "a.db", model=Counting()) as agent:
        assert (await agent.feedback(0, 1.0)).update == "written"


def test_an_agent_needs_a_name_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        CoDAgent("", memory=tmp_path / "a.db")
    with pytest.raises(NotADatabase, match="is no path"):
        CoDAgent("a", memory=":memory:")


async def test_the_history_shows_what_each_task_was_solved_with_when_feedback_comes_out_of_order(
    tmp_path: Path,
) -> None:
    from cod_agent.memory import history
    from cod_agent.memory.readonly import look

    async with CoDAgent("a", model=Counting(), memory=tmp_path / "a.db") as agent:
        for task in TASKS[:3]:
            await agent.solve(task)
        await agent.feedback(2, 1.0)
        await agent.feedback(0, 0.0)
        await agent.solve(TASKS[3])
    with look(tmp_path / "a.db") as conn:
        steps = history.steps(conn, history.find(conn)[0])
    assert [(step.version, step.update) for step in steps] == [(2, "written"), (0, "none"), (1, "written"), (2, "none")]
