"""What each segment gets for what it made possible: a return, less a baseline.

A segment is an episode: the solve episode at position k, or the update episode after it. Its elements q are its own reward and the
rewards of the solve episodes that inherit from it; its return is made of them, its advantage is the return less what other
runs got at the same kind and position. No division by a deviation. Plain numpy: no loop over packs, runs or positions.

NaN is a reward that the infrastructure lost. It leaves every sum and every baseline; a segment with nothing finite in its return
has no advantage (NaN) and is counted in `dropped`. So runs and positions may be padded with NaN. A task that the policy failed is
no NaN: its reward is 0.

Shapes: P... any leading axes (packs), G runs of each, S positions. docs/credit.md has the formulas and a worked example.
Source: Connect the Dots (arXiv 2606.20002), section on credit assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cod_agent.errors import UnknownName, UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Returns = Literal["mean", "window", "discounted"]
Baseline = Literal["group", "leave-one-out", "position"]
Own = Literal["element", "beside"]
Method = Literal["exact", "published"]


@dataclass(frozen=True, slots=True, eq=False)
class Advantages:
    """What credit made of rewards. NaN where a segment has no advantage."""

    solve: Floats
    """Advantages of the solve segments [..., G, S]."""
    update: Floats
    """Advantages of the update segments [..., G, S-1]: [..., k] is the update after task k."""
    solve_returns: Floats
    update_returns: Floats

    @property
    def dropped(self) -> int:
        """How many segments have no advantage, padding included."""
        return int(np.isnan(self.solve).sum() + np.isnan(self.update).sum())


def segment_credit(
    rewards: ArrayLike,
    update_rewards: ArrayLike,
    *,
    returns: Returns = "mean",
    window: int | None = None,
    gamma: float | None = None,
    baseline: Baseline = "group",
    own: Own = "element",
    heirs: ArrayLike | None = None,
) -> Advantages:
    """Each segment's advantage from its own reward and those that came of it.

    Args:
        rewards: [..., G, S], of the solve episodes; NaN where lost.
        update_rewards: [..., G, S-1], of the update episodes themselves (their form); NaN where lost or there was none.
        returns: "mean" of the elements; "window", the mean of the first `window` of them; "discounted", the sum of
            gamma^t q_t, not normalised. A lost element leaves the return but keeps its place.
        window: elements that count, at least 1. Only with "window".
        gamma: between 0 and 1. Only with "discounted".
        baseline: "group", the mean over the G runs; "leave-one-out", the mean over the others of them (NaN without others);
            "position", for runs that have no group: the mean over all other runs in the array, or, where no other has
            this segment, over all other segments of its kind (NaN where the array has one run only).
        own: an update's own reward is one "element" of q (published), or is added "beside" the return of the later ones.
        heirs: [..., G, S] integers: the first position whose solve episode could see what position k left behind, S if
            none. By default k + 1, as in a pack.

    Raises:
        UsageError: shapes or options that do not fit together, or an infinite reward.
    """
    known, updates = _checked(rewards, update_rewards)
    _check_options(returns, window, gamma, own)
    first = _first_heirs(heirs, known.shape)
    tails = _suffix_sums(known, 1.0 if gamma is None else gamma), _suffix_sums(np.isfinite(known), 1.0)

    def returned(values: Floats, first: Ints, *, beside: bool) -> Floats:
        last = None if window is None else np.minimum(first + window - (0 if beside else 1), known.shape[-1])
        later, counted = (_between(tail, first, last) for tail in tails)
        return _return(values, later, counted, gamma, beside=beside)

    solves = returned(known, first, beside=False)
    written = returned(updates, first[..., :-1], beside=own == "beside")
    return Advantages(_less(solves, baseline), _less(written, baseline), solves, written)


def trajectory_credit(rewards: ArrayLike, update_rewards: ArrayLike, *, baseline: Baseline = "group") -> Advantages:
    """One advantage for all segments of a run: the mean of its rewards less the baseline. An ablation.

    The updates' own rewards do not count. Arguments and errors as for `segment_credit`.
    """
    known, updates = _checked(rewards, update_rewards)
    total, counted = np.nansum(known, -1, keepdims=True), np.isfinite(known).sum(-1, keepdims=True)
    mean = np.where(counted > 0, total / np.maximum(counted, 1), np.nan)
    advantage = _less(mean, baseline)
    shapes = known.shape, updates.shape
    return Advantages(*(np.broadcast_to(part, shape).copy() for part in (advantage, mean) for shape in shapes))


def solve_only_credit(rewards: ArrayLike, update_rewards: ArrayLike, **options: Any) -> Advantages:
    """Segment credit for solve episodes, advantage 0 for updates: nobody learns to write. An ablation.

    A solve episode keeps its whole return, later rewards included. `options` and errors are those of `segment_credit`.
    """
    made = segment_credit(rewards, update_rewards, **options)
    nothing = np.where(np.isnan(made.update), np.nan, 0.0)
    return Advantages(made.solve, nothing, made.solve_returns, made.update_returns)


# ---- what goes in ----


def _checked(rewards: ArrayLike, update_rewards: ArrayLike) -> tuple[Floats, Floats]:
    try:
        known, updates = np.asarray(rewards, float), np.asarray(update_rewards, float)
    except ValueError as error:
        raise UsageError(f"rewards are arrays of numbers; pad runs of unequal length with NaN ({error})") from error
    if known.ndim < 2 or not known.shape[-1]:
        raise UsageError(f"rewards are [..., runs, positions] with at least one position, not {list(known.shape)}")
    if updates.shape != (*known.shape[:-1], known.shape[-1] - 1):
        raise UsageError(
            f"{list(updates.shape)} update rewards for {list(known.shape)} rewards: one position less is due"
        )
    if np.isinf(known).any() or np.isinf(updates).any():
        raise UsageError("a reward is infinite: give NaN for one that was lost")
    return known, updates


def _check_options(returns: str, window: int | None, gamma: float | None, own: str) -> None:
    _check_name("return style", returns, Returns)
    _check_name("place for an update's own reward", own, Own)
    if (window is not None) != (returns == "window") or (window is not None and window < 1):
        raise UsageError(f"returns={returns!r} with window={window}: a window is at least 1, and only for 'window'")
    if (gamma is not None) != (returns == "discounted") or (gamma is not None and not 0 <= gamma <= 1):
        raise UsageError(f"returns={returns!r} with gamma={gamma}: gamma is from 0 to 1, and only for 'discounted'")


def _check_name(kind: str, name: str, names: Any) -> None:
    if name not in get_args(names):
        raise UnknownName.among(kind, name, list(get_args(names)))


def _first_heirs(heirs: ArrayLike | None, shape: tuple[int, ...]) -> Ints:
    """Position of the first heir of each segment, broadcast to as many axes as `shape` has."""
    after = np.arange(1, shape[-1] + 1).reshape((1,) * (len(shape) - 1) + (-1,))
    if heirs is None:
        return after
    first = np.asarray(heirs)
    if first.shape != shape or first.dtype.kind not in "iu":
        raise UsageError(f"heirs are integers [{', '.join(map(str, shape))}], not {first.dtype} {list(first.shape)}")
    if (first < after).any() or (first > shape[-1]).any():
        raise UsageError(f"the heirs of position k come after k, or are {shape[-1]} for none")
    return first.astype(np.int64)


# ---- returns ----


def _suffix_sums(values: NDArray[Any], gamma: float) -> Floats:
    """[..., S+1]: at j the sum of gamma^t values[j + t] to the end, NaN as 0. Doubling the reach makes log2(S) steps of it."""
    size = values.shape[-1]
    out = np.zeros((*values.shape[:-1], size + 1))
    np.copyto(out[..., :-1], values, where=~np.isnan(values))
    reach = 1
    while reach < size and gamma:
        out[..., :-reach] += gamma * out[..., reach:]
        reach, gamma = 2 * reach, gamma * gamma
    return out


def _between(tail: Floats, first: Ints, last: Ints | None) -> Floats:
    """What the positions from `first` up to, not with, `last` (None: to the end) have in a suffix sum."""
    out = np.take_along_axis(tail, first, -1)
    return out if last is None else out - np.take_along_axis(tail, last, -1)


def _return(values: Floats, later: Floats, counted: NDArray[Any], gamma: float | None, *, beside: bool) -> Floats:
    """The return of own rewards `values` and the sum `later` of `counted` elements; NaN where nothing is finite."""
    has_own = np.isfinite(values)
    mine = np.where(has_own, values, 0.0)
    elements = counted + has_own
    if beside:
        out = mine + (later if gamma is not None else later / np.maximum(counted, 1))
    else:
        out = mine + gamma * later if gamma is not None else (mine + later) / np.maximum(elements, 1)
    return np.where(elements > 0, out, np.nan)


# ---- baselines ----


def _less(returns: Floats, baseline: str) -> Floats:
    """Returns [..., G, K] less their baseline."""
    _check_name("baseline", baseline, Baseline)
    if baseline == "group":
        return _centred(returns)
    if baseline == "leave-one-out":
        return _less_others(returns, -2)
    if np.isfinite(returns).any(-1).sum() < 2:
        # Less its own other positions a run would be worth what its positions are, and not what it did.
        return np.full(returns.shape, np.nan)
    out = _less_others(returns, tuple(range(returns.ndim - 1)))
    return np.where(np.isnan(out), _less_others(returns, None), out)


def _centred(returns: Floats, axis: int | tuple[int, ...] | None = -2) -> Floats:
    """Returns less their mean over the finite ones along `axis` (None: over all)."""
    finite = np.isfinite(returns)
    count = np.maximum(finite.sum(axis, keepdims=True), 1)
    out = returns - np.where(finite, returns, 0.0).sum(axis, keepdims=True) / count
    # Once more for what rounding left: a group whose returns are all equal has advantages of exactly 0.
    return out - np.where(finite, out, 0.0).sum(axis, keepdims=True) / count


def _less_others(returns: Floats, axis: int | tuple[int, ...] | None) -> Floats:
    """Returns less the mean of the other finite ones along `axis`; NaN where there is no other."""
    count = np.isfinite(returns).sum(axis, keepdims=True)
    return _centred(returns, axis) * np.where(count > 1, count / np.maximum(count - 1, 1), np.nan)


# ---- re-weighting ----


def reweight(
    advantages: ArrayLike, lengths: ArrayLike, groups: ArrayLike | None = None, method: Method = "exact"
) -> Floats:
    """Adaptive RED: A becomes A exp(A / T) in each group whose token mean is negative, with the T that makes it 0.

    Args:
        advantages: [...], one per segment or sequence; NaN stays NaN and does not count.
        lengths: [...], its sampled tokens. What has none stays as it is.
        groups: [...] integers or strings: what is re-weighted together. By default everything.
        method: "exact" finds the root of sum A L exp(A / T), which exists wherever a positive advantage does; a group
            without one is left alone. "published" is the reference's bisection: T from .8 to 100, stopped at a gap of .05.

    Raises:
        UsageError: shapes that differ, a negative length, an unknown method.
    """
    worth, cooling, _ = _cooled(advantages, lengths, groups, method)
    return worth * np.exp(worth * cooling)


def temperatures(
    advantages: ArrayLike, lengths: ArrayLike, groups: ArrayLike | None = None, method: Method = "exact"
) -> dict[Any, float]:
    """The T that `reweight` uses for each group, by its label ("" without groups); infinite where it changes nothing."""
    _, _, coldness = _cooled(advantages, lengths, groups, method)
    return {name: 1 / beta if beta else float("inf") for name, beta in coldness.items()}


def _cooled(
    advantages: ArrayLike, lengths: ArrayLike, groups: ArrayLike | None, method: str
) -> tuple[Floats, Floats, dict[Any, float]]:
    """(advantages, 1 / T of each, 1 / T of each group by label), with 1 / T = 0 where nothing changes."""
    _check_name("re-weighting method", method, Method)
    worth, tokens = np.asarray(advantages, float), np.asarray(lengths, float)
    labels = np.full(worth.shape, "") if groups is None else np.asarray(groups)
    if not worth.shape == tokens.shape == labels.shape:
        shapes = [list(part.shape) for part in (worth, tokens, labels)]
        raise UsageError("advantages, lengths and groups of one shape, not {}, {} and {}".format(*shapes))
    if not (tokens >= 0).all() or np.isinf(worth).any():
        raise UsageError("lengths are numbers of tokens, and advantages finite or NaN")
    names, codes = np.unique(labels, return_inverse=True)
    counts = np.isfinite(worth) & (tokens > 0)
    codes = codes.reshape(worth.shape)
    a, length, group = worth[counts], tokens[counts], codes[counts]
    per_group = np.zeros(len(names))
    total = np.bincount(group, a * length, len(names))
    # What rounding leaves of a sum of 0 is not negative.
    active = total < -1e-12 * np.bincount(group, np.abs(a) * length, len(names))
    if method == "exact":
        active &= np.bincount(group, a > 0, len(names)) > 0
    if active.any():
        inside = active[group]
        dense = (np.cumsum(active) - 1)[group[inside]]
        solved = _root if method == "exact" else _published
        per_group[active] = solved(a[inside], length[inside], dense, int(active.sum()))
    each = np.where(counts, per_group[codes], 0.0)
    return worth, each, dict(zip(names.tolist(), per_group.tolist(), strict=True))


def _root(a: Floats, length: Floats, group: Ints, groups: int) -> Floats:
    """The beta = 1 / T of each group at which sum a L exp(a beta) = 0, to the last bit that bisection can tell.

    That is where log(positive part / negative part) passes 0. It rises with beta. Of the slope's two terms one grows and one
    shrinks, which gives a bracket; taking the largest exponent out of each part, nothing overflows.
    """
    scale = np.zeros(groups)
    np.maximum.at(scale, group, np.abs(a))
    size = np.abs(a) / scale[group]
    mass = size * length
    up, down = a > 0, a < 0
    most, least = np.zeros(groups), np.full(groups, np.inf)
    np.maximum.at(most, group[up], size[up])
    np.minimum.at(least, group[down], size[down])
    # Of the positive advantages how far below the largest, of the negative ones how far beyond the smallest.
    up_gap, down_gap = (most[group] - size)[up], (size - least[group])[down]

    def log_ratio(beta: Floats) -> Floats:
        gains = np.bincount(group[up], mass[up] * np.exp(-beta[group[up]] * up_gap), groups)
        losses = np.bincount(group[down], mass[down] * np.exp(-beta[group[down]] * down_gap), groups)
        return np.log(gains) - np.log(losses) + beta * (most + least)

    def mean_size(part: NDArray[np.bool_]) -> Floats:
        weight = np.bincount(group[part], mass[part], groups)
        return np.bincount(group[part], (mass * size)[part], groups) / weight

    missing = -log_ratio(np.zeros(groups))
    low, high = missing / (most + mean_size(down)), missing / (mean_size(up) + least)
    while True:
        middle = (low + high) / 2
        if not ((low < middle) & (middle < high)).any():
            return middle / scale
        too_small = log_ratio(middle) < 0
        low, high = np.where(too_small, middle, low), np.where(too_small, high, middle)


def _published(a: Floats, length: Floats, group: Ints, groups: int) -> Floats:
    """1 / T of each group as the reference's bisection leaves it: its last midpoint."""
    low, high = np.full(groups, 0.8), np.full(groups, 100.0)
    for _ in range(20):
        middle = (low + high) / 2
        too_hot = np.bincount(group, a * length * np.exp(a / middle[group]), groups) < 0
        low, high = np.where(too_hot, low, middle), np.where(too_hot, middle, high)
        if (high - low).max() < 0.05:
            break
    return 1 / middle
