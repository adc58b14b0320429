"""Worlds: the `Environment` protocol and the built-in ones, found by `WORLD` or `WORLD:PRESET`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cod_agent.environments.base import SPLITS, Environment, Form, Recovery, Session, Split, Tool, tools_of
from cod_agent.environments.packing import PACKINGS, Packing, packed
from cod_agent.errors import UnknownName

if TYPE_CHECKING:
    from cod_agent.environments.frozen_lake import FrozenLake

__all__ = [
    "PACKINGS",
    "SPLITS",
    "WORLDS",
    "Environment",
    "Form",
    "FrozenLake",
    "Packing",
    "Recovery",
    "Session",
    "Split",
    "Tool",
    "make_world",
    "packed",
    "tools_of",
]

WORLDS = {
    "alchemy": ("cod_agent.environments.alchemy", "Alchemy", "small"),
    "frozen-lake": ("cod_agent.environments.frozen_lake", "FrozenLake", "small"),
    "grid-navigation": ("cod_agent.environments.grid_navigation", "GridNavigation", "small"),
}
"""World -> (module, class, default preset). A class takes (preset, seed, *, split, form) and has `pack(n, index)`."""


def make_world(name: str, *, seed: int = 0, split: str = "eval", form: Form = "natural") -> Any:
    """The world of that name, WORLD or WORLD:PRESET.

    Raises:
        UnknownName: no such world or preset.
    """
    from importlib import import_module

    world, _, preset = name.partition(":")
    if world not in WORLDS:
        raise UnknownName.among("world", world, list(WORLDS))
    module, made, default = WORLDS[world]
    return getattr(import_module(module), made)(preset or default, seed, split=split, form=form)


def __getattr__(name: str) -> Any:
    if name == "FrozenLake":
        from cod_agent.environments.frozen_lake import FrozenLake

        return FrozenLake
    raise AttributeError(name)
