"""Alchemy-Random: find out which pairs of elements make what, and remember it for the next element to make."""

from cod_agent.environments.alchemy.players import PLAYERS
from cod_agent.environments.alchemy.recipes import PRESETS, Graph, Preset
from cod_agent.environments.alchemy.world import Alchemy, AlchemySession

__all__ = ["PLAYERS", "PRESETS", "Alchemy", "AlchemySession", "Graph", "Preset"]
