"""A training step's rows: what each is worth and where it stands, whatever order it came in."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numpy")
from cod_agent.errors import UsageError  # noqa: E402
from cod_train.batch import Credit, Shaping, advantages, gathered, layout, plan, rows_of  # noqa: E402
from cod_train.rollouts import Call, Rollout, Segment  # noqa: E402


def call(*lengths: int) -> tuple[Call, ...]:
    """A conversation of calls that extend one another: (asked, answered, asked, answered, ...) lengths."""
    told: list[int] = []
    out = []
    for asked, answered in zip(lengths[::2], lengths[1::2], strict=True):
        told = told + list(range(asked))
        sampled = [7] * answered
        out.append(Call(list(told), sampled, [-0.5] * answered, "base"))
        told = told + sampled
    return tuple(out)


def rollout(name: str, rewards: list[float], updates: list[float], group: str = "pack", world: str = "lake") -> Rollout:
    segments = [Segment("solve", at, "done", call(5, 2, 3, 2)) for at in range(len(rewards))]
    segments += [Segment("update", at, "done", call(9, 4)) for at in range(len(updates))]
    heirs = tuple(range(1, len(rewards) + 1))
    return Rollout(name, group, world, tuple(rewards), tuple(updates), heirs, tuple(segments), frozenset({"base"}))


def labelled(*rollouts: Rollout) -> list[dict]:
    return [dict(row.label) for row in chain.from_iterable(rows_of(one) for one in rollouts)]


def worth(rows: list[dict], how: Credit | None = None) -> dict[tuple[str, str, int], float]:
    values, _ = advantages(rows, how or Credit())
    return {(row["rollout"], row["kind"], row["position"]): value for row, value in zip(rows, values, strict=True)}


def test_rows_have_tokens_and_what_credit_needs() -> None:
    rows = list(rows_of(rollout("a", [1.0, 0.0], [-0.1])))
    assert [(row.label["kind"], row.label["position"]) for row in rows] == [("solve", 0), ("solve", 1), ("update", 0)]
    assert rows[0].tokens.calls == 2 and rows[0].label["tokens"] == 4 == sum(rows[0].tokens.mask)
    assert rows[0].label["rewards"] == [1.0, 0.0] and rows[0].label["updates"] == [-0.1]


def test_a_pack_of_two_by_hand() -> None:
    # solve 0: mean(1, 0) = .5 and mean(0, 0) = 0, less their mean .25; update 0: mean(0, 0) and mean(-.1, 0).
    found = worth(labelled(rollout("a", [1.0, 0.0], [0.0]), rollout("b", [0.0, 0.0], [-0.1])))
    assert found["a", "solve", 0] == pytest.approx(0.25) and found["b", "solve", 0] == pytest.approx(-0.25)
    assert found["a", "update", 0] == pytest.approx(0.025) and found["b", "update", 0] == pytest.approx(-0.025)
    assert found["a", "solve", 1] == 0.0


def test_padding_counts_nothing_and_order_changes_nothing() -> None:
    rows = labelled(rollout("a", [1.0, 0.0], [0.0]), rollout("b", [0.0, 1.0], [0.0]), rollout("c", [0.0, 0.0], [0.0]))
    before = worth(rows)
    shuffled: list[dict | None] = [*rows, None, None]
    random.Random(1).shuffle(shuffled)
    values, report = advantages(shuffled, Credit())
    for row, value in zip(shuffled, values, strict=True):
        assert value == (0.0 if row is None else before[row["rollout"], row["kind"], row["position"]])
    assert report.rollouts == 3 and report.reward == {0: pytest.approx(1 / 3), 1: pytest.approx(1 / 3)}


def test_rollouts_of_other_packs_and_worlds_are_not_compared_where_there_is_a_group() -> None:
    ours = [rollout("a", [1.0], [], "p"), rollout("b", [0.0], [], "p")]
    alone = worth(labelled(*ours))
    beside = worth(
        labelled(*ours, rollout("c", [1.0], [], "q"), rollout("d", [1.0], [], "q"), rollout("e", [0.0], [], "p", "x"))
    )
    assert alone["a", "solve", 0] == beside["a", "solve", 0] == 0.5


def test_lives_without_a_group_are_compared_by_position_within_their_world() -> None:
    found = worth(labelled(rollout("a", [1.0], [], ""), rollout("b", [0.0], [], ""), rollout("c", [1.0], [], "", "x")))
    assert found["a", "solve", 0] == 1.0 and found["b", "solve", 0] == -1.0
    assert found["c", "solve", 0] == 0.0


def test_a_group_that_shrank_to_one_is_compared_with_the_others_of_its_world() -> None:
    found = worth(labelled(rollout("a", [1.0], [], "p"), rollout("b", [0.0], [], "q"), rollout("c", [0.0], [], "r")))
    assert found["a", "solve", 0] == 1.0 and found["b", "solve", 0] == -0.5


@pytest.mark.parametrize("baseline", ["group", "leave-one-out"])
def test_lives_without_others_in_their_group_are_counted(baseline: Any) -> None:
    together = [rollout("a", [1.0], [], "p"), rollout("b", [0.0], [], "p")]
    lone = [rollout("c", [1.0], [], "q"), rollout("d", [0.0], [], "")]
    found, report = advantages(labelled(*together, *lone), Credit(baseline=baseline))
    assert found[2:].tolist() == [1.0, -1.0] and report.alone == 2 and not report.dropped
    assert advantages(labelled(*together), Credit(baseline=baseline))[1].alone == 0
    # Where that is what was asked for, nobody is wanting.
    assert advantages(labelled(*lone), Credit(baseline="position"))[1].alone == 0


def test_a_life_with_nothing_to_compare_it_with_is_dropped_with_that_reason() -> None:
    rows = labelled(rollout("a", [0.0, 1.0], [0.0], "p"))
    rows += labelled(rollout("b", [1.0], [], "q"), rollout("c", [1.0], [], "q"))
    found, report = advantages(rows, Credit())
    assert found.tolist() == [0.0] * 5 and report.alone == 1
    assert report.dropped == {"no other to compare it with": 3}


def test_the_size_of_advantages_is_that_of_all_rows_before_any_is_left_out() -> None:
    rows = labelled(*[rollout(name, [reward], [], "p") for name, reward in (("a", 1.0), ("b", 0.0))])
    rows += labelled(*[rollout(name, [1.0], [], "q") for name in ("c", "d")])
    assert advantages([*rows, None], Credit())[1].advantage_abs == pytest.approx(0.25)
    how = {"mini_batches": 1, "ranks": 1, "micro_batches": 1, "seed": 0}
    planned = plan(rows, [(5, 4)] * 4, [row["rollout"] for row in rows], Credit(), **how, skip=True)
    assert planned.report.advantage_abs == pytest.approx(0.25) and abs(planned.worth).mean() == pytest.approx(0.125)


def test_lost_rewards_leave_and_are_counted() -> None:
    rows = labelled(rollout("a", [math.nan], []), rollout("b", [1.0], []), rollout("c", [0.0], []))
    values, report = advantages(rows, Credit())
    assert values.tolist() == [0.0, 0.5, -0.5]
    assert report.dropped == {"no finite reward in its return": 1} and report.reward == {0: 0.5}


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("baseline", ["group", "leave-one-out", "position"])
def test_a_lost_reward_leaves_what_comes_after_it_as_it_was(baseline: Any, lost: int) -> None:
    known = {"a": [1.0, 0.0, 1.0], "b": [0.0, 0.0, 1.0], "c": [0.0, 1.0, 0.0]}
    whole, part = (
        worth(
            labelled(*[rollout(name, rewards, [0.0, 0.0]) for name, rewards in of.items()]), Credit(baseline=baseline)
        )
        for of in (known, {**known, "a": [*known["a"][:lost], math.nan, *known["a"][lost + 1 :]]})
    )
    assert all(map(math.isfinite, part.values()))
    for (name, kind, position), value in part.items():
        if position > lost or (position == lost and kind == "update"):
            assert value == whole[name, kind, position]


def test_a_group_whose_rewards_are_all_lost_is_left_out_and_the_others_train() -> None:
    gone = [rollout(name, [math.nan, math.nan], [0.0], "p") for name in "ab"]
    there = [rollout("c", [1.0, 1.0], [0.0], "q"), rollout("d", [0.0, 0.0], [0.0], "q")]
    values = worth(labelled(*gone, *there), Credit(reweight="exact"))
    assert {name for (name, kind, _), value in values.items() if kind == "solve" and value} == {"c", "d"}
    _, report = advantages(labelled(*gone, *there), Credit())
    assert report.lost == 4 and report.reward == {0: 0.5, 1: 0.5}
    assert report.dropped["no finite reward in its return"] == 4


def test_rewards_of_each_world_are_reported_beside_those_of_all() -> None:
    rows = labelled(rollout("a", [4.0, 0.0], [0.0], world="ask"), rollout("b", [-0.1, 1.0], [0.0], world="steer"))
    _, report = advantages(rows, Credit())
    assert report.by_world == {"ask": {0: 4.0, 1: 0.0}, "steer": {0: -0.1, 1: 1.0}}


def test_a_rollout_without_a_row_is_lost_with_its_reasons() -> None:
    segments = tuple(Segment("solve", at, "done", (), "no reward is known") for at in range(2))
    none = Rollout("a", "pack", "lake", (math.nan, math.nan), (math.nan,), (2, 2), segments, frozenset())
    some = rollout("b", [1.0, math.nan], [0.0])
    some = replace(some, segments=(*some.segments[:1], *segments[1:]))
    rows, lost, refused = gathered([none, some])
    assert [row.label["rollout"] for row in rows] == ["b"]
    assert lost == {"no reward is known": 1} and refused == {"no reward is known": 1}
    assert gathered([none, none])[0] == [] and gathered([none, none])[1] == {"no reward is known": 2}


def test_reweighting_makes_a_negative_token_mean_zero() -> None:
    # The losing rollout's rows are longer: weighted by tokens the advantages sum below zero.
    long = Rollout("b", "pack", "lake", (0.0,), (), (1,), (Segment("solve", 0, "done", call(5, 9)),), frozenset())
    rows = labelled(rollout("a", [1.0], []), long)
    plain, _ = advantages(rows, Credit())
    weighted, report = advantages(rows, Credit(reweight="exact"))
    tokens = [row["tokens"] for row in rows]
    assert sum(value * n for value, n in zip(plain, tokens, strict=True)) < -1
    assert sum(value * n for value, n in zip(weighted, tokens, strict=True)) == pytest.approx(0, abs=1e-9)
    assert report.temperature > 0


def test_credit_of_other_kinds() -> None:
    rows = labelled(rollout("a", [1.0, 0.0], [0.0]), rollout("b", [0.0, 0.0], [0.0]))
    whole = worth(rows, Credit(kind="trajectory"))
    assert set(whole.values()) == {0.25, -0.25}
    solves = worth(rows, Credit(kind="solve"))
    assert solves["a", "update", 0] == 0.0 and solves["a", "solve", 0] == 0.25
    with pytest.raises(UsageError, match="window"):
        Credit(kind="trajectory", window=2)


def test_the_length_penalty_shapes_training_only() -> None:
    (row,) = rows_of(rollout("a", [1.0], []), shaping=Shaping(0.1, longest=4))
    assert row.label["rewards"] == [0.95] and row.label["successes"] == [1.0]
    assert Shaping(0.1, longest=4)(0.0, 4) == 0.0 and math.isnan(Shaping(0.1, longest=4)(math.nan, 4))


# ---- layout ----

SIZES = st.lists(st.integers(2, 200), min_size=1, max_size=60)


def minis_of(order: list[int | None], minis: int, ranks: int) -> list[set[int]]:
    """The rows of each mini-batch as verl's worker deals them: a rank's share, cut into mini-batches."""
    share = len(order) // ranks
    out: list[set[int]] = [set() for _ in range(minis)]
    for rank in range(ranks):
        hand = order[rank * share : (rank + 1) * share]
        for mini in range(minis):
            part = hand[mini * share // minis : (mini + 1) * share // minis]
            out[mini] |= {row for row in part if row is not None}
    return out


def shaped(sizes: list[int]) -> list[tuple[int, int]]:
    """Lengths of prompt and response of rows of so many tokens."""
    return [(size - size // 3, size // 3) for size in sizes]


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_every_row_once_and_the_same_mini_batches_for_any_number_of_ranks(
    sizes: list[int], minis: int, ranks: int, micro: int, seed: int
) -> None:
    lengths = shaped(sizes)
    names = [f"{at:03d}" for at in range(len(lengths))]
    order = layout(lengths, names, mini_batches=minis, ranks=ranks, micro_batches=micro, seed=seed)
    assert sorted(row for row in order if row is not None) == list(range(len(lengths)))
    assert len(order) % (minis * ranks * micro) == 0
    one = layout(lengths, names, mini_batches=minis, ranks=1, micro_batches=1, seed=seed)
    assert minis_of(order, minis, ranks) == minis_of(one, minis, 1)


@settings(max_examples=50, deadline=None)
@given(SIZES, st.randoms())
def test_the_layout_does_not_depend_on_who_came_first(sizes: list[int], dice: random.Random) -> None:
    lengths = shaped(sizes)
    came = list(range(len(lengths)))
    dice.shuffle(came)
    first = layout(lengths, [f"{at:03d}" for at in came], mini_batches=2, ranks=2, micro_batches=2, seed=3)
    order = sorted(came)
    at = {name: row for row, name in enumerate(came)}
    again = layout(
        [lengths[at[name]] for name in order],
        [f"{name:03d}" for name in order],
        mini_batches=2,
        ranks=2,
        micro_batches=2,
        seed=3,
    )
    assert [None if row is None else came[row] for row in first] == [
        None if row is None else order[row] for row in again
    ]


def test_ranks_and_mini_batches_have_as_much_to_do() -> None:
    dice = random.Random(0)
    lengths = shaped([dice.randint(10, 200) for _ in range(451)])
    order = layout(lengths, list(range(451)), mini_batches=2, ranks=2, micro_batches=4, seed=1)
    share = len(order) // 4
    loads = [
        sum(sum(lengths[row]) for row in order[at : at + share] if row is not None)
        for at in range(0, len(order), share)
    ]
    assert max(loads) < 1.05 * min(loads)
    assert sum(row is None for row in order) <= 16


def test_a_layout_of_nothing_makes_no_sense() -> None:
    with pytest.raises(UsageError, match="mini_batches"):
        layout([(2, 1)], ["a"], mini_batches=0, ranks=1, micro_batches=1, seed=0)


def test_rows_worth_nothing_are_not_computed_and_the_mean_stays_that_of_all_tokens() -> None:
    same = [rollout("a", [1.0], [], "p"), rollout("b", [1.0], [], "p")]
    differ = [rollout("c", [1.0], [], "q"), rollout("d", [0.0], [], "q")]
    rows = labelled(*same, *differ)
    how = {"mini_batches": 1, "ranks": 1, "micro_batches": 1, "seed": 0}
    lengths, names = [(5, 4)] * 4, [row["rollout"] for row in rows]
    whole = plan(rows, lengths, names, Credit(), **how, skip=False)
    fewer = plan(rows, lengths, names, Credit(), **how, skip=True)
    assert {*whole.order} - {None} == {0, 1, 2, 3} and {*fewer.order} - {None} == {2, 3}
    tokens = sum(row["tokens"] for row in rows)
    computed = sum(rows[at]["tokens"] for at in fewer.order if at is not None)
    # What a row adds to a mean over the tokens computed is what it adds to the mean over all.
    assert fewer.worth[2] / computed == pytest.approx(whole.worth[2] / tokens)
    assert fewer.report.zero == 2


def test_a_step_that_is_worth_nothing_is_computed_as_it_is() -> None:
    rows = labelled(rollout("a", [1.0], []), rollout("b", [1.0], []))
    found = plan(rows, [(5, 4)] * 2, ["a", "b"], Credit(), mini_batches=1, ranks=1, micro_batches=1, seed=0, skip=True)
    assert {*found.order} - {None} == {0, 1} and not found.worth.any()


@pytest.mark.parametrize("lengths", [[(5, 4), (5, 4)], [(5, 4), (5, 7)], [(5, 4), (6, 4)]])
def test_columns_of_one_length_get_a_padding_row_beside_them(lengths: list[tuple[int, int]]) -> None:
    order = layout(lengths, ["a", "b"], mini_batches=1, ranks=1, micro_batches=1, seed=0)
    assert sorted(row for row in order if row is not None) == [0, 1] and None in order


def test_columns_that_differ_get_none() -> None:
    assert None not in layout([(5, 4), (6, 7)], ["a", "b"], mini_batches=1, ranks=1, micro_batches=1, seed=0)
