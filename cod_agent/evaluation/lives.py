"""Live through many packs at once: one `CoDAgent` for each life, one memory for all of them.

A control that needs the main lane's context waits for it; all others begin at once, and as many as may are under way at any time. The first
error ends everything, and loses nothing: the file knows where each run stands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cod_agent.agent import CoDAgent
from cod_agent.budget import Budget
from cod_agent.evaluation.attempts import best_of
from cod_agent.evaluation.given import LONGEST_HISTORY, Giver
from cod_agent.evaluation.lanes import Lane, Life
from cod_agent.events import Event, TaskEnded
from cod_agent.memory import Memory
from cod_agent.tasks import Outcome


@dataclass(slots=True)
class Watch:
    """Callbacks of whoever looks on; each may be left out."""

    begins: Callable[[Sequence[Lane]], None] = lambda lanes: None
    """Once before everything, with all lanes."""
    outcome: Callable[[Lane, int, Outcome], None] = lambda lane, pack, outcome: None
    """After each task: its lane, the pack's row, what came of it."""
    event: Callable[[Event], None] | None = None
    """Everything that happens in the first pack of the first lane, as it happens."""


Chosen = Callable[[Lane, Life], bool]


async def live_all(
    lanes: Sequence[Lane], memory: Memory, watch: Watch | None = None, *, chosen: Chosen | None = None
) -> float:
    """Live every pack in every lane; rewards and counts are in the lanes afterwards. Returns the seconds it took.

    Args:
        lanes: of one plan or of several, which share their concurrency.
        chosen: which lives; all if not given. A life of the main lane that another one needs is lived if it is among them, and has to be
            in the file otherwise.

    Raises:
        CodError: the first one of any run; calling again goes on.
    """
    watch, started = watch or Watch(), time.monotonic()
    places = asyncio.Semaphore(lanes[0].plan.concurrency)
    wanted = sorted(
        ((life, number, lane) for number, lane in enumerate(lanes) for life in lane.lives()), key=lambda one: one[:2]
    )
    wanted = [(life, number, lane) for life, number, lane in wanted if chosen is None or chosen(lane, life)]
    lived = {(lane.agent, lane.plan.world, life): asyncio.Event() for life, _, lane in wanted if lane.main is None}

    async def one(life: Life, lane: Lane, shown: bool) -> None:
        needed = lane.needed(life)
        if needed is not None and (before := lived.get((lane.plan.agent, lane.plan.world, needed))):
            await before.wait()
        async with places:
            await _live(lane, life, memory, watch, shown)
        if lane.main is None:
            lived[lane.agent, lane.plan.world, life].set()

    lives = [asyncio.create_task(one(life, lane, number == 0 and life == Life(0, 0))) for life, number, lane in wanted]
    try:
        await asyncio.gather(*lives)
    finally:
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
    return time.monotonic() - started


async def _live(lane: Lane, life: Life, memory: Memory, watch: Watch, shown: bool) -> None:
    pack, run = lane.pack(life), lane.run(life)
    agent = CoDAgent(
        lane.agent,
        model=lane.model,
        memory=memory,
        environment=pack.environment,
        updates=lane.way.updates,
        given=_giver(lane, life, run, memory),
        budget=Budget.parse(lane.plan.budget) if lane.plan.budget else None,
        run_budget=Budget.parse(lane.plan.run_budget) if lane.plan.run_budget else None,
        gate=lane.plan.gate,
        settings=lane.settings,
    )

    def took(outcome: Outcome, position: int, over: bool = True) -> None:
        lane.take(life, outcome, position)
        if over:
            watch.outcome(lane, life.row, outcome)

    async with agent:
        if lane.way.again:
            async for position, outcome, over in best_of(agent, pack, run, _main(lane, life)):
                took(outcome, position, over)
        elif shown and watch.event is not None:
            async for event in agent.stream(pack, run=run):
                watch.event(event)
                if isinstance(event, TaskEnded):
                    took(event.outcome, event.position)
        else:
            async for outcome in agent.run(pack, run=run):
                took(outcome, outcome.position)


def _giver(lane: Lane, life: Life, run: str, memory: Memory) -> Giver | None:
    if lane.way.text is None:
        return None
    limit = min(LONGEST_HISTORY, getattr(lane.model, "context_length", LONGEST_HISTORY))
    return Giver(lane.name, lane.way.text, memory, _main(lane, life), (lane.agent, run), lane.world.form, limit)


def _main(lane: Lane, life: Life) -> tuple[str, str]:
    """The run of the main lane that a life takes its contexts or its means from."""
    main = lane.main or lane
    return main.agent, main.run(lane.needed(life) or life)
