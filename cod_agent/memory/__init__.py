"""The run database: one SQLite file that holds contexts, tasks, episodes and every call. `Memory.open(path)` is where it starts."""

from cod_agent.memory.database import Memory

__all__ = ["Memory"]
