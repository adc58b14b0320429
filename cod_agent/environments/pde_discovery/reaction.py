"""The physics: u_t = u_xx + f(u) for x and t in [0, 1], u = 0 at both ends, solved in sine modes.

Every reaction is 0 at u = 0, so f(u) has sine modes as u has; diffusion is exact in them, and the reaction is taken by the
fourth-order exponential Runge-Kutta rule (ETDRK4: Cox and Matthews 2002, its coefficients by Kassam and Trefethen 2005). Tests hold it
against exact solutions, finer steps and a stiff solver on a grid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice

import numpy as np

from cod_agent.environments.pde_discovery.equations import Equation, Values, values

HUNDREDTHS = 100
"""Places and times are told in hundredths."""
BOUND = 3.0
"""No |u| of any task reaches it."""
MOST_STEPS = 256
"""In a hundredth of time."""

Start = Sequence[tuple[float, int]]
"""The initial condition: (amplitude, mode m) of each amplitude * sin(m pi x)."""


class _Steps:
    """What a step of length `dt` needs, for `modes` sine modes: all arrays have shape [modes], the transform [modes, modes]."""

    def __init__(self, modes: int, dt: float) -> None:
        numbers = np.arange(1, modes + 1)
        self.sines = np.sin(np.pi * np.outer(numbers, numbers) / (modes + 1))
        self.back = self.sines * (2 / (modes + 1))
        z = -((np.pi * numbers) ** 2) * dt
        # The coefficients lose all digits near z = 0, and none as means over a circle around z.
        around = z[:, None] + np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
        exp, half = np.exp(around), np.exp(around / 2)
        self.whole, self.half = np.exp(z), np.exp(z / 2)
        self.middle = dt * np.real(((half - 1) / around).mean(1))
        self.first = dt * np.real(((-4 - around + exp * (4 - 3 * around + around**2)) / around**3).mean(1))
        self.between = dt * np.real(((2 + around + exp * (around - 2)) / around**3).mean(1))
        self.last = dt * np.real(((-4 - 3 * around - around**2 + exp * (4 - around)) / around**3).mean(1))

    def reaction(self, equation: Equation, modes: Values) -> Values:
        """The modes of f(u)."""
        return values(equation, modes @ self.sines) @ self.back

    def step(self, equation: Equation, a: Values) -> Values:
        """`a`, shape [..., modes], one step later."""
        at_a = self.reaction(equation, a)
        b = self.half * a + self.middle * at_a
        at_b = self.reaction(equation, b)
        c = self.half * a + self.middle * at_b
        at_c = self.reaction(equation, c)
        d = self.half * b + self.middle * (2 * at_c - at_a)
        at_d = self.reaction(equation, d)
        return self.whole * a + self.first * at_a + 2 * self.between * (at_b + at_c) + self.last * at_d


_steps = cache(_Steps)


def _march(equation: Equation, now: Values, stride: float) -> Iterator[Values]:
    """The modes, shape [..., modes], after each hundredth of time.

    Args:
        stride: what the slope of the reaction times the length of a step stays below. It is steepest at the beginning, where u is high.
    """
    modes = now.shape[-1]
    while True:
        u = now @ _steps(modes, 1.0).sines
        slope = np.abs(values(equation, u + 1e-4) - values(equation, u - 1e-4)).max() / 2e-4
        count = 2
        while slope > stride * HUNDREDTHS * count and count < MOST_STEPS:
            count *= 2
        for _ in range(count):
            now = _steps(modes, 1 / (HUNDREDTHS * count)).step(equation, now)
        yield now


def solution(
    equation: Equation, start: Start, until: int = HUNDREDTHS, *, modes: int = 63, stride: float = 0.1
) -> Values:
    """u at all hundredths, shape [until + 1, 101]: first index time, second place.

    Args:
        until: the last hundredth of time that is wanted.
        modes: sine modes taken.
        stride: in time, as a part of the time in which the reaction changes u.
    """
    first = np.zeros(modes)
    for amplitude, mode in start:
        first[mode - 1] += amplitude
    kept = [first, *islice(_march(equation, first, stride), until)]
    places = np.linspace(0, 1, HUNDREDTHS + 1)
    return np.array(kept) @ np.sin(np.pi * np.outer(np.arange(1, modes + 1), places))


def bounded(equation: Equation, amplitude: float, *, steepest: int, modes: int = 31) -> bool:
    """Whether |u| stays below `BOUND` from every start of at most this amplitude in the first `steepest` modes.

    Such a start lies between two profiles, a plateau with steep flanks and its negative. Solutions never cross (the comparison
    principle), so it is enough to follow those two.
    """
    places = np.arange(1, modes + 1) / (modes + 1)
    profile = amplitude * np.minimum(1, steepest * np.pi * np.minimum(places, 1 - places))
    using = _steps(modes, 1.0)
    with np.errstate(over="ignore", invalid="ignore"):
        for now in islice(_march(equation, np.array([profile, -profile]) @ using.back, 0.5), HUNDREDTHS):
            highest = np.abs(now @ using.sines).max()
            if not highest < BOUND:  # NaN counts as high
                return False
            if highest < amplitude / 5:  # from here on diffusion is stronger than three terms of any kind
                return True
    return True
