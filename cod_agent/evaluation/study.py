"""Live a plan and its controls, or several plans, and say what came of it.

The parts of a study are lived one after the other by the same model in one file, and each run keeps the plan of all of them. So
the file alone says how to go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from cod_agent.environments.packing import World
from cod_agent.evaluation.cluster import Cluster, fan_out
from cod_agent.evaluation.controls import lanes_of
from cod_agent.evaluation.lanes import Lane
from cod_agent.evaluation.lives import Watch, live_all
from cod_agent.evaluation.measures import Measure, measured, weights_of
from cod_agent.evaluation.plan import Plan, refuse_mixture, release, resolved, set_up, study_settings
from cod_agent.evaluation.players import CEILING, FLOOR, played
from cod_agent.evaluation.result import AGAINST, NO_CONTEXT, Arm, Evaluation, Study, compare
from cod_agent.evaluation.statistics import Curve, curve, difference, paired
from cod_agent.memory import Memory
from cod_agent.models.base import Model


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
    return (await study([plan], memory, watch, api_key=api_key)).evaluations[0]


async def study(
    parts: Sequence[Plan],
    memory: Memory,
    watch: Watch | None = None,
    *,
    api_key: str | None = None,
    cluster: Cluster | None = None,
) -> Study:
    """`evaluate` for several plans of one model, such as `parts_of` makes.

    Args:
        cluster: where packs are lived (`ray_cluster`); in this process if not given.

    Raises: as `evaluate`.
    """
    watch = watch or Watch()
    async with AsyncExitStack() as stack:
        parts, lanes = lanes_for(parts, stack, api_key)
        for part, own in zip(parts, lanes, strict=True):
            _refuse_mixture(memory, part, own)
        watch.begins([lane for own in lanes for lane in own])
        found = []
        for own in lanes:
            if cluster is None:
                seconds = await live_all(own, memory, watch)
            else:
                seconds = await fan_out(own, memory, cluster, watch, api_key=api_key)
            found.append(_bounded(summarise(own, seconds, memory), own[0]))
    return Study(tuple(found), tuple(parts), Path(memory.path), sum(one.seconds for one in found))


def lanes_for(
    parts: Sequence[Plan], stack: AsyncExitStack, api_key: str | None
) -> tuple[Sequence[Plan], Sequence[Sequence[Lane]]]:
    """The plans with their worlds' full names, and the lanes of each; models are shared by all, and closed with the stack."""
    models: dict[str, Model] = {}

    def shared(plan: Plan, world: World, key: str | None) -> Model:
        # A player belongs to its world; everything else plays all of them.
        name = f"{plan.model} {plan.world}" if plan.model.startswith("scripted:") else f"{plan.model} {plan.base_url}"
        if name not in models:
            models[name] = resolved(plan, world, api_key=key)
            stack.push_async_callback(release, models[name])
        return models[name]

    done, lanes = [], []
    for part in parts:
        plan, world, model = set_up(part, model=partial(shared, key=api_key))
        other = None
        if plan.against is not None:
            rival = replace(plan, model=plan.against, base_url=plan.against_base_url or plan.base_url)
            key = api_key if rival.base_url == plan.base_url else None  # a key is for one endpoint only
            other = set_up(rival, model=partial(shared, key=key))[2]
        done.append(plan)
        lanes.append(lanes_of(plan, world, model, other))
    settings = study_settings(done)
    for plan, own in zip(done, lanes, strict=True):
        for lane in own:
            lane.settings = {**settings, **plan.settings()}
    return done, lanes


def _refuse_mixture(memory: Memory, plan: Plan, lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        names = (name for pack in lane.runs() for name in pack)
        refuse_mixture(memory, plan, names, agent=lane.agent, more=("against",) * lane.name.startswith(AGAINST))


# ---- what came of it ----


def summarise(
    lanes: Sequence[Lane], seconds: float, memory: Memory | None = None, *, rows: Sequence[int] | None = None
) -> Evaluation:
    """What the lanes of a plan hold, which need not be lived to the end.

    Args:
        memory: the file they were lived in, for what else is to be counted.
        rows: of the packs that count; all if not given.
    """
    main, plan = lanes[0], lanes[0].plan
    rows = range(plan.rows) if rows is None else rows
    arms = [_arm(lane, main, rows, memory) for lane in lanes]
    bare = next((arm for arm in arms if arm.name == NO_CONTEXT), None)
    rival = next((arm for arm in arms if arm.name.startswith(AGAINST)), None)
    return Evaluation(
        world=main.world.name,
        model=main.model.name,
        seeds=plan.seeds,
        packs=len(rows),
        pack_size=plan.pack_size,
        arms=tuple(arms),
        benefit=difference(arms[0].rewards, bare.rewards) if bare else None,
        written=main.written,
        kept=main.kept,
        held=main.held,
        calls=sum(lane.calls for lane in lanes),
        seconds=seconds,
        split=plan.split,
        packing=plan.packing,
        repeats=plan.repeats,
        comparison=compare(arms[0], rival) if rival else None,
        weights=_weights(lanes, arms, memory),
    )


def _arm(lane: Lane, main: Lane, rows: Sequence[int], memory: Memory | None) -> Arm:
    rewards, named = lane.rewards[list(rows)], lane.runs()
    runs = tuple(named[row] for row in rows)
    return Arm(
        name=lane.name,
        agent=lane.agent,
        model=lane.model.name,
        world=lane.world.name,
        rewards=rewards,
        runs=runs,
        curve=curve(rewards),
        difference=None if lane is main else paired(main.rewards[list(rows)], rewards).points,
        measures=_measures(lane, runs, memory),
    )


def _weights(lanes: Sequence[Lane], arms: Sequence[Arm], memory: Memory | None) -> tuple[str, ...]:
    if memory is None:
        return ()
    ours = [arm for lane, arm in zip(lanes, arms, strict=True) if lane.model is lanes[0].model]
    found = (weights_of(memory, arm.agent, [name for pack in arm.runs for name in pack]) for arm in ours)
    return tuple(sorted(set[str]().union(*found)))


def _measures(lane: Lane, runs: Sequence[Sequence[str]], memory: Memory | None) -> tuple[Measure, ...]:
    # Tries of one task are told from the next task by what it is, which in a Ralph loop is the same.
    if memory is None or (lane.way.again and lane.plan.packing != "cod"):
        return ()
    return measured(memory, lane.agent, [name for pack in runs for name in pack], again=lane.way.again)


def _bounded(found: Evaluation, main: Lane) -> Evaluation:
    """With floor and ceiling of the packs that the main lane lived: of the arms that the players have, or played beside them."""

    arms = {arm.name: arm.curve for arm in found.arms}

    def of(player: str) -> Curve | None:
        if player in arms:  # one figure for one player
            return arms[player]
        if player not in (getattr(main.world, "players", None) or {}):
            return None
        plan = main.plan
        return curve(np.concatenate([played(world, player, plan.packs, plan.pack_size) for world in main.worlds]))

    return replace(found, floor=of(FLOOR), ceiling=of(CEILING))
