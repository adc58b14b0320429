"""Forgetting: nothing that comes from a bad task is left in the file, what remains is learnt again, and the life goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from forgetful import ORDER, PLANTED, Believer, hiding, house, lived, task, tasks, versions
from typer.testing import CliRunner

from cod_agent import CoDAgent, Memory
from cod_agent.cli import app
from cod_agent.errors import RunLeased, UnknownName
from cod_agent.memory import history
from cod_agent.memory.content import rebuild_request
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify


def sound(path: Path) -> bool:
    report = verify(path)
    assert report.ok, report.faults
    return True


@pytest.mark.parametrize("planted", ["feedback", "observation", "tool"])
async def test_what_was_planted_is_found_nowhere_and_the_rest_is_learnt_as_if_it_had_never_been(
    tmp_path: Path, planted: str
) -> None:
    path, without = tmp_path / "a.db", tmp_path / "without.db"
    async with house(path) as agent:
        assert PLANTED in await lived(agent, tasks(4, {1: planted}))
        assert {"messages", "contexts", "calls", "effects", "tasks"} <= set(hiding(path))
        done = await agent.forget("room1", reason="it was an attack")
        assert not hiding(path) and sound(path) and not done.lingering
        remains = agent.context
    async with house(without) as agent:
        expected = await lived(agent, [one for one in tasks(4) if one.id != "room1"])
    assert remains == expected and "room3" in expected
    assert done.derived == {("a", "life"): 6} and not done.waiting


async def test_the_life_goes_on_and_a_forgotten_task_is_known_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {1: "feedback"}))
        await agent.forget("room1")
    model = Believer()
    async with house(path, model=model) as agent:
        outcomes = [outcome async for outcome in agent.run(tasks(5, {1: "feedback"}))]
        assert "room4" in agent.context and PLANTED not in agent.context
    assert model.calls == 2 * 3, "the three tasks that were lived were not lived again"
    assert [outcome.task.id for outcome in outcomes] == [f"room{at}" for at in range(5)]
    assert (outcomes[1].task.prompt, outcomes[1].answer) == ("(forgotten)", "(forgotten)") and outcomes[1].reward == 0.5
    assert outcomes[2].task.prompt and outcomes[2].answer == "(forgotten)"
    assert sound(path)
    with look(path) as conn:
        steps = history.steps(conn, history.find(conn, "a", "life")[0])
    assert [step.gone for step in steps] == ["", "forgotten", "forgotten", "", ""]


async def test_without_a_model_it_is_taken_out_at_once_and_the_rest_waits(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(4, {1: "feedback"}))
    async with CoDAgent("a", memory=path) as agent:
        done = await agent.forget("room1")
        assert list(done.waiting) == [("a", "life")] and not done.derived and not hiding(path)
    async with house(path) as agent:
        assert "room4" in await lived(agent, tasks(5, {1: "feedback"})), (
            "the life goes on before the rest is learnt again"
        )
        assert "room2" not in agent.context
        done = await agent.forget("room1")
        assert not done.removed.rows and done.derived
        assert [f"room{at}" in agent.context for at in range(5)] == [True, False, True, True, True]
        again = await agent.forget("room1")
        assert not again.derived and not again.waiting
    assert sound(path)


async def test_the_run_in_which_the_rest_was_learnt_again_is_none_to_choose_from(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {1: "feedback"}))
        (name,) = (run for _, run in (await agent.forget("room1")).derived)
    with look(path) as conn:
        (again,) = (one.name for one in history.find(conn) if one.name != name)
    for command in ("log", "show", "diff", "blame"):
        done = CliRunner().invoke(app, ["context", command, str(path)])
        assert done.exit_code == 0, done.output
        assert (again in done.output) == (command in ("log", "blame")), (
            "log lists it beside, and blame says which lines came through it"
        )
        assert CliRunner().invoke(app, ["context", command, str(path), "--run", again]).exit_code == 0
    with look(path) as conn:
        assert [one.name for one in history.meant(history.find(conn, run=again))] == [again]
    forget = ["context", "forget", str(path), "--task", "room1"]
    done = await asyncio.to_thread(CliRunner().invoke, app, forget)
    assert "forgotten: everything is gone already." in done.output


async def test_it_is_forgotten_in_the_middle_of_a_life(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        async for outcome in agent.run(tasks(5, {1: "feedback"})):
            if outcome.position == 2:
                assert (await agent.forget("room1")).derived
        assert [f"room{at}" in agent.context for at in range(5)] == [True, False, True, True, True]
    assert not hiding(path) and sound(path)


async def test_what_another_task_needs_stays_word_for_word(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {0: "feedback"}))
        await lived(agent, tasks(3), run="other")
        with look(path) as conn:
            query = "SELECT c.id FROM calls c JOIN episodes e ON e.id = c.episode_id JOIN runs r ON r.id = e.run_id WHERE r.name = 'other'"
            before = {call: rebuild_request(conn, call) for (call,) in conn.execute(query).fetchall()}
        done = await agent.forget(0, run="life")
    assert done.removed.runs == [("a", "life")] and not hiding(path) and sound(path)
    with look(path) as conn:
        assert {call: rebuild_request(conn, call) for call in before} == before
    assert versions(path, "other")[-1] and None not in versions(path, "other")


async def test_a_task_is_forgotten_wherever_it_was_lived_and_forks_learn_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {1: "feedback"}))
        await lived(agent, [task("attic")], run="early", fork=("life", 1))
        await lived(agent, [task("cellar")], run="late", fork=("life", 3))
        done = await agent.forget("room1")
    assert sorted(done.derived) == [("a", "late"), ("a", "life")] and not hiding(path) and sound(path)
    assert None not in versions(path, "early")
    notes = versions(path, "late")
    assert notes[:2] == [None, None], "the fork began with what was forgotten"
    assert [place in str(notes[-1]) for place in ("room0", "room1", "room2", "cellar")] == [True, False, True, True]


async def test_tasks_made_from_what_it_led_to_are_forgotten_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        outcomes = [outcome async for outcome in agent.run(tasks(3, {1: "feedback"}))]
        assert PLANTED in outcomes[2].answer
        follow = task("report").model_copy(update={"prompt": f"Sum up: {outcomes[2].answer}"})
        await agent.solve(follow)
        done = await agent.forget("room1")
        assert [position for _, _, position in done.removed.tasks] == [1, 3]
        assert not hiding(path) and "room2" in agent.context and sound(path)


async def test_forgetting_a_second_task_reaches_what_was_learnt_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(5, {1: "feedback"}))
        await agent.forget("room1")
        done = await agent.forget("room2", reason="a mistake")
        assert ("a", "life/forget/1") in done.removed.runs
        assert [f"room{at}" in agent.context for at in range(5)] == [True, False, False, True, True]
    assert sound(path) and not hiding(path, "Lamp room2")


async def test_two_tasks_can_be_forgotten_before_anything_is_learnt_again(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(5, {1: "feedback", 3: "observation"}))
    async with CoDAgent("a", memory=path) as agent:
        await agent.forget("room1")
        await agent.forget("room3")
    async with house(path) as agent:
        await lived(agent, tasks(6, {1: "feedback", 3: "observation"}))
        await agent.forget("room3")
        assert [f"room{at}" in agent.context for at in range(6)] == [True, False, True, False, True, True]
    assert sound(path) and not hiding(path)


async def test_versions_that_are_held_back_go_with_what_was_found_in_them(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path, gate="review") as agent:
        await lived(agent, tasks(3, {0: "feedback"}))
        assert PLANTED in (await agent.review().held())[0].reason + (await agent.review().held())[0].body
        await agent.forget("room0")
        assert [one.position for one in await agent.review().held()] == [1, 2], "those were made from the empty note"
    assert not hiding(path) and sound(path)


async def test_what_is_learnt_again_passes_the_gate_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path, gate="review") as agent:
        await lived(agent, tasks(1, {0: "feedback"}))
        await agent.review().accept(1)
        await lived(agent, tasks(2, {0: "feedback"}))
        await agent.review().accept(3)
        done = await agent.forget("room0")
        assert "life/forget/1" in done.waiting["a", "life"] and agent.context == "" and not hiding(path)
        await agent.review(run="life/forget/1").accept(1)
        done = await agent.forget("room0")
        assert done.derived and "room1" in agent.context and not hiding(path) and sound(path)


async def test_an_episode_that_is_not_over_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    class Gone(Believer):
        async def _answer(self, messages: Any) -> Any:
            if "room2" in messages[-1].content or "room2" in messages[0].content:
                raise ConnectionError("cut")
            return await super()._answer(messages)

    async with house(path, model=Gone()) as agent:
        with pytest.raises(ConnectionError):
            await lived(agent, tasks(3, {1: "feedback"}))
        await agent.forget("room1")
    async with house(path) as agent:
        outcomes = [outcome async for outcome in agent.run(tasks(4, {1: "feedback"}))]
        assert outcomes[2].reason == "forgotten" and outcomes[3].update == "written"
    assert not hiding(path) and sound(path)


async def test_an_application_whose_feedback_comes_late_forgets_too(tmp_path: Path) -> None:
    path = tmp_path / "a.db"

    async def answer(task: Any, context: str, tools: Any) -> str:
        found = await tools[0](f"{task.id}; {context}")
        return f"{found}, says the tool"

    async def fetch(what: str) -> str:
        """Fetch."""
        return f"Lamp {what.split(';')[0]} has 5 watts. {ORDER if what.startswith('room0') else ''}"

    options = {"environment": None, "solver": answer, "tools": [fetch]}
    async with house(path, **options) as agent:
        outcomes = [await agent.solve(one) for one in tasks(2)]
        for outcome in reversed(outcomes):  # judged in another order than solved
            await agent.feedback(outcome, 1.0, "thanks")
        await agent.solve(task("room2"))
        await agent.feedback(2, 0.5, f"why do you say {PLANTED}?")
        await agent.solve(task("room3"))
        done = await agent.forget("room0")
        assert done.derived and not hiding(path)
        assert [f"room{at}" in agent.context for at in range(4)] == [False, True, True, False]
        await agent.feedback(3, 1.0, "thanks")
        assert "room3" in agent.context
    assert sound(path) and not hiding(path)


async def test_a_text_can_be_taken_out_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3))
        await lived(agent, tasks(3, {1: "observation"}), run="other")
        await agent.forget("room0", run="life")
        assert hiding(path), "another run read it by itself"
        done = await agent.forget(quoting=[PLANTED.upper()])
        assert not hiding(path) and ("a", "other") in done.derived
        assert PLANTED not in str(versions(path, "other")[-1]) and "room2" in str(versions(path, "other")[-1])
    assert sound(path)


async def test_a_run_that_another_process_lives_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {1: "feedback"}))
    child = os.fork()
    if not child:
        signal.pause()
        os._exit(0)
    try:
        with closing(sqlite3.connect(path)) as conn:
            conn.execute("DELETE FROM leases")
        memory = Memory.open(path)
        memory.write_sync(lambda conn: _leased(conn, child))
        async with house(memory) as agent:
            with pytest.raises(RunLeased):
                await agent.forget("room1")
        memory.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert hiding(path) and sound(path)


def _leased(conn: sqlite3.Connection, pid: int) -> None:
    from cod_agent.memory import lease

    run = conn.execute("SELECT id FROM runs").fetchone()[0]
    lease.take(conn, run, "a", "life")
    conn.execute("UPDATE leases SET owner = 'somebody', pid = ?", (pid,))


async def test_who_reads_an_older_state_keeps_it_until_they_have_gone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    async with house(path) as agent:
        await lived(agent, tasks(3, {1: "feedback"}))
        with look(path) as conn:
            assert conn.execute("SELECT count(*) FROM tasks").fetchone() == (3,)
            assert (await agent.forget("room1")).lingering
        assert not (await agent.forget("room1")).lingering
        assert not hiding(path)


async def test_what_was_never_lived_cannot_be_forgotten(tmp_path: Path) -> None:
    async with house(tmp_path / "a.db") as agent:
        await lived(agent, tasks(2))
        with pytest.raises(UnknownName, match="did you mean room1"):
            await agent.forget("room01")
        with pytest.raises(UnknownName, match="no position 7"):
            await agent.forget(7)


# ---- crashes ----


def killed(path: Path, write: int, after: bool) -> bool:
    """Forget in a process that kills itself before or after its n-th write; returns whether it came so far."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == signal.SIGKILL
    count, original = 0, Memory.write

    async def dying(memory: Memory, job: Any) -> Any:
        nonlocal count
        count += 1
        if count == write and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        done = await original(memory, job)
        if count == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Memory.write = dying  # type: ignore[method-assign]
    try:
        asyncio.run(_forgotten(path))
    finally:
        os._exit(0)


async def _forgotten(path: Path) -> None:
    async with house(path) as agent:
        await agent.forget("room1")


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9], ids=["all", "some"])
def test_killed_at_any_write_the_same_command_finishes(tmp_path: Path, step: int) -> None:
    async def live(path: Path) -> None:
        async with house(path) as agent:
            await lived(agent, tasks(3, {1: "feedback"}))
            await lived(agent, [task("cellar")], run="late", fork=("life", 3))

    first, whole = tmp_path / "first.db", tmp_path / "whole.db"
    asyncio.run(live(first))
    whole.write_bytes(first.read_bytes())
    asyncio.run(_forgotten(whole))
    expected = {run: versions(whole, run) for run in ("life", "late", "life/forget/1", "late/forget/1")}
    for number in range(0, 400, step):
        write, after = 1 + number // 2, bool(number % 2)
        path = tmp_path / f"{number}.db"
        path.write_bytes(first.read_bytes())
        if not killed(path, write, after):
            assert write > 15
            return
        asyncio.run(_forgotten(path))
        assert {run: versions(path, run) for run in expected} == expected, (write, after)
        assert not hiding(path) and sound(path), (write, after)
