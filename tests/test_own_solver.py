"""An application keeps its own agent: its loop, its framework, its tools; recorded, resumed and judged like any."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from cod_agent import Boundary, CoDAgent, Task, idempotency_key, recorded_tool, tool
from cod_agent.errors import ModelError, ReplayDiverged, TaskMismatch, ToolFailed, ToolInDoubt, UsageError
from cod_agent.journal.http import recording_client
from cod_agent.models.openai import OpenAIModel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import own_solver  # noqa: E402
from lives import Lives, killed_often, projection, reply, sent  # noqa: E402
from servers import Answer, Fault, ScriptedServer, spoken  # noqa: E402


class Died(BaseException):
    """The process dies here: nothing catches it, nothing is tidied up."""


def noted(request: dict[str, Any], n: int) -> Any:
    """A model that writes down what it was told of each task."""
    last = spoken(request["messages"][-1])
    if "Write the new note." in last:
        before = last.partition("<context>\n")[2].partition("\n</context>")[0]
        reward = last.partition("Reward: ")[2].partition("\n")[0]
        kept = "" if before.startswith("(nothing") else before + "; "
        return f"<context>\n{kept}{reward}\n</context>"
    return f"answer to {last}"


def rows(memory: Path, query: str) -> list[Any]:
    with sqlite3.connect(memory / "a.db") as conn:
        return conn.execute(query).fetchall()


def agent_of(memory: Path, solver: Any, server: ScriptedServer | None = None, **options: Any) -> CoDAgent:
    model = OpenAIModel("m", base_url=server.url, retries=0) if server else None
    options = {"updates": server is not None, **options}
    return CoDAgent("a", model=model, memory=memory / "a.db", solver=solver, **options)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")


# ---- the three ways of the example ----


async def test_a_loop_on_the_sdk_is_recorded_byte_for_byte(tmp_path: Path) -> None:
    def script(request: dict[str, Any], n: int) -> Any:
        if request["messages"][-1]["role"] == "tool":
            return "Iceland."
        return Answer(None, [("search", {"query": "puffins"}), ("search", {"query": "puffins"}), ("fly", {})])

    with ScriptedServer(script) as server:
        solver = own_solver.sdk_solver(server.url)
        async with agent_of(tmp_path, solver, tools=[own_solver.search]) as agent:
            assert (await agent.solve(Task(id="t", prompt="Where do puffins breed?"))).answer == "Iceland."
        assert sent(tmp_path / "a.db") == server.bodies
        told = [message["content"] for message in server.requests[1]["messages"][-3:]]
    assert told == ["three results for puffins"] * 2 + ["error: 'fly'"]
    assert rows(tmp_path, "SELECT name, occurrence FROM effects") == [("search", 0), ("search", 1)]


async def test_a_solver_may_ask_the_agents_own_model(tmp_path: Path) -> None:
    with ScriptedServer(noted) as server:
        async with agent_of(tmp_path, own_solver.asking_solver, server) as agent:
            outcome = await agent.solve(Task(id="t", prompt="What is 40 + 2?"))
            assert outcome.answer == "answer to Check that, then answer." and outcome.calls == 2
        labels = rows(tmp_path, "SELECT labels FROM messages ORDER BY id LIMIT 1")
    assert "context" in labels[0][0]


async def test_a_solver_may_do_without_a_model(tmp_path: Path) -> None:
    async with agent_of(tmp_path, own_solver.modelless_solver, tools=[own_solver.search], updates=True) as agent:
        outcome = await agent.solve(Task(id="t", prompt="puffins"))
        assert outcome.answer == "25 found" and outcome.calls == 0
        with pytest.raises(UsageError, match="no model"):
            await agent.feedback(outcome, 1.0)


@pytest.mark.slow
def test_an_sdk_loop_killed_anywhere_goes_on_and_repeats_nothing_recorded(tmp_path: Path) -> None:
    with ScriptedServer(reply) as server:
        with Lives("sdk", server.url, tmp_path / "whole") as whole:
            assert whole.live()
        with Lives("sdk", server.url, tmp_path / "killed") as life:
            assert killed_often(life, server, Random(3)) >= 3
        assert projection(life.database) == projection(whole.database)


# ---- feedback that comes later ----


async def test_feedback_comes_days_later_and_out_of_order(tmp_path: Path) -> None:
    with ScriptedServer(noted) as server:
        async with agent_of(tmp_path, None, server) as agent:
            for name in ("monday", "tuesday", "wednesday"):
                outcome = await agent.solve(Task(id=name, prompt=name))
                assert (outcome.update, outcome.reward, agent.context) == ("none", None, "")
        # Days later, another process.
        async with agent_of(tmp_path, None, server) as agent:
            assert (await agent.feedback(1, 0.25)).update == "written"
            assert (await agent.feedback(2, 0.5, "nearly")).version == 2
            assert (await agent.feedback(0, 1.0)).version == 3
            assert agent.context == "0.250; 0.500; 1.000"
            calls = server.count
            assert (await agent.feedback(0, 1.0)).version == 3 and server.count == calls, "said twice, done once"
            with pytest.raises(UsageError, match="judged already"):
                await agent.feedback(0, 0.0)
            await agent.solve(Task(id="thursday", prompt="thursday"))
            assert "0.250; 0.500; 1.000" in spoken(server.requests[-1]["messages"][0])


async def test_feedback_may_be_given_between_the_tasks_of_a_run(tmp_path: Path) -> None:
    tasks = [Task(id=name, prompt=name) for name in ("a", "b", "c")]
    with ScriptedServer(noted) as server:
        async with agent_of(tmp_path, None, server) as agent, asyncio.timeout(20):
            async for outcome in agent.run(tasks):
                await agent.feedback(outcome, outcome.position / 2)
            assert agent.context == "0.000; 0.500; 1.000"


def test_feedback_without_an_event_loop(tmp_path: Path) -> None:
    with ScriptedServer(noted) as server, agent_of(tmp_path, None, server) as agent:
        outcome = agent.solve_sync(Task(id="t", prompt="t"))
        assert agent.feedback_sync(outcome, 1.0).context == "1.000"


# ---- crashes ----


async def dies(agent: CoDAgent, task: Task) -> None:
    """Solve until `Died`, and leave the database as a dead process does."""
    with pytest.raises(Died):
        await agent.solve(task)
    agent.close()


TASK = Task(id="t", prompt="pay")


@pytest.mark.parametrize(
    ("policy", "decision", "runs", "answer"),
    [
        ("repeat", None, 2, "paid"),
        ("ask", "repeat", 2, "paid"),
        ("ask", "fail", 1, "unknown"),
        ("fail", None, 1, "unknown"),
    ],
)
async def test_a_tool_that_was_running_at_the_crash_does_as_it_declares(
    tmp_path: Path, policy: Any, decision: str | None, runs: int, answer: str
) -> None:
    keys = []

    @tool(on_crash=policy)
    def pay(sum: int) -> str:
        """Pay."""
        keys.append(idempotency_key())
        if len(keys) == 1:
            raise Died
        return "paid"

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        try:
            return str(await tools[0](sum=3))
        except ToolFailed as error:
            return "unknown" if "unknown" in str(error) else str(error)

    await dies(agent_of(tmp_path, solver, tools=[pay]), TASK)
    if decision is not None:
        async with agent_of(tmp_path, solver, tools=[pay]) as agent:
            with pytest.raises(ToolInDoubt, match="on_doubt"):
                await agent.solve(TASK)
    asked: list[Any] = []

    def decide(name: str, arguments: Any) -> str:
        asked.append((name, arguments))
        return decision or "wrong"

    async with agent_of(tmp_path, solver, tools=[pay], on_doubt=decide) as agent:
        assert (await agent.solve(TASK)).answer == answer
    assert len(keys) == runs and len(set(keys)) == 1 and keys[0], "a repeated call has the key of the first"
    assert asked == ([("pay", {"sum": 3})] if decision else [])


async def test_equal_calls_have_keys_of_their_own(tmp_path: Path) -> None:
    keys = []

    def pay(sum: int) -> str:
        """Pay."""
        keys.append(idempotency_key())
        return "paid"

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        await asyncio.gather(tools[0](3), tools[0](3))
        return str(await tools[0](3))

    async with agent_of(tmp_path, solver, tools=[pay]) as agent:
        await agent.solve(TASK)
    assert len(set(keys)) == 3


@pytest.mark.parametrize("moment", ["inside", "after"])
async def test_a_tool_that_asks_a_model_itself_is_one_thing_to_the_record(tmp_path: Path, moment: str) -> None:
    import openai

    deaths = [moment]

    async def helper(question: str) -> str:
        """Ask a helper."""
        async with openai.AsyncOpenAI(base_url=server.url, http_client=recording_client()) as client:
            said: Any = [{"role": "user", "content": question}]
            answer = await client.chat.completions.create(model="m", messages=said)
        if deaths == ["inside"]:
            deaths.clear()
            raise Died
        return answer.choices[0].message.content or ""

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        answer = str(await tools[0]("where?"))
        if deaths:
            deaths.clear()
            raise Died
        return answer

    with ScriptedServer(lambda request, n: "there") as server:
        await dies(agent_of(tmp_path, solver, tools=[helper]), TASK)
        async with agent_of(tmp_path, solver, tools=[helper]) as agent:
            assert (await agent.solve(TASK)).answer == "there"
        assert server.count == (2 if moment == "inside" else 1)


async def test_parallel_tools_go_on_where_each_of_them_was(tmp_path: Path) -> None:
    runs: list[str] = []

    async def fetch(page: str, seconds: float) -> str:
        """Fetch."""
        runs.append(page)
        await asyncio.sleep(seconds)
        if page == "c" and runs.count("c") == 1:
            raise Died
        return page.upper()

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        pages = [("a", 0.3), ("b", 0.0), ("c", 0.1), ("b", 0.0)]
        return "".join(await asyncio.gather(*(tools[0](page, seconds) for page, seconds in pages)))

    async def until_it_dies() -> None:
        # In a task of its own, whose other tools end with it.
        async with asyncio.TaskGroup() as group:
            group.create_task(agent_of(tmp_path, solver, tools=[fetch]).solve(TASK))

    with pytest.raises(BaseException) as died:  # noqa: PT011
        await until_it_dies()
    assert "Died" in repr(died.value)
    for left in asyncio.all_tasks() - {asyncio.current_task()}:
        left.cancel()
    await asyncio.sleep(0)
    async with agent_of(tmp_path, solver, tools=[fetch]) as agent:
        assert (await agent.solve(TASK)).answer == "ABCB"
    assert sorted(runs) == ["a", "a", "b", "b", "c", "c"]


async def test_a_tool_of_the_applications_own_is_recorded_wherever_it_is_called(tmp_path: Path) -> None:
    runs = []

    @recorded_tool
    def lookup(word: str) -> str:
        runs.append(word)
        return word.upper()

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        found = await lookup("x")
        if len(runs) == 1 and not died:
            died.append(True)
            raise Died
        return str(found)

    died: list[bool] = []
    await dies(agent_of(tmp_path, solver), TASK)
    async with agent_of(tmp_path, solver) as agent:
        assert (await agent.solve(TASK)).answer == "X" and runs == ["x"]
    assert await lookup("outside") == "OUTSIDE"


# ---- what must not be hidden by the SDK ----


def ask_twice(url: str, second: str) -> Any:
    import openai

    async def solver(task: Task, context: str, tools: Boundary) -> str:
        async with openai.AsyncOpenAI(base_url=url, http_client=recording_client(), max_retries=2) as client:
            for text in ("first", second):
                said: Any = [{"role": "user", "content": text}]
                answer = await client.chat.completions.create(model="m", messages=said)
            return answer.choices[0].message.content or ""

    return solver


async def test_a_program_that_changed_is_told_so_through_the_sdk(tmp_path: Path) -> None:
    with ScriptedServer(lambda request, n: Fault(400) if n == 1 else "ok") as server:
        async with agent_of(tmp_path, ask_twice(server.url, "second")) as agent:
            with pytest.raises(Exception, match="400"):
                await agent.solve(TASK)

        async def changed(task: Task, context: str, tools: Boundary) -> str:
            import openai

            async with openai.AsyncOpenAI(base_url=server.url, http_client=recording_client(), max_retries=2) as client:
                said: Any = [{"role": "user", "content": "something else"}]
                await client.chat.completions.create(model="m", messages=said)
            return ""

        async with agent_of(tmp_path, changed) as agent:
            with pytest.raises(ReplayDiverged):
                await agent.solve(TASK)
        assert server.count == 2, "nothing is asked by a program that diverged"


async def test_an_endpoint_that_is_away_leaves_the_task_open(tmp_path: Path) -> None:
    with ScriptedServer(lambda request, n: Fault(503) if n == 1 else f"answer {n}") as server:
        async with agent_of(tmp_path, own_solver.asking_solver, server) as agent:
            with pytest.raises(ModelError):
                await agent.solve(TASK)
            with pytest.raises(TaskMismatch):
                await agent.solve(Task(id="another", prompt="x"))
            assert (await agent.solve(TASK)).answer == "answer 2"
        assert server.count == 3
