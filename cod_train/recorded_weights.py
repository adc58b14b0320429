"""The checkpoints that a run database names: does the registry know each of them, as it was when it answered?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cod_agent.memory.readonly import look
from cod_train.checkpoint_records import DIGITS, Checkpoint
from cod_train.checkpoints import Registry

_NAMED = re.compile(rf"[^@/]+@[0-9a-f]{{{DIGITS}}}(/.*)?")
"""As a checkpoint's servers call themselves: NAME@DIGEST."""


@dataclass(frozen=True, slots=True)
class Answered:
    """Weights as calls have them on record."""

    weights: str
    calls: int
    first: int
    """Row of the first of these calls."""
    checkpoint: Checkpoint | None
    """What the registry knows under that name and digest."""

    @property
    def lost(self) -> bool:
        """Whether they call themselves a checkpoint, and the registry knows none of that name and digest."""
        return self.checkpoint is None and _NAMED.fullmatch(self.weights) is not None


def answered(database: str | Path, registry: Registry) -> list[Answered]:
    """Every weights that answered a call of a run database, in the order in which they first did.

    Raises:
        UsageError: there is no such file.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
    """
    query = "SELECT weights, count(*), min(id) FROM calls WHERE weights <> '' GROUP BY weights ORDER BY min(id)"
    with look(database) as conn:
        found = conn.execute(query).fetchall()
    return [Answered(weights, calls, first, registry.of_weights(weights)) for weights, calls, first in found]
