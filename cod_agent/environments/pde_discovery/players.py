"""Scripted players of PDE discovery: one experiment each, by the book; one of them takes notes, `0.7013 -0.2210`, a line a point.

Both sample early, at places where u is as different as the profile lets expect, let the world regress on all the evidence, and finalise
the candidate that explains it best: by the squared errors in units of what noise does to each point (noise of u counts by the
slope of f), and a price for each term. The one that remembers first recalls every point it has noted. That is a good player, not an upper
bound: it chooses its points for the task at hand only, and notes no equations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, pi, sin

import numpy as np

from cod_agent.context import Message
from cod_agent.environments.pde_discovery.equations import TERMS, Equation, Unreadable, Values, read_equation, values
from cod_agent.environments.players import after_note, not_compact, note_in, players_of

MOST = 150
"""Points of a note, the newest: they fit into 4,000 characters."""
PRICE, UNLIKELY = 3.0, 15.0
"""Of a term; of one whose coefficient is none that the rules allow, but for a fit's error."""
LIKELY = (0.45, 2.05)

_POINT = re.compile(r"^-?[0-3]\.[0-9]{4} -?[0-9]{1,4}\.[0-9]{4}$", re.MULTILINE)
_FIT = re.compile(r"^[0-9]{1,8}\.[0-9]{4} (.*u.*)$", re.MULTILINE)
_MODE = r"-?[0-9]\.?[0-9]{0,2} [1-9]"
_START = re.compile(rf"^u0 ({_MODE}(?: {_MODE})?) noise (0\.[0-9]{{1,4}})$", re.MULTILINE)
_LEFT = re.compile(r"(?:^|\n)points ([0-9]+) steps [0-9]+ evidence ([0-9]+)$")


@dataclass(frozen=True, slots=True)
class Bench:
    """What the conversation of a solve episode says."""

    start: Sequence[tuple[float, int]]
    """(Amplitude, mode)."""
    noise: float
    given: int
    """Points that were in evidence from the beginning."""
    left: int
    """Points that may still be sampled."""
    done: frozenset[str]
    """What was done, by its verb."""


def read_bench(messages: Sequence[Message]) -> Bench:
    """What a player has before it.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    start = _START.search(after_note(seen[0])) if seen else None
    first, last = (_LEFT.search(text) for text in (seen[0], seen[-1])) if seen else (None, None)
    if start is None or first is None or last is None:
        raise not_compact("pde-discovery")
    numbers = start[1].split(" ")
    modes = [(float(a), int(m)) for a, m in zip(numbers[::2], numbers[1::2], strict=True)]
    verbs = frozenset(said.content.partition(" ")[0] for said in messages if said.role == "assistant")
    return Bench(modes, float(start[2]), int(first[2]), int(last[1]), verbs)


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """What a player does next: a list of one.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    bench = read_bench(messages)
    seen = [said.content for said in messages if said.role == "user"]
    noted = _POINT.findall(note_in(seen[0]))[-MOST:] if remember and not bench.given else []
    if noted and "recall" not in bench.done:
        return [f"recall {'; '.join(noted)}"]
    if bench.left:
        return [f"sample {'; '.join(f'{x:.2f} 0.01' for x in _places(bench))}"]
    if bench.given and "summarise" not in bench.done:
        return ["summarise"]
    fits = _FIT.findall(seen[-1])
    if not fits:
        return ["regress"]
    lines = dict.fromkeys([*noted, *_POINT.findall("\n".join(seen[1:]))])  # a summary says again what was sampled
    points = np.array([[float(number) for number in line.split(" ")] for line in lines]).reshape(-1, 2)
    return [f"finalise {min(fits, key=lambda fit: _cost(fit, points, bench.noise))}"]


def _places(bench: Bench) -> list[float]:
    """Where to sample at t = .01: where u, if it were for diffusion alone, is spread evenly, away from 0."""
    places = [place / 100 for place in range(1, 100)]
    u = [sum(a * exp(-((m * pi) ** 2) / 100) * sin(m * pi * x) for a, m in bench.start) for x in places]
    low, high, n = min(u), max(u), bench.left
    levels = sorted((low + (high - low) * at / n for at in range(n + 1)), key=abs)[1:]
    return sorted(places[min(range(99), key=lambda at: abs(u[at] - level))] for level in levels)


def _cost(fit: str, points: Values, noise: float) -> float:
    """Of a candidate: twice its negative log-likelihood, and the price of its terms."""
    try:
        equation: Equation = read_equation(fit, list(TERMS))
    except Unreadable:
        return float("inf")
    u, response = points.T
    slope = (values(equation, u + 1e-4) - values(equation, u - 1e-4)) / 2e-4
    variance = noise**2 * (1 / 16 + slope**2)
    return float(((values(equation, u) - response) ** 2 / variance + np.log(variance)).sum()) + sum(
        PRICE if LIKELY[0] <= abs(c) <= LIKELY[1] else UNLIKELY for c in equation.values()
    )


def noted(prompt: str) -> str:
    """The note of a perfect player after a task: the points of the note before it, and what was sampled."""
    points = dict.fromkeys(_POINT.findall(f"{note_in(prompt)}\n{after_note(prompt)}"))
    return "\n".join(list(points)[-MOST:])


PLAYERS = players_of(choices, noted)
