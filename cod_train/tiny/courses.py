"""What each world gives to cloning, beside its scripted player: any answer at all, the whole truth, and the words of its facts.

A world is taught in one of its presets, whose facts a tiny policy has words for (`cod_train.tiny.tokenizer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from cod_agent.context import CLOSE, OPEN, Message
from cod_agent.environments.alchemy import players as alchemists
from cod_agent.environments.alchemy import recipes
from cod_agent.environments.alchemy.world import compact_names
from cod_agent.environments.draws import below, randomness, shuffled
from cod_agent.environments.frozen_lake import MOVES, maps
from cod_agent.environments.frozen_lake import players as lakes
from cod_agent.environments.grid_navigation import fields
from cod_agent.environments.grid_navigation import players as travellers
from cod_agent.environments.players import Choices
from cod_agent.tasks import Pack
from cod_train.tiny.tokenizer import CELLS, CODES, COSTS, EFFECTS, FACTS, PAIRS, PRODUCTS

_LAKE, _ALCHEMY, _GRID = "frozen-lake", "alchemy", "grid-navigation"


@dataclass(frozen=True, slots=True)
class Course:
    """One world."""

    choices: Choices
    """What the player may answer: equally good answers."""
    noted: Callable[[str], str]
    """The prompt of an update -> its new note."""
    wild: Callable[[Sequence[Message], Random], str]
    """A random answer that is well formed."""
    truth: Callable[[Pack, Random], list[str]]
    """The lines of a note that holds all there is to know in a pack; only a teacher may see it."""
    keys: tuple[str, ...]
    """A fact is a key and a value, a token each."""
    values: tuple[str, ...]
    drill: Callable[[Random], tuple[str, str]] | None = None
    """The prompt of a task whose note has the answer, and the answer; None where lives have enough of these."""

    def garbled(self, line: str, dice: Random) -> str:
        """A line of a note with any value at all."""
        return f"{line.partition(':')[0]}:{self.values[below(dice, len(self.values))]}"


# ---- frozen lakes ----


def hidden_mapping(pack: Pack) -> dict[int, str]:
    """The secret of a pack of lakes: direction -> move."""
    return maps.draw_mapping(_hidden(_LAKE, pack, "directions"))


def _any_direction(messages: Sequence[Message], dice: Random) -> str:
    return f"{list(MOVES)[below(dice, 4)]}? Direction {1 + below(dice, 4)}"


def _all_directions(pack: Pack, dice: Random) -> list[str]:
    return lakes.lines_of(lakes.known([tuple(hidden_mapping(pack).values())])).split("\n")


# ---- alchemy:tiny ----


def _any_pair(messages: Sequence[Message], dice: Random) -> str:
    return PAIRS[below(dice, len(PAIRS))]


def _all_pairs(pack: Pack, dice: Random) -> list[str]:
    """In random order, as they might have been tried."""
    preset, hidden = recipes.PRESETS[pack.data["preset"]], _hidden(_ALCHEMY, pack, "recipes")
    graph, _ = recipes.draw_graph(hidden, preset, pack.data["split"])
    names = compact_names(graph)
    made = {f"{names[one]}+{names[other]}": names[product] for (one, other), product in graph.recipes.items()}
    return [f"{made.get(pair, 'none')}: {pair}" for pair in shuffled(dice, PAIRS)]


def _look_up(dice: Random) -> tuple[str, str]:
    """A note of any length, and one of the elements that it knows how to make."""
    pairs = shuffled(dice, PAIRS)[: 1 + below(dice, len(PAIRS))]
    products = shuffled(dice, PRODUCTS)[: 1 + below(dice, len(PRODUCTS))]
    made = dict(zip(pairs, products, strict=False))
    wanted, product = list(made.items())[below(dice, len(made))]
    note = "\n".join(f"{made.get(pair, 'none')}: {pair}" for pair in shuffled(dice, pairs))
    return f"{OPEN}\n{note}\n{CLOSE}\nmake {product} 1\na b c d", wanted


# ---- grid-navigation:tiny ----


def _any_move(messages: Sequence[Message], dice: Random) -> str:
    at, _, _ = travellers.read_trip(messages[-1].content)
    here = fields.name_of(*at)
    ends = [cell for cell in CELLS if (cell[0] == here[0]) != (cell[1] == here[1])]
    return ends[below(dice, len(ends))]


def _all_costs(pack: Pack, dice: Random) -> list[str]:
    preset, hidden = fields.PRESETS[pack.data["preset"]], _hidden(_GRID, pack, "field")
    field = fields.draw_field(hidden, preset, pack.data["split"])
    return [f"{cell}: {cost // 10}" for cell, cost in zip(CELLS, field.costs, strict=True)]


def _hidden(world: str, pack: Pack, what: str) -> Random:
    """The randomness that a world draws a pack's secret from."""
    data = pack.data
    return randomness(world, data["preset"], data["split"], data["seed"], data["pack"], what)


COURSES = {
    _LAKE: Course(
        choices=lakes.choices,
        noted=lambda prompt: lakes.lines_of(lakes.noted(prompt)),
        wild=_any_direction,
        truth=_all_directions,
        keys=FACTS,
        values=CODES,
    ),
    _ALCHEMY: Course(
        choices=alchemists.choices,
        noted=alchemists.noted,
        wild=_any_pair,
        truth=_all_pairs,
        keys=EFFECTS,
        values=tuple(f" {pair}" for pair in PAIRS),
        drill=_look_up,
    ),
    _GRID: Course(
        choices=travellers.choices,
        noted=travellers.noted,
        wild=_any_move,
        truth=_all_costs,
        keys=tuple(f"{cell}:" for cell in CELLS),
        values=COSTS,
    ),
}
"""By world."""


def course_of(world: str) -> Course:
    """Of a world, WORLD:PRESET."""
    return COURSES[world.partition(":")[0]]
