"""A Ralph loop: any world's task again and again, lived, measured and resumed as other packs are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cod_agent import Environment, Feedback, Memory, Observation, Pack, Task
from cod_agent.environments import FrozenLake, make_world, packed
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation import NO_CONTEXT, Plan, Watch, draw, evaluate, kept_plan
from cod_agent.memory.verify import verify

PLAN = Plan("frozen-lake:small", "scripted:perfect", packs=12, controls=(NO_CONTEXT,), packing="ralph-sample")


def test_a_pack_is_its_first_task_again_and_again() -> None:
    lake = FrozenLake("small", 5, form="compact")
    loop = packed(lake, "ralph-sample")
    plain, again = lake.pack(3, 2), loop.pack(3, 2)
    assert list(again) == [plain[0]] * 3 and again.environment is loop
    assert again.id == f"{plain.id}/ralph-sample" and again.data == {**plain.data, "packing": "ralph-sample"}
    shown = {loop.start(task).reset() for task in again}
    assert shown == {lake.start(plain[0]).reset()}
    with pytest.raises(UsageError, match="at least one task"):
        loop.pack(0)


@pytest.mark.parametrize("form", ["natural", "compact"])
def test_everything_else_is_as_in_the_world(form: Any) -> None:
    lake = make_world("frozen-lake:tiny", seed=3, split="train", form=form)
    loop = packed(lake, "ralph-sample")
    assert isinstance(loop, Environment)
    for name in ("name", "form", "recovery", "players"):
        assert getattr(loop, name) == getattr(lake, name)
    assert packed(lake, "cod") is lake


def test_a_world_of_ones_own_can_be_repeated() -> None:
    class Quiz:
        """No form, no recovery, no players."""

        name = "quiz"

        def pack(self, n: int, index: int = 0) -> Pack:
            return Pack(f"quiz/{index}", tuple(Task(id=f"question-{i}") for i in range(n)), self)

        def start(self, task: Task) -> Any:
            return self

        def reset(self) -> Observation:
            return Observation("What is 2 + 2?")

        def step(self, answer: str) -> Observation:
            return Observation("", done=True, feedback=Feedback(reward=float(answer == "4")))

    loop = packed(Quiz(), "ralph-sample")
    assert [task.id for task in loop.pack(3)] == ["question-0"] * 3 and loop.start(loop.pack(1)[0]).step("4").done


def test_a_world_with_too_few_tasks_says_so_with_the_first_pack() -> None:
    loop = packed(make_world("alchemy:tiny"), "ralph-full")
    with pytest.raises(UsageError, match="4 different targets a pack, so no pack of 8 tasks"):
        loop.pack(8, 0)
    assert [loop.pack(4, index)[0].data["index"] for index in range(5)] == [0, 1, 2, 3, 0]
    assert len(packed(make_world("alchemy:tiny"), "ralph-sample").pack(8)) == 8


def test_an_unknown_packing_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="did you mean ralph-sample"):
        packed(FrozenLake(), "ralph-smple")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean ralph-sample"):
        replace(PLAN, packing="ralph-smple").check()  # type: ignore[arg-type]


async def test_controls_live_the_same_task_again_and_again(memory: Memory, tmp_path: Path) -> None:
    found = await evaluate(replace(PLAN, packs=48, controls=(NO_CONTEXT, "perfect", "memoryless")), memory)
    assert found.main.gain.low > 0.1 and found.controls["perfect"].gain.low > 0.1
    assert abs(found.controls["memoryless"].gain.mean) < 0.3
    assert found.benefit is not None and found.benefit.low > 0.1
    assert found.json()["packing"] == "ralph-sample" and found.amount == "48 packs of one task 4 times"

    def lived(conn: Any) -> Any:
        query = "SELECT r.agent, r.name, count(*), count(DISTINCT t.fingerprint) FROM tasks t JOIN runs r ON r.id = t.run_id GROUP BY r.id"
        return conn.execute(query).fetchall()

    runs = await memory.read(lived)
    assert len(runs) == 48 * 4
    assert all(name.endswith("/ralph-sample") and (tasks, kinds) == (4, 1) for _, name, tasks, kinds in runs)
    assert verify(memory.path).ok
    pytest.importorskip("matplotlib")
    assert draw(found, tmp_path / "eval.png").stat().st_size > 10_000


async def test_a_loop_that_was_stopped_goes_on_from_the_file(memory: Memory) -> None:
    told: list[int] = []

    def stop(lane: Any, pack: int, outcome: Any) -> None:
        told.append(pack)
        if len(told) == 20:
            raise KeyError("stopped by the test")

    with pytest.raises(KeyError):
        await evaluate(PLAN, memory, Watch(outcome=stop))
    assert kept_plan(memory) == PLAN
    found = await evaluate(kept_plan(memory), memory)
    assert found.main.lost == 0 and found.packing == "ralph-sample"
    assert verify(memory.path).ok


async def test_it_shares_a_file_with_the_plain_packs(memory: Memory) -> None:
    plain = replace(PLAN, packs=2, packing="cod")
    await evaluate(plain, memory)

    def forget(conn: Any) -> None:
        conn.execute("UPDATE runs SET settings = json_remove(settings, '$.plan.packing', '$.plan.split')")

    await memory.write(forget)  # as an older version kept it
    await evaluate(replace(PLAN, packs=2), memory)
    assert (await evaluate(plain, memory)).packing == "cod"
    count = await memory.read(lambda conn: conn.execute("SELECT count(*) FROM runs").fetchone())
    assert count == (8,)


def test_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from cod_agent.cli import app

    def cod(*words: str, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*words], prog_name="cod")
        assert result.exit_code == code, result.output
        return result

    monkeypatch.chdir(tmp_path)
    words = ("eval", "frozen-lake:tiny", "--model", "scripted:perfect", "--packs", "4", "--packing", "ralph-sample")
    assert "4 packs of one task 4 times, seed 1" in cod(*words, "--controls", "no-context,memoryless").stdout
    out = "eval-frozen-lake-tiny-scripted-perfect-ralph-sample"
    again = json.loads(cod("eval", "--resume", "--out", out, "--json").stdout)
    assert again["packing"] == "ralph-sample" and set(again["controls"]) == {"no-context", "memoryless"}
    said = cod("run", *words[1:], "--split", "train", "--db", "lake.db").stdout
    assert "frozen-lake:tiny/train/1/0/ralph-sample task 3: reward" in said
    assert "4 packs of one task 4 times lived in" in cod("run", "--resume", "--db", "lake.db").stdout
    changed = cod("run", "--resume", "--db", "lake.db", "--packing", "cod", code=1).stderr
    assert "begun with packing ralph-sample, not cod" in changed
    assert "did you mean ralph-sample" in cod("run", "frozen-lake", "--packing", "ralph-sampel", code=1).stderr
