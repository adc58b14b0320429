"""What the tasks of a pack are: related ones, as the world gives them, or one task again and again (a Ralph loop).

    world = packed(make_world("frozen-lake:small"), "ralph-sample")
    world.pack(4)             # the first task of the world's own pack, four times

The names are those of the published packing strategies (arXiv 2606.20002), with a hyphen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

from cod_agent.environments.base import Environment, Form, Recovery, Session
from cod_agent.errors import UnknownName
from cod_agent.tasks import Pack, Task

Packing = Literal["cod", "ralph-sample"]
"""cod: related tasks that share what is hidden; ralph-sample: the first of them, as many times as the pack has tasks."""
PACKINGS: tuple[Packing, ...] = get_args(Packing)


class World(Environment, Protocol):
    """An environment with packs of its own."""

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack, of `n` tasks."""
        ...


class RalphLoop:
    """A world whose packs are one task again and again. Everything else is as in the world it is made of.

    Args:
        world: whose first task of each pack is repeated.
    """

    def __init__(self, world: World) -> None:
        self._world, self.name = world, world.name
        self.form: Form = getattr(world, "form", "natural")
        self.recovery: Recovery = getattr(world, "recovery", "deterministic")
        self.players: Mapping[str, Callable[..., Any]] = getattr(world, "players", {})

    def pack(self, n: int, index: int = 0) -> Pack:
        """The first task of the world's pack, `n` times, under an id of its own."""
        plain = self._world.pack(n, index)
        return Pack(f"{plain.id}/ralph-sample", (plain[0],) * n, self, {**plain.data, "packing": "ralph-sample"})

    def start(self, task: Task) -> Session:
        """As the world does."""
        return self._world.start(task)


def packed(world: World, packing: Packing) -> World:
    """The world with packs of that kind.

    Raises:
        UnknownName: there is no such packing.
    """
    if packing not in PACKINGS:
        raise UnknownName.among("packing", str(packing), list(PACKINGS))
    return world if packing == "cod" else RalphLoop(world)
