"""What an agent may do, and the strict reading of it. The grammar, the same in both forms:

    sample X T; X T; ...         also: sample x=.25 t=.1; (0.5, 0.1)
    recall U R; U R; ...         also: recall u=.25 r=.1, and as points are shown: u = .25, response = .1
    summarise
    regress                      all supports; `regress 2` or `regress max_terms=2`: of at most so many terms
    regress TERM, TERM | TERM    these supports
    finalise EQUATION

Words may be written in any case and with a z; a line break separates points as a semicolon does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cod_agent.environments.pde_discovery.equations import TERMS, Equation, Unreadable, quoted, read_equation, read_term
from cod_agent.environments.pde_discovery.regression import Support

LONGEST = 4000
"""Characters of an action."""
MOST_SUPPORTS = 8

Verb = Literal["sample", "recall", "summarise", "regress", "finalise"]

_NUMBER = r"([+-]?(?:[0-9]{1,4}(?:\.[0-9]{1,12})?|\.[0-9]{1,12}))"
_PAIRS = {
    verb: re.compile(
        rf"\( ?(?:{one}=)?{_NUMBER}[ ,](?:{other}=)?{_NUMBER} ?\)|(?:{one}=)?{_NUMBER}[ ,](?:{other}=)?{_NUMBER}"
    )
    for verb, one, other in (("sample", "x", "t"), ("recall", "u", "r(?:esponse)?"))
}
_WORD = re.compile(r"\s*([A-Za-z]{1,12})(.*)", re.DOTALL)
_AROUND = re.compile(r" ?([=,]) ?")
_MOST = re.compile(r"(?:max_terms=)?([1-9])")


@dataclass(frozen=True, slots=True)
class Action:
    """One of them."""

    verb: Verb
    points: Sequence[tuple[float, float]] = ()
    """(x, t) to sample, or (u, response) to recall."""
    most: int = 0
    """Terms of the supports to try; 0: as many as an equation can have."""
    supports: Sequence[Support] = ()
    """Those to try; none: all."""
    equation: Equation = field(default_factory=dict)
    """To finalise."""


def read_action(text: str, known: Sequence[str]) -> Action:
    """The action that `text` is, with terms of `known`.

    Raises:
        Unreadable: it is none.
        Refused: it names a term that is none of `known`.
    """
    if len(text) > LONGEST:
        raise Unreadable(f"an action has at most {LONGEST} characters")
    found = _WORD.fullmatch(text)
    verb = found[1].lower().replace("ize", "ise") if found else ""
    if found is None or verb not in _READERS:
        raise Unreadable(f"{quoted(text)} begins with none of {', '.join(_READERS)}")
    return _READERS[verb](found[2].strip(), known)


def _sample(rest: str, known: Sequence[str]) -> Action:
    return Action("sample", _pairs("sample", rest))


def _recall(rest: str, known: Sequence[str]) -> Action:
    return Action("recall", _pairs("recall", rest))


def _summarise(rest: str, known: Sequence[str]) -> Action:
    if rest:
        raise Unreadable(f"nothing follows summarise, not {quoted(rest)}")
    return Action("summarise")


def _regress(rest: str, known: Sequence[str]) -> Action:
    number = _MOST.fullmatch("".join(rest.lower().split()))
    if number or not rest:
        return Action("regress", most=int(number[1]) if number else 0)
    parts = rest.split("|")
    if len(parts) > MOST_SUPPORTS:
        raise Unreadable(f"at most {MOST_SUPPORTS} candidates can be tried at once, not {len(parts)}")
    tried = []
    for part in parts:
        terms = [read_term(term, known) for term in part.split(",")]
        if len(set(terms)) < len(terms):
            raise Unreadable(f"a term stands twice in {quoted(part)}")
        tried.append(tuple(sorted(terms, key=list(TERMS).index)))
    return Action("regress", supports=tuple(dict.fromkeys(tried)))


def _finalise(rest: str, known: Sequence[str]) -> Action:
    return Action("finalise", equation=read_equation(rest, known))


_READERS: dict[str, Callable[[str, Sequence[str]], Action]] = {
    "sample": _sample,
    "recall": _recall,
    "summarise": _summarise,
    "regress": _regress,
    "finalise": _finalise,
}


def _pairs(verb: Verb, text: str) -> tuple[tuple[float, float], ...]:
    pairs = []
    for part in text.lower().replace("\n", ";").split(";"):
        said = _AROUND.sub(r"\1", " ".join(part.split()))
        if not said:
            continue
        found = _PAIRS[verb].fullmatch(said)
        if found is None:
            raise Unreadable(f"{quoted(part)} is no pair of numbers to {verb}")
        one, other = (float(number) for number in found.groups() if number)
        pairs.append((one, other))
    if not pairs:
        raise Unreadable(f"{verb} needs at least one pair of numbers")
    return tuple(pairs)
