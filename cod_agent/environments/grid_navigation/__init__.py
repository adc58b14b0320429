"""Grid Navigation: cross a field whose costs are hidden, see what you pay for, and remember it for the next trip."""

from cod_agent.environments.grid_navigation.fields import PRESETS, Preset
from cod_agent.environments.grid_navigation.players import PLAYERS
from cod_agent.environments.grid_navigation.world import GridNavigation, GridSession

__all__ = ["PLAYERS", "PRESETS", "GridNavigation", "GridSession", "Preset"]
