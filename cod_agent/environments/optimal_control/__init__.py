"""Optimal control: steer a cart that answers in a way nobody tells, by a law written down beforehand; remember how it answered."""

from cod_agent.environments.optimal_control.dynamics import PRESETS, Dynamics, Flight, Preset, Trip, flown
from cod_agent.environments.optimal_control.players import PLAYERS
from cod_agent.environments.optimal_control.world import ControlSession, OptimalControl

__all__ = ["PLAYERS", "PRESETS", "ControlSession", "Dynamics", "Flight", "OptimalControl", "Preset", "Trip", "flown"]
