"""Tools that agents may be given, beside functions of your own."""

from cod_agent.tools.command import command_tool

__all__ = ["command_tool"]
