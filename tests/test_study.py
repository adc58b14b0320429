"""Studies: several worlds, sizes and seeds, repeats, another model on the same packs; and all of it on the command line."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import cod_agent.cli
from cod_agent import Memory
from cod_agent.environments import make_world
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation import (
    NO_CONTEXT,
    SUITES,
    Arm,
    Plan,
    Watch,
    compare,
    curve,
    evaluate,
    kept_plan,
    kept_study,
    paired,
    parts_of,
    study,
    summarise,
)
from cod_agent.evaluation.players import played
from cod_agent.evaluation.statistics import difference, together
from cod_agent.evaluation.words import doubts
from cod_agent.memory.verify import verify

PLAN = Plan("frozen-lake:small", "scripted:perfect", packs=4, pack_size=2, controls=(NO_CONTEXT,))


def count(memory: Memory, table: str = "calls") -> int:
    return int(memory.read_sync(lambda conn: conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]))


# ---- figures ----


def test_differences_by_position_are_pack_by_pack_and_never_without_doubt() -> None:
    theirs = np.random.default_rng(2).random((50, 3))
    ours = theirs + [0.0, 0.1, 1.0]
    found, wide = paired(ours, theirs), float(ours.max() - min(0.0, theirs.min()))
    others = 1 - 0.025 ** (1 / 50)  # so many packs at most may be others than 50 that are all alike: .071
    assert [(point.mean, point.low, point.high) for point in found.points] == [
        pytest.approx((value, value - others * (wide + value), value + others * (wide - value)))
        for value in (0.0, 0.1, 1.0)
    ]


@pytest.mark.parametrize(("packs", "clear"), [(1, False), (2, False), (5, False), (6, True)])
def test_packs_that_all_go_alike_are_sure_of_a_difference_as_a_sign_test_is(packs: int, clear: bool) -> None:
    """Five heads in a row are chance at 95%, six are not. At most the difference is 1, for rewards are between 0 and 1."""
    for ours, theirs in ((1.0, 0.0), (0.0, 1.0)):
        found = difference(np.full((packs, 3), ours), np.full((packs, 3), theirs))
        assert (found.low > 0 or found.high < 0) is clear
        assert -1 <= found.low < found.high <= 1
    mixed = together([np.ones(packs), np.ones(packs)])
    assert -1 <= mixed.low < mixed.high <= 1


def test_parts_weigh_the_same_and_packs_are_drawn_within_them() -> None:
    dice = np.random.default_rng(3)
    small, large = dice.normal(1, 0.1, 20), dice.normal(0, 0.1, 2000)
    found = together([small, large])
    assert found.mean == pytest.approx((small.mean() + large.mean()) / 2)
    half = 1.96 * np.hypot(small.std() / 20**0.5, large.std() / 2000**0.5) / 2
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert np.isnan(together([small, np.full(3, np.nan)]).mean) and np.isnan(together([]).mean)


def arm(name: str, rewards: Any) -> Arm:
    return Arm(name, name, name, "w", rewards, (), curve(rewards))


def test_a_comparison_says_who_is_better_or_that_nobody_knows() -> None:
    dice = np.random.default_rng(5)
    base = (dice.random((200, 3)) < 0.4).astype(float)
    more = np.maximum(base, dice.random((200, 3)) < 0.3)
    ahead, behind, even = (
        compare(arm("a", ours), arm("b", theirs))
        for ours, theirs in ((more, base), (base, more), (base, base[::-1].copy()))
    )
    assert ahead.better == "a" and ahead.sentence.startswith("a is better than b, by 0.1")
    assert behind.better == "b" and behind.sentence.startswith("b is better than a, by 0.1")
    assert behind.at_least.low < 0 < behind.behind.low
    assert even.better is None and even.sentence.startswith("The data do not say which is better")
    assert [point.mean for point in ahead.positions] == pytest.approx((more - base).mean(0).tolist())


def test_a_few_packs_decide_nothing() -> None:
    """The bootstrap of three packs that nearly agree is narrow; Student's t knows better."""
    found = compare(arm("a", np.ones((3, 2))), arm("b", np.array([[0.9, 1.0], [0.9, 1.0], [0.2, 1.0]])))
    assert found.overall.low > 0 and found.better is None
    assert found.at_least.low <= 0 and f"a is ahead by at least {found.at_least.low:+.3f} (one-sided" in found.sentence
    back = compare(arm("b", np.array([[0.9, 1.0], [0.9, 1.0], [0.2, 1.0]])), arm("a", np.ones((3, 2))))
    assert f"a is ahead by at least {found.at_least.low:+.3f} (one-sided" in back.sentence
    even = compare(arm("a", np.array([[1.0], [0.0]])), arm("b", np.array([[0.0], [1.0]])))
    assert even.sentence.endswith("over 2 packs.")


# ---- parts ----


def test_suites_are_worlds_and_a_size() -> None:
    for name, suite in SUITES.items():
        parts = parts_of(replace(PLAN, pack_size=3), [name])
        assert [(part.world, part.pack_size) for part in parts] == [(world, suite.pack_size) for world in suite.worlds]
        assert [make_world(part.world).name for part in parts] == list(suite.worlds)
    assert [part.pack_size for part in parts_of(PLAN, ["tiny"], [6])] == [6, 6, 6]


def test_sizes_of_one_world_have_agents_of_their_own() -> None:
    parts = parts_of(PLAN, ["frozen-lake:small", "alchemy:tiny"], [4, 8])
    assert [(part.agent, part.pack_size) for part in parts] == [("agent/4", 4), ("agent/8", 8)] * 2
    assert [part.agent for part in parts_of(PLAN, ["frozen-lake:small", "alchemy:tiny"])] == ["agent", "agent"]


def test_what_is_asked_for_twice_or_is_nearly_a_suite() -> None:
    with pytest.raises(UsageError, match="frozen-lake:small in packs of 4 is asked for 2 times"):
        parts_of(PLAN, ["tiny", "frozen-lake:small"], [4])
    with pytest.raises(UnknownName, match="did you mean harder"):
        parts_of(PLAN, ["hardr"])


async def test_a_study_is_lived_in_one_file_and_goes_on_from_it(memory: Memory) -> None:
    parts = parts_of(PLAN, ["frozen-lake:small", "alchemy:tiny"], [2, 3])
    told: list[Any] = []

    def stop(lane: Any, pack: int, outcome: Any) -> None:
        told.append(outcome)
        if len(told) == 40:
            raise KeyError("stopped by the test")

    with pytest.raises(KeyError):
        await study(parts, memory, Watch(outcome=stop))
    assert kept_study(memory) == parts
    found = await study(kept_study(memory), memory)
    assert [(one.world, one.pack_size) for one in found.evaluations] == [(part.world, part.pack_size) for part in parts]
    assert all(np.isfinite(arm.rewards).all() for one in found.evaluations for arm in one.arms)
    lived = count(memory)
    again = await study(kept_study(memory), memory)
    assert count(memory) == lived and [one.arms for one in again.evaluations] == [one.arms for one in found.evaluations]
    assert verify(memory.path).ok
    said = json.loads(json.dumps(found.json(), allow_nan=False))
    assert [part["world"] for part in said["parts"]] == [part.world for part in parts]
    means = [np.mean(one.arms[0].rewards) for one in found.evaluations]
    assert said["overall"]["mean"]["mean"] == pytest.approx(np.mean(means), abs=1e-6)
    assert said["overall"]["benefit"] == said["overall"]["differences"][NO_CONTEXT]


async def test_a_plan_alone_is_kept_as_before(memory: Memory) -> None:
    await evaluate(PLAN, memory)
    assert kept_study(memory) == (PLAN,) and kept_plan(memory) == PLAN
    settings = memory.read_sync(lambda conn: conn.execute("SELECT settings FROM runs LIMIT 1").fetchone()[0])
    assert json.loads(settings).keys() == {"max_context", "updates", "plan"}


# ---- seeds and repeats ----


async def test_seeds_are_more_packs_of_the_same_part(memory: Memory) -> None:
    both = await evaluate(replace(PLAN, more_seeds=(9,)), memory)
    lived = count(memory)
    one, two = await evaluate(PLAN, memory), await evaluate(replace(PLAN, seed=9), memory)
    assert count(memory) == lived, "the packs are those of each seed alone"
    assert both.packs == 8 and both.seeds == (1, 9)
    assert (both.arms[0].rewards == np.concatenate([one.arms[0].rewards, two.arms[0].rewards])).all()
    said = both.json()["seeds"]
    assert [part["seed"] for part in said] == [1, 9]
    assert [part["positions"] for part in said] == [one.json()["positions"], two.json()["positions"]]
    assert both.floor is not None and both.floor.points[0].n == 8


async def test_repeats_are_more_runs_of_the_same_pack(memory: Memory) -> None:
    once = await evaluate(PLAN, memory)
    found = await evaluate(replace(PLAN, repeats=3), memory)
    assert found.arms[0].runs[2] == tuple(f"frozen-lake:small/eval/1/2{end}" for end in ("", "#1", "#2"))
    assert found.packs == 4 and found.main.points[0].n == 4 and count(memory, "runs") == 2 * 4 * 3
    query = (
        "SELECT t.reward FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.agent = 'agent' AND r.name LIKE '%/2#1'"
    )
    second = memory.read_sync(lambda conn: [row[0] for row in conn.execute(query)])
    rest = 3 * found.arms[0].rewards[2] - once.arms[0].rewards[2] - second
    assert set(np.round(rest, 6)) <= {0.0, 1.0}


async def test_floor_and_ceiling_are_those_of_the_players(memory: Memory) -> None:
    found = await evaluate(replace(PLAN, packs=6), memory)
    world = make_world("frozen-lake:small", seed=1)
    assert found.floor == curve(played(world, "memoryless", 6, 2))
    assert found.ceiling == curve(played(world, "perfect", 6, 2))
    assert len(found.json()["floor"]) == len(found.json()["ceiling"]) == 2


async def test_a_player_that_is_an_arm_has_one_figure(memory: Memory) -> None:
    found = await evaluate(replace(PLAN, packs=12, controls=("memoryless",)), memory)
    assert found.floor == found.controls["memoryless"]
    assert found.ceiling == curve(played(make_world(PLAN.world, seed=1), "perfect", 12, PLAN.pack_size))


# ---- two models ----


async def test_another_model_lives_the_same_packs(memory: Memory) -> None:
    plan = replace(PLAN, packs=24, pack_size=4, against="scripted:memoryless")
    found = await evaluate(plan, memory)
    assert found.comparison is not None and found.comparison.better == "scripted:perfect"
    other = found.arms[-1]
    assert (other.name, other.agent) == ("against: scripted:memoryless", "agent/against")
    assert other.runs == found.arms[0].runs and list(found.controls) == [NO_CONTEXT]
    assert found.json()["comparison"]["better"] == "scripted:perfect"
    with pytest.raises(UsageError, match="with against scripted:memoryless, not scripted:perfect"):
        await evaluate(replace(plan, against="scripted:perfect"), memory)


async def test_two_models_are_compared_over_all_parts(memory: Memory) -> None:
    plan = replace(PLAN, against="scripted:memoryless", controls=())
    found = await study(parts_of(plan, ["frozen-lake:small", "alchemy:tiny"]), memory)
    said = found.json()["overall"]
    each = [part["comparison"]["overall"]["mean"] for part in found.json()["parts"]]
    assert said["comparison"]["other"] == "scripted:memoryless" and said["benefit"] is None
    assert said["comparison"]["overall"]["mean"] == pytest.approx(np.mean(each), abs=1e-5)


async def test_the_lanes_of_one_agent_are_not_the_lives_of_another(memory: Memory) -> None:
    """An agent that has the name of a control's lane would be told that lane's figures as its own."""
    plan = replace(PLAN, packs=2, controls=("no-context",))
    await evaluate(plan, memory)
    with pytest.raises(UsageError, match="lived by agent 'agent/no-context' with agent agent, not agent/no-context"):
        await evaluate(replace(plan, agent="agent/no-context"), memory)
    await evaluate(replace(plan, agent="other/blank", temperature=0.0, controls=()), memory)
    with pytest.raises(UsageError, match="lived by agent 'other/blank' with agent other/blank, not other"):
        await evaluate(replace(plan, agent="other", controls=("blank",)), memory)


async def test_weights_that_changed_under_a_model_s_name_are_said(memory: Memory) -> None:
    """A folder that a training wrote anew, an endpoint that serves another checkpoint: the name is the same, and the plan, too."""
    first = await evaluate(replace(PLAN, packs=2), memory)
    (weights,) = first.weights
    with sqlite3.connect(memory.path) as conn:
        conn.execute("UPDATE calls SET weights = 'w-2' WHERE id = 1")
    mixed = await evaluate(replace(PLAN, packs=2), memory)
    assert set(mixed.weights) == {weights, "w-2"}
    told = "2 weights answered as scripted:perfect"
    assert any(told in said for said in doubts(mixed)) and not any(told in said for said in doubts(first))


def test_an_address_without_a_model_is_refused() -> None:
    with pytest.raises(UsageError, match="name it with --against MODEL"):
        replace(PLAN, against_base_url="http://host/v1").check()
    plan = replace(PLAN, against="openai:x", against_base_url="http://me:secret@host/v1")
    assert "secret" not in json.dumps(plan.settings())


# ---- on the command line ----


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cod(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(cod_agent.cli.app, ["eval", *map(str, words)], prog_name="cod")
    assert result.exit_code == code, f"{result.exit_code}: {result.stdout}{result.stderr}{result.exception!r}"
    return result


PERFECT = ("--model", "scripted:perfect")


def test_a_mix_goes_on_from_its_file_and_refuses_another(here: Path) -> None:
    worlds = "frozen-lake,alchemy:tiny"
    told = cod(worlds, *PERFECT, "--packs", 2, "--pack-size", 2, "--seed", "1,2", "--repeats", 2, "--json").stdout
    found = json.loads(told)
    assert [(part["world"], part["pack_size"], part["packs"]) for part in found["parts"]] == [
        ("frozen-lake:small", 2, 4),
        ("alchemy:tiny", 2, 4),
    ]
    out = "eval-frozen-lake-alchemy-tiny-scripted-perfect"
    assert {path.name for path in (here / out).iterdir()} >= {"eval.json", "runs.db"}
    again = json.loads(cod(worlds, "--resume", "--out", out, "--seed", "1,2", "--pack-size", 2, "--json").stdout)
    assert [part["positions"] for part in again["parts"]] == [part["positions"] for part in found["parts"]]
    for words, said in (
        (("--seed", "1"), "was begun with --seed 1,2"),
        (("--pack-size", "3"), "was begun with frozen-lake:small in packs of 2"),
        (("alchemy:tiny",), "leave worlds and sizes out"),
        (("--repeats", "1"), "with repeats 2, not 1"),
        (("--model", "embedded"), "with model scripted:perfect, not embedded"),
        (("--against", "embedded"), "without against, not with embedded"),
        (("--controls", "perfect"), "with controls no-context"),
    ):
        assert said in cod(*words, "--resume", "--out", out, code=1).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("tiny", "--repeats", "0"), "--repeats must be at least 1"),
        (("tiny", "--seed", "1,x"), "--seed is a whole number, or several"),
        (("tiny", "--seed", "1,1"), "--seed names a seed twice"),
        (("tiny", "--pack-size", "0"), "--pack-size must be at least 1"),
        (("tini",), "did you mean tiny"),
        (("frozen-lake", *PERFECT, "--pack-size", "1", "--controls", "frozen"), "use --pack-size 2 or more"),
        (("frozen-lake", *PERFECT, "--controls", "forein"), "did you mean foreign"),
        (("frozen-lake", *PERFECT, "--against", "embeded"), "did you mean embedded"),
    ],
)
def test_what_makes_no_sense_is_one_sentence_that_helps(here: Path, words: tuple[str, ...], said: str) -> None:
    error = cod(*words, code=1).stderr
    assert error.startswith("Error: ") and said in error


def test_what_is_not_lived_to_the_end_is_summed_up_too() -> None:
    from cod_agent.evaluation import lanes_of, set_up

    plan, world, model = set_up(PLAN)
    found = summarise(lanes_of(plan, world, model), 0.0)
    assert found.main.lost == 8 and np.isnan(found.main.overall.mean) and found.json()["mean"]["mean"] is None
