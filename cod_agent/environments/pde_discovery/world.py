"""PDE Discovery as an environment: the reaction term of u_t = u_xx + f(u) is hidden but shared by a pack.

Every task starts from another profile, some flat and some high, and lets the agent look at a few points only: u and f(u) there, with
noise. Fits of few terms to a few points are many; the points of other tasks tell them apart. The reward is 1 / (1 + e), e being the
error of the coefficients over the sum of the true ones, plus 1 for each term too many; nothing finalised is worth 0.

Some presets remember themselves: what was sampled stays in evidence in the run's later tasks (`Observation.carried`). In the others the
context is what carries: an agent hands back what it noted (`recall`), or tries the terms it remembers on new points.

Two forms say the same thing, with the actions of `actions`. The natural one explains itself; the compact one is

    u0 0.84 1 -0.32 3 noise 0.004      the world: u(x, 0) = .84 sin(pi x) - .32 sin(3 pi x)
    points 3 steps 6 evidence 0        what is left, and how many points are in evidence
    sample .3 .01; .5 .01; .7 .2       the agent: x and t
    0.7013 -0.2210                     the world: u and the response, one line a point
    ...
    points 0 steps 5 evidence 3
    regress 2                          the agent
    0.0041 1.25*u - 0.8*u^3            the world: the largest error, and the equation; some for each number of terms
    ...
    finalise 1.25*u - 0.8*u^3          the agent

A malformed answer ends the episode with reward 0; what cannot be done is refused, and costs the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place, carried_number, not_carried
from cod_agent.environments.draws import randomness
from cod_agent.environments.pde_discovery import words
from cod_agent.environments.pde_discovery.actions import Action, read_action
from cod_agent.environments.pde_discovery.equations import Equation, Refused, Unreadable, Values, values, written
from cod_agent.environments.pde_discovery.packs import (
    PRESETS,
    STRATA,
    Preset,
    draw_equation,
    draw_noise,
    draw_start,
    stratum,
)
from cod_agent.environments.pde_discovery.players import PLAYERS
from cod_agent.environments.pde_discovery.reaction import BOUND, HUNDREDTHS, Start, solution
from cod_agent.environments.pde_discovery.regression import Candidate, judged, searched, tried
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Task

WORLD = "pde-discovery"

KEPT = 256
"""Points in evidence at most: of a long life, the newest."""
ROUNDED = 5
"""Thousandths by which a coefficient may differ from the one that a regression showed: that rounded to two decimals."""
HIGHEST = 9999.0
"""No response is higher, whatever is recalled."""

Point = tuple[float, float]
"""u and response, as they were shown: four decimals."""


@dataclass(frozen=True, slots=True)
class Rod:
    """What is hidden of a task, and its number among what runs remember. It is only read, so that sessions may share it."""

    equation: Equation
    start: Start
    number: int
    """Of the pack."""
    noise: tuple[object, ...]
    """The names from which the noise of the task's points is drawn."""


class PdeSession:
    """One profile to look at; all state of the task is here.

    Args:
        evidence: points that are there from the beginning.
    """

    def __init__(self, rod: Rod, preset: Preset, form: Form, evidence: Sequence[Point] = ()) -> None:
        self._rod, self._preset, self._form, self._before = rod, preset, form, tuple(evidence)
        self._begin()

    def _begin(self) -> None:
        self._evidence, self._steps, self._points, self._over = list(self._before), 0, 0, False
        self._fitted = np.empty((0, 2))
        self._candidates, self._dice = list[Candidate](), randomness(*self._rod.noise)

    def reset(self) -> Observation:
        """The start of the task, with all its points and turns."""
        self._begin()
        gap = "\n" if self._form == "compact" else "\n\n"
        return Observation(f"{words.start(self._form, self._rod.start, self._preset.noise)}{gap}{self._left()}")

    def step(self, answer: str) -> Observation:
        """Do one action; whatever is malformed ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this rod is behind you: the episode is over, start the task again to look once more")
        try:
            action = read_action(self._said(answer), self._preset.terms)
            if action.verb == "finalise":
                return self._finalised(action.equation)
            text, summary = self._done(action)
        except Unreadable as wrong:
            return self._end(MALFORMED, "", why=str(wrong))
        except Refused as reason:
            text = summary = f"refused: {reason}" if self._form == "compact" else f"That cannot be done: {reason}."
        self._steps += 1
        if self._steps == self._preset.steps:
            return self._end("steps", summary)
        gap = "\n" if self._form == "compact" else "\n\n"
        return Observation(f"{text}{gap}{self._left()}", summary)

    def _said(self, answer: object) -> str:
        said = answer if self._form == "compact" else tagged(answer)
        if not isinstance(said, str):
            raise Unreadable(
                "there is no text" if self._form == "compact" else "there is not exactly one pair of answer tags"
            )
        return said

    # ---- what is done ----

    def _done(self, action: Action) -> tuple[str, str]:
        """What the agent sees of an action, and what an update reads of it."""
        compact, count = self._form == "compact", len(self._evidence)
        if action.verb == "summarise":
            told = f"summary {count}" if compact else f"You looked at the {words.counted(count)} in evidence."
            return words.points(self._form, self._evidence) or told, told
        if action.verb == "sample":
            told = words.points(self._form, self._sampled(action.points), action.points)
        elif action.verb == "recall":
            self._recall(action.points)
            told = f"recalled {len(action.points)}" if compact else f"You recalled {words.counted(len(action.points))}."
        else:
            self._regress(action)
            told = words.fits(self._form, self._candidates, count)
        return told, told

    def _sampled(self, points: Sequence[Point]) -> list[Point]:
        left = self._preset.points - self._points
        if len(points) > left:
            verb = "is" if len(points) == 1 else "are"
            raise Refused(f"{words.counted(len(points))} {verb} more than the {left} left to sample")
        at = [(round(x * HUNDREDTHS), round(t * HUNDREDTHS)) for x, t in points]
        if not all(1 <= x < HUNDREDTHS and 1 <= t <= HUNDREDTHS for x, t in at):
            raise Refused("x is from 0.01 to 0.99 and t from 0.01 to 1")
        known = _solution(tuple(self._rod.equation.items()), self._rod.start, max(t for _, t in at))
        u = known[[t for _, t in at], [x for x, _ in at]]
        noise, new = self._preset.noise, list[Point]()
        for true, response in zip(u, values(self._rod.equation, u), strict=True):
            seen = true + draw_noise(self._dice, noise), response + draw_noise(self._dice, noise / 4)
            new.append((round(float(seen[0]), 4) + 0.0, round(float(seen[1]), 4) + 0.0))
        self._points += len(new)
        self._add(new)
        return new

    def _recall(self, points: Sequence[Point]) -> None:
        if self._preset.remembers:
            raise Refused("what was sampled is in evidence already")
        if not all(abs(u) <= BOUND and abs(response) <= HIGHEST for u, response in points):
            raise Refused(f"u is never beyond {BOUND:g}, nor a response beyond {HIGHEST:g}")
        self._add(points)

    def _add(self, points: Sequence[Point]) -> None:
        self._evidence = [*self._evidence, *points][-KEPT:]

    def _regress(self, action: Action) -> None:
        if not self._evidence:
            raise Refused("there is no evidence yet")
        most, points = self._preset.most, np.array(self._evidence)
        if max([action.most, *map(len, action.supports)]) > most:
            raise Refused(f"an equation has at most {most} terms")
        self._fitted = points
        if action.supports:
            self._candidates = tried(points, action.supports)
        else:
            self._candidates = searched(points, self._preset.terms, action.most or most)

    def _finalised(self, equation: Equation) -> Observation:
        """The numbers that the agent wrote count, if they are those of a candidate or as near as its rounded ones."""
        wanted = _thousandths(equation)
        for candidate in self._candidates:
            shown = _thousandths(candidate.equation)
            if shown.keys() == wanted.keys() and all(abs(shown[term] - wanted[term]) <= ROUNDED for term in shown):
                final = judged({term: number / 1000 for term, number in wanted.items()}, self._fitted, candidate)
                told = f"finalised {written(final.equation)}"
                reward = reward_of(final.equation, self._rod.equation)
                return self._end("finalised", told if self._form == "compact" else f"You {told}.", reward, final)
        raise Refused(
            "that is none of the equations of the latest regression: copy one as it is shown, or rounded to two decimals"
        )

    def _end(
        self, how: str, summary: str, reward: float = 0.0, final: Candidate | None = None, why: str = ""
    ) -> Observation:
        self._over = True
        latest = min(self._candidates, key=lambda candidate: candidate.error, default=None)
        said = words.ending(self._form, how, why, final, latest)
        text = (summary or said) if self._form == "compact" else f"{summary}\n{said}".strip()
        carried = None
        if self._preset.remembers:
            carried = {"pack": self._rod.number, "points": [list(point) for point in self._evidence]}
        feedback = Feedback(reward=reward, text=said, ending=how)
        return Observation(text, summary or text, done=True, feedback=feedback, carried=carried)

    def _left(self) -> str:
        left = self._preset.points - self._points, self._preset.steps - self._steps
        return words.left(self._form, *left, len(self._evidence))


def reward_of(found: Equation, true: Equation) -> float:
    """1 / (1 + e): the errors of all coefficients over the sum of the true ones, plus 1 for each term too many."""
    wrong = sum(abs(found.get(term, 0.0) - true.get(term, 0.0)) for term in {**found, **true})
    return 1 / (1 + wrong / sum(map(abs, true.values())) + max(0, len(found) - len(true)))


class PdeDiscovery(DrawnWorld[Preset]):
    """The world `pde-discovery`; its presets are small (8 terms, 3 points a task), paper, paper-hard, paper-forgets and
    paper-hard-forgets.

    No set of terms of one split is ever drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)
        self.remembers = self.preset.remembers

    def rules(self) -> str:
        return words.rules(self.preset)

    def start(self, task: Task, carried: Any = None) -> PdeSession:
        """A session of `task`.

        Args:
            carried: what the last observation of the run's task before carried; of another pack it says nothing.

        Raises:
            UsageError: the task is not one of this world and preset, or `carried` is nothing that a session of it gave.
        """
        return self._session(self.place(task), carried if self.remembers else None)

    def session(self, place: Place) -> PdeSession:
        return self._session(place, None)

    def _session(self, place: Place, carried: Any) -> PdeSession:
        rod = _drawn(place)
        evidence = _checked(carried, rod.number) if carried is not None else ()
        return PdeSession(rod, self.preset, self.form, evidence)


def _checked(carried: Any, number: int) -> Sequence[Point]:
    """The points in evidence that a run's environment has of the pack of that number. Raises: UsageError."""
    if isinstance(carried, dict) and carried.keys() == {"pack", "points"} and type(carried["pack"]) is int:
        points = carried["points"]
        if carried["pack"] != number:
            return ()
        if isinstance(points, list) and len(points) <= KEPT and all(map(_is_point, points)):
            return [(float(u), float(response)) for u, response in points]
    raise not_carried("pde-discovery")


def _is_point(point: Any) -> bool:
    if not isinstance(point, list) or len(point) != 2 or not all(type(number) in (int, float) for number in point):
        return False
    return abs(point[0]) <= 2 * BOUND and abs(point[1]) <= HIGHEST  # of NaN, neither holds


def _thousandths(equation: Equation) -> dict[str, int]:
    return {term: round(1000 * coefficient) for term, coefficient in equation.items()}


@lru_cache(1024)
def _drawn(place: Place) -> Rod:
    """A preset that forgets has the packs of the one that remembers."""
    names = (WORLD, place.preset.removesuffix("-forgets"), place.split, place.seed, place.pack)
    equation = _equation(names, place.preset)
    amplitude = stratum(randomness(*names, "amplitudes", place.index // STRATA), place.index)
    start = draw_start(randomness(*names, place.index), amplitude)
    number = carried_number(*names)
    return Rod(equation, start, number, (*names, place.index, "noise"))


@lru_cache(1024)
def _equation(names: tuple[str, str, Split, int, int], preset: str) -> Equation:
    return draw_equation(randomness(*names, "equation"), PRESETS[preset], names[2])


@lru_cache(128)
def _solution(equation: tuple[tuple[str, float], ...], start: Start, until: int) -> Values:
    """As far as somebody looks: at most 80 KiB, and some hundredths of a second to find."""
    return solution(dict(equation), start, until)
