"""Alchemy-Random as an environment: which pairs of elements make what is hidden but shared by a pack.

What an agent finds out in one task (by combining) helps in the next ones (by remembering), and nothing else does: names tell
nothing, and every task of a pack asks for another element. Making it is worth 1, everything else 0.

Two forms say the same thing. The natural one explains itself; the compact one, for the shipped tiny policies, is

    make K 2                          the target and its tier
    a b c d                           what is held; `a3 b2` where materials are limited
    a+b                               the agent: a pair
    D: a+b                            the world: what it made, or `none: a+b`, or `lack: a+q` for what is not held
    ...                               and the target and what is held now

A malformed answer ends the episode with reward 0, as in the published environment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random
from string import ascii_lowercase, ascii_uppercase

from cod_agent.environments.alchemy.players import PLAYERS
from cod_agent.environments.alchemy.recipes import PRESETS, Graph, Preset, draw_graph, materials
from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Split
from cod_agent.environments.drawn import DrawnWorld, Place
from cod_agent.environments.draws import below, between, randomness
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Pack

WORLD = "alchemy"

RULES = """\
You are an alchemist. Each turn you combine two of the elements that you hold, or one with itself. A pair makes another \
element or nothing; the order of the two does not matter. Your task is to make the one element that is named.

Every element has a tier. You are given elements of tier 0. An element of tier t is made of one of tier t-1 and \
a second one of tier t-1 or below. Which pairs make what is not told, and the names mean nothing. The recipes are the same \
for all tasks of this series, while the element to make is another one each time. So what you find out by trying also helps \
in later tasks.

{materials} An element that you do not hold costs you the round. You have {rounds} rounds to make the target.

Answer each turn with exactly one pair between answer tags, for example:
<answer>abc + xyz</answer>
Anything else ends the task without success."""

_UNLIMITED = "Combining uses nothing up, and what you make you keep until the task is over."
_LIMITED = (
    "Combining uses up both elements, also where it makes nothing. When you hold fewer than two, the task is over."
)

_ANSWER = re.compile(r"([A-Za-z]{1,32})[ \t]*\+[ \t]*([A-Za-z]{1,32})")
_COMPACT_ANSWER = re.compile(r"([A-Za-z]{1,2}) *\+ *([A-Za-z]{1,2})")
_ENDS = {
    "made": "You made the target.",
    "rounds": "You ran out of rounds.",
    "stuck": "You ran out of materials.",
    MALFORMED: "The answer was malformed: exactly one pair, two elements with a plus between them, between answer tags was expected.",
}


def parse_answer(answer: object, form: Form) -> tuple[str, str] | None:
    """The two names an answer combines, or None if it is malformed: not exactly one pair, or not where it belongs."""
    if not isinstance(answer, str):
        return None
    if form == "compact":
        found = _COMPACT_ANSWER.fullmatch(answer.strip(" \n"))
        return (found[1], found[2]) if found else None
    found = _ANSWER.fullmatch(tagged(answer) or "")
    return (found[1].lower(), found[2].lower()) if found else None


def compact_names(graph: Graph) -> tuple[str, ...]:
    """a, b, c, ... for what is given, then A, B, C, ...; AA, AB, ... where these would not be enough."""
    made = len(graph.tiers) - graph.base
    letters = 1 if made <= len(ascii_uppercase) else 2
    higher = ("".join(name) for name in product(ascii_uppercase, repeat=letters))
    return (*ascii_lowercase[: graph.base], *(name for name, _ in zip(higher, range(made), strict=False)))


def natural_names(rng: Random, graph: Graph) -> tuple[str, ...]:
    """Three to five random letters for each element."""
    names: dict[str, None] = {}
    while len(names) < len(graph.tiers):
        length = between(rng, 3, 5)
        names["".join(ascii_lowercase[below(rng, len(ascii_lowercase))] for _ in range(length))] = None
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Lore:
    """What the tasks of a pack share. It is only read, so that sessions may share it."""

    graph: Graph
    names: Mapping[Form, Sequence[str]]
    """Of each element."""
    targets: Sequence[int]
    """Of each task."""


class AlchemySession:
    """One element to make; all state of the task is here.

    Args:
        lore: recipes and names.
        target: the element to make.
        count: how many of each given element there are; None: combining uses nothing up.
        rounds: combinations allowed.
    """

    def __init__(self, lore: Lore, target: int, count: int | None, rounds: int, form: Form) -> None:
        self._graph, self._names, self._target = lore.graph, lore.names[form], target
        self._count, self._limit, self._form = count, rounds, form
        self._number = {name: element for element, name in enumerate(self._names)}
        self._held, self._round, self._over = self._given(), 0, False

    def reset(self) -> Observation:
        """Hold what is given, and look."""
        self._held, self._round, self._over = self._given(), 0, False
        return Observation(self._view(""))

    def step(self, answer: str) -> Observation:
        """Combine two elements; whatever is malformed ends the episode with reward 0.

        Raises:
            UsageError: the episode was already over.
        """
        if self._over:
            raise UsageError("this target is behind you: the episode is over, start the task again to try once more")
        names = parse_answer(answer, self._form)
        if names is None:
            return self._end(MALFORMED, "invalid" if self._form == "compact" else "You combined nothing.")
        self._round += 1
        pair = self._taken(names)
        made = None if pair is None else self._graph.recipes.get(pair)
        if made is not None:
            self._held[made] = self._held.get(made, 0) + 1 if self._count else 1
        effect = self._effect(names, pair, made)
        if made == self._target:
            return self._end("made", effect)
        if self._round >= self._limit:
            return self._end("rounds", effect)
        if self._count and sum(self._held.values()) < 2:
            return self._end("stuck", effect)
        return Observation(self._view(effect), effect)

    def _given(self) -> dict[int, int]:
        return dict.fromkeys(range(self._graph.base), self._count or 1)

    def _taken(self, names: tuple[str, str]) -> tuple[int, int] | None:
        """The pair of that name, used up if materials are limited; None if it is not there."""
        one, other = (self._number.get(name, -1) for name in names)
        enough = 2 if self._count and one == other else 1
        if self._held.get(one, 0) < enough or self._held.get(other, 0) < enough:
            return None
        if self._count:
            self._held[one] -= 1
            self._held[other] -= 1
        return min(one, other), max(one, other)

    def _end(self, how: str, effect: str) -> Observation:
        self._over = True
        compact = self._form == "compact"
        text = effect if compact else f"{effect} {_ENDS[how]}"
        told = ("invalid" if how == MALFORMED else how) if compact else _ENDS[how]
        feedback = Feedback(reward=float(how == "made"), text=told, ending=how)
        return Observation(text, effect, done=True, feedback=feedback)

    def _effect(self, said: tuple[str, str], pair: tuple[int, int] | None, made: int | None) -> str:
        one, other = said if pair is None else (self._names[element] for element in pair)
        if self._form == "compact":
            return f"{'lack' if pair is None else 'none' if made is None else self._names[made]}: {one}+{other}"
        if pair is None:
            return f"You do not hold what {one} + {other} takes: the round is lost."
        if made is None:
            return f"{one} + {other} made nothing."
        return f"{one} + {other} made {self._names[made]} (tier {self._graph.tiers[made]})."

    def _view(self, effect: str) -> str:
        name, tier = self._names[self._target], self._graph.tiers[self._target]
        if self._form == "compact":
            lines = [effect] if effect else []
            return "\n".join([*lines, f"make {name} {tier}", " ".join(map(self._shown, self._holding()))])
        heading = f"Round {self._round + 1} of {self._limit}. {effect or 'You have not combined anything yet.'}"
        shelves = {
            at: [e for e in self._holding() if self._graph.tiers[e] == at] for at in range(max(self._graph.tiers) + 1)
        }
        listed = "\n".join(f"Tier {at}: {', '.join(map(self._shown, shelf))}" for at, shelf in shelves.items() if shelf)
        return f"{heading}\n\nThe element to make: {name} (tier {tier}).\n\nYou hold:\n{listed}"

    def _holding(self) -> list[int]:
        return sorted(element for element, count in self._held.items() if count)

    def _shown(self, element: int) -> str:
        name = self._names[element]
        if not self._count:
            return name
        return f"{name}{self._held[element]}" if self._form == "compact" else f"{name} ({self._held[element]})"


class Alchemy(DrawnWorld[Preset]):
    """The world `alchemy`; its presets are tiny (10 pairs), small (3 tiers), paper, paper-hard (limited materials), paper-large.

    No graph of recipes of one split, whatever its elements are called, is ever drawn in the other.
    """

    world, presets, players = WORLD, PRESETS, PLAYERS

    def __init__(self, preset: str = "small", seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        super().__init__(preset, seed, split=split, form=form)

    def rules(self) -> str:
        return RULES.format(rounds=self.preset.rounds, materials=_LIMITED if self.preset.limited else _UNLIMITED)

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack of `n` tasks, each of which has another target. A longer pack of the same index begins with the
        tasks of a shorter one.

        Raises:
            UsageError: `n` is not positive or more than the preset's targets, or `index` is negative.
        """
        if n > self.preset.targets:
            raise UsageError(f"{self.name} has {self.preset.targets} different targets a pack, so no pack of {n} tasks")
        return super().pack(n, index)

    def session(self, place: Place) -> AlchemySession:
        preset, lore = self.preset, _lore(place.preset, place.split, place.seed, place.pack)
        if not 0 <= place.index < preset.targets:
            raise UsageError(f"{self.name} has no task {place.index} in a pack: indexes go up to {preset.targets - 1}")
        target, names = lore.targets[place.index], (WORLD, place.preset, place.split, place.seed, place.pack)
        count = materials(randomness(*names, place.index), lore.graph, target) if preset.limited else None
        return AlchemySession(lore, target, count, preset.rounds, self.form)


@lru_cache(1024)
def _lore(preset: str, split: Split, seed: int, pack: int) -> Lore:
    names = (WORLD, preset, split, seed, pack)
    graph, targets = draw_graph(randomness(*names, "recipes"), PRESETS[preset], split)
    called: dict[Form, Sequence[str]] = {
        "natural": natural_names(randomness(*names, "names"), graph),
        "compact": compact_names(graph),
    }
    return Lore(graph, called, targets)
