"""A lie told to a real model: the shipped policy, whose notes decide what it does, lives with a world that once tells its updates wrong.

In one task the summaries that an update reads name wrong directions; what the policy sees while it walks is true. Three lives of
each pack: honest, lied to, and lied to with the task forgotten some tasks later. Draws are seeded by the prompt, so that the three are the
same until they differ in what they read.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from pathlib import Path

import lab

from cod_agent import CoDAgent, Memory
from cod_agent.environments import FrozenLake
from cod_agent.environments.base import Form, Session
from cod_agent.evaluation.statistics import Interval, curve, paired
from cod_agent.memory.readonly import look
from cod_agent.models.base import Sampling
from cod_agent.models.embedded import GgufModel
from cod_agent.policies import folder_of
from cod_agent.tasks import Observation, Pack, Task

POLICY, WORLD = "embedded", "small"
TASKS = 8
LIED, FORGOTTEN = 1, 4
"""0-based: the task that is told wrong, and the one before which it is forgotten."""
ARMS = ("honest", "lied to", "lied to, then forgotten")


@dataclass
class Liar:
    """A frozen lake that tells the updates of one task wrong."""

    lake: FrozenLake
    lie: bool
    form: Form = "compact"

    @property
    def name(self) -> str:
        return self.lake.name

    def start(self, task: Task) -> Session:
        session = self.lake.start(task)
        return _Wrong(session) if self.lie and task.data["index"] == LIED else session


@dataclass
class _Wrong:
    """A walk whose summaries are one direction off."""

    true: Session

    def reset(self) -> Observation:
        return self.true.reset()

    def step(self, answer: str) -> Observation:
        seen: Observation = self.true.step(answer)
        return replace(seen, summary=re.sub(r"(?<=Direction )\d", _next, seen.summary))


def _next(found: re.Match[str]) -> str:
    return str(int(found[0]) % 4 + 1)


def lived(folder: Path, packs: int) -> lab.Found:
    """Rewards by arm, as `lab.outcomes` spells them."""
    lake = FrozenLake(WORLD, seed=2, form="compact")
    model = GgufModel(folder_of(POLICY) / "model.gguf", name=POLICY, form="compact", sampling=Sampling(seed=1))
    try:
        arms = {arm: asyncio.run(_arm(folder / f"{arm}.db", model, lake, arm, packs)) for arm in ARMS}
    finally:
        model.close()
    return {"packs": packs, "lied": LIED, "forgotten": FORGOTTEN, "outcomes": arms}


async def _arm(file: Path, model: GgufModel, lake: FrozenLake, arm: str, packs: int) -> str:
    memory = Memory.open(file, durable=False)
    agent = CoDAgent("agent", model=model, memory=memory, environment=Liar(lake, arm != "honest"))
    forgets = arm == ARMS[2]

    async def life(pack: Pack) -> None:
        async for _ in agent.run(list(pack[: FORGOTTEN if forgets else TASKS]), run=pack.id):
            pass

    drawn = list(lake.packs(packs, TASKS))
    async with agent:
        await asyncio.gather(*(life(pack) for pack in drawn))
        if forgets:
            for pack in drawn:
                done = await agent.forget(pack[LIED].id, run=pack.id, reason="a lie", vacuum=False)
                if done.waiting:
                    raise RuntimeError(f"{pack.id} was not learnt again: {done.waiting}")
            forgets = False
            await asyncio.gather(*(life(pack) for pack in drawn))
    memory.close()
    with look(file) as conn:
        packs_of = [[reward for (reward,) in conn.execute(_REWARDS, (pack.id,))] for pack in drawn]
    return lab.spelt_rewards(packs_of)


_REWARDS = "SELECT t.reward FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.name = ? ORDER BY t.position"


def table(found: lab.Found) -> str:
    """Reward by task of each life, and how much less than the honest one between the lie and the forgetting, and from there on."""
    lives = {arm: lab.rewards(words) for arm, words in found["outcomes"].items()}
    honest, lied, forgotten = lives[ARMS[0]], found["lied"], found["forgotten"]
    spans = [slice(lied + 1, forgotten), slice(forgotten, None)]
    rows = []
    for arm, rewards in lives.items():
        means = [lab.spelt(point.mean, None, None) for point in curve(rewards).points]
        apart = [_spelt(paired(rewards[:, span], honest[:, span]).overall) for span in spans]
        rows.append([arm, *means, *(apart if arm != ARMS[0] else ["", ""])])
    last = honest.shape[1]
    names = [f"task {at + 1}{', the lie' if at == lied else ''}" for at in range(last)]
    after = [f"against honest, tasks {lied + 2} to {forgotten}", f"tasks {forgotten + 1} to {last}"]
    return lab.table(["life", *names, *after], rows)


def _spelt(apart: Interval) -> str:
    return lab.spelt(apart.mean, apart.low, apart.high)
