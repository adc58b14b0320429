"""Optimal control as an environment: one law is written down, the cart flies by it, and the table of the flight is what teaches.

How the cart answers (a and b) is hidden and the same for a pack; start and target are new with each task. So what an agent works out
from the table of one task helps in the next, if it writes it down. The reward is 1 / (1 + loss) (see `dynamics`).

Some presets remember themselves: the last law of the run that flew is shown with the next task (`Observation.carried`).

Two forms say the same thing. The natural one explains itself; the compact one, for the shipped tiny policies, is

    x 0.41 v -0.2 to 2.3 in 8         the world: start, velocity, target, steps
    law -0.5 * x  off 1.1 -0.2 0.44   where the world remembers: the last law, how far off x and v were in the end, the reward
    0.3 * (x_target - x) - v          the agent: a law
    0: 0.4100 -0.2000 0.7670          the world: t, x, v, u
    ...
    8: 2.2964 0.0123                  in the end
    flown -0.0036 0.0123 1.0412 0.0315      and how it ended: how far off x and v were, the sum of u^2, the loss

A law that cannot be read ends the episode with reward -0.1, one that has no value in some step with 0, as in the published environment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place, carried_number, not_carried
from cod_agent.environments.draws import randomness
from cod_agent.environments.expressions import LENGTH, ExpressionError, parse
from cod_agent.environments.optimal_control.dynamics import (
    NAMES,
    PRESETS,
    Dynamics,
    Flight,
    Preset,
    Trip,
    draw_dynamics,
    draw_trip,
    flown,
)
from cod_agent.environments.optimal_control.players import PLAYERS
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Task

WORLD = "optimal-control"

UNREADABLE = -0.1
"""The reward of an answer that is no law, as published."""

RULES = """\
You steer a cart along a line. In each step t = 0, 1, 2, ... a control u between -1 and 1 changes its velocity v, and that \
changes its place x:

v' = a * v + b * u{noise}
x' = x + v'

a and b are not told. a lies between 0.55 and 1.2; b between -1.5 and 1.5, and at least 0.35 away from 0. They are the same for \
all tasks of this series, while start and target are new each time. So what you work out about a and b helps in later tasks.

You do not choose u step by step. Before the start you write down one law, an expression that gives u from what is then the case; \
what it gives is cut to [-1, 1]. It may speak of
x, v: place and velocity now; t: the step, from 0; horizon: the number of steps; remaining: horizon - t; \
x_target, v_target: where the cart shall be in the end and how fast (0).
It is written with numbers, + - * / ** and parentheses, abs(A), min(A, B), max(A, B), pow(A, B), clip(A, LOW, HIGH), \
< <= > >= == !=, and, or, not, and A if CONDITION else B. At most {length} characters; nothing else is understood.

The loss is (x - x_target)**2 + 2 * (v - v_target)**2 after the last step, plus 0.03 times the sum of u**2 over all steps. Your reward \
is 1 / (1 + loss). A law that cannot be read gets -0.1; one that has no finite value in some step (a division by zero) gets 0. \
Afterwards you see x, v and u of every step.{lasting}

Answer with exactly one expression between answer tags, for example:
<answer>0.5 * (x_target - x) - v if t < 3 else 0</answer>"""

_NOISE = " + w        (w is chance: new in every step, anywhere between -{noise:g} and {noise:g})"
_REMEMBERS = " The last law of yours that flew is shown with the next task."
_ENDS = {
    "flown": "The cart has flown.",
    "runtime": "The law failed",
    MALFORMED: "The answer was malformed",
}


def parse_answer(answer: object, form: Form) -> str:
    """The text of the law an answer gives.

    Raises:
        ExpressionError: there is none where it belongs.
    """
    text = answer if form == "compact" and isinstance(answer, str) else tagged(answer)
    if text is None:
        raise ExpressionError("exactly one expression between answer tags was expected")
    return text.strip()


@dataclass(frozen=True, slots=True)
class Last:
    """The last law of a run that flew."""

    law: str
    x: float
    """How far off it ended."""
    v: float
    reward: float


class ControlSession:
    """One trip of one cart; all state of the task is here.

    Args:
        last: what the run's environment remembers, if it does such a thing.
        carries: the number under which the run is to remember the law; None: the world forgets.
    """

    def __init__(
        self, dynamics: Dynamics, trip: Trip, form: Form, *, last: Last | None = None, carries: int | None = None
    ) -> None:
        self._dynamics, self._trip, self._form = dynamics, trip, form
        self._last, self._carries, self._over = last, carries, False

    def reset(self) -> Observation:
        """Stand at the start."""
        self._over, trip, last = False, self._trip, self._last
        if self._form == "compact":
            lines = [f"x {trip.x:g} v {trip.v:g} to {trip.target:g} in {len(trip.noise)}"]
            lines += [f"law {last.law}  off {last.x:z.4f} {last.v:z.4f} {last.reward:.4f}"] if last else []
            return Observation("\n".join(lines))
        place = f"At t = 0 the cart is at x = {trip.x:g} with v = {trip.v:g}."
        text = f"{place} After {len(trip.noise)} steps it shall be at x_target = {trip.target:g} with v_target = 0."
        return Observation(f"{text}\n\n{_told(last)}" if last else text)

    def step(self, answer: str) -> Observation:
        """Fly by the law; what cannot be read ends the episode with reward -0.1.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this trip is behind you: the episode is over, start the task again to make it once more")
        self._over = True
        try:
            text = parse_answer(answer, self._form)
            law = parse(text, NAMES)
        except ExpressionError as error:
            return self._refused(str(error))
        flight = flown(law, self._dynamics, self._trip)
        if not flight.failure:
            self._last = Last(" ".join(text.split()), flight.off, flight.v[-1], flight.reward)
        table = _rows(flight) if self._form == "compact" else _table(flight)
        ending = "runtime" if flight.failure else "flown"
        told = _brief(flight) if self._form == "compact" else _judgement(flight)
        return self._end(ending, table, told, flight.reward)

    def _refused(self, why: str) -> Observation:
        if self._form == "compact":
            return self._end(MALFORMED, "invalid", f"invalid: {why}", UNREADABLE)
        return self._end(MALFORMED, "The cart did not move.", f"{_ENDS[MALFORMED]}: {why}.", UNREADABLE)

    def _end(self, ending: str, table: str, told: str, reward: float) -> Observation:
        last = self._last
        carried = None
        if self._carries is not None and last is not None:
            carried = {"cart": self._carries, "law": last.law, "x": last.x, "v": last.v, "reward": last.reward}
        feedback = Feedback(reward=reward, text=told, ending=ending)
        return Observation(f"{table}\n{told}", table, done=True, feedback=feedback, carried=carried)


def _rows(flight: Flight) -> str:
    shown = [f"{x:z.4f} {v:z.4f}" for x, v in zip(flight.x, flight.v, strict=True)]
    forces = [*(f" {u:z.4f}" for u in flight.u), ""]
    return "\n".join(f"{t}: {place}{u}" for t, (place, u) in enumerate(zip(shown, forces, strict=True)))


def _brief(flight: Flight) -> str:
    if flight.failure:
        return f"runtime: {flight.failure}"
    return f"flown {flight.off:z.4f} {flight.v[-1]:z.4f} {flight.effort:.4f} {flight.loss:.4f}"


def _table(flight: Flight) -> str:
    lines = [
        f"{t:2} | {x:z9.4f} | {v:z9.4f} | {u}"
        for t, (x, v, u) in enumerate(
            zip(flight.x, flight.v, [*(f"{u:z7.4f}" for u in flight.u), "      -"], strict=True)
        )
    ]
    return "\n".join([" t |         x |         v |       u", *lines])


def _judgement(flight: Flight) -> str:
    if flight.failure:
        return f"{_ENDS['runtime']}: {flight.failure}."
    ends = f"In the end x - x_target = {flight.off:z.4f} and v - v_target = {flight.v[-1]:z.4f}."
    return f"{_ENDS['flown']} {ends} The sum of u**2 is {flight.effort:.4f}, the loss {flight.loss:.4f}."


def _told(last: Last) -> str:
    ends = f"x - x_target was {last.x:z.4f} and v - v_target was {last.v:z.4f}, the reward {last.reward:.4f}"
    return f"The last law that flew in this series: {last.law}\nIn the end of that flight {ends}."


class OptimalControl(DrawnWorld[Preset]):
    """The world `optimal-control`; its presets are small, medium, paper, paper-noisy and paper-improve.

    No cart of one split is ever drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)
        self.remembers = self.preset.remembers

    def rules(self) -> str:
        noise = _NOISE.format(noise=self.preset.noise) if self.preset.noise else ""
        return RULES.format(noise=noise, length=LENGTH, lasting=_REMEMBERS if self.remembers else "")

    def start(self, task: Task, carried: Any = None) -> ControlSession:
        """A session of `task`.

        Args:
            carried: what the last observation of the run's task before carried; of another cart it says nothing.

        Raises:
            UsageError: the task is not one of this world and preset, or `carried` is nothing that a session of it gave.
        """
        return self._session(self.place(task), carried if self.remembers else None)

    def session(self, place: Place) -> ControlSession:
        return self._session(place, None)

    def _session(self, place: Place, carried: Any) -> ControlSession:
        dynamics, trip = _drawn(place)
        if not self.remembers:
            return ControlSession(dynamics, trip, self.form)
        number = carried_number(WORLD, place.preset, place.split, place.seed, place.pack)
        last = None if carried is None else _checked(carried, number)
        return ControlSession(dynamics, trip, self.form, last=last, carries=number)


def _checked(carried: Any, number: int) -> Last | None:
    """What a run's environment remembers of the cart of that number. Raises: UsageError."""
    if isinstance(carried, dict) and carried.keys() == {"cart", "law", "x", "v", "reward"}:
        law, numbers = carried["law"], [carried[name] for name in ("x", "v", "reward")]
        sound = all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
        if type(carried["cart"]) is int and sound and isinstance(law, str) and _is_law(law):
            return Last(law, *numbers) if carried["cart"] == number else None
    raise not_carried("optimal-control")


def _is_law(text: str) -> bool:
    try:
        parse(text, NAMES)
    except ExpressionError:
        return False
    return "\n" not in text


@lru_cache(1024)
def _drawn(place: Place) -> tuple[Dynamics, Trip]:
    """Cart and trip of a task; both are only read, so that sessions may share them. The presets of the paper have the same packs, but
    for the noise."""
    names = (WORLD, place.preset.partition("-")[0], place.split, place.seed, place.pack)
    trip = draw_trip(randomness(*names, place.index), PRESETS[place.preset])
    return draw_dynamics(randomness(*names, "dynamics"), place.split), trip
