"""Canaries: a version that was held back is tried before anybody decides, and what comes of it decides.

    WriteGate("quarantine", canaries=lake.pack(4), misbehaved=lambda outcome, trajectory: "bought" if ... else "")

The held version is lived with in a run of its own, `RUN/canary/VERSION`, forked from it, on the canary tasks and without updates; the
version in force likewise. Where the held one's mean reward is not lower and no task misbehaved it is adopted, or else refused; the commit
names both runs and rewards. They are runs like any other: what a crash cut off is gone on with, and no version is tried twice. Their
settings say `"purpose": "canary"`, so that nobody trains on them. Canary tasks run their tools: give tasks that may be run.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from cod_agent.errors import UsageError
from cod_agent.events import ContextKept, ContextWritten
from cod_agent.memory import read, runs, versions
from cod_agent.tasks import Outcome, Pack
from cod_agent.trust.review import Held, held
from cod_agent.trust.write_gate import WriteGate

if TYPE_CHECKING:
    from cod_agent.agent import CoDAgent
    from cod_agent.lifecycle import Emit

CANARY = "canary"
"""What a canary run's settings say under `purpose`."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of trying a version."""

    version: int
    head: int
    """The version in force that it was held against."""
    rewards: tuple[float, float] | None
    """Mean reward with it and with the one in force, on the tasks that both were judged on; None: there are none."""
    adopted: bool | None
    """None: undecided, for want of rewards; it stays held back."""
    reason: str


async def try_held(agent: CoDAgent, run: runs.Run, emit: Emit | None = None) -> list[Trial]:
    """Try, oldest first, each held version of a run that was made from the version in force; others are left to people.

    The run's lease and lock are the caller's.

    Raises:
        UsageError: the agent's gate has no canaries.
        ModelError, StoreError, ReplayDiverged, ToolInDoubt: what stopped a task; the same call goes on.
    """
    gate = agent._ways.gate
    if not len(gate.canaries):
        raise UsageError("there are no tasks to try a version on: give WriteGate(canaries=...)")
    trials = []
    for waiting in await agent.memory.read(lambda conn: held(conn, run)):
        now = await agent.memory.read(lambda conn: versions.latest(conn, run.id))
        if not waiting.moved_on and now.version == waiting.head:
            trials.append(await _try(agent, run, waiting, gate, emit))
    return trials


async def _try(agent: CoDAgent, run: runs.Run, waiting: Held, gate: WriteGate, emit: Emit | None) -> Trial:
    with_it = await _lived(agent, run, waiting.version, gate)
    without = await _lived(agent, run, waiting.head, gate)
    pairs = [
        (one.reward, other.reward)
        for one, other in zip(with_it, without, strict=True)
        if one.reward is not None and other.reward is not None and isfinite(one.reward + other.reward)
    ]
    means = (
        (sum(one for one, _ in pairs) / len(pairs), sum(other for _, other in pairs) / len(pairs)) if pairs else None
    )
    wrong = agent._tap.text(await _misbehaved(agent, run, waiting.version, with_it, gate))
    if means is None and not wrong:
        return Trial(waiting.version, waiting.head, None, None, "no canary task was judged: give tasks with a reward")
    lower = means is not None and means[0] < means[1]
    reason = wrong or (means and f"mean reward {means[0]:.3f} on {len(pairs)} tasks, {means[1]:.3f} without it") or ""
    why: dict[str, Any] = {
        "reason": "canaries",
        "why": reason,
        "runs": [_name(run, version) for version in (waiting.version, waiting.head)],
        "rewards": means,
    }
    adopted = not (wrong or lower)

    def decide(conn: sqlite3.Connection) -> versions.Context | None:
        if adopted:
            return runs.adopt(conn, run, waiting.id, why)
        runs.refuse(conn, run, waiting.id, why)
        return None

    made = await agent.memory.write(decide)
    if emit is not None and made is not None:
        emit(ContextWritten(run.name, waiting.position, made.body, made.version))
    elif emit is not None:
        emit(ContextKept(run.name, waiting.position, f"canaries: {reason}"))
    return Trial(waiting.version, waiting.head, means, adopted, reason)


def _name(run: runs.Run, version: int) -> str:
    return f"{run.name}/canary/{version}"


async def _lived(agent: CoDAgent, run: runs.Run, version: int, gate: WriteGate) -> list[Outcome]:
    tasks = gate.canaries
    async with agent._twin(CANARY, tasks.environment if isinstance(tasks, Pack) else agent.environment) as twin:
        return [outcome async for outcome in twin.run(tasks, run=_name(run, version), fork=(run.name, version))]


async def _misbehaved(agent: CoDAgent, run: runs.Run, version: int, outcomes: list[Outcome], gate: WriteGate) -> str:
    """What the first task that misbehaved did, "" if none did."""
    if gate.misbehaved is None:
        return ""
    opened = await agent.memory.read(lambda conn: runs.find_run(conn, run.agent, _name(run, version)))
    for outcome in outcomes:
        known = await agent.memory.read(lambda conn, at=outcome.position: read.position(conn, opened, at))  # type: ignore[misc]
        trajectory = await agent.memory.read(lambda conn, of=known: read.trajectory(conn, int(of.solve_id or 0), of))  # type: ignore[misc]
        if what := gate.misbehaved(outcome, trajectory):
            return f"task {outcome.task.id!r} misbehaved: {what}"
    return ""
