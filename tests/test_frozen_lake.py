"""FrozenLake-Obscure: fair maps, stable seeds, splits that share nothing, and no answer that breaks it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_agent.context import NATURAL
from cod_agent.environments.base import Environment
from cod_agent.environments.draws import randomness
from cod_agent.environments.frozen_lake import PRESETS, FrozenLake
from cod_agent.environments.frozen_lake.maps import (
    FAR,
    draw_lake,
    draw_mapping,
    neighbours,
    split_of,
)
from cod_agent.environments.frozen_lake.world import parse_answer
from cod_agent.errors import UnknownName, UsageError
from cod_agent.tasks import Pack, Task

GOLDEN = {
    "small-shifting": "be435f8694c348bf53571d057d08225ba9de583bd5f3f2f1bcbb0454f0e3a58f",
    "tiny": "8d6c6eb4bf43e7cc26fcb50e0543aa304ddf45b57d2a1d7d543011003e3c6866",
    "small": "0c3c39c1929bc70f9b1a245f7f2a3004100cfe0c6daca58a2932bd13efebe288",
    "5x5": "da024348ba0729a3c13c31fa7971557dff29be3bdb0dfe68b6dc89fd36c4e878",
    "6x6": "366dc4ff1ac77a43809edecfac04222697286b5f3d840363bca50ce815002066",
    "paper": "8a5b1b7cbc1af3495ef20c8e22dfa3186089a51559f41f1d7848e6fdcce756a8",
    "paper-hard": "6ba6fe155146e18e825705d97e1f2b960391fbeaa4b4c3934491279715820409",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""


def secret(pack: Pack) -> dict[int, str]:
    data = pack.data
    names = ("frozen-lake", data["preset"], data["split"], data["seed"], data["pack"], "directions")
    return draw_mapping(randomness(*names))


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    lake = FrozenLake("small", form="compact")
    assert isinstance(lake, Environment)
    assert (lake.name, lake.form, lake.recovery) == ("frozen-lake:small", "compact", "deterministic")


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        FrozenLake(**wrong)


@pytest.mark.parametrize(("n", "index"), [(0, 0), (-1, 0), (2, -1)])
def test_impossible_packs_are_errors_of_use(n, index):
    with pytest.raises(UsageError):
        FrozenLake().pack(n, index)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    lake = FrozenLake(preset, 7, form="compact")
    shown = [[lake.start(task).reset().text for task in pack] + [secret(pack)] for pack in lake.packs(4, 4)]
    assert hashlib.sha256(json.dumps(shown).encode()).hexdigest() == GOLDEN[preset]


def test_a_longer_pack_begins_with_the_shorter_one():
    lake = FrozenLake("small", 5)
    assert lake.pack(6, 2).tasks[:3] == lake.pack(3, 2).tasks


def test_packs_of_one_world_differ_and_share_their_secret_within():
    lake = FrozenLake("small", 5, form="compact")
    shown = {lake.start(task).reset().text for pack in lake.packs(20, 4) for task in pack}
    assert len(shown) > 60
    assert len({tuple(secret(pack).values()) for pack in lake.packs(300, 1)}) == 24


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    lake = FrozenLake("small", 5)
    pack = lake.pack(3, 1)
    task = Task.model_validate_json(pack[2].model_dump_json())
    assert FrozenLake("small", 99).start(task).reset() == lake.start(pack[2]).reset()
    told = task.model_dump_json() + json.dumps(pack.data)
    assert not any(f"{n}: {move}" in told or f'"{move}"' in told for n, move in secret(pack).items())


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"preset": "tiny", "split": "eval", "seed": 0, "pack": 0, "index": 0},
        {"preset": "small", "split": "test", "seed": 0, "pack": 0, "index": 0},
        {"preset": "small", "split": "eval", "seed": [], "pack": 0, "index": 0},
    ],
)
def test_a_task_of_another_world_is_an_error_of_use(data):
    with pytest.raises(UsageError, match="no task of frozen-lake:small"):
        FrozenLake("small").start(Task(id="x", data=data))


def test_secrets_are_spread_evenly():
    counts = Counter(tuple(draw_mapping(randomness(i)).values()) for i in range(24 * 200))
    assert len(counts) == 24
    assert all(140 < count < 265 for count in counts.values())


# Maps


def shortest_path(size: int, start: int, goal: int, holes: frozenset[int]) -> int:
    """By widening a set of reachable cells: not how the world does it."""
    reached, steps = {start}, 0
    while goal not in reached:
        wider = reached | {near for cell in reached for near in neighbours(size)[cell].values() if near not in holes}
        if wider == reached:
            return FAR
        reached, steps = wider, steps + 1
    return steps


@pytest.mark.parametrize("preset", PRESETS)
def test_every_map_has_a_path_of_allowed_length(preset):
    kind, sizes, ice = PRESETS[preset], set(), []
    for i in range(300):
        lake = draw_lake(randomness("maps", i), kind, "train")
        sizes.add(lake.size)
        ice.append(1 - len(lake.holes) / lake.size**2)
        assert kind.path[0] <= shortest_path(lake.size, lake.start, lake.goal, lake.holes) <= kind.path[1]
        assert lake.start != lake.goal and not lake.holes & {lake.start, lake.goal}
    assert sizes == set(range(kind.size[0], kind.size[1] + 1))
    assert 0.6 < sum(ice) / len(ice) < 0.85


def test_no_map_of_one_split_occurs_in_the_other_even_turned_or_mirrored():
    def images(cells: str, size: int) -> set[str]:
        rows, out = [cells[i : i + size] for i in range(0, size**2, size)], set()
        for _ in range(4):
            rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
            out |= {"".join(rows), "".join(row[::-1] for row in rows)}
        return out

    seen: dict[str, set[str]] = {}
    for split in ("train", "eval"):
        world = FrozenLake("tiny", 3, split=split, form="compact")
        shown = {world.start(task).reset().text.replace("\n", "") for pack in world.packs(150, 4) for task in pack}
        seen[split] = {image for cells in shown for image in images(cells, 3)}
    assert not seen["train"] & seen["eval"]


def test_a_quarter_of_all_maps_is_for_evaluation():
    lakes = [
        draw_lake(randomness("share", split, i), PRESETS["small"], split)
        for split in ("train", "eval")
        for i in range(50)
    ]
    assert [split_of(lake) for lake in lakes] == ["train"] * 50 + ["eval"] * 50
    anyhow = Counter()
    for i in range(4000):
        dice = randomness("any", i)
        holes = frozenset(cell for cell in range(2, 16) if dice.random() > 0.65)
        anyhow[split_of(type(lakes[0])(4, 0, 1, holes))] += 1
    assert 0.2 < anyhow["eval"] / 4000 < 0.3


# Walking


def by_hand(form: str, mapping: Sequence[str] = ("Left", "Down", "Right", "Up")):
    """A session on a map that is known: `@.#` `.*.` `...`."""
    from cod_agent.environments.frozen_lake.maps import Lake
    from cod_agent.environments.frozen_lake.world import LakeSession

    return LakeSession(Lake(3, 0, 4, frozenset({2})), dict(enumerate(mapping, 1)), 4, form)


def test_the_compact_form_says_what_really_happened():
    session = by_hand("compact")
    assert session.reset().text == "@.#\n.*.\n..."
    seen = session.step("Up? Direction 1")
    assert (seen.text, seen.summary, seen.done) == (
        "blocked: Direction 1\n@.#\n.*.\n...",
        "blocked: Direction 1",
        False,
    )
    seen = session.step("Up? Direction 3")
    assert (seen.text, seen.summary) == ("Right: Direction 3\n.@#\n.*.\n...", "Right: Direction 3")
    seen = session.step("Direction 2")
    assert (seen.text, seen.done, seen.feedback.reward, seen.feedback.text) == ("Down: Direction 2", True, 1.0, "goal")


def test_the_natural_form_says_the_same_in_sentences():
    session = by_hand("natural")
    first = session.reset().text
    assert "Step 1 of 4" in first and "P\tF\tH" in first and "the goal is at (1, 1)" in first
    assert "Direction 1 left you at (0, 0)" in session.step("<answer>1</answer>").text
    seen = session.step("I try this.\n<answer> Direction 3 </answer>")
    assert "Direction 3 took you from (0, 0) to (0, 1)" in seen.text and "F\tP\tH" in seen.text
    assert seen.summary == "Direction 3 took you from (0, 0) to (0, 1)."
    seen = session.step("<answer>3</answer>")
    assert seen.done and seen.feedback.reward == 0.0 and "hole" in seen.feedback.text


def test_the_steps_run_out():
    session = by_hand("compact")
    session.reset()
    last = [session.step("Direction 1") for _ in range(4)][-1]
    assert last.done and last.feedback.reward == 0.0 and last.feedback.text == "steps"
    with pytest.raises(UsageError, match="over"):
        session.step("Direction 1")


def test_the_rules_are_told_in_the_natural_form_only():
    assert FrozenLake("small", form="compact").pack(1)[0].prompt == ""
    rules = FrozenLake("small").pack(1)[0].prompt
    assert "7 steps" in rules and "<answer>3</answer>" in rules
    assert rules in NATURAL.solve(FrozenLake("small").pack(1)[0], "", None)[-1].content


def test_sessions_share_no_state():
    lake = FrozenLake("small", 2, form="compact")
    task = lake.pack(1)[0]
    one, other = lake.start(task), lake.start(task)
    shown = one.reset().text, other.reset().text
    one.step("Direction 1")
    assert shown[0] == shown[1] == other.reset().text


# Answers

MALFORMED = [
    "",
    "5",
    "Direction 0",
    "<answer></answer>",
    "<answer>5</answer>",
    "<answer>34</answer>",
    "<answer>3",
    "3</answer>",
    "<answer>1</answer><answer>2</answer>",
    "<answer><answer>3</answer></answer>",
    "</answer>3<answer>",
    "<answer>٣</answer>",
    "<answer>３</answer>",
    "<answer>³</answer>",
    "<answer>three</answer>",
    "<answer>-3</answer>",
    "<answer>3.0</answer>",
    "Up? Direction ٣",
    "Up? Direction 3 Direction 4",
    "Up?  Direction 3",
    "up? Direction 3",
    "null",
    "None",
    "\x00",
    "\ud800",
    "3" * 1_000_000,
    "<answer>" * 100_000,
    "Direction 3 " * 100_000,
    None,
    3,
    b"<answer>3</answer>",
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_malformed_answers_end_the_episode_with_reward_0(answer, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(answer)
    assert seen.done and seen.feedback.reward == 0.0
    assert ("malformed" if form == "natural" else "invalid") in seen.feedback.text


def test_what_a_thinking_model_thinks_does_not_count():
    said = "<think>maybe <answer>1</answer> or <answer>2</answer></think>So: <answer>3</answer>"
    assert parse_answer(said, "natural") == 3


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "3",
        "1",
        "٣",
        "Direction ",
        "Direction 2",
        "Up? ",
        "Left?",
        "</think>",
        " ",
        "\n",
        "\t",
        "é",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join)), st.sampled_from(["natural", "compact"]))
def test_no_answer_raises_or_wins_wrongly(answer, form):
    session = by_hand(form, ("Down", "Left", "Up", "Right"))
    session.reset()
    direction = parse_answer(answer, form)
    seen = session.step(answer)
    assert direction in (None, 1, 2, 3, 4)
    assert seen.done == (direction is None)  # no single step from the corner reaches goal or hole
    assert direction is None or str(direction) in answer


# Cost


def test_a_step_costs_far_below_a_millisecond():
    lake, costs = FrozenLake("paper-hard", 0), []
    for pack in lake.packs(50, 1):
        session = lake.start(pack[0])
        session.reset()
        began = time.perf_counter()
        session.step("<answer>1</answer>")
        costs.append(time.perf_counter() - began)
    assert median(costs) < 0.5e-3
