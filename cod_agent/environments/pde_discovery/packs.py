"""Where equations and starts come from: presets, draws that are the same on every machine, and two splits that share no support.

A support, the set of an equation's terms, belongs to one split for good, by a hash of its terms. Of a support of the wanted split, signs
and magnitudes are drawn; together they are kept if no start of any task, whatever it is, leads to |u| >= 3. That asks nothing of
the length of a pack, so that a longer one begins with a shorter one.

Source: PDE Discovery of arXiv 2606.20002, where the supports and their signs are lists; those are not public where this was
written from, so here they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from random import Random

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, between, of_eval, shuffled, uniform
from cod_agent.environments.pde_discovery.equations import TERMS, Equation
from cod_agent.environments.pde_discovery.reaction import Start, bounded
from cod_agent.environments.pde_discovery.regression import Support, supports

AMPLITUDE = (0.4, 2.0)
"""Of the starts: the sum of the amplitudes of their modes."""
STRATA = 4
"""Equal parts of that range; of four tasks in a row each has another one."""
MODES = (2, 3)
"""What a second mode may be; the first is 1."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of equations a world has, and how they may be looked at."""

    sizes: tuple[int, ...]
    """How many terms an equation has: one of these, with even chances."""
    points: int
    """Points that may be sampled in a task."""
    noise: float = 0.002
    """Standard deviation of that of u; that of the response is a quarter."""
    terms: Support = tuple(TERMS)
    """The dictionary."""
    steps: int = 6
    """Answers a task may take."""
    remembers: bool = False
    """Whether what was sampled stays in evidence for the later tasks of a run."""

    @property
    def most(self) -> int:
        """The most terms an equation has."""
        return max(self.sizes)


_SMALL = ("u", "u^2", "u^3", "u^4", "sin(2*u)", "(exp(u)-1)", "tanh(u)", "u/(1+u^2)")
_PAPER = Preset(sizes=(1, 2), points=6, remembers=True)
_HARD = replace(_PAPER, sizes=(2, 2, 3))

PRESETS: dict[str, Preset] = {
    "small": Preset(sizes=(1, 2, 2), points=3, noise=0.004, terms=_SMALL),
    "paper": _PAPER,
    "paper-hard": _HARD,
    "paper-forgets": replace(_PAPER, remembers=False),
    "paper-hard-forgets": replace(_HARD, remembers=False),
}


def split_of(support: Support) -> Split:
    """The split a support belongs to: one quarter of all is for evaluation."""
    return "eval" if of_eval(f"family:{' '.join(support)}") else "train"


@cache
def _of_split(terms: Support, size: int, split: Split) -> tuple[Support, ...]:
    return tuple(support for support in supports(terms, size) if split_of(support) == split)


def draw_equation(rng: Random, preset: Preset, split: Split) -> Equation:
    """An equation: support of that split, signs with even chances, magnitudes of two decimals from .5 to 2."""
    size = preset.sizes[below(rng, len(preset.sizes))]
    among = _of_split(preset.terms, size, split)
    while True:
        support = among[below(rng, len(among))]
        equation = {term: (1 - 2 * below(rng, 2)) * between(rng, 50, 200) / 100 for term in support}
        if bounded(equation, AMPLITUDE[1], steepest=MODES[-1]):
            return equation


def stratum(rng: Random, index: int) -> int:
    """In which part of the amplitudes a task lies; `rng` belongs to it and its three neighbours."""
    return shuffled(rng, range(STRATA))[index % STRATA]


def draw_start(rng: Random, stratum: int) -> Start:
    """One or two modes with even chances, in hundredths; a second one has a fifth to two fifths of the amplitude."""
    low, high = AMPLITUDE
    whole = int(100 * (low + (high - low) * (stratum + rng.random()) / STRATA))
    second = int(whole * uniform(rng, 0.2, 0.4)) * below(rng, 2)
    modes = [(whole - second, 1), *([(second, MODES[below(rng, len(MODES))])] if second else [])]
    return tuple(((1 - 2 * below(rng, 2)) * amplitude / 100, mode) for amplitude, mode in modes)


def draw_noise(rng: Random, deviation: float) -> float:
    """As good as Gaussian, by additions alone: never beyond six standard deviations."""
    return deviation * (sum(rng.random() for _ in range(12)) - 6)
