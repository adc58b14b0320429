"""Forgetting: everything descended from a bad task is taken out of the file, and what remains is learnt again.

    done = await agent.forget("ticket-17", reason="the customer's text was an attack")
    print(done.removed.rows, done.derived)

First the removal, one transaction (`cod_agent.memory.removal`): from then on no prompt has any of it, and the runs it reached go on from
their last clean version. Then their later updates are made again, in order, in a run of their own, `RUN/forget/1`, forked from that
version: its environment shows what was recorded, its solver answers what was recorded, and the agent's model writes the updates through
the same gate and limits as any other; the run adopts what comes of it. Whatever stops this, the same call goes on. Without a model there
is the removal, and the updates wait; so do those that the gate holds back, until somebody decides. These runs say `"purpose": "forget"`
in their settings: nobody trains on them.
"""

from __future__ import annotations

import asyncio
import copy
import json
import sqlite3
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.context import Prompts, prompts_for
from cod_agent.errors import UsageError
from cod_agent.journal.boundary import Boundary
from cod_agent.journal.episode import current_episode
from cod_agent.lifecycle import Lifecycle
from cod_agent.memory import derivation, read, runs, versions
from cod_agent.memory.descent import Place, places_of
from cod_agent.memory.observations import unpack_observation
from cod_agent.memory.removal import REASON, Removal, Removed
from cod_agent.tasks import Observation, Task
from cod_agent.trust.review import held

if TYPE_CHECKING:
    from cod_agent.agent import CoDAgent

Named = tuple[str, str]
"""Agent and name of a run."""

MODEL = "a model to make them"
REVIEW = "a decision about what the write gate holds back in run {}"
"""What updates wait for."""


@dataclass(slots=True)
class Forgotten:
    """What came of it."""

    removed: Removed
    derived: dict[Named, int] = field(default_factory=dict)
    """By run: the version it adopted, once its later updates were made again."""
    waiting: dict[Named, str] = field(default_factory=dict)
    """By run whose later updates are not in force again yet: what they wait for. The same call goes on then."""
    lingering: bool = False
    """Whether somebody who reads an older state of the file keeps it from being cleared: do the same once they have gone."""

    def json(self) -> dict[str, Any]:
        tasks = [{"agent": agent, "run": run, "position": position} for agent, run, position in self.removed.tasks]
        derived = [{"agent": agent, "run": run, "version": version} for (agent, run), version in self.derived.items()]
        return {
            "tasks": tasks,
            "runs": [{"agent": agent, "run": run} for agent, run in self.removed.runs],
            "rows": dict(self.removed.rows),
            "derived": derived,
            "waiting": [{"agent": agent, "run": run, "for": what} for (agent, run), what in self.waiting.items()],
            "lingering": self.lingering,
        }


def places(conn: sqlite3.Connection, agent: str, task: str | int | None, run: str | None) -> list[Place]:
    """Where a task was lived: every position that has its id, or one position of a run; None: nowhere.

    Raises:
        UnknownName: nowhere.
    """
    if task is None:
        return []
    if isinstance(task, str):
        return places_of(conn, task, agent, run)
    found = runs.find_run(conn, agent, run or "life")
    return [(found.id, read.position(conn, found, task).position)]


async def forget(
    agent: CoDAgent, task: str | int | None, run: str | None, reason: str, quoting: Sequence[str], vacuum: bool
) -> Forgotten:
    """See `CoDAgent.forget`."""
    if task is None and not quoting:
        raise UsageError("say what is to be forgotten: a task's id, a position, or texts (quoting=[...])")
    if any(not text.strip() for text in quoting):
        raise UsageError("a text to be forgotten has at least one letter: every text has the empty one in it")
    where = await agent.memory.read(lambda conn: places(conn, agent.name, task, run))
    done = Forgotten(await _remove(agent, where, agent._tap.text(reason), quoting))
    done.lingering = await asyncio.to_thread(_clear, agent, vacuum)
    for owner, name in done.removed.runs:
        async with _living(agent, owner, name) as (twin, opened):
            came = await _derive(twin, opened)
        if isinstance(came, int):
            done.derived[owner, name] = came
        elif came:
            done.waiting[owner, name] = came
    return done


# ---- taking it out ----


async def _remove(agent: CoDAgent, where: Iterable[Place], reason: str, quoting: Sequence[str]) -> Removed:
    """The removal, while no agent of this process lives a run it reaches; other processes are kept away by the leases."""
    # Those the tasks were lived in, to begin with: what goes is worked out in the transaction, and mostly reaches no others.
    runs_of = await agent.memory.read(lambda conn: sorted({derivation.named(conn, place)[:2] for place in where}))
    while True:
        async with AsyncExitStack() as locks:
            for owner, name in runs_of:
                await locks.enter_async_context(agent.memory.lock(f"{owner}\0{name}"))

            def job(conn: sqlite3.Connection, locked: Sequence[Named] = runs_of) -> tuple[bool, Removed]:
                found = Removal(conn, where, quoting)
                if not set(found.removed.runs) <= set(locked):
                    return False, found.removed
                _unqueue(conn, found.removed.tasks)
                return True, found.remove(reason)

            done, removed = await agent.memory.write(job)
        if done:
            return removed
        runs_of = sorted(removed.runs)


def _unqueue(conn: sqlite3.Connection, tasks: Iterable[tuple[str, str, int]]) -> None:
    """A service that took the task in may still have it in its inbox."""
    if conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'host_inbox'").fetchone() is not None:
        conn.executemany("DELETE FROM host_inbox WHERE agent = ? AND run = ? AND position = ?", tasks)


def _clear(agent: CoDAgent, vacuum: bool) -> bool:
    """Take out of the file what SQLite would leave in its free room and its log; returns whether something of it is left."""
    if not vacuum:
        return False
    agent.memory.vacuum()
    log = Path(f"{agent.memory.path}-wal")
    return log.is_file() and log.stat().st_size > 0


# ---- learning it again ----


@asynccontextmanager
async def _living(agent: CoDAgent, owner: str, name: str) -> AsyncIterator[tuple[CoDAgent, runs.Run]]:
    """The agent, under the name of the run's own, with the run's lease and lock."""
    twin = copy.copy(agent)
    twin.name, twin._tenancy = owner, agent._tenancy.guest(owner)
    opened = await twin._opened(name, None, None, must_exist=True)
    try:
        async with twin._tenancy.living(opened):
            yield twin, opened
    finally:
        await agent.memory.write(twin._tenancy.release)


async def _derive(agent: CoDAgent, run: runs.Run) -> int | str:
    """Carry out what a run plans to derive; returns the version it adopted, what the plan waits for, or "": there is none."""
    came: int | str = ""
    while (plan := await agent.memory.read(lambda conn: derivation.pending(conn, run))) is not None:
        if plan.updates and agent._model is None:
            return MODEL
        again = await _opened_again(agent, run, plan)
        async with agent._tenancy.living(again):
            for number, update in enumerate(plan.updates):
                await _update(agent, again, number, update)
                await agent._try_held(again)
            if await agent.memory.read(lambda conn, of=again: held(conn, of)):  # type: ignore[misc]
                return REVIEW.format(again.name)

            def adopt(
                conn: sqlite3.Connection, plan: derivation.Plan = plan, again: runs.Run = again
            ) -> versions.Context:
                found = versions.latest(conn, again.id)
                then = derivation.following(conn, run, plan, found.version)
                more = {"derive": then.json()} if then else {}
                return runs.adopt(conn, run, found.id, {"reason": REASON, "derived": plan.run, **more})

            came = (await agent.memory.write(adopt)).version
    return came


async def _opened_again(agent: CoDAgent, run: runs.Run, plan: derivation.Plan) -> runs.Run:
    """The run that updates are made again in."""
    query = "SELECT environment, settings FROM runs WHERE id = ?"

    def open_it(conn: sqlite3.Connection) -> runs.Run:
        environment, settings = conn.execute(query, (run.id,)).fetchone()
        settings = {**json.loads(settings), "purpose": derivation.PURPOSE}
        model = agent._model.name if agent._model else ""
        start = read.version_id(conn, *plan.start)
        said: dict[str, Any] = {"environment": environment, "pack": None, "length": None, "model": model}
        return runs.open_run(conn, run.agent, plan.run, settings=settings, start=start, **said)

    return await agent._tenancy.take(plan.run, open_it)


async def _update(agent: CoDAgent, again: runs.Run, number: int, update: derivation.Named) -> None:
    """Make one update again: the task is solved as it was recorded, judged as it was, and the update follows."""
    memory = agent.memory
    found = await memory.read(lambda conn: _found(conn, update))
    if found is None:
        return
    known, remains = found
    prompts = agent._ways.prompts or _prompts(agent)
    ways = replace(agent._ways, solver=remains.solve, prompts=prompts, tools=(), updates=True, given=None)
    life = Lifecycle(ways, again, remains if remains.shown else None, agent.watch)
    await life.live(number, known.task)
    now = await memory.read(lambda conn: read.position(conn, again, number))
    if now.state == "solved" and known.feedback is not None:
        said = known.feedback
        await memory.write(lambda conn: runs.judged(conn, again, now, said))
        await life.live(number, known.task)


def _found(conn: sqlite3.Connection, update: derivation.Named) -> tuple[runs.Lived, _Remains] | None:
    """What remains of a task; None: nothing does, it was forgotten itself or pruned."""
    agent, name, position = update
    known = read.position(conn, runs.find_run(conn, agent, name), position)
    there = conn.execute("SELECT body IS NOT NULL FROM tasks WHERE id = ?", (known.id,)).fetchone()[0]
    return (known, _Remains(known, read.steps(conn, int(known.solve_id or 0)))) if there else None


def _prompts(agent: CoDAgent) -> Prompts:
    """Those of the agent's environment; what a model reads tells where packs bring an environment each."""
    if agent.environment is None and agent._model is not None:
        return prompts_for(agent._model)
    return prompts_for(agent.environment)


class _Remains:
    """What is on record of a task, as an environment, its session and the solver that lives in it."""

    name, recovery = "remains", "deterministic"

    def __init__(self, known: runs.Lived, steps: Sequence[tuple[str, str, str, Any]]) -> None:
        self._known, self._steps = known, steps
        seen = [unpack_observation(said) for kind, _, _, said in steps if kind != "tool"]
        if seen:
            seen[-1] = replace(seen[-1], done=True, feedback=known.feedback)
        self.shown: list[Observation] = seen

    def start(self, task: Task) -> _Session:
        """A session that shows what was shown."""
        return _Session(self.shown)

    async def solve(self, task: Task, context: str, tools: Boundary) -> str:
        """Do what was done, asking nobody."""
        episode = current_episode()
        for kind, name, arguments, said in self._steps:
            if kind == "tool" and episode is not None:
                await episode.effect("tool", name, json.loads(arguments), _giving(said))
            elif kind == "observe":
                await tools.observe()
            else:
                await tools.act(json.loads(arguments))
        return self._known.answer


class _Session:
    def __init__(self, shown: Sequence[Observation]) -> None:
        self._shown, self._at = shown, 0

    def reset(self) -> Observation:
        self._at = 0
        return self._shown[0]

    def step(self, answer: str) -> Observation:
        self._at += 1
        return self._shown[self._at]


def _giving(said: Any) -> Any:
    async def do(_: int) -> tuple[Any, None]:
        return said, None

    return do


__all__ = ["Forgotten", "forget", "places"]
