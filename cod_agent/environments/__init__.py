"""Worlds: the `Environment` protocol and the built-in ones, found by `WORLD` or `WORLD:PRESET`."""

from cod_agent.environments.base import Environment, Form, Recovery, Session, Tool, tools_of

__all__ = ["Environment", "Form", "Recovery", "Session", "Tool", "tools_of"]
