"""How the cart moves: what a pack hides, the trips of its tasks, and the flight of a law.

    v' = a v + b u + w        u: what the law says, cut to [-1, 1]; w: noise, 0 in most presets
    x' = x + v'

a and b are drawn for a pack, in ten-thousandths, so that the secret is exact; start and target for each task, in hundredths. The loss of a
flight of T steps is (x_T - x*)^2 + 2 (v_T - v*)^2 + 0.03 (sum of u^2), the reward 1 / (1 + loss). The target velocity v* is 0.

The split is a property of the secret: a hash of a and b in hundredths, so that no cart of an evaluation, and hardly one that is
nearly the same, ever occurs in training.

Source: Optimal Control of arXiv 2606.20002; `paper` is its hard setting, of which its data are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, between, of_eval, uniform
from cod_agent.environments.expressions import Expression, ExpressionError

A, B = (5500, 12_000), (3500, 15_000)
"""Least and most of a and of the size of b, in ten-thousandths."""

NAMES = ("x", "v", "t", "x_target", "v_target", "horizon", "remaining")
"""What a law may speak of. `t` counts from 0; `remaining` is `horizon` - `t`."""

SPEED, EFFORT = 2.0, 0.03
"""What a unit of squared velocity at the end and of squared control cost, where one of squared distance costs 1."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of trips a world has."""

    steps: int
    x: float
    """The start lies within so much of 0."""
    v: float
    """The velocity there is at most this much."""
    target: float
    """The target lies within so much of 0."""
    noise: float = 0.0
    """How much the velocity changes by itself in a step, at most: evenly distributed in [-noise, noise]."""
    remembers: bool = False
    """Whether the last law of the run that flew, and how it ended, is shown with the next task."""


_HARD = Preset(steps=12, x=2, v=1.5, target=8)

PRESETS: dict[str, Preset] = {
    "small": Preset(steps=8, x=1, v=0.5, target=3),
    "medium": Preset(steps=12, x=2, v=1, target=5),
    "paper": _HARD,
    "paper-noisy": replace(_HARD, noise=0.1),
    "paper-improve": replace(_HARD, remembers=True),
}


@dataclass(frozen=True, slots=True)
class Dynamics:
    """The hidden property of a pack."""

    a: float
    b: float


@dataclass(frozen=True, slots=True)
class Trip:
    """One task."""

    x: float
    v: float
    target: float
    noise: tuple[float, ...]
    """What is added to the velocity in each step; as many as there are steps."""


@dataclass(frozen=True, slots=True)
class Flight:
    """What came of a law."""

    x: tuple[float, ...]
    """Where the cart was at t = 0, 1, ...: one more than there were steps."""
    v: tuple[float, ...]
    u: tuple[float, ...]
    """As applied, in [-1, 1]."""
    off: float
    """Where the cart was in the end, less the target."""
    failure: str = ""
    """Why the law had no value in the step after these; empty: it always had one."""

    @property
    def effort(self) -> float:
        """The sum of u^2."""
        return sum(force * force for force in self.u)

    @property
    def loss(self) -> float:
        return self.off**2 + SPEED * self.v[-1] ** 2 + EFFORT * self.effort

    @property
    def reward(self) -> float:
        """0 where the law failed."""
        return 0.0 if self.failure else 1 / (1 + self.loss)


def split_of(a: int, b: int) -> Split:
    """The split of a secret, given in ten-thousandths."""
    return "eval" if of_eval(f"optimal-control {a // 100} {b // 100}") else "train"


def draw_dynamics(rng: Random, split: Split) -> Dynamics:
    """A secret of `split`, by rejection."""
    while True:
        a, b = between(rng, *A), between(rng, *B) * (1 if below(rng, 2) else -1)
        if split_of(a, b) == split:
            return Dynamics(a / 10_000, b / 10_000)


def draw_trip(rng: Random, preset: Preset) -> Trip:
    """A task of the preset."""
    x, v, target = (round(uniform(rng, -most, most) * 100) / 100 for most in (preset.x, preset.v, preset.target))
    return Trip(x, v, target, tuple(uniform(rng, -preset.noise, preset.noise) for _ in range(preset.steps)))


def flown(law: Expression, dynamics: Dynamics, trip: Trip) -> Flight:
    """The flight of a law, up to where it has no value."""
    steps, failure = len(trip.noise), ""
    xs, vs, us = [trip.x], [trip.v], list[float]()
    fixed = {"x_target": trip.target, "v_target": 0.0, "horizon": float(steps)}
    for t, noise in enumerate(trip.noise):
        values = {"x": xs[-1], "v": vs[-1], "t": float(t), "remaining": float(steps - t), **fixed}
        try:
            u = min(max(law(values), -1.0), 1.0)
        except ExpressionError as error:
            failure = f"at t = {t} {error}"
            break
        us.append(u)
        vs.append(dynamics.a * vs[-1] + dynamics.b * u + noise)
        xs.append(xs[-1] + vs[-1])
    return Flight(tuple(xs), tuple(vs), tuple(us), xs[-1] - trip.target, failure)
