"""Worlds: the `Environment` protocol and the built-in ones, found by `WORLD` or `WORLD:PRESET`, beside those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cod_agent.environments.base import SPLITS, Environment, Form, Recovery, Session, Split, Tool, tools_of
from cod_agent.environments.named import WORLDS, make_world
from cod_agent.environments.packing import PACKINGS, Packing, packed

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


def __getattr__(name: str) -> Any:
    if name == "FrozenLake":
        from cod_agent.environments.frozen_lake import FrozenLake

        return FrozenLake
    raise AttributeError(name)
