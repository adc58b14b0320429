"""Sparse regression: which few terms explain the evidence, and with what coefficients.

Every support up to a number of terms is tried (575 of three out of fifteen: nothing needs to be screened away), each by least squares with
a ridge of 1e-8, its coefficients rounded to three decimals, and judged by the largest error it leaves.

Source: PDE Discovery of arXiv 2606.20002, whose regression screens the terms first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np

from cod_agent.environments.pde_discovery.equations import TERMS, Equation, Values, values

RIDGE = 1e-8
BEST = 3
"""Candidates that are shown of each number of terms."""

Support = tuple[str, ...]
"""Terms in the order of `TERMS`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An equation that was fitted."""

    equation: Equation
    error: float
    """The largest |f(u) - response| over the evidence."""
    condition: float
    """Of the design, its columns brought to one length: large where the evidence cannot tell the terms apart."""


@cache
def supports(terms: Support, size: int) -> tuple[Support, ...]:
    """All supports of so many terms."""
    return tuple(combinations(terms, size))


def fitted(points: Values, tried: Sequence[Support], best: int | None = None) -> list[Candidate]:
    """The candidates of some supports, the least error first.

    Args:
        points: the evidence, shape [n, 2]: u and response.
        tried: supports, all of one size.
        best: how many candidates are wanted; None: all.
    """
    u, response = points.T
    names = sorted({term for support in tried for term in support}, key=list(TERMS).index)
    columns = np.stack([TERMS[name](u) for name in names], axis=1)
    place = {name: at for at, name in enumerate(names)}
    chosen = np.array([[place[term] for term in support] for support in tried])
    designs = columns[:, chosen].transpose(1, 0, 2)  # [supports, n, size]
    normal = designs.transpose(0, 2, 1) @ designs
    right = designs.transpose(0, 2, 1) @ response
    ridged = normal + RIDGE * np.eye(chosen.shape[1])
    try:
        found = np.linalg.solve(ridged, right[..., None])[..., 0]
    except (
        np.linalg.LinAlgError
    ):  # one high point, recalled a hundred times: in so large numbers the ridge is rounded away
        found = (np.linalg.pinv(ridged, hermitian=True) @ right[..., None])[..., 0]
    found = np.clip(np.round(found, 3), -999, 999) + 0.0
    errors = np.abs((designs @ found[..., None])[..., 0] - response).max(1)
    return [
        Candidate(dict(zip(tried[at], found[at].tolist(), strict=True)), float(errors[at]), _condition(normal[at]))
        for at in np.argsort(errors, kind="stable")[:best]
    ]


def _condition(normal: Values) -> float:
    lengths = np.sqrt(np.maximum(np.diagonal(normal), 1e-30))
    spread = np.linalg.eigvalsh(normal / np.outer(lengths, lengths))
    return float(np.sqrt(max(spread[-1], 1e-12) / max(spread[0], 1e-12)))


def judged(equation: Equation, points: Values, like: Candidate) -> Candidate:
    """A candidate with the terms of another and coefficients of its own, by what it leaves of the points, shape [n, 2]."""
    return replace(like, equation=equation, error=float(np.abs(values(equation, points[:, 0]) - points[:, 1]).max()))


def searched(points: Values, terms: Support, most: int) -> list[Candidate]:
    """Of each number of terms up to `most` the best candidates, the smaller first."""
    return [one for size in range(1, most + 1) for one in fitted(points, supports(terms, size), BEST)]


def tried(points: Values, wanted: Sequence[Support]) -> list[Candidate]:
    """The candidates of these supports, the smaller first."""
    sizes = sorted({len(support) for support in wanted})
    return [one for size in sizes for one in fitted(points, [some for some in wanted if len(some) == size])]
