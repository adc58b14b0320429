"""Scripted players of alchemy: curious ones, one of whom takes notes, `K: a+b` or `none: a+b`, one line a pair that was tried.

Both know what pairs made in this episode; the one that remembers also what its note says. If that is enough to make the target, they
take a shortest way. If not, they try a pair that nobody tried: of elements of one tier, as high as the target's ingredients may be
and as few rounds away as there is; pairs across tiers when those are used up. Where materials are limited, they take the pair
that rules out the fewest others. That is a good player, not an upper bound: it never plans two tasks ahead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations_with_replacement, product

from cod_agent.context import Message
from cod_agent.environments.alchemy.recipes import plan, ways_of
from cod_agent.environments.players import after_note, not_compact, note_in, players_of
from cod_agent.errors import UsageError

Pair = tuple[str, str]
"""Two names in the order of an inventory."""

_NAME = "[a-z]|[A-Z]{1,2}"
_FACT = re.compile(rf"^([A-Z]{{1,2}}|none): ({_NAME})\+({_NAME})$", re.MULTILINE)
_VIEW = re.compile(rf"(?:^|\n)make ([A-Z]{{1,2}}) ([1-9])\n((?:{_NAME})(\d*)(?: (?:{_NAME})\d*)*)$")
_HELD = re.compile(rf"({_NAME})(\d*)")


@dataclass(frozen=True, slots=True)
class Bench:
    """What a compact observation ends with."""

    target: str
    tier: int
    """Of the target."""
    held: Mapping[str, int]
    """How many of each name."""
    limited: bool
    """Whether materials are."""


def read_bench(text: str) -> Bench:
    """The target and the inventory a compact observation ends with.

    Raises:
        UsageError: there is none.
    """
    found = _VIEW.search(text)
    if found is None:
        raise not_compact("alchemy")
    held = {name: int(count or 1) for name, count in _HELD.findall(found[3])}
    return Bench(found[1], int(found[2]), held, bool(found[4]))


def facts_in(text: str) -> dict[Pair, str]:
    """Every `K: a+b` and `none: a+b` line of `text` as pair -> K or none, in order; of a pair told twice the last."""
    facts: dict[Pair, str] = {}
    for made, one, other in _FACT.findall(text):
        if facts.get((one, other), made) != made:
            del facts[one, other]
        facts[one, other] = made
    return facts


def lines_of(facts: Mapping[Pair, str]) -> str:
    """The note that holds `facts`: one line each."""
    return "\n".join(f"{made}: {one}+{other}" for (one, other), made in facts.items())


@dataclass(frozen=True)
class Lore:
    """What follows from facts. Contradictions (a note from elsewhere) are left out: nothing is made of itself, by any detour."""

    facts: Mapping[Pair, str]
    base: Sequence[str]
    tiers: dict[str, int] = field(init=False)
    """Of each element one knows how to make."""

    def __post_init__(self) -> None:
        tiers = dict.fromkeys(self.base, 0)
        made = {pair: product for pair, product in self.facts.items() if product != "none"}
        while fresh := {
            product: 1 + max(tiers[one], tiers[other])
            for (one, other), product in made.items()
            if product not in tiers and one in tiers and other in tiers
        }:
            tiers.update(fresh)
        object.__setattr__(self, "tiers", tiers)

    @cached_property
    def ways(self) -> dict[str, list[Pair]]:
        """The known recipes of each element."""
        tiers = self.tiers
        return ways_of(
            {
                pair: made
                for pair, made in self.facts.items()
                if made in tiers and all(tiers.get(part, 99) < tiers[made] for part in pair)
            }
        )

    def untried(self, tier: int, *, across: bool) -> list[Pair]:
        """Pairs that nobody tried, the higher element of `tier`, the other of the same or (`across`) a lower one."""
        names = sorted(self.tiers, key=str.swapcase)  # as an inventory: small letters first
        top = [name for name in names if self.tiers[name] == tier]
        pairs: Iterable[Pair] = combinations_with_replacement(top, 2)
        if across:
            lower = [name for name in names if self.tiers[name] < tier]
            pairs = ((min(pair, key=str.swapcase), max(pair, key=str.swapcase)) for pair in product(lower, top))
        return [pair for pair in pairs if pair not in self.facts]


def options(messages: Sequence[Message], *, remember: bool = True) -> list[Pair]:
    """What a player may combine in a solve episode: equally good pairs.

    Raises:
        UsageError: the world does not speak its compact form.
    """
    seen = [said.content for said in messages if said.role == "user"]
    if not seen:
        raise UsageError("a player needs a prompt: there is no user message")
    bench = read_bench(seen[-1])
    note = note_in(seen[0]) if remember else ""
    lore = Lore(facts_in("\n".join([note, *seen[1:]])), _given(seen[0]))
    known = plan(bench.target, lore.ways, bench.held, limited=bench.limited)
    if known:
        return known[:1]
    tiers = [*range(bench.tier - 1, -1, -1), *range(bench.tier, max(lore.tiers.values()) + 1)]
    for across in (False, True):
        for tier in tiers:
            found = _nearest(lore, bench, lore.untried(tier, across=across))
            if found:
                return found
    return _anything(bench)


def _given(first: str) -> list[str]:
    return [name for name in read_bench(first).held if name.islower()]


def _nearest(lore: Lore, bench: Bench, pairs: Sequence[Pair]) -> list[Pair]:
    """First steps towards those of `pairs` that take the fewest rounds and, where materials are limited, rule out the fewest others."""
    best: tuple[int, int] | None = None
    found: dict[Pair, None] = {}
    ways = dict(lore.ways)
    for pair in pairs:
        ways[""] = [pair]  # as if it made something without a name
        steps = plan("", ways, bench.held, limited=bench.limited)
        if steps is None:
            continue
        worth = len(steps), -_possible(pairs, bench.held, pair) if bench.limited else 0
        if best is None or worth < best:
            best, found = worth, {}
        if worth == best:
            found[steps[0]] = None
    return list(found)


def _possible(pairs: Sequence[Pair], held: Mapping[str, int], used: Pair) -> int:
    """How many others of `pairs` are still there when `used` is used up."""
    left = dict(held)
    for part in used:
        left[part] = left.get(part, 0) - 1
    enough = {name for name, count in left.items() if count > 0}
    double = {name for name, count in left.items() if count > 1}
    return sum(
        one in enough and other in (double if one == other else enough) and (one, other) != used for one, other in pairs
    )


def _anything(bench: Bench) -> list[Pair]:
    """Where everything was tried and nothing helps: any pair one holds."""
    names = list(bench.held)
    return [
        (one, other)
        for at, one in enumerate(names)
        for other in names[at:]
        if one != other or not bench.limited or bench.held[one] > 1
    ]


def choices(messages: Sequence[Message], *, remember: bool = True) -> list[str]:
    """`options`, as answers."""
    return [f"{one}+{other}" for one, other in options(messages, remember=remember)]


def noted(prompt: str) -> str:
    """The note of a perfect player after a task: the note before it and what happened; of a pair told twice the last."""
    return lines_of(facts_in(f"{note_in(prompt)}\n{after_note(prompt)}"))


PLAYERS = players_of(choices, noted)
