"""Credit against values worked by hand, against a slow implementation written from the formulas, and against what must not
matter: padding, order, how packs are dealt out."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_agent.errors import UsageError
from cod_train.credit import Floats, reweight, segment_credit, solve_only_credit, temperatures, trajectory_credit

NAN = math.nan
QUICK = settings(max_examples=60, deadline=None)

# Two runs of a pack of three tasks; the second run's first update was refused.
REWARDS = [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
UPDATES = [[0.0, 0.0], [-0.1, 0.0]]


def close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-12)


# ---- by hand ----


def test_three_tasks_by_hand() -> None:
    made = segment_credit(REWARDS, UPDATES)
    close(made.solve_returns, [[2 / 3, 1, 1], [1 / 3, 1 / 2, 1]])
    close(made.update_returns, [[2 / 3, 1 / 2], [0.3, 1 / 2]])
    close(made.solve, [[1 / 6, 1 / 4, 0], [-1 / 6, -1 / 4, 0]])
    close(made.update, [[0.55 / 3, 0], [-0.55 / 3, 0]])
    assert made.dropped == 0


def test_an_updates_own_reward_beside_the_later_ones() -> None:
    made = segment_credit(REWARDS, UPDATES, own="beside")
    close(made.update_returns, [[1, 1], [0.4, 1]])
    close(made.solve_returns, segment_credit(REWARDS, UPDATES).solve_returns)


@pytest.mark.parametrize(
    ("options", "solve", "update"),
    [
        ({"returns": "window", "window": 1}, [0, 1, 1], [-0.1, 0]),
        ({"returns": "window", "window": 2}, [1 / 2, 1, 1], [0.45, 1 / 2]),
        ({"returns": "window", "window": 9}, [2 / 3, 1, 1], [1.9 / 3, 1 / 2]),
        ({"returns": "discounted", "gamma": 0.5}, [0.75, 1.5, 1], [-0.1 + 0.75, 0.5]),
        ({"returns": "discounted", "gamma": 0}, [0, 1, 1], [-0.1, 0]),
        ({"returns": "discounted", "gamma": 1}, [2, 2, 1], [1.9, 1]),
        ({"returns": "window", "window": 1, "own": "beside"}, [0, 1, 1], [0.9, 1]),
        ({"returns": "discounted", "gamma": 0.5, "own": "beside"}, [0.75, 1.5, 1], [1.4, 1]),
    ],
)
def test_return_styles_by_hand(options: dict[str, Any], solve: list[float], update: list[float]) -> None:
    made = segment_credit([[0, 1, 1]], [[-0.1, 0]], **options)
    close(made.solve_returns, [solve])
    close(made.update_returns, [update])


def test_what_the_infrastructure_lost_leaves_sums_and_baselines() -> None:
    made = segment_credit([[NAN, 1, NAN], [0, 0, 1], [NAN, NAN, NAN]], [[0, 0], [NAN, 0], [NAN, NAN]])
    close(made.solve_returns, [[1, 1, NAN], [1 / 3, 1 / 2, 1], [NAN] * 3])
    close(made.update_returns, [[1 / 2, 0], [1 / 2, 1 / 2], [NAN] * 2])
    close(made.solve, [[1 / 3, 1 / 4, NAN], [-1 / 3, -1 / 4, 0], [NAN] * 3])
    assert made.dropped == 1 + 3 + 2


def test_a_lost_element_keeps_its_place() -> None:
    rewards, updates = [[0, NAN, 1, 1]], [[0, 0, 0]]
    close(segment_credit(rewards, updates, returns="window", window=2).solve_returns, [[0, 1, 1, 1]])
    close(segment_credit(rewards, updates, returns="discounted", gamma=0.5).solve_returns, [[0.375, 0.75, 1.5, 1]])


def test_only_heirs_are_credited() -> None:
    # What position 0 left behind came too late for 1; what 2 left behind nobody read.
    made = segment_credit([[0, 1, 0, 1]], [[-0.1, 0, -0.1]], heirs=[[2, 2, 4, 4]])
    close(made.solve_returns, [[1 / 3, 2 / 3, 0, 1]])
    close(made.update_returns, [[0.9 / 3, 1 / 3, -0.1]])


def test_the_others_are_the_baseline() -> None:
    made = segment_credit([[0.0], [1.0], [NAN], [0.5]], np.zeros((4, 0)), baseline="leave-one-out")
    close(made.solve, [[-0.75], [0.75], [NAN], [0]])
    alone = segment_credit([[1.0]], np.zeros((1, 0)), baseline="leave-one-out")
    assert np.isnan(alone.solve).all() and alone.dropped == 1


def test_runs_without_a_group_are_compared_by_position() -> None:
    # Three lives of their own: two of length two, one of length three.
    rewards = [[[0, 1, NAN]], [[1, 1, NAN]], [[0, 0, 1]]]
    updates = [[[0, NAN]], [[0, NAN]], [[0, 0]]]
    made = segment_credit(rewards, updates, baseline="position")
    close(made.solve_returns[:, 0], [[1 / 2, 1, NAN], [1, 1, NAN], [1 / 3, 1 / 2, 1]])
    close(made.solve[:2, 0, 0], [1 / 2 - 2 / 3, 1 - 5 / 12])
    # Nobody else got as far: the mean of all other solve segments stands in.
    close(made.solve[2, 0, 2], 1 - (1 / 2 + 1 + 1 / 3 + 1 + 1 + 1 / 2) / 6)
    close(made.update[2, 0, 1], 1 / 2 - (1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert segment_credit([[1.0]], np.zeros((1, 0)), baseline="position").dropped == 1


def test_a_run_alone_is_not_compared_with_its_own_other_positions() -> None:
    # Padding is no other run, and a run may have company in its solves and none in its updates.
    made = segment_credit([[[0, 1, 1]], [[NAN] * 3]], [[[0, 0]], [[NAN] * 2]], baseline="position")
    assert np.isfinite(made.solve_returns[0]).all() and np.isnan(made.solve).all() and np.isnan(made.update).all()
    some = segment_credit([[[0, 1]], [[0, NAN]]], [[[0]], [[NAN]]], heirs=[[[1, 2]], [[2, 2]]], baseline="position")
    close(some.solve[:, 0, 0], [0.5, -0.5])
    assert np.isnan(some.update).all()


def test_equal_returns_are_worth_exactly_nothing() -> None:
    made = segment_credit([[0.1, 0.7, 0.2]] * 7, [[-0.1, 0]] * 7)
    assert not made.solve.any() and not made.update.any()


def test_trajectory_credit_is_one_value_for_a_run() -> None:
    made = trajectory_credit([[0, 1, NAN], [0, 0, 1], [NAN] * 3], [[0, 0]] * 3)
    close(made.solve, [[1 / 12] * 3, [-1 / 12] * 3, [NAN] * 3])
    close(made.update, [[1 / 12] * 2, [-1 / 12] * 2, [NAN] * 2])
    close(made.update_returns[:, 0], [1 / 2, 1 / 3, NAN])
    close(trajectory_credit([[0, 1], [1, 1]], [[0], [0]], baseline="leave-one-out").solve, [[-0.5] * 2, [0.5] * 2])


def test_solve_only_credit_teaches_no_update() -> None:
    rewards, updates = [[0, 1, 1], [0, 0, NAN]], [[0, 0], [0, NAN]]
    made, whole = solve_only_credit(rewards, updates, own="beside"), segment_credit(rewards, updates, own="beside")
    close(made.solve, whole.solve)
    close(made.update, [[0, 0], [0, NAN]])
    close(made.update_returns, whole.update_returns)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"returns": "means"}, "did you mean mean"),
        ({"baseline": "groups"}, "did you mean group"),
        ({"own": "none"}, "element"),
        ({"window": 2}, "only for 'window'"),
        ({"returns": "window"}, "at least 1"),
        ({"returns": "window", "window": 0}, "at least 1"),
        ({"gamma": 0.9}, "only for 'discounted'"),
        ({"returns": "discounted"}, "from 0 to 1"),
        ({"returns": "discounted", "gamma": 1.1}, "from 0 to 1"),
        ({"heirs": [1, 2, 3]}, "heirs are integers"),
        ({"heirs": [[1.0, 2.0, 3.0]] * 2}, "heirs are integers"),
        ({"heirs": [[1, 1, 3]] * 2}, "come after"),
        ({"heirs": [[1, 2, 4]] * 2}, "3 for none"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        segment_credit(REWARDS, UPDATES, **options)


@pytest.mark.parametrize(
    ("rewards", "updates", "word"),
    [
        ([0, 1], [0], "at least one position"),
        ([[]], [[]], "at least one position"),
        (REWARDS, REWARDS, "one position less"),
        ([[0, 1], [1]], [[0], [0]], "pad runs"),
        ([[0, math.inf]], [[0]], "infinite"),
    ],
)
def test_rewards_that_make_no_sense(rewards: Any, updates: Any, word: str) -> None:
    for credit in segment_credit, trajectory_credit, solve_only_credit:
        with pytest.raises(UsageError, match=word):
            credit(rewards, updates)


# ---- against a slow implementation ----


def slow_return(own: float | None, later: list[float], options: dict[str, Any]) -> float:
    """A segment's return from its q, one element after the other. `own` is None where it has been set aside."""
    q = ([] if own is None else [own]) + later
    if options["returns"] == "discounted":
        kept = [options["gamma"] ** t * value for t, value in enumerate(q) if not math.isnan(value)]
        return sum(kept) if kept else NAN
    kept = [value for value in q[: options["window"]] if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else NAN


def slow_segments(rewards: Floats, updates: Floats, heirs: Any, options: dict[str, Any]) -> Iterator[tuple[Any, float]]:
    packs, runs, positions = rewards.shape
    for p, g, k in product(range(packs), range(runs), range(positions)):
        later = [float(value) for value in rewards[p, g, heirs[p, g, k] :]]
        yield ("solve", p, g, k), slow_return(float(rewards[p, g, k]), later, options)
        if k == positions - 1:
            continue
        own = float(updates[p, g, k])
        if options["own"] == "element":
            yield ("update", p, g, k), slow_return(own, later, options)
        else:
            parts = [x for x in (own, slow_return(None, later, options)) if not math.isnan(x)]
            yield ("update", p, g, k), sum(parts) if parts else NAN


def slow_credit(
    rewards: Floats, updates: Floats, heirs: Any, baseline: str, options: dict[str, Any]
) -> dict[Any, float]:
    returns = dict(slow_segments(rewards, updates, heirs, options))
    finite = {at: value for at, value in returns.items() if not math.isnan(value)}
    pools: dict[Any, list[Any]] = defaultdict(list)
    for at in finite:
        kind, p, _, k = at
        pools[kind, None if baseline == "position" else p, k].append(at)
    out = dict.fromkeys(returns, NAN)
    for at, value in finite.items():
        kind, p, _, k = at
        pool = pools[kind, None if baseline == "position" else p, k]
        if baseline != "group":
            pool = [other for other in pool if other != at]
        if baseline == "position" and not pool:
            pool = [other for other in finite if other[0] == kind and other != at]
            pool = pool if any(other[1:3] != at[1:3] for other in pool) else []
        if pool:
            out[at] = value - sum(finite[other] for other in pool) / len(pool)
    return out


@pytest.mark.parametrize("baseline", ["group", "leave-one-out", "position"])
@pytest.mark.parametrize("own", ["element", "beside"])
@pytest.mark.parametrize(
    ("returns", "window", "gamma"), [("mean", None, None), ("window", 2, None), ("discounted", None, 0.8)]
)
def test_agrees_with_the_slow_implementation(
    returns: Any, window: int | None, gamma: float | None, own: Any, baseline: Any
) -> None:
    dice = np.random.default_rng(5)
    options = {"returns": returns, "window": window, "gamma": gamma, "own": own}
    for _ in range(25):
        packs, runs, positions = (int(size) for size in dice.integers(1, (4, 5, 7)))
        rewards = lossy(dice, dice.normal(size=(packs, runs, positions)))
        updates = lossy(dice, dice.choice([0.0, -0.1], (packs, runs, positions - 1)))
        heirs = dice.integers(np.arange(1, positions + 1), positions + 1, (packs, runs, positions))
        made = segment_credit(rewards, updates, heirs=heirs, baseline=baseline, **options)
        wanted = slow_credit(rewards, updates, heirs, baseline, options)
        for (kind, *at), value in wanted.items():
            close(getattr(made, kind)[tuple(at)], value)
        assert made.dropped == sum(map(math.isnan, wanted.values()))


def lossy(dice: np.random.Generator, values: Floats) -> Floats:
    return np.where(dice.random(values.shape) < dice.choice([0.0, 0.2, 0.7]), NAN, values)


# ---- what must not matter ----

numbers = st.one_of(st.just(NAN), st.sampled_from([0.0, 1.0]), st.floats(-2, 2, allow_subnormal=False))


@st.composite
def batches(draw: Any) -> tuple[Floats, Floats, Any]:
    """(rewards [P, G, S], update rewards, heirs)."""
    packs, runs, positions = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))

    def filled(count: int) -> Floats:
        size = packs * runs * count
        return np.array(draw(st.lists(numbers, min_size=size, max_size=size))).reshape(packs, runs, count)

    late = np.array(draw(st.lists(st.integers(0, 2), min_size=positions, max_size=positions)))
    heirs = np.broadcast_to(np.minimum(np.arange(1, positions + 1) + late, positions), (packs, runs, positions))
    return filled(positions), filled(positions - 1), heirs


styles = st.sampled_from(
    [
        {"returns": returns, "baseline": baseline, "own": own}
        for returns in (
            {"returns": "mean"},
            {"returns": "window", "window": 2},
            {"returns": "discounted", "gamma": 0.7},
        )
        for baseline in ("group", "leave-one-out", "position")
        for own in ("element", "beside")
    ]
).map(lambda style: {**style, **style["returns"]})


def padded(values: Any, axis: int, fill: float) -> Any:
    return np.pad(values, [(0, int(i == axis)) for i in range(3)], constant_values=fill)


@QUICK
@given(batches(), styles, st.integers(0, 2))
def test_padding_does_not_matter(batch: Any, style: Any, axis: int) -> None:
    rewards, updates, heirs = batch
    longer = rewards.shape[-1] + int(axis == 2)
    made = segment_credit(rewards, updates, heirs=heirs, **style)
    more = segment_credit(
        padded(rewards, axis, NAN), padded(updates, axis, NAN), heirs=padded(heirs, axis, longer), **style
    )
    inside = tuple(map(slice, rewards.shape))
    close(more.solve[inside], made.solve)
    close(more.update[tuple(map(slice, updates.shape))], made.update)
    assert more.dropped - made.dropped == more.solve.size - made.solve.size + more.update.size - made.update.size


@QUICK
@given(batches(), styles, st.randoms(use_true_random=False))
def test_order_does_not_matter(batch: Any, style: Any, dice: Any) -> None:
    packs, runs = (dice.sample(range(size), size) for size in batch[0].shape[:2])
    made = segment_credit(*batch[:2], heirs=batch[2], **style)
    rewards, updates, heirs = (part[packs][:, runs] for part in batch)
    moved = segment_credit(rewards, updates, heirs=heirs, **style)
    close(moved.solve, made.solve[packs][:, runs])
    close(moved.update, made.update[packs][:, runs])


@QUICK
@given(batches(), styles.filter(lambda style: style["baseline"] != "position"))
def test_sharding_does_not_matter(batch: Any, style: Any) -> None:
    whole = segment_credit(*batch[:2], heirs=batch[2], **style)
    shards = [segment_credit(r, u, heirs=h, **style) for r, u, h in zip(*batch, strict=True)]
    close(whole.solve, np.stack([shard.solve for shard in shards]))
    close(whole.update, np.stack([shard.update for shard in shards]))


@QUICK
@given(
    st.lists(numbers, min_size=1, max_size=9), st.sampled_from([segment_credit, trajectory_credit, solve_only_credit])
)
def test_one_task_is_grpo_without_deviation(rewards: list[float], credit: Any) -> None:
    finite = [reward for reward in rewards if not math.isnan(reward)]
    mean = sum(finite) / max(1, len(finite))
    made = credit(np.array(rewards)[:, None], np.zeros((len(rewards), 0)))
    close(made.solve[:, 0], [reward - mean for reward in rewards])
    assert made.update.shape == (len(rewards), 0)


# ---- re-weighting ----


def token_sum(advantages: Any, lengths: Any) -> float:
    return float(np.nansum(np.asarray(advantages) * lengths))


def test_the_temperature_by_hand() -> None:
    # exp(b) = e^2 exp(-b) at b = 1: T = 1.
    advantages, lengths = [1.0, -1.0], [1.0, math.exp(2)]
    close(temperatures(advantages, lengths)[""], 1.0)
    close(reweight(advantages, lengths), [math.e, -1 / math.e])


def test_groups_are_weighted_apart_and_what_needs_nothing_is_untouched() -> None:
    advantages = np.array([1.0, -1.0, 1.0, -0.5, -1.0, -2.0, NAN, 0.5])
    lengths = np.array([1.0, math.exp(2), 1, 1, 3, 4, 9, 0])
    groups = ["a", "a", "positive", "positive", "negative", "negative", "a", "a"]
    hot = temperatures(advantages, lengths, groups)
    close([hot["a"], hot["positive"], hot["negative"]], [1, math.inf, math.inf])
    close(reweight(advantages, lengths, groups), [math.e, -1 / math.e, 1, -0.5, -1, -2, NAN, 0.5])


def test_a_sum_of_rounding_errors_is_no_negative_sum() -> None:
    advantages = np.array([-0.1, -0.2, 0.3])
    assert token_sum(advantages, np.ones(3)) < 0
    assert temperatures(advantages, np.ones(3))[""] == math.inf


sizes = st.floats(1e-3, 1e3)


@QUICK
@given(
    st.lists(sizes, min_size=1, max_size=8),
    st.lists(sizes, min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from([1e-200, 1e-9, 1.0, 1e200]),
)
def test_the_root_is_a_root(up: list[float], down: list[float], dice: Any, scale: float) -> None:
    advantages = np.array([*up, *(-size for size in down)])
    lengths = np.array([dice.randint(1, 2000) for _ in advantages], float)
    made = reweight(advantages, lengths)
    if token_sum(advantages, lengths) >= 0:
        close(made, advantages)
    else:
        assert abs(token_sum(made, lengths)) <= 1e-9 * np.abs(made * lengths).sum()
        assert (np.abs(made) >= np.abs(advantages))[: len(up)].all()
    np.testing.assert_allclose(reweight(advantages * scale, lengths), made * scale, rtol=1e-9)


@pytest.mark.parametrize(
    ("advantages", "lengths"),
    [([1e-12, -1], [1, 1]), ([1, -1], [1, 1e300]), ([1e-17, 1, -1e-17, -1.5], [1] * 4), ([1e-320, -1], [1, 1])],
)
def test_nothing_overflows(advantages: list[float], lengths: list[float]) -> None:
    made = reweight(advantages, lengths)
    assert np.isfinite(made).all()
    assert abs(token_sum(made, lengths)) <= 1e-9 * np.abs(made * lengths).sum()


def test_the_published_bisection_to_the_letter() -> None:
    dice = np.random.default_rng(3)
    for _ in range(20):
        advantages, lengths = dice.normal(-0.1, 0.5, 30), dice.integers(1, 50, 30)
        low, high, middle = 0.8, 100.0, math.inf
        if token_sum(advantages, lengths) < 0:
            for _ in range(20):
                middle = (low + high) / 2
                if sum(a * n * math.exp(a / middle) for a, n in zip(advantages, lengths, strict=True)) < 0:
                    high = middle
                else:
                    low = middle
                if high - low < 0.05:
                    break
        close(temperatures(advantages, lengths, method="published")[""], middle)
        close(reweight(advantages, lengths, method="published"), advantages * np.exp(advantages / middle))


def test_the_published_bisection_stops_early() -> None:
    advantages, lengths = [0.5, -0.5], [1.0, 1.2]
    exact, published = (temperatures(advantages, lengths, method=method)[""] for method in ("exact", "published"))
    assert 0 < abs(published - exact) < 0.05
    assert token_sum(reweight(advantages, lengths, method="published"), lengths) != pytest.approx(0, abs=1e-6)
    # It cannot go below T = .8, and goes there also where nothing positive can help.
    assert temperatures([-1.0, -2.0], [1, 1], method="published")[""] == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (([1.0], [1, 2]), "one shape"),
        (([1.0], [1], [1, 2]), "one shape"),
        (([1.0], [-1]), "numbers of tokens"),
        (([math.inf], [1]), "finite"),
        (([1.0], [1], None, "exactly"), "did you mean exact"),
    ],
)
def test_weights_that_make_no_sense(arguments: Any, word: str) -> None:
    for function in reweight, temperatures:
        with pytest.raises(UsageError, match=word):
            function(*arguments)


def test_neither_torch_nor_verl_is_imported() -> None:
    code = "import cod_train.credit, sys; sys.exit(bool({'torch', 'verl', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
