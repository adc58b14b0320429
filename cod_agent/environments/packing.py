"""What the tasks of a pack are: related ones, as the world gives them, or one task again and again (a Ralph loop).

    world = packed(make_world("frozen-lake:small"), "ralph-sample")
    world.pack(4)             # the first task of the world's own pack, four times
    world = packed(make_world("frozen-lake:small"), "ralph-full")
    world.pack(4, 5)          # the second task of its second pack, four times: no task is left out

The names are those of the published packing strategies (arXiv 2606.20002), with a hyphen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

from cod_agent.environments.base import Environment, Form, Recovery, Session, started
from cod_agent.errors import UnknownName
from cod_agent.tasks import Pack, Task

Packing = Literal["cod", "ralph-sample", "ralph-full"]
"""cod: related tasks that share what is hidden; ralph-sample: the first of them, as many times as the pack has tasks; ralph-full:
each of them in turn, a pack of its own for each."""
PACKINGS: tuple[Packing, ...] = get_args(Packing)


class World(Environment, Protocol):
    """An environment with packs of its own."""

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack, of `n` tasks."""
        ...


class RalphLoop:
    """A world whose packs are one task again and again. Everything else is as in the world it is made of.

    Args:
        world: whose tasks are repeated.
        packing: of each pack the first task, or all of them in turn.
    """

    def __init__(self, world: World, packing: Packing = "ralph-sample") -> None:
        self._world, self._packing, self.name = world, packing, world.name
        self.remembers: bool = getattr(world, "remembers", False)
        self.form: Form = getattr(world, "form", "natural")
        self.recovery: Recovery = getattr(world, "recovery", "deterministic")
        self.highest_reward: float = getattr(world, "highest_reward", 1.0)
        self.players: Mapping[str, Callable[..., Any]] = getattr(world, "players", {})

    def pack(self, n: int, index: int = 0) -> Pack:
        """One task `n` times, under an id of its own."""
        full = self._packing == "ralph-full" and n > 0
        at, which = divmod(index, n) if full else (index, 0)
        # All n tasks, so that a world that has fewer says so with its first pack, whichever of them is repeated.
        plain = self._world.pack(n if full else min(n, 1), at)
        name = f"{plain.id}/{which}/{self._packing}" if self._packing == "ralph-full" else f"{plain.id}/{self._packing}"
        return Pack(name, (plain[which],) * n, self, {**plain.data, "packing": self._packing})

    def start(self, task: Task, carried: Any = None) -> Session:
        """As the world does."""
        return started(self._world, task, carried)


def packed(world: World, packing: Packing) -> World:
    """The world with packs of that kind.

    Raises:
        UnknownName: there is no such packing.
    """
    if packing not in PACKINGS:
        raise UnknownName.among("packing", str(packing), list(PACKINGS))
    return world if packing == "cod" else RalphLoop(world, packing)
