"""Live a plan and its controls, and say what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from cod_agent.evaluation.lives import Lane, Watch, lanes_of, live_all
from cod_agent.evaluation.plan import Plan, refuse_mixture, release, set_up
from cod_agent.evaluation.result import MAIN, NO_CONTEXT, Arm, Evaluation
from cod_agent.evaluation.statistics import curve, difference, paired
from cod_agent.memory import Memory


def summarise(plan: Plan, lanes: Sequence[Lane], seconds: float) -> Evaluation:
    """What the lanes hold, which need not be lived to the end."""
    main, others = lanes[0], lanes[1:]
    bare = next((lane for lane in others if lane.name == NO_CONTEXT), None)
    return Evaluation(
        world=main.world.name,
        model=main.model.name,
        seeds=(plan.seed,),
        packs=plan.packs,
        pack_size=plan.pack_size,
        arms=tuple(_arm(plan, lane, main) for lane in lanes),
        benefit=difference(main.rewards, bare.rewards) if bare else None,
        written=main.written,
        kept=main.kept,
        calls=sum(lane.calls for lane in lanes),
        seconds=seconds,
        split=plan.split,
        packing=plan.packing,
    )


def _arm(plan: Plan, lane: Lane, main: Lane) -> Arm:
    return Arm(
        name=lane.name,
        agent=lane.agent,
        model=lane.model.name,
        world=lane.world.name,
        rewards=lane.rewards,
        runs=tuple((lane.world.pack(plan.pack_size, pack).id,) for pack in range(len(lane.rewards))),
        curve=curve(lane.rewards),
        difference=None if lane is main else paired(main.rewards, lane.rewards).points,
    )


async def evaluate(plan: Plan, memory: Memory, watch: Watch | None = None, *, api_key: str | None = None) -> Evaluation:
    """Live through the packs of a plan and its controls, or go on with it, and say what came of it.

        plan = Plan("frozen-lake:small", "embedded", packs=64, controls=("no-context",))
        found = asyncio.run(evaluate(plan, Memory.open("eval.db")))
        print(found.main.gain)

    Args:
        plan: what to live through.
        memory: the evidence. The same plan on the same file lives only what is missing.
        watch: whom to tell how it goes.
        api_key: of the model's endpoint; never stored.

    Raises:
        UsageError: the plan asks for what there is not, or the file holds something else under its run names.
        ModelError, StoreError: see `cod_agent.errors`; calling again goes on.
    """
    plan, world, model = set_up(plan, api_key=api_key)
    try:
        refuse_mixture(memory, plan, (world.pack(plan.pack_size, pack).id for pack in range(plan.packs)))
        lanes = lanes_of(plan, world, model)
        return summarise(plan, lanes, await live_all(plan, lanes, memory, watch))
    finally:
        await release(model)


__all__ = ["MAIN", "evaluate", "summarise"]
