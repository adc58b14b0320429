"""Worlds in one word: `cod eval harder` measures several of them, each in packs of the size that the suite has.

    all             The default preset of every built-in world, in packs of 4: a first look at all kinds of things that can be hidden.
    cross-domain    The presets that one trains with, in packs of 4. For a model trained in one of these worlds, the others say whether
                    what it learnt is to take notes or to know that world; none is made harder, so that only the world is new.
    harder          The hard presets, in packs of 8 instead of 4: longer ways, larger fields, materials that run out, more terms.
                    Whether the habit of taking notes holds where there is more to note and more depends on it.
    published-8b    What the published 8B model was trained in (both worlds, mixed) and elsewhere, as it was measured: in packs of 8.
    published-27b   The same of the published 27B model, whose mixture were the three worlds of numbers.
    tiny            The presets that the shipped tiny policies can read, in packs of 4. For a look within minutes on two cores.

The published evaluation is that of arXiv 2606.20002. In the two `published` suites, environments remember as they did there, and
`terminal:paper-hard` shares nothing between the tasks of a pack: a note has little to carry. In the others the same worlds are taken as
they forget, or share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from cod_agent.environments import WORLDS, make_world
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.plan import Plan


@dataclass(frozen=True, slots=True)
class Suite:
    """Worlds, and how many tasks their packs have if nobody says otherwise."""

    worlds: tuple[str, ...]
    pack_size: int


SUITES = {
    "all": Suite(tuple(f"{world}:{default}" for world, (_, _, default) in WORLDS.items()), 4),
    "cross-domain": Suite(
        (
            "frozen-lake:paper",
            "alchemy:paper",
            "grid-navigation:paper-forgets",
            "terminal:paper-shared",
            "learn2ask:paper-shared",
            "optimal-control:paper",
            "pde-discovery:paper-forgets",
        ),
        4,
    ),
    "harder": Suite(
        (
            "frozen-lake:paper-hard",
            "alchemy:paper-hard",
            "grid-navigation:paper-hard-forgets",
            "pde-discovery:paper-hard-forgets",
        ),
        8,
    ),
    "published-8b": Suite(("frozen-lake:paper-hard", "alchemy:paper-hard", "terminal:paper-hard"), 8),
    "published-27b": Suite(
        ("pde-discovery:paper-hard", "optimal-control:paper-improve", "grid-navigation:paper-hard"), 8
    ),
    "tiny": Suite(("frozen-lake:small", "alchemy:tiny", "grid-navigation:tiny"), 4),
}


def parts_of(plan: Plan, names: Sequence[str], sizes: Sequence[int] = ()) -> tuple[Plan, ...]:
    """A plan for each world and each size.

    Args:
        plan: what they have in common. Its pack size counts for worlds outside of suites where no size is given.
        names: worlds and suites.
        sizes: of packs.

    Raises:
        UnknownName: a word that is neither a suite nor a world.
        UsageError: the same world and size twice.
    """
    cells: list[tuple[str, int]] = []
    for name in names:
        if name in SUITES:
            worlds, usual = SUITES[name].worlds, SUITES[name].pack_size
        else:
            _refuse_near_miss(name)
            worlds, usual = (name,), plan.pack_size
        cells += [(world, size) for world in worlds for size in sizes or (usual,)]
    for cell, count in Counter(cells).items():
        if count > 1:
            raise UsageError(f"{cell[0]} in packs of {cell[1]} is asked for {count} times: name it once")
    several = {world for world, count in Counter(world for world, _ in cells).items() if count > 1}
    return tuple(
        replace(plan, world=world, pack_size=size, agent=f"{plan.agent}/{size}" if world in several else plan.agent)
        for world, size in cells
    )


def refuse_suite(name: str) -> None:
    """For where worlds are named and suites are not. Raises: UnknownName, for a word that is no world but a suite."""
    if name in SUITES:
        try:
            make_world(name)
        except UnknownName:
            inside = ", ".join(SUITES[name].worlds)
            raise UnknownName(
                f"no world called {name!r}: that is a suite of cod eval; its worlds are {inside}"
            ) from None


def _refuse_near_miss(name: str) -> None:
    """Raises: UnknownName, for a word that is no world but nearly a suite; other words are for `make_world` to judge."""
    if ":" not in name and get_close_matches(name, SUITES):
        try:
            make_world(name)
        except UnknownName:
            raise UnknownName.among("suite", name, list(SUITES)) from None
