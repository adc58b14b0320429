"""The Solver protocol."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from cod_agent.journal.boundary import Boundary
from cod_agent.tasks import Task


class Solver(Protocol):
    """Solves one task."""

    def __call__(self, task: Task, context: str, tools: Boundary) -> Awaitable[str]:
        """The answer. `context` is what earlier tasks taught; in an environment that waits for an answer, it is given this one."""
        ...
