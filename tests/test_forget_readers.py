"""Whoever reads a file copes with what was forgotten: it is left out, counted, or shown as gone; nothing crashes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from forgetful import PLANTED, Believer, hiding, house, lived, tasks, versions
from typer.testing import CliRunner

from cod_agent import CoDAgent, Memory
from cod_agent.cli import app
from cod_agent.environments import FrozenLake
from cod_agent.evaluation.given import Giver, history
from cod_agent.evaluation.measures import measured
from cod_agent.evaluation.samples import sample
from cod_agent.memory.merge import merge
from cod_agent.memory.readonly import look
from cod_agent.memory.verify import verify


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two runs, in one of which a task was forgotten."""
    path = tmp_path_factory.mktemp("forgotten") / "a.db"

    async def live() -> None:
        async with house(path) as agent:
            await lived(agent, tasks(4, {1: "feedback"}))
            await lived(agent, tasks(2), run="other")
            await agent.forget("room1", run="life")

    asyncio.run(live())
    return path


def test_training_leaves_it_out_and_says_why(forgotten: Path) -> None:
    from cod_train.rollouts import FORGOTTEN, PURPOSES, read_rollouts

    rollouts, account = read_rollouts([forgotten])
    life = next(rollout for rollout in rollouts if rollout.name.endswith("a/life"))
    kept = [(segment.kind, segment.position) for segment in life.segments if not segment.refused]
    assert kept == [("solve", 0)]
    assert account.refused[FORGOTTEN][0] >= 3 and account.refused[PURPOSES["forget"]][0] == 4
    assert [reward == reward for reward in life.rewards] == [True, False, False, False]


def test_reports_and_controls_show_that_it_is_gone(forgotten: Path) -> None:
    memory = Memory.open(forgotten)
    try:
        assert [measure.tasks for measure in measured(memory, "a", ["life", "other"])] == [2, 2, 1, 1]
        giver = Giver("history", history, memory, ("a", "life"), ("a", "life"), "natural", 10_000)
        told = memory.read_sync(lambda conn: history(conn, giver, 4))
    finally:
        memory.close()
    assert "(forgotten)" in told and PLANTED not in told
    with look(forgotten) as conn:
        arm: Any = SimpleNamespace(name="main", agent="a", runs=(("life",),))
        shown = sample(conn, arm, 0, "an example")
    assert shown is not None and [task.prompt for task in shown.tasks][1] == "(forgotten)"
    assert shown.tasks[2].first.startswith("You stand in room2")


def test_a_merge_brings_tombstones_and_no_text_back(forgotten: Path, tmp_path: Path) -> None:
    path = tmp_path / "to.db"
    memory = Memory.open(path)
    try:
        merge(memory, forgotten)
        assert merge(memory, forgotten).known == 3
    finally:
        memory.close()
    assert verify(path).ok and not hiding(path) and versions(path, "life") == versions(forgotten, "life")


async def test_agents_of_the_same_file_go_on_while_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    memory = Memory.open(path)

    class Slow(Believer):
        async def _answer(self, messages: Any) -> Any:
            await asyncio.sleep(0.002)
            return await super()._answer(messages)

    async with house(memory) as agent:
        await lived(agent, tasks(3, {0: "feedback"}))
        neighbours = [CoDAgent(f"b{n}", model=Slow(), memory=memory, environment=agent.environment) for n in range(4)]
        living = [asyncio.create_task(lived(one, tasks(6))) for one in neighbours]
        await asyncio.sleep(0.02)
        await agent.forget("room0")
        notes = await asyncio.gather(*living)
        for one in neighbours:
            await one.aclose()
    memory.close()
    assert all("room5" in note for note in notes)
    assert verify(path).ok, verify(path).faults
    assert not hiding(path)


def test_a_real_model_in_a_world_forgets_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "lake.db"

    def cod(*words: str) -> str:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == 0, done.output
        return str(done.stdout)

    cod("run", "frozen-lake:small", "--model", "embedded", "--packs", "2", "--seed", "3", "--db", str(path))
    bad = "frozen-lake:small/eval/3/0/1"
    would = json.loads(cod("context", "forget", str(path), "--task", bad, "--dry-run", "--json"))
    assert would["rows"]["context"] == 2 and verify(path).pruned == 0
    first = json.loads(cod("context", "forget", str(path), "--task", bad, "--reason", "a test", "--json"))
    assert first["forgotten"][0]["rows"] == would["rows"] and first["forgotten"][0]["waiting"]
    assert "(forgotten)" in cod("context", "log", str(path), "--run", "frozen-lake:small/eval/3/0")
    done = json.loads(cod("context", "forget", str(path), "--task", bad, "--model", "embedded", "--json"))
    assert done["forgotten"][0]["derived"][0]["version"] == 5
    assert "Direction" in cod("context", "show", str(path), "--run", "frozen-lake:small/eval/3/0")
    verified = cod("verify", str(path))
    assert "agrees with itself" in verified and "parts pruned or forgotten" in verified
    assert "lived before" in cod("run", "--resume", "--db", str(path))
    prompt = FrozenLake("small", seed=3, form="compact").pack(4).tasks[1]
    assert prompt.id == bad and not hiding(path, json.dumps(prompt.data)[1:-1] or "none")


def test_a_position_needs_its_run(forgotten: Path) -> None:
    done = CliRunner().invoke(app, ["context", "forget", str(forgotten), "--position", "0"])
    assert done.exit_code == 1 and "has 3 such runs" in done.output
    done = CliRunner().invoke(app, ["context", "forget", str(forgotten)])
    assert done.exit_code == 1 and "--task ID" in done.output
    done = CliRunner().invoke(
        app, ["context", "forget", str(forgotten), "--text", "has 5 watts", "--dry-run", "--json"]
    )
    assert json.loads(done.stdout)["rows"]["context"] >= 2
