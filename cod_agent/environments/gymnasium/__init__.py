"""Gymnasium, both ways: its environments as worlds of ours, and our worlds as its environments.

    world = from_gymnasium("CliffWalking-v1", shuffled=True)
    world.pack(4)                               # four tasks, whose numbered actions mean the same things

    env = to_gymnasium(lake, lake.pack(4))
    env = gymnasium.make("cod/frozen-lake-small-v0", seed=1, pack=0, size=4)

Importing this module makes the ids `cod/WORLD-PRESET-v0` known to Gymnasium, where it is installed.
"""

from __future__ import annotations

import contextlib

from cod_agent.environments.gymnasium.adopted import GymnasiumWorld, from_gymnasium
from cod_agent.environments.gymnasium.exported import make, register, to_gymnasium
from cod_agent.errors import MissingExtra

__all__ = ["GymnasiumWorld", "from_gymnasium", "make", "register", "to_gymnasium"]

with contextlib.suppress(MissingExtra):
    register()
