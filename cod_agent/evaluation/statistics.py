"""Reward by position, with intervals: what a table of rewards (packs x positions) says and how sure one can be of it.

Packs are independent, the tasks inside a pack are not (they share what is hidden, and a context). So intervals come
from drawing whole packs again, with replacement: the percentile bootstrap, with a fixed seed, so that the same
rewards always give the same figures. NaN rewards (lost to the infrastructure, or not lived yet) leave the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
LEVEL = 0.95
SEED = 20002

Rewards = NDArray[np.float64]
"""Shape [packs, positions]; NaN where there is none."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95% interval; all NaN where nothing was finite."""

    mean: float
    low: float
    high: float

    def json(self) -> dict[str, float | None]:
        """NaN is no JSON: null."""
        return {"mean": _json(self.mean), "low": _json(self.low), "high": _json(self.high)}


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


def curve(rewards: Rewards) -> Curve:
    """What `rewards` say.

    Args:
        rewards: shape [packs, positions], NaN where there is none.
    """
    packs, positions = rewards.shape
    counted = np.isfinite(rewards)
    filled = np.where(counted, rewards, 0.0)
    draws = np.random.default_rng(SEED).multinomial(packs, np.full(packs, 1 / packs), size=DRAWS) if packs else None
    means, drawn = _means(filled, counted, draws)
    points = [
        Point(*_widened(_interval(means[at], drawn[:, at]), n), position=at, n=n)
        for at, n in enumerate(counted.sum(0).tolist())
    ]
    whole = counted.sum(1, keepdims=True).astype(float)
    mean, drawn_mean = _means(filled.sum(1, keepdims=True), whole, draws)
    gain = (means[-1] - means[0], drawn[:, -1] - drawn[:, 0]) if positions else (np.nan, np.full(1, np.nan))
    return Curve(
        tuple(points),
        Interval(*_interval(mean[0], drawn_mean[:, 0])),
        Interval(*_interval(*gain)),
        int((~counted).sum()),
    )


def difference(ours: Rewards, theirs: Rewards) -> Interval:
    """Mean of ours minus mean of theirs at the last position, over the same packs.

    Args:
        ours, theirs: shape [packs, positions] each, row i being pack i in both.
    """
    return curve(ours[:, -1:] - theirs[:, -1:]).overall


def _means(
    values: Rewards, counted: NDArray[np.bool_] | Rewards, draws: NDArray[np.int64] | None
) -> tuple[Rewards, Rewards]:
    """Mean of each column, and of each column in each draw: shapes [columns] and [DRAWS, columns]."""
    with np.errstate(invalid="ignore"):
        means = values.sum(0) / counted.sum(0)
        if draws is None:
            return means, np.full((1, values.shape[1]), np.nan)
        return means, (draws @ values) / (draws @ counted.astype(float))


def _interval(mean: float, drawn: Rewards) -> tuple[float, float, float]:
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return float(mean), float("nan"), float("nan")
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(mean), float(low), float(high)


def _widened(interval: tuple[float, float, float], n: int) -> tuple[float, float, float]:
    """An interval of rewards that were all 0 or all 1, where every draw is the same: the exact (Clopper-Pearson) one instead."""
    mean, low, high = interval
    if low == high == mean and mean in (0.0, 1.0):
        least = ((1 - LEVEL) / 2) ** (1 / n)
        return (1.0, least, 1.0) if mean else (0.0, 0.0, 1 - least)
    return interval


def _json(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None
