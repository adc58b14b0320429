"""Terminal: jobs for a simulated shell on two simulated computers, which the tasks of a pack may share."""

from cod_agent.environments.terminal.places import PRESETS, Preset
from cod_agent.environments.terminal.players import PLAYERS
from cod_agent.environments.terminal.world import Terminal, TerminalSession

__all__ = ["PLAYERS", "PRESETS", "Preset", "Terminal", "TerminalSession"]
