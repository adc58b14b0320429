"""What an evaluation found, as objects: for a table, a figure, a report, a file.

    Study         all of it: one evaluation for each part (a world and a pack size)
    Evaluation    one part: its arms on the same packs, floor and ceiling, the comparison of two models
    Arm           one way to play the packs: rewards, their curve, and what the main arm is ahead of it

The first arm of an evaluation is the main one, the model with its own context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.environments import Packing, Split
from cod_agent.evaluation.statistics import (
    AtLeast,
    Curve,
    Interval,
    Point,
    Rewards,
    at_least,
    curve,
    paired,
    together,
    width,
)

if TYPE_CHECKING:
    from cod_agent.evaluation.measures import Measure
    from cod_agent.evaluation.plan import Plan

MAIN = "with context"
"""The arm that is the point of it all."""

NO_CONTEXT = "no-context"
"""The control: the same model gets the null context in every solve episode and writes none."""

AGAINST = "against: "
"""How the name of another model's arm begins."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to play the packs, and what came of it."""

    name: str
    agent: str
    """In the run database."""
    model: str
    world: str
    rewards: Rewards = field(compare=False, repr=False)
    """Shape [packs, positions], the mean over repeats; NaN where there is none."""
    runs: tuple[tuple[str, ...], ...] = field(repr=False)
    """The names of each pack's runs: more than one where it was repeated."""
    curve: Curve
    difference: tuple[Point, ...] | None = None
    """The main arm minus this one, pack by pack, at each position; None for the main arm itself."""
    measures: tuple[Measure, ...] = ()
    """By position, what else was counted; () where nothing is recorded."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same packs: the main arm's minus the other's."""

    model: str
    other: str
    positions: tuple[Point, ...]
    overall: Interval
    """Over all tasks."""
    at_least: AtLeast
    """How far the first is ahead at least (one-sided, 95%), over packs."""
    behind: AtLeast
    """The same for the other."""

    @property
    def better(self) -> str | None:
        """The better model's name; None where the data do not say. Both the interval and Student's t have to say it."""
        if self.overall.low > 0 and self.at_least.low > 0:
            return self.model
        if self.overall.high < 0 and self.behind.low > 0:
            return self.other
        return None

    @property
    def sentence(self) -> str:
        """The answer, for people."""
        interval = f"[{abs(self.overall.low):.3f}, {abs(self.overall.high):.3f}]"
        if self.better == self.model:
            return f"{self.model} is better than {self.other}, by {self.overall.mean:.3f} {interval} of mean reward."
        if self.better is not None:
            interval = f"[{-self.overall.high:.3f}, {-self.overall.low:.3f}]"
            return f"{self.other} is better than {self.model}, by {-self.overall.mean:.3f} {interval} of mean reward."
        interval = f"[{self.overall.low:+.3f}, {self.overall.high:+.3f}]"
        return (
            f"The data do not say which is better: {self.model} minus {self.other} is {self.overall.mean:+.3f} {interval} "
            f"of mean reward over {count(self.at_least.n, 'pack')}{self._bound}."
        )

    @property
    def _bound(self) -> str:
        """What speaks against an interval that excludes 0; "" where it does not."""
        if not (self.overall.low > 0 or self.overall.high < 0):
            return ""
        ahead, bound = (self.model, self.at_least) if self.overall.low > 0 else (self.other, self.behind)
        if bound.low != bound.low:
            return ", too few for a bound by Student's t"
        return f", yet by Student's t over packs {ahead} is ahead by at least {bound.low:+.3f} (one-sided, 95%), which is no lead"

    def json(self) -> dict[str, Any]:
        """`positions`, `overall` and `at_least` are of the first model minus the other."""
        return {
            "model": self.model,
            "other": self.other,
            "positions": [point.json() for point in self.positions],
            "overall": self.overall.json(),
            "at_least": self.at_least.json(),
            "better": self.better,
            "sentence": self.sentence,
        }


def compare(main: Arm, other: Arm) -> Comparison:
    """Two models' arms on the same packs."""
    ahead = paired(main.rewards, other.rewards)
    each, wide = by_pack(main.rewards - other.rewards), width(main.rewards, other.rewards)
    return Comparison(main.model, other.model, ahead.points, ahead.overall, at_least(each, wide), at_least(-each, wide))


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Reward by position of one model in one world, and what else was tried on the same packs."""

    world: str
    model: str
    seeds: tuple[int, ...]
    packs: int
    """Of all seeds."""
    pack_size: int
    arms: tuple[Arm, ...]
    """The main one first."""
    benefit: Interval | None
    """At the last position: reward with the context minus without it, pack by pack; None without that control."""
    written: int
    """Updates of the main arm that wrote a new version."""
    kept: int
    """Updates of the main arm that were refused; the last good version stayed."""
    calls: int
    """Of all arms."""
    seconds: float
    split: Split = "eval"
    packing: Packing = "cod"
    repeats: int = 1
    """Runs of each pack in each arm."""
    held: int = 0
    """Updates of the main arm whose version the write gate held back."""
    floor: Curve | None = None
    """Of the world's memoryless player; None where the world has no players."""
    ceiling: Curve | None = None
    """Of the world's perfect player."""
    comparison: Comparison | None = None
    """With another model on the same packs."""
    weights: tuple[str, ...] = ()
    """All that answered as the model, in all arms: more than one where it changed under its name in the middle."""

    @property
    def seed(self) -> int:
        """The first of them."""
        return self.seeds[0]

    @property
    def width(self) -> float:
        """How far apart rewards are here: 1, or more where some were outside of 0 to 1."""
        return width(*(arm.rewards for arm in self.arms))

    @property
    def main(self) -> Curve:
        """Reward of the main arm."""
        return self.arms[0].curve

    @property
    def controls(self) -> dict[str, Curve]:
        """Reward of what the main arm is held against, another model aside."""
        return {arm.name: arm.curve for arm in self.arms[1:] if not arm.name.startswith(AGAINST)}

    @property
    def rival(self) -> Arm | None:
        """The other model's arm."""
        return next((arm for arm in self.arms if arm.name.startswith(AGAINST)), None)

    @property
    def amount(self) -> str:
        """In words: `512 packs of 4`."""
        tasks = f"{self.pack_size}" if self.packing == "cod" else f"one task {self.pack_size} times"
        times = f", each {self.repeats} times" if self.repeats > 1 else ""
        return f"{count(self.packs, 'pack')} of {tasks}{times}"

    def json(self) -> dict[str, Any]:
        """One JSON object. `positions` is a list of {position, mean, low, high, n}, and so is each of `controls`."""
        others = self.arms[1:]
        return {
            "world": self.world,
            "split": self.split,
            "packing": self.packing,
            "model": self.model,
            "seed": self.seed,
            "packs": self.packs,
            "pack_size": self.pack_size,
            "positions": _points(self.main),
            "controls": {name: _points(found) for name, found in self.controls.items()},
            "mean": self.main.overall.json(),
            "gain": self.main.gain.json(),
            "control_gains": {name: found.gain.json() for name, found in self.controls.items()},
            "benefit": self.benefit and self.benefit.json(),
            "differences": {arm.name: [point.json() for point in arm.difference or ()] for arm in others},
            "floor": self.floor and _points(self.floor),
            "ceiling": self.ceiling and _points(self.ceiling),
            "comparison": self.comparison and self.comparison.json(),
            "measures": {arm.name: [one.json() for one in arm.measures] for arm in self.arms if arm.measures},
            "repeats": self.repeats,
            "seeds": self._by_seed(),
            "updates": {"written": self.written, "held": self.held, "kept": self.kept},
            "lost": self.main.lost,
            "calls": self.calls,
            "seconds": round(self.seconds, 1),
        }

    def _by_seed(self) -> list[dict[str, Any]]:
        """The main arm's rewards, seed by seed."""
        each = np.split(self.arms[0].rewards, len(self.seeds))
        return [
            {"seed": seed, "positions": _points(curve(rewards))} for seed, rewards in zip(self.seeds, each, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Study:
    """One or more evaluations of the same model, lived in one file."""

    evaluations: tuple[Evaluation, ...]
    plan: tuple[Plan, ...]
    """What was asked for: a plan for each evaluation."""
    database: Path
    seconds: float

    def json(self) -> dict[str, Any]:
        """The evaluation's own object where there is one; otherwise {"parts": [one each], "overall": ...}."""
        if len(self.evaluations) == 1:
            return self.evaluations[0].json()
        return {"parts": [one.json() for one in self.evaluations], "overall": self.overall()}

    def overall(self) -> dict[str, Any]:
        """Over all parts, each of the same weight: mean reward, gain, and what the main arm is ahead of each other arm at the last task."""
        mains = [one.arms[0].rewards for one in self.evaluations]
        ahead: dict[str, list[Rewards]] = {}
        for one in self.evaluations:
            for arm in one.arms[1:]:
                ahead.setdefault(arm.name, []).append((one.arms[0].rewards - arm.rewards)[:, -1])
        everywhere = {name: values for name, values in ahead.items() if len(values) == len(mains)}
        whole = compared(self.evaluations)
        return {
            "mean": together([by_pack(rewards) for rewards in mains]).json(),
            "gain": together([rewards[:, -1] - rewards[:, 0] for rewards in mains]).json(),
            "benefit": together(everywhere[NO_CONTEXT]).json() if NO_CONTEXT in everywhere else None,
            "differences": {name: together(values).json() for name, values in everywhere.items()},
            "comparison": whole and whole.json(),
            "packs": sum(one.packs for one in self.evaluations),
            "calls": sum(one.calls for one in self.evaluations),
            "seconds": round(self.seconds, 1),
        }


def compared(found: Sequence[Evaluation]) -> Comparison | None:
    """The two models over all tasks of all parts, each part of the same weight; None where there is one model.

    Student's t takes all packs as one sample, which all parts have as many of: what lies between parts counts as spread, so it is no
    surer than the interval.
    """
    first = found[0].comparison
    if first is None:
        return None
    ahead = [by_pack(one.arms[0].rewards - one.rival.rewards) for one in found if one.rival]
    each, wide = np.concatenate(ahead), max(one.width for one in found)
    return Comparison(first.model, first.other, (), together(ahead), at_least(each, wide), at_least(-each, wide))


def count(n: int, what: str) -> str:
    """`1 pack`, `1,024 packs`."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def by_pack(rewards: Rewards) -> Rewards:
    """The mean over each pack's tasks: [packs, positions] -> [packs]; NaN where nothing is finite."""
    counted = np.isfinite(rewards)
    with np.errstate(invalid="ignore"):
        return np.where(counted, rewards, 0.0).sum(1) / counted.sum(1)


def _points(found: Curve) -> list[dict[str, float | None]]:
    return [point.json() for point in found.points]
