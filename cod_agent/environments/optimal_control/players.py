"""Scripted players of optimal control: one finds the cart out while it flies, the other notes what it found, `a 0.8312 b -0.7021 ...`.

Who does not know the cart writes a law that probes in the first step and then reads the answer off x and v: in each step two
polynomials, one for either side of a place, since that tells the sign of b. They are fitted to what the best control would be for each of
many carts that may be, of which every one has by then flown by the same law so far. That is a good law, not the best one: a step never
probes for the sake of later ones.

Who knows it plans the best flight, a least-squares problem with bounds (the loss is quadratic in u), and adds to each step of the plan the
best answer to being off it, from the Riccati equation. That matters where there is noise.

A note holds the least-squares estimate of a and b, and the sums of v*v, v*u and u*u that it rests on: enough to add the next table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from cod_agent.context import Message
from cod_agent.environments.optimal_control.dynamics import EFFORT, SPEED, A, B
from cod_agent.environments.players import after_note, not_compact, note_in, players_of
from cod_agent.errors import MissingExtra, UsageError

Array = NDArray[np.float64]

DEGREE = 2
"""Of the two polynomials in x and v by which a law explores, in each step."""
POWERS = [(i, j) for j in range(DEGREE + 1) for i in range(DEGREE + 1 - j)]
"""Of x and v, in its terms."""
CARTS = (6, 20)
"""How many values of a and of b may be: all pairs of them. Four times as many make nothing better."""
RIDGE = 0.01
"""Weight, for each cart, of wishing small coefficients."""

_NUMBER = r"(-?[0-9]{1,6}(?:\.[0-9]{1,4})?)"
_TRIP = re.compile(rf"^x {_NUMBER} v {_NUMBER} to {_NUMBER} in ([1-9][0-9]?)$", re.MULTILINE)
_ROW = re.compile(rf"^[0-9]{{1,2}}: {_NUMBER} {_NUMBER}(?: {_NUMBER})?$", re.MULTILINE)
_NOTE = re.compile(rf"^a {_NUMBER} b {_NUMBER} vv {_NUMBER} vu {_NUMBER} uu {_NUMBER}$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of a cart."""

    estimate: Array
    """Of a and b, shape [2]."""
    sums: Array
    """Of the products of v and u, shape [2, 2]: how sure the estimate is."""

    @property
    def enough(self) -> bool:
        """Whether it says anything about both."""
        return bool(np.linalg.det(self.sums) > 1e-6)

    @property
    def cart(self) -> tuple[float, float]:
        """a and b, as near to the estimate as they can be."""
        (a, b), (least, most) = self.estimate, np.array(B) / 10_000
        low, high = np.array(A) / 10_000
        return float(np.clip(a, low, high)), float(np.copysign(np.clip(abs(b), least, most), b))


@dataclass(frozen=True, slots=True)
class Start:
    """A trip as a player sees it."""

    x: float
    v: float
    target: float
    steps: int


def read_trip(text: str) -> Start:
    """What a compact observation says.

    Raises:
        UsageError: it is none.
    """
    found = _TRIP.search(text)
    if found is None:
        raise not_compact("optimal-control")
    return Start(float(found[1]), float(found[2]), float(found[3]), int(found[4]))


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player answers in a solve episode: one law.

    Raises:
        UsageError: the world does not speak its compact form.
        MissingExtra: scipy is not installed.
    """
    prompt = next((said.content for said in messages if said.role == "user"), None)
    if prompt is None:
        raise UsageError("a player needs a prompt: there is no user message")
    trip, known = read_trip(after_note(prompt)), read_note(note_in(prompt)) if remember else None
    return [_planned(trip, *known.cart) if known else _exploring(trip)]


def noted(prompt: str) -> str:
    """The note after a task: what was known before, and what its table says."""
    before, rows = read_note(note_in(prompt)), [found.groups() for found in _ROW.finditer(after_note(prompt))]
    told = [(float(v), float(u), float(w)) for (_, v, u), (_, w, _) in zip(rows, rows[1:], strict=False) if u]
    said, after = np.array([row[:2] for row in told]).reshape(-1, 2), np.array([row[2] for row in told])
    sums, answers = said.T @ said, said.T @ after
    if before:
        sums, answers = sums + before.sums, answers + before.sums @ before.estimate
    now = Seen(np.linalg.lstsq(sums, answers, rcond=None)[0], sums)
    (vv, vu), (_, uu) = now.sums
    a, b = now.estimate
    return f"a {a:z.4f} b {b:z.4f} vv {vv:.4f} vu {vu:z.4f} uu {uu:.4f}" if now.enough else ""


def read_note(note: str) -> Seen | None:
    """What a note says of the cart, None if it says nothing."""
    found = _NOTE.search(note)
    if found is None:
        return None
    a, b, vv, vu, uu = map(float, found.groups())
    seen = Seen(np.array([a, b]), np.array([[vv, vu], [vu, uu]]))
    return seen if seen.enough else None


PLAYERS = players_of(choices, noted)


# ---- a cart that is known ----


def _planned(trip: Start, a: float, b: float) -> str:
    """The law of the best flight, with an answer to being off it."""
    u, gains = _best(trip, a, b), _gains(np.array([a]), np.array([b]), trip.steps)[0][0]
    x, v, laws = trip.x, trip.v, list[str]()
    for now, (of_x, of_v) in zip(u, gains, strict=True):
        laws.append(_polynomial({(0, 0): now + of_x * x + of_v * v, (1, 0): -of_x, (0, 1): -of_v}))
        v = a * v + b * now
        x += v
    return _by_step(laws)


def _best(trip: Start, a: float, b: float) -> Array:
    """The controls with the least loss where there is no noise, shape [steps]."""
    try:
        from scipy.optimize import lsq_linear
    except ImportError:
        raise MissingExtra("the players of optimal-control", "worlds") from None
    powers = a ** np.arange(trip.steps)
    reach = powers.cumsum()
    of_v, of_x = b * powers[::-1], b * reach[::-1]
    ways = np.vstack([of_x, SPEED**0.5 * of_v, EFFORT**0.5 * np.eye(trip.steps)])
    wanted = np.zeros(trip.steps + 2)
    wanted[:2] = trip.target - trip.x - a * reach[-1] * trip.v, -(SPEED**0.5) * a * powers[-1] * trip.v
    found: Array = lsq_linear(ways, wanted, (-1, 1), method="bvls").x
    return found


def _gains(a: Array, b: Array, steps: int) -> tuple[Array, Array]:
    """How the best control answers to x and v being off, if there were no bounds, and what being wrong about it costs.

    Args:
        a, b: shape [carts].

    Returns: gains, shape [carts, steps, 2], u = -gains @ (x - x*, v); and weights, shape [carts, steps].
    """
    gains, weights = np.zeros((len(a), steps, 2)), np.zeros((len(a), steps))
    xx, xv, vv = np.ones(len(a)), np.zeros(len(a)), np.full(len(a), SPEED)  # the loss still to come, a quadratic form
    for t in reversed(range(steps)):
        # One step makes v' = a v + b u of v, and adds that to x.
        pushed = xx + 2 * xv + vv
        weights[:, t] = EFFORT + b * b * pushed
        gains[:, t, 0] = b * (xx + xv) / weights[:, t]
        gains[:, t, 1] = b * a * pushed / weights[:, t]
        left = EFFORT / weights[:, t]
        xv, vv, xx = a * (xx + xv) * left, a * a * pushed * left, xx - (b * (xx + xv)) ** 2 / weights[:, t]
    return gains, weights


# ---- a cart that is not known ----


@cache
def _may_be(steps: int) -> tuple[Array, Array, Array, Array]:
    """Carts that may be, shape [carts], with their gains and the roots of their weights."""
    values, sizes = ((np.arange(n) + 0.5) / n for n in (CARTS[0], CARTS[1] // 2))
    a = (A[0] + (A[1] - A[0]) * values) / 10_000
    b = (B[0] + (B[1] - B[0]) * sizes) / 10_000
    every_a, every_b = (grid.ravel() for grid in np.meshgrid(a, [*-b, *b]))
    gains, weights = _gains(every_a, every_b, steps)
    return every_a, every_b, gains, np.sqrt(weights)


def _exploring(trip: Start) -> str:
    """A law that probes and then does what is best on average over the carts that may be."""
    a, b, gains, weights = _may_be(trip.steps)
    push = 1.0 if trip.target > trip.x else -1.0
    x, v, u, laws = np.full(len(a), trip.x), np.full(len(a), trip.v), np.full(len(a), push), [f"{push:g}"]
    for t in range(1, trip.steps):
        v = a * v + b * u
        x = x + v
        wanted = np.clip(-gains[:, t, 0] * (x - trip.target) - gains[:, t, 1] * v, -1, 1)
        # With half of the carts b is above 0. They are on one side of the median, as far as their places tell it.
        limit, fitted = np.median(x), list[str]()
        for side in (x > limit, x <= limit):
            terms = np.stack([x[side] ** i * v[side] ** j for i, j in POWERS], 1)
            by_weight = terms * weights[side, t, None]
            squares = by_weight.T @ by_weight + RIDGE * np.eye(len(POWERS))
            factors = np.linalg.solve(squares, by_weight.T @ (wanted[side] * weights[side, t]))
            u[side] = np.clip(terms @ factors, -1, 1)
            fitted.append(_polynomial(dict(zip(POWERS, factors.tolist(), strict=True))))
        laws.append(f"({fitted[0]} if x > {limit:.4g} else {fitted[1]})")
    return _by_step(laws)


# ---- writing ----


def _polynomial(factors: Mapping[tuple[int, int], float]) -> str:
    """`0.5+x*-1.2+v*(0.3+x*0.1)`, of the factors by the powers of x and v they stand before."""
    inner = [[f"{factors[i, j]:.4g}" for i in range(DEGREE + 1) if (i, j) in factors] for j in range(DEGREE + 1)]
    return _nested("v", [_nested("x", row) for row in inner if row])


def _nested(name: str, factors: Sequence[str]) -> str:
    """A polynomial in `name`, as Horner writes it."""
    *before, said = factors
    for factor in reversed(before):
        said = f"{factor}+{name}*{said if '+' not in said else f'({said})'}"
    return said


def _by_step(laws: Sequence[str]) -> str:
    """A law that is another one in each step."""
    return " else ".join([f"{law} if t == {t}" for t, law in enumerate(laws[:-1])] + [laws[-1]])
