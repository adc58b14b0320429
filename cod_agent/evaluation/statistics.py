"""Reward by position, with intervals: what a table of rewards (packs x positions) says and how sure one can be of it.

Packs are independent, the tasks inside a pack are not (they share what is hidden, and a context). So intervals come
from drawing whole packs again, with replacement: the percentile bootstrap, with a fixed seed, so that the same
rewards always give the same figures. NaN rewards (lost to the infrastructure, or not lived yet) leave the means.

Where something is decided, a single end of an interval decides, and it is Student's t (`at_least`): a formula that
anyone can repeat, and that keeps its word for few packs, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
SEED = 20002
_SAME = 1e-12
"""Spread of values that differ by rounding only."""

Rewards = NDArray[np.float64]
"""Shape [packs, positions]; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval; all NaN where nothing was finite. As text `0.98 [0.95, 1.00]`."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.mean == self.mean else "none"

    @property
    def signed(self) -> str:
        """A difference as text: `+0.41 [+0.31, +0.51]`."""
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]" if self.mean == self.mean else "none"

    def json(self) -> dict[str, float | None]:
        """NaN is no JSON: null."""
        return {"mean": _json(self.mean), "low": _json(self.low), "high": _json(self.high)}


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A mean, and what it is at least with 95% confidence (one-sided); NaN where too little was finite."""

    mean: float
    low: float
    n: int
    """Finite values."""

    def json(self) -> dict[str, float | None]:
        """NaN is no JSON: null."""
        return {"mean": _json(self.mean), "low": _json(self.low), "n": self.n}


@dataclass(frozen=True, slots=True)
class Point(Interval):
    """The rewards at one position."""

    position: int
    n: int
    """Packs that count here: those with a finite reward."""

    def json(self) -> dict[str, float | None]:
        return {"position": self.position, **Interval.json(self), "n": self.n}


@dataclass(frozen=True, slots=True)
class Curve:
    """Reward by position of one player."""

    points: tuple[Point, ...]
    overall: Interval
    """Over all tasks."""
    gain: Interval
    """Last position minus first. Flat is at most .06 either way, on 1,024 packs."""
    lost: int
    """Tasks without a finite reward, left out everywhere."""


def reach(*tables: Rewards) -> tuple[float, float]:
    """The lowest and the highest reward there may be, as far as one can tell: 0 and 1, or the outermost that were seen."""
    seen = np.concatenate([[0.0, 1.0], *map(_finite, tables)])
    return float(seen.min()), float(seen.max())


def width(*tables: Rewards) -> float:
    """How far apart two rewards may be: 1, or more where some were seen outside of 0 to 1."""
    low, high = reach(*tables)
    return high - low


def curve(rewards: Rewards) -> Curve:
    """What `rewards` say. Where those of all packs are the same every draw is, too: there fewer than 1 - .025^(1/n) of all
    packs are others, and the interval reaches as far as if those were the lowest or the highest there may be (`reach`). Of rewards
    that are all 0 or all 1 that is the exact interval (Clopper-Pearson).

    Args:
        rewards: shape [packs, positions], NaN where there is none.
    """
    return _curve(rewards, *reach(rewards))


def paired(ours: Rewards, theirs: Rewards) -> Curve:
    """Ours minus theirs by position, pack by pack. Where all packs differ alike, the interval reaches as far as if the packs that
    are others (see `curve`) differed by all there is: by 1 either way, where rewards are between 0 and 1.

    Args:
        ours, theirs: shape [packs, positions] each, row i being pack i in both.
    """
    wide = width(ours, theirs)
    return _curve(ours - theirs, -wide, wide)


def _curve(rewards: Rewards, low: float, high: float) -> Curve:
    """Of values that are between `low` and `high`."""
    packs, positions = rewards.shape
    counted = np.isfinite(rewards)
    filled = np.where(counted, rewards, 0.0)
    draws = _draws(packs) if packs else None
    means, drawn = _means(filled, counted, draws)
    points = [
        Point(*_spread(_interval(means[at], drawn[:, at]), n, low, high), position=at, n=n)
        for at, n in enumerate(counted.sum(0).tolist())
    ]
    whole = counted.sum(1, keepdims=True).astype(float)
    mean, drawn_mean = _means(filled.sum(1, keepdims=True), whole, draws)
    gain = (means[-1] - means[0], drawn[:, -1] - drawn[:, 0]) if positions else (np.nan, np.full(1, np.nan))
    lived, both = int(counted.any(1).sum()), int(counted[:, [0, -1]].all(1).sum()) if positions else 0
    return Curve(
        tuple(points),
        Interval(*_spread(_interval(mean[0], drawn_mean[:, 0]), lived, low, high)),
        Interval(*_spread(_interval(*gain), both, low - high, high - low)),
        int((~counted).sum()),
    )


@lru_cache(maxsize=1)
def _draws(packs: int) -> Rewards:
    """How often each pack is in each draw, shape [DRAWS, packs]: one seed, so that curves of as many packs share their draws."""
    draws = np.random.default_rng(SEED).multinomial(packs, np.full(packs, 1 / packs), size=DRAWS).astype(float)
    draws.setflags(write=False)
    return draws


def difference(ours: Rewards, theirs: Rewards) -> Interval:
    """Mean of ours minus mean of theirs at the last position, over the same packs.

    Args:
        ours, theirs: shape [packs, positions] each, row i being pack i in both.
    """
    return paired(ours[:, -1:], theirs[:, -1:]).overall


def together(values: Sequence[NDArray[np.float64]]) -> Interval:
    """The mean over several parts, each of the same weight however many packs it has.

    Packs are drawn again within each part: which worlds and sizes there are is given, and not chance.

    Args:
        values: of each part, one value per pack; shape [packs], NaN leaves the mean.
    """
    dice = np.random.default_rng(SEED)
    means, drawn, least = [], [], min((int(np.isfinite(part).sum()) for part in values), default=0)
    for part in values:
        found = _finite(part)
        means.append(found.mean() if len(found) else np.nan)
        draws = dice.multinomial(len(found), np.full(len(found), 1 / len(found)), size=DRAWS) if len(found) else None
        drawn.append(np.full(DRAWS, np.nan) if draws is None else draws @ found / len(found))
    if not means:
        return Interval(np.nan, np.nan, np.nan)
    wide = width(*map(np.abs, values))
    return Interval(*_spread(_interval(float(np.mean(means)), np.mean(drawn, axis=0)), least * len(means), -wide, wide))


def at_least(values: NDArray[np.float64], wide: float = 1.0) -> AtLeast:
    """The mean of independent values, such as the differences between two players pack by pack, and its lower end.

    The end is mean - t(.95, n - 1) s / sqrt(n). Values that are all the same have no spread s: there one can only say that
    fewer than 1 - .05^(1/n) of all packs (about 3/n) are others, and the end is that far, times `wide`, below the mean.

    Args:
        values: shape [packs]; NaN leaves the mean.
        wide: how far apart rewards may be (`width`).
    """
    found = _finite(values)
    n = len(found)
    if n < 2:
        return AtLeast(float(found.mean()) if n else float("nan"), float("nan"), n)
    mean, spread = float(found.mean()), float(found.std(ddof=1))
    if np.ptp(found) < _SAME:
        return AtLeast(mean, mean - (1 - (1 - LEVEL) ** (1 / n)) * wide, n)
    return AtLeast(mean, mean - student(LEVEL, n - 1) * spread / n**0.5, n)


def student(level: float, freedom: int) -> float:
    """The quantile of Student's t distribution, to .001 from 4 degrees of freedom on (one-sided 95%).

    Source: Abramowitz and Stegun, 26.7.5 (Cornish-Fisher).
    """
    z = NormalDist().inv_cdf(level)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def _means(values: Rewards, counted: NDArray[np.bool_] | Rewards, draws: Rewards | None) -> tuple[Rewards, Rewards]:
    """Mean of each column, and of each column in each draw: shapes [columns] and [DRAWS, columns]."""
    with np.errstate(invalid="ignore"):
        means = values.sum(0) / counted.sum(0)
        if draws is None:
            return means, np.full((1, values.shape[1]), np.nan)
        return means, (draws @ values) / (draws @ counted.astype(float))


def _interval(mean: float, drawn: Rewards) -> tuple[float, float, float]:
    finite = _finite(drawn)
    if not len(finite):
        return float(mean), float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(mean), float(low), float(high)


def _spread(interval: tuple[float, float, float], n: int, lowest: float, highest: float) -> tuple[float, float, float]:
    """An interval of values (between `lowest` and `highest`) that were all the same, where every draw is the same: see `curve`."""
    mean, low, high = interval
    if n and high - low < _SAME:
        others = 1 - ((1 - LEVEL) / 2) ** (1 / n)
        return mean, mean - others * max(mean - lowest, 0), mean + others * max(highest - mean, 0)
    return interval


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _json(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
