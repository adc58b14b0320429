"""A lane: one way to live a plan's packs, and what came of it so far. `controls.lanes_of` makes them, `lives.live_all` lives them.

A pack's row is its place among the packs of all seeds; a life is one run of one pack in one lane. Beside the first repeat, a run's name
ends in `#1`, `#2`, ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.evaluation.plan import Plan
from cod_agent.evaluation.statistics import Rewards
from cod_agent.models.base import Model
from cod_agent.tasks import Outcome, Pack

if TYPE_CHECKING:
    from cod_agent.evaluation.given import Text


@dataclass(frozen=True, slots=True)
class Way:
    """What makes a lane another one than the main one."""

    updates: bool = False
    """Whether it writes a context of its own."""
    text: Text | None = None
    """Where the context comes from that it is given instead."""
    after: int | None = None
    """The main lane's pack that must be lived first, as a number of packs further; None: it needs none."""
    again: bool = False
    """Whether each task is tried again, for what the main lane spent on it."""


@dataclass(frozen=True, slots=True, order=True)
class Life:
    """One run of one pack."""

    row: int
    number: int


@dataclass(slots=True)
class Lane:
    """One way to live the packs, and what came of it so far."""

    name: str
    agent: str
    model: Model
    plan: Plan
    worlds: Sequence[Any]
    """One for each seed."""
    way: Way
    main: Lane | None = None
    """The lane it is held against; None for that one itself."""
    spread: int = 1
    """Packs of its own for each of the plan's: where each task is lived again and again, as many as a pack has tasks."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Kept with each of its runs."""
    written: int = 0
    held: int = 0
    kept: int = 0
    calls: int = 0
    _taken: Rewards = field(init=False, repr=False)
    """Shape [packs, runs of a pack, positions]; NaN where there is none yet."""

    def __post_init__(self) -> None:
        self.settings = self.settings or self.plan.settings()
        self._taken = np.full((self.plan.rows, self.spread * self.plan.repeats, self.plan.pack_size), np.nan)

    @property
    def world(self) -> Any:
        """That of the first seed."""
        return self.worlds[0]

    @property
    def rewards(self) -> Rewards:
        """Shape [packs, positions]: the mean over a pack's runs; NaN where there is none yet."""
        counted = np.isfinite(self._taken)
        with np.errstate(invalid="ignore"):
            found: Rewards = np.where(counted, self._taken, 0.0).sum(1) / counted.sum(1)
        return found

    @property
    def tasks(self) -> int:
        """How many outcomes there will be."""
        return self._taken.size

    def lives(self) -> Iterator[Life]:
        """All of them, pack by pack."""
        packs, each, _ = self._taken.shape
        return (Life(row, number) for row in range(packs) for number in range(each))

    def pack(self, life: Life) -> Pack:
        """What is lived."""
        seed, index = divmod(life.row, self.plan.packs)
        pack: Pack = self.worlds[seed].pack(self.plan.pack_size, index * self.spread + life.number % self.spread)
        return pack

    def run(self, life: Life) -> str:
        """The name of the run."""
        repeat = life.number // self.spread
        return f"{self.pack(life).id}#{repeat}" if repeat else self.pack(life).id

    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The names of each pack's runs."""
        packs, each, _ = self._taken.shape
        return tuple(tuple(self.run(Life(row, number)) for number in range(each)) for row in range(packs))

    def needed(self, life: Life) -> Life | None:
        """The life of the main lane that must come first: of the same repeat, and of the same seed."""
        if self.way.after is None:
            return None
        seed, index = divmod(life.row, self.plan.packs)
        return Life(seed * self.plan.packs + (index + self.way.after) % self.plan.packs, life.number)

    def take(self, life: Life, outcome: Outcome, position: int) -> None:
        """Count an outcome; of several at a position, the best."""
        if outcome.reward is not None:
            at = (life.row, life.number, position)
            self._taken[at] = np.fmax(self._taken[at], outcome.reward)
        self.written += outcome.update == "written"
        self.held += outcome.update == "held"
        self.kept += outcome.update == "kept"
        self.calls += outcome.calls
