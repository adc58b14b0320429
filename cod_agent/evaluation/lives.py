"""Live through many packs at once: one `CoDAgent` a pack, one memory and one model for all of them.

A lane is a way to play the same packs: the model with its context, or a control beside it. The first error ends
everything that is under way, and loses nothing: the file knows where each run stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cod_agent.agent import CoDAgent
from cod_agent.errors import UnknownName
from cod_agent.evaluation.plan import Plan, world_of
from cod_agent.evaluation.result import MAIN, NO_CONTEXT
from cod_agent.evaluation.statistics import Rewards
from cod_agent.events import Event, TaskEnded
from cod_agent.memory import Memory
from cod_agent.models.base import Model
from cod_agent.tasks import Outcome


@dataclass(slots=True)
class Lane:
    """One way to play the packs, and what came of it so far."""

    name: str
    agent: str
    model: Model
    world: Any
    updates: bool
    rewards: Rewards
    """Shape [packs, positions]; NaN where there is none yet."""
    written: int = 0
    kept: int = 0
    calls: int = 0
    lengths: list[list[int]] = field(default_factory=list)
    """For each position the lengths, in characters, of the contexts after it."""

    def take(self, pack: int, outcome: Outcome) -> None:
        """Count an outcome."""
        if outcome.reward is not None:
            self.rewards[pack, outcome.position] = outcome.reward
        self.written += outcome.update == "written"
        self.kept += outcome.update == "kept"
        self.calls += outcome.calls
        self.lengths[outcome.position].append(len(outcome.context))


def lanes_of(plan: Plan, world: Any, model: Model) -> list[Lane]:
    """The plan's own lane and one for each of its controls.

    Raises:
        UnknownName: no such control; known are `no-context` and the world's own players.
    """

    def lane(name: str, agent: str, model: Model, world: Any, updates: bool) -> Lane:
        nothing = np.full((plan.packs, plan.pack_size), np.nan)
        return Lane(name, agent, model, world, updates, nothing, lengths=[[] for _ in range(plan.pack_size)])

    lanes = [lane(MAIN, plan.agent, model, world, True)]
    players = list(getattr(world, "players", {}))
    for control in dict.fromkeys(plan.controls):
        name = f"{plan.agent}/{control}"
        if control == NO_CONTEXT:
            lanes.append(lane(control, name, model, world, False))
        elif control in players:
            from cod_agent.models import resolve

            compact = world_of(plan, "compact")
            player = resolve(f"scripted:{control}", world=compact)
            lanes.append(lane(control, name, player, compact, True))
        else:
            raise UnknownName.among("control", control, [NO_CONTEXT, *players])
    return lanes


@dataclass(slots=True)
class Watch:
    """Callbacks of whoever looks on; each may be left out."""

    outcome: Callable[[Lane, int, Outcome], None] = lambda lane, pack, outcome: None
    """After each task: its lane, the pack's index, what came of it."""
    event: Callable[[Event], None] | None = None
    """Everything that happens in pack 0 of the first lane, as it happens."""


async def live_all(
    plan: Plan, lanes: Sequence[Lane], memory: Memory, watch: Watch | None = None, *, only: str | None = None
) -> float:
    """Live every pack in every lane; rewards and counts are in the lanes afterwards. Returns the seconds it took.

    Args:
        only: the name of the one run (a pack's id) to live.

    Raises:
        CodError: the first one of any run; calling again goes on.
    """
    watch = watch or Watch()
    started = time.monotonic()
    waiting = iter([(lane, pack) for pack in range(plan.packs) for lane in lanes])

    async def work() -> None:
        for lane, pack in waiting:
            if only is None or lane.world.pack(plan.pack_size, pack).id == only:
                await _live(plan, lane, pack, memory, watch, lane is lanes[0] and pack == 0)

    workers = [asyncio.create_task(work()) for _ in range(min(plan.concurrency, plan.packs * len(lanes)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return time.monotonic() - started


async def _live(plan: Plan, lane: Lane, index: int, memory: Memory, watch: Watch, shown: bool) -> None:
    pack = lane.world.pack(plan.pack_size, index)
    agent = CoDAgent(lane.agent, model=lane.model, memory=memory, updates=lane.updates, settings=plan.settings())

    def took(outcome: Outcome) -> None:
        lane.take(index, outcome)
        watch.outcome(lane, index, outcome)

    async with agent:
        if shown and watch.event is not None:
            async for event in agent.stream(pack):
                watch.event(event)
                if isinstance(event, TaskEnded):
                    took(event.outcome)
        else:
            async for outcome in agent.run(pack):
                took(outcome)
