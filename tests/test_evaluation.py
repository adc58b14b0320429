"""Reward by position: the figures, the lanes, going on after a stop, and the picture."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cod_agent import Memory
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation import NO_CONTEXT, Plan, Watch, curve, difference, draw, evaluate, kept_plan, paired
from cod_agent.events import ContextWritten, Observed
from cod_agent.memory.verify import verify

PLAN = Plan("frozen-lake:small", "scripted:perfect", packs=24, controls=(NO_CONTEXT,))


# ---- figures ----


def test_means_and_intervals_agree_with_what_is_known() -> None:
    dice = np.random.default_rng(7)
    rewards = (dice.random((400, 3)) < [0.2, 0.5, 0.9]).astype(float)
    found = curve(rewards)
    for at, truth in enumerate((0.2, 0.5, 0.9)):
        point = found.points[at]
        assert (point.position, point.n) == (at, 400)
        assert point.mean == pytest.approx(rewards[:, at].mean())
        half = 1.96 * math.sqrt(truth * (1 - truth) / 400)
        assert point.high - point.low == pytest.approx(2 * half, rel=0.2)
        assert point.low < truth < point.high
    assert found.gain.mean == pytest.approx(rewards[:, 2].mean() - rewards[:, 0].mean())
    assert found.gain.low > 0.5
    assert found.lost == 0


def test_intervals_are_over_packs_and_not_over_tasks() -> None:
    """Tasks of a pack that all go alike are worth one observation, not eight."""
    alike = np.repeat((np.random.default_rng(3).random((100, 1)) < 0.5).astype(float), 8, axis=1)
    apart = (np.random.default_rng(3).random((100, 8)) < 0.5).astype(float)
    wide, narrow = curve(alike).overall, curve(apart).overall
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_the_same_rewards_give_the_same_figures() -> None:
    rewards = np.random.default_rng(1).random((50, 4))
    assert curve(rewards) == curve(rewards.copy())


def test_lost_tasks_leave_the_means() -> None:
    rewards = np.ones((10, 2))
    rewards[:5, 0] = 0
    rewards[5:, 0] = np.nan
    found = curve(rewards)
    assert (found.points[0].mean, found.points[0].n, found.lost) == (0, 5, 5)
    assert found.overall.mean == pytest.approx(10 / 15)


def test_nothing_finite_is_no_number() -> None:
    found = curve(np.full((4, 2), np.nan))
    assert math.isnan(found.points[0].mean)
    assert found.points[0].json() == {"position": 0, "mean": None, "low": None, "high": None, "n": 0}


def test_intervals_grow_with_the_scale_of_the_rewards() -> None:
    rewards = (np.random.default_rng(4).random((40, 3)) < (0.0, 0.5, 1.0)).astype(float)
    theirs = np.zeros((40, 3))
    small, large = curve(rewards), curve(4 * rewards)
    pairs = [*zip(small.points, large.points, strict=True), (small.overall, large.overall), (small.gain, large.gain)]
    pairs += zip(paired(rewards, theirs).points, paired(4 * rewards, theirs).points, strict=True)
    for one, four in pairs:
        assert [four.mean, four.low, four.high] == pytest.approx([4 * one.mean, 4 * one.low, 4 * one.high])
    assert large.points[0].high > 0.3 and large.points[2].low < 3.7 and large.points[2].high == 4


def test_rewards_that_are_all_the_same_are_not_known_exactly() -> None:
    (point,) = curve(np.full((16, 1), -0.1)).points
    assert point.low == point.mean == -0.1 and point.high > 0.1
    (point,) = curve(np.full((16, 1), 0.5)).points
    assert 0.35 < point.low < 0.45 and 0.55 < point.high < 0.65


def test_a_difference_is_taken_pack_by_pack() -> None:
    theirs = np.random.default_rng(5).random((60, 3))
    found = difference(theirs + np.tile([[0.24], [0.26]], (30, 1)), theirs)
    assert found.mean == pytest.approx(0.25)
    assert 0.24 < found.low < 0.25 < found.high < 0.26


# ---- lives ----


async def test_a_context_helps_and_its_absence_does_not(memory: Memory) -> None:
    found = await evaluate(replace(PLAN, packs=64, controls=(NO_CONTEXT, "memoryless")), memory)
    assert found.main.points[3].low > found.controls[NO_CONTEXT].points[3].high
    assert found.main.gain.low > 0.1
    assert found.benefit is not None and found.benefit.low > 0.1
    assert abs(found.controls["memoryless"].gain.mean) < 0.3
    assert (found.written, found.kept) == (64 * 3, 0)
    assert verify(memory.path).ok


async def test_the_result_is_one_json_object(memory: Memory) -> None:
    said = json.loads(json.dumps((await evaluate(PLAN, memory)).json(), allow_nan=False))
    assert {key: said[key] for key in ("world", "model", "seed", "packs", "pack_size")} == {
        "world": "frozen-lake:small",
        "model": "scripted:perfect",
        "seed": 1,
        "packs": 24,
        "pack_size": 4,
    }
    for positions in (said["positions"], said["controls"][NO_CONTEXT]):
        assert [point["position"] for point in positions] == [0, 1, 2, 3]
        assert all(point.keys() == {"position", "mean", "low", "high", "n"} and point["n"] == 24 for point in positions)


async def test_no_context_writes_none_and_sees_none(memory: Memory) -> None:
    await evaluate(PLAN, memory)

    def read(conn: Any) -> Any:
        query = "SELECT count(*), max(c.version) FROM contexts c JOIN runs r ON r.id = c.run_id WHERE r.agent = ?"
        return conn.execute(query, ("agent/no-context",)).fetchone()

    assert await memory.read(read) == (24, 0)


async def test_the_same_plan_again_lives_nothing_twice(memory: Memory) -> None:
    first = await evaluate(PLAN, memory)
    count = await memory.read(lambda conn: conn.execute("SELECT count(*) FROM calls").fetchone())
    again = await evaluate(replace(PLAN, world="frozen-lake"), memory)
    assert replace(again, seconds=0) == replace(first, seconds=0)
    assert await memory.read(lambda conn: conn.execute("SELECT count(*) FROM calls").fetchone()) == count


async def test_more_packs_keep_the_ones_that_were_lived(memory: Memory) -> None:
    await evaluate(replace(PLAN, packs=8), memory)
    seen: list[int] = []
    found = await evaluate(PLAN, memory, Watch(outcome=lambda lane, pack, outcome: seen.append(pack)))
    assert found.packs == 24
    assert await memory.read(lambda conn: conn.execute("SELECT count(*) FROM runs").fetchone()) == (48,)


async def test_what_was_stopped_goes_on(memory: Memory) -> None:
    told: list[int] = []

    def stop(lane: Any, pack: int, outcome: Any) -> None:
        told.append(pack)
        if len(told) == 30:
            raise KeyError("stopped by the test")

    with pytest.raises(KeyError):
        await evaluate(PLAN, memory, Watch(outcome=stop))
    query = "SELECT count(*) FROM tasks WHERE state != 'open'"
    done = await memory.read(lambda conn: conn.execute(query).fetchone()[0])
    assert 30 <= done < 24 * 4 * 2
    found = await evaluate(kept_plan_of(memory), memory)
    assert found.main.lost == 0
    assert verify(memory.path).ok


def kept_plan_of(memory: Memory) -> Plan:
    plan = kept_plan(memory)
    assert plan == PLAN
    return plan


async def test_two_experiments_do_not_share_a_run(memory: Memory) -> None:
    await evaluate(replace(PLAN, packs=2), memory)
    for other in ({"model": "scripted:memoryless"}, {"pack_size": 5}, {"temperature": 0.5}):
        with pytest.raises(UsageError, match="choose another file"):
            await evaluate(replace(PLAN, packs=2, **other), memory)
    await evaluate(replace(PLAN, packs=2, seed=2), memory)


async def test_packs_to_train_on_are_others(memory: Memory) -> None:
    plan = replace(PLAN, packs=2, split="train", controls=("memoryless",))
    found = await evaluate(plan, memory)
    assert found.split == "train" and found.json()["split"] == "train"
    assert await names(memory) == {"frozen-lake:small/train/1/0", "frozen-lake:small/train/1/1"}
    await evaluate(replace(plan, split="eval"), memory)
    assert len(await names(memory)) == 4
    assert kept_plan(memory, "frozen-lake:small/train/1/1") == plan


async def names(memory: Memory) -> set[str]:
    return await memory.read(lambda conn: {name for (name,) in conn.execute("SELECT name FROM runs")})


async def test_a_plan_of_an_older_version_goes_on(memory: Memory) -> None:
    await evaluate(replace(PLAN, packs=2), memory)

    def forget(conn: Any) -> None:
        conn.execute("UPDATE runs SET settings = json_remove(settings, '$.plan.split')")

    await memory.write(forget)
    assert kept_plan(memory) == replace(PLAN, packs=2)
    assert (await evaluate(replace(PLAN, packs=3), memory)).packs == 3


async def test_the_first_pack_is_shown_as_it_happens(memory: Memory) -> None:
    events: list[Any] = []
    await evaluate(replace(PLAN, packs=3, controls=()), memory, Watch(event=events.append))
    assert {event.run for event in events} == {"frozen-lake:small/eval/1/0"}
    assert sum(isinstance(event, ContextWritten) for event in events) == 3
    assert any(isinstance(event, Observed) for event in events)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (replace(PLAN, packs=0), "--packs must be at least 1"),
        (replace(PLAN, pack_size=0), "--pack-size must be at least 1"),
        (replace(PLAN, temperature=-1.0), "cannot be negative"),
    ],
)
async def test_a_plan_that_asks_for_nothing_is_refused(memory: Memory, plan: Plan, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        await evaluate(plan, memory)


async def test_an_unknown_name_has_a_suggestion(memory: Memory) -> None:
    with pytest.raises(UnknownName, match="did you mean train"):
        await evaluate(replace(PLAN, split="trian"), memory)  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="did you mean no-context"):
        await evaluate(replace(PLAN, controls=("no-contxt",)), memory)


def test_credentials_in_an_address_are_not_kept() -> None:
    plan = replace(PLAN, base_url="https://me:secret@host:8000/v1")
    assert "secret" not in json.dumps(plan.settings())
    assert plan.settings()["plan"]["base_url"] == "https://host:8000/v1"


# ---- the picture ----


def test_the_figure_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    memory = Memory.open(tmp_path / "runs.db", durable=False)
    try:
        found = asyncio.run(evaluate(replace(PLAN, packs=4, controls=(NO_CONTEXT, "perfect", "memoryless")), memory))
    finally:
        memory.close()
    path = draw(found, tmp_path / "eval.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
