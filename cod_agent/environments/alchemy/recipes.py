"""Where the recipes come from: presets, graphs whose targets can all be made, and graphs of one split only.

A graph is drawn, then kept if every element got its recipes, if it has the targets the preset asks for, each of which can be
made within the rounds, and if it belongs to the wanted split. The split is a property of the graph itself, a hash of what colour
refinement sees of it, so no graph of an evaluation, however its elements are named, ever occurs in training.

Source: Alchemy-Random of arXiv 2606.20002 (`paper`, `paper-hard`, `paper-large`). Of the published code are mended here: targets that
repeat within a pack, targets without a recipe, and a gap of 1 that made recipes across tiers impossible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from cod_agent.environments.base import Split
from cod_agent.environments.draws import below, between, of_eval, shuffled, uniform

Pair = tuple[int, int]
"""Two elements, the smaller number first; the same twice is a pair, too."""

ATTEMPTS = 50
"""To find a free pair for a recipe, before the graph is drawn anew."""


@dataclass(frozen=True, slots=True)
class Preset:
    """What kind of recipes a world has. Ranges are inclusive; numbers in them are drawn for each pack."""

    tiers: tuple[int, int]
    """Tiers, those of the given elements (tier 0) counted."""
    base: tuple[int, int]
    """Elements of tier 0."""
    shrink: tuple[float, float]
    """Elements of a tier, as a share of those one tier below."""
    rounds: int
    """Combinations after which the episode is over."""
    targets: int
    """Different elements to make that a pack has, so the most tasks of a pack."""
    recipes: tuple[int, int] = (1, 1)
    """Recipes of an element, drawn for each."""
    cross: tuple[float, float] = (0.0, 0.0)
    """Probability that the second ingredient comes from further below than the first."""
    gap: int = 1
    """How much further: from so many tiers below that of the first ingredient."""
    noise: tuple[float, float] = (0.0, 0.0)
    """Elements that are good for nothing, as a share of the others of their tier."""
    depth: int = 2
    """How often noise is added; from the second time on half as much, which may be made of earlier noise."""
    limited: bool = False
    """Whether combining uses up what is combined."""


PRESETS: dict[str, Preset] = {
    "tiny": Preset(tiers=(2, 2), base=(4, 4), shrink=(1.0, 1.0), rounds=4, targets=4),
    "small": Preset(tiers=(3, 3), base=(4, 4), shrink=(0.65, 0.8), rounds=6, targets=4),
    "paper": Preset(tiers=(3, 4), base=(3, 4), shrink=(0.4, 0.6), rounds=8, targets=4, cross=(0.0, 0.1)),
    "paper-hard": Preset(
        tiers=(3, 4),
        base=(4, 6),
        shrink=(0.4, 0.8),
        rounds=15,
        targets=8,
        recipes=(1, 2),
        cross=(0.0, 0.05),
        noise=(0.0, 0.3),
        limited=True,
    ),
    "paper-large": Preset(
        tiers=(3, 4),
        base=(10, 15),
        shrink=(0.4, 0.6),
        rounds=15,
        targets=8,
        recipes=(2, 3),
        cross=(0.2, 0.35),
        gap=2,
        noise=(0.15, 0.25),
        depth=3,
    ),
}


@dataclass(frozen=True, slots=True)
class Graph:
    """Who makes what. Elements are numbered: those of tier 0 first, then all others in an order that tells nothing."""

    tiers: tuple[int, ...]
    """Of each element."""
    recipes: Mapping[Pair, int]
    """What a pair makes; a pair that is not there makes nothing."""
    noise: frozenset[int]
    """Elements of which nothing else is made but noise; they are never to be made."""

    @property
    def base(self) -> int:
        """How many elements are given."""
        return self.tiers.count(0)

    def ways(self) -> dict[int, list[Pair]]:
        """The recipes of each element that has some."""
        return ways_of(self.recipes)


E = TypeVar("E", bound=Hashable)


def ways_of(recipes: Mapping[tuple[E, E], E]) -> dict[E, list[tuple[E, E]]]:
    """Of pair -> product: product -> pairs."""
    ways: dict[E, list[tuple[E, E]]] = {}
    for pair, product in recipes.items():
        ways.setdefault(product, []).append(pair)
    return ways


def plan(
    target: E, ways: Mapping[E, Sequence[tuple[E, E]]], held: Mapping[E, int], *, limited: bool
) -> list[tuple[E, E]] | None:
    """A short way to make one `target` more: the pairs to combine, in order. None if there is none.

    Each ingredient is made by the recipe that is shortest for it alone, so what ingredients share is not always made use of.

    Args:
        ways: recipes of each element; nothing is made of itself, by any detour.
        held: how many there are of each element.
        limited: whether combining uses up what is combined.
    """
    found = _made(target, ways, held, limited)
    return found[0] if found else None


def _made(
    target: E, ways: Mapping[E, Sequence[tuple[E, E]]], held: Mapping[E, int], limited: bool
) -> tuple[list[tuple[E, E]], Mapping[E, int]] | None:
    """The steps of `plan`, and what is held after them."""
    best: tuple[list[tuple[E, E]], Mapping[E, int]] | None = None
    for pair in ways.get(target, ()):
        steps: list[tuple[E, E]] = []
        left = held
        for part in pair:
            if not left.get(part):
                made = _made(part, ways, left, limited)
                if made is None:
                    break
                steps, left = steps + made[0], made[1]
            if limited:
                left = {**left, part: left[part] - 1}
        else:
            if best is None or len(steps) + 1 < len(best[0]):
                best = [*steps, pair], {**left, target: left.get(target, 0) + 1}
    return best


def plenty(graph: Graph) -> dict[int, int]:
    """More of each given element than any plan uses up."""
    return dict.fromkeys(range(graph.base), 1 << 30)


def materials(rng: Random, graph: Graph, target: int) -> int:
    """How many there are of each given element when materials are limited: enough for one plan, and up to twice as many."""
    steps = plan(target, graph.ways(), plenty(graph), limited=True) or []
    need = max(Counter(part for pair in steps for part in pair if part < graph.base).values())
    return max(need, int(need * uniform(rng, 1.5, 2.0) + 0.5))


def split_of(graph: Graph) -> Split:
    """The split a graph belongs to: one quarter of all graphs is for evaluation, each with all that only name their elements otherwise."""
    # The prefix is one under which the few graphs of `tiny` and `paper`, too, are divided about as the many of the others.
    return "eval" if of_eval(f"colours:{canonical(graph)}") else "train"


def canonical(graph: Graph) -> str:
    """What colour refinement sees of a graph: the same for graphs that differ in the numbers of their elements only."""
    ways = graph.ways()
    uses: list[list[tuple[int, int]]] = [[] for _ in graph.tiers]
    for (one, other), product in graph.recipes.items():
        uses[one].append((other, product))
        if one != other:
            uses[other].append((one, product))
    colours, told = list(graph.tiers), []
    while True:
        marks = [
            (
                colours[element],
                tuple(sorted(tuple(sorted((colours[a], colours[b]))) for a, b in ways.get(element, ()))),
                tuple(sorted((colours[other], colours[product], other == element) for other, product in uses[element])),
            )
            for element in range(len(colours))
        ]
        told.append(sorted(marks))
        ranks = {mark: rank for rank, mark in enumerate(sorted(set(marks)))}
        if len(ranks) == len(set(colours)):
            return repr(told)
        colours = [ranks[mark] for mark in marks]


def draw_graph(rng: Random, preset: Preset, split: Split) -> tuple[Graph, tuple[int, ...]]:
    """A graph of `split` and its targets in order, `preset.targets` of them, by rejection."""
    while True:
        graph = _grown(rng, preset)
        if graph is None:
            continue
        targets = _targets(rng, graph, preset)
        if targets and split_of(graph) == split:
            return graph, targets


def _grown(rng: Random, preset: Preset) -> Graph | None:
    """A graph; None if it has fewer elements than targets, or some recipe found no free pair."""
    sizes = [between(rng, *preset.base)]
    tiers, shrink = between(rng, *preset.tiers), uniform(rng, *preset.shrink)
    cross, noise = uniform(rng, *preset.cross), uniform(rng, *preset.noise)
    while len(sizes) < tiers:
        sizes.append(max(1, int(sizes[-1] * shrink + 0.5)))
    if sum(sizes[1:]) < preset.targets:
        return None
    layers: list[list[int]] = [[] for _ in sizes]
    recipes: dict[Pair, int] = {}
    elements: list[int] = []

    def add(tier: int, ways: int, pool: list[list[int]]) -> int | None:
        """A new element made of what is in the pool, by its number."""
        elements.append(tier)
        for _ in range(ways):
            pair = _free_pair(rng, tier, pool, recipes, cross, preset.gap)
            if pair is None:
                return None
            recipes[pair] = len(elements) - 1
        return len(elements) - 1

    for tier, size in enumerate(sizes):
        for _ in range(size):
            made = add(tier, between(rng, *preset.recipes) if tier else 0, layers)
            if made is None:
                return None
            layers[tier].append(made)
    real = len(elements)
    for time in range(preset.depth):
        share = noise if time == 0 else noise / 2
        fresh = [
            (tier, add(tier, 1, layers)) for tier in range(1, tiers) for _ in range(int(sizes[tier] * share + 0.5))
        ]
        for tier, made in fresh:
            if made is None:
                return None
            layers[tier].append(made)
    return _renumbered(rng, elements, recipes, range(real, len(elements)), sizes[0])


def _free_pair(
    rng: Random, tier: int, layers: Sequence[Sequence[int]], taken: Mapping[Pair, int], cross: float, gap: int
) -> Pair | None:
    """Ingredients for an element of `tier` that make nothing yet: one from the tier below, one from there or, across, further below."""
    for _ in range(ATTEMPTS):
        second = tier - 1
        if rng.random() < cross and tier >= 2:
            second = between(rng, max(0, tier - 1 - gap), tier - 2)
        one, other = (layers[at][below(rng, len(layers[at]))] for at in (tier - 1, second))
        pair = (min(one, other), max(one, other))
        if pair not in taken:
            return pair
    return None


def _renumbered(rng: Random, tiers: list[int], recipes: dict[Pair, int], noise: range, base: int) -> Graph:
    """The graph, with all but the given elements in random order: neither names nor the inventory tell what came first."""
    order = [*range(base), *shuffled(rng, range(base, len(tiers)))]
    number = {old: new for new, old in enumerate(order)}
    named = {
        (min(number[a], number[b]), max(number[a], number[b])): number[product] for (a, b), product in recipes.items()
    }
    return Graph(tuple(tiers[old] for old in order), named, frozenset(number[old] for old in noise))


def _targets(rng: Random, graph: Graph, preset: Preset) -> tuple[int, ...] | None:
    """Which elements are to be made, in order; None if there are too few that can be.

    A tier is drawn with weight tier + 1, then one of its elements that was not drawn yet; all are shuffled, so that no place in a
    pack is harder than another.
    """
    ways, held = graph.ways(), plenty(graph)
    left: dict[int, list[int]] = {}
    for element in range(graph.base, len(graph.tiers)):
        steps = None if element in graph.noise else plan(element, ways, held, limited=preset.limited)
        if steps and len(steps) <= preset.rounds:
            left.setdefault(graph.tiers[element], []).append(element)
    if sum(map(len, left.values())) < preset.targets:
        return None
    chosen = []
    for _ in range(preset.targets):
        ticket = below(rng, sum(tier + 1 for tier in left))
        for tier in sorted(left):
            ticket -= tier + 1
            if ticket < 0:
                break
        chosen.append(left[tier].pop(below(rng, len(left[tier]))))
        if not left[tier]:
            del left[tier]
    return tuple(shuffled(rng, chosen))
