"""Reaction terms and equations: their values, how they are written, and the strict reading of what somebody wrote.

An equation is a sum of terms with coefficients, written `1.25*u - 0.8*u^3`. What is read is looked up: a term by one of its spellings
in a table, a coefficient by a pattern of at most ten characters. Nothing is ever evaluated.

Source: PDE Discovery of arXiv 2606.20002 for the fifteen terms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Equation = Mapping[str, float]
"""Term -> coefficient; the terms in the order of `TERMS`."""

TERMS: dict[str, Callable[[Values], Values]] = {
    "u": lambda u: u,
    "u^2": lambda u: u * u,
    "u^3": lambda u: u * u * u,
    "u^4": lambda u: (u * u) ** 2,
    "u^5": lambda u: u * (u * u) ** 2,
    "u^7": lambda u: u * (u * u) ** 3,
    "sin(u)": np.sin,
    "sin(2*u)": lambda u: np.sin(2 * u),
    "(exp(u)-1)": np.expm1,
    "log(1+u^2)": lambda u: np.log1p(u * u),
    "tanh(u)": np.tanh,
    "u/(1+u^2)": lambda u: u / (1 + u * u),
    "u^2/(1+u^2)": lambda u: u * u / (1 + u * u),
    "u^4/(1+u^4)": lambda u: (u * u) ** 2 / (1 + (u * u) ** 2),
    "u/(1+u+u^2)": lambda u: u / (1 + u + u * u),
}
"""The dictionary: each term as it is written here, and its values. All are 0 at u = 0."""

_OTHERWISE = {
    "u*u": "u^2",
    "u*u*u": "u^3",
    "sin(2u)": "sin(2*u)",
    "exp(u)-1": "(exp(u)-1)",
    "(e^u-1)": "(exp(u)-1)",
    "e^u-1": "(exp(u)-1)",
    "expm1(u)": "(exp(u)-1)",
    "log(u^2+1)": "log(1+u^2)",
    "ln(1+u^2)": "log(1+u^2)",
    "ln(u^2+1)": "log(1+u^2)",
    "u/(u^2+1)": "u/(1+u^2)",
    "u^2/(u^2+1)": "u^2/(1+u^2)",
    "u^4/(u^4+1)": "u^4/(1+u^4)",
    "u/(u^2+u+1)": "u/(1+u+u^2)",
}
_SPELLINGS = sorted([(name, name) for name in TERMS] + list(_OTHERWISE.items()), key=lambda pair: -len(pair[0]))
"""(Spelling, term), the longest first: `u^2/(1+u^2)` begins with `u`."""

_SAME = str.maketrans({"\u2212": "-", "\u00b7": "*", "\u00d7": "*", "\u00b2": "^2", "\u00b3": "^3"})
_COEFFICIENT = re.compile(r"([+-])?(?:([0-9]{1,3}(?:\.[0-9]{1,6})?|\.[0-9]{1,6})\*?)?")
_LEFT = ("f(u)=", "u_t=u_xx")


class Unreadable(Exception):
    """What was written is no equation, term or number; `str()` says what is wrong and where."""


class Refused(Exception):
    """A well-formed action that cannot be done; `str()` says why."""


def values(equation: Equation, u: Values) -> Values:
    """f(u), of the shape of `u`."""
    total = np.zeros_like(u)
    for term, coefficient in equation.items():
        total += coefficient * TERMS[term](u)
    return total


def written(equation: Equation) -> str:
    """`1.25*u - 0.8*u^3`: coefficients of three decimals, without zeros at their end."""
    text = ""
    for term, coefficient in equation.items():
        sign = "-" if coefficient < 0 else "+"
        text += (f" {sign} " if text else sign.strip("+")) + f"{decimals(abs(coefficient))}*{term}"
    return text


def decimals(number: float) -> str:
    """At most three decimals, without zeros at their end: `1.25`, `-0.8`, `2`."""
    return f"{number + 0.0:.3f}".rstrip("0").rstrip(".")


def read_term(text: str, known: Sequence[str]) -> str:
    """The term that `text` is.

    Raises:
        Unreadable: it is none.
        Refused: it is none of `known`.
    """
    said = _plain(text)
    term = next((term for spelling, term in _SPELLINGS if spelling == said), "")
    if not term:
        raise Unreadable(f"{quoted(text)} is none of the terms: {', '.join(known)}")
    return _known(term, known)


def _known(term: str, known: Sequence[str]) -> str:
    if term not in known:
        raise Refused(f"{term} is none of the terms here: {', '.join(known)}")
    return term


def read_equation(text: str, known: Sequence[str]) -> dict[str, float]:
    """The equation that `text` is: terms of `known`, each at most once, with a coefficient below 1000 or none, which means 1.

    Raises:
        Unreadable: it is something else.
        Refused: a term is none of `known`.
    """
    said, found, at = _plain(text), dict[str, float](), 0
    for left in _LEFT:
        said = said.removeprefix(left)
    while at < len(said):
        head = _COEFFICIENT.match(said, at)  # of what may be missing, so that there always is a match
        sign, number = head.groups() if head else (None, None)
        begins = head.end() if head else at
        term = next(((spelling, term) for spelling, term in _SPELLINGS if said.startswith(spelling, begins)), None)
        if term is None or (at > 0 and sign is None):
            raise Unreadable(f"at {quoted(said[at:])} a sign, a coefficient and one of {', '.join(known)} was expected")
        if term[1] in found:
            raise Unreadable(f"{term[1]} stands there twice")
        found[_known(term[1], known)] = float(number or 1) * (-1 if sign == "-" else 1)
        at = begins + len(term[0])
    if not found:
        raise Unreadable("an equation names at least one term")
    return {term: found[term] for term in TERMS if term in found}


def quoted(text: str) -> str:
    """The beginning of what somebody wrote, fit to be shown: printable ASCII, at most 24 characters."""
    shown = "".join(letter if " " <= letter <= "~" else "?" for letter in text.strip()[:24])
    return f"'{shown}'"


def _plain(text: str) -> str:
    """Lower case, no spaces, one way to write a power, a product and a minus."""
    return "".join(text.translate(_SAME).lower().split()).replace("**", "^")
