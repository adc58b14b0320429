"""FrozenLake-Obscure: find out which of four numbered directions is which, and remember it for the next lake."""

from cod_agent.environments.base import Split
from cod_agent.environments.frozen_lake.maps import MOVES, PRESETS, Preset
from cod_agent.environments.frozen_lake.players import PLAYERS
from cod_agent.environments.frozen_lake.world import FrozenLake, LakeSession

__all__ = ["MOVES", "PLAYERS", "PRESETS", "FrozenLake", "LakeSession", "Preset", "Split"]
