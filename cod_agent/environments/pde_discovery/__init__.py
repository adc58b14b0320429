"""PDE Discovery: find the reaction term that all rods of a pack share, from few noisy points of each."""

from cod_agent.environments.pde_discovery.equations import TERMS
from cod_agent.environments.pde_discovery.packs import PRESETS, Preset
from cod_agent.environments.pde_discovery.players import PLAYERS
from cod_agent.environments.pde_discovery.world import PdeDiscovery, PdeSession

__all__ = ["PLAYERS", "PRESETS", "TERMS", "PdeDiscovery", "PdeSession", "Preset"]
