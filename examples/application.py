"""An application with an agent inside: ratings come late and out of order, and better weights come while it is used.

    pip install 'connect-the-dots[local,train]'
    python examples/application.py            # a minute or two on two cores, no GPU, no key

A guide leads travellers over a frozen lake whose moves mean something else than they say. How a traveller liked it is known only when two
more have gone, the newer rating before the older one; each rating is an update of the guide's context. The model behind the guide is
whatever a registry says is promoted: `cod serve` follows it. After ten travellers a better checkpoint goes through the gate
(`cod promote`); the guide works on meanwhile, no call fails, and in the end its history names the weights that wrote each version.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Feedback, Observation, Outcome, Sampling, Session, Task
from cod_agent.environments import FrozenLake
from cod_agent.models.openai import OpenAIModel
from cod_train.checkpoints import Registry

COD = (sys.executable, "-m", "cod_agent.cli")
BEFORE, AFTER, MOST = 10, 10, 300
"""Travellers before the candidate is tried, after it serves, and in all."""


class Unrated:
    """A world that keeps its judgement to itself, as most applications' worlds do: a rating comes later, from elsewhere."""

    def __init__(self, world: FrozenLake) -> None:
        self._world, self.name, self.form, self.recovery = world, world.name, world.form, world.recovery
        self.ratings: dict[str, Feedback] = {}
        """By task: what the travellers will say. An application has this in its own database."""

    def start(self, task: Task) -> Session:
        walk, ratings = self._world.start(task), self.ratings

        class Walk:
            def reset(self) -> Observation:
                return walk.reset()

            def step(self, answer: str) -> Observation:
                seen = walk.step(answer)
                if seen.feedback is not None:
                    ratings[task.id] = seen.feedback
                return replace(seen, feedback=None)

        return Walk()


async def guide(agent: CoDAgent, world: Unrated, travellers: Iterator[Task], where: str, registry: Path) -> list[float]:
    """Lead travellers until ten have gone since the weights changed. Their ratings."""
    unrated: list[Outcome] = []
    rewards: list[float] = []
    promotion: asyncio.subprocess.Process | None = None
    first, since = served(where), 0
    for number, task in enumerate(travellers):
        unrated.append(await agent.solve(task))
        while len(unrated) > 2:
            # The newer of the two that have waited speaks first.
            late = unrated.pop(1 if number % 2 else 0)
            said = world.ratings[late.task.id]
            judged = await agent.feedback(late, said.reward, said.text)
            rewards.append(said.reward or 0.0)
            print(f"traveller {judged.position:3d}  {said.text:7s}  context version {judged.version} ({judged.update})")
        if number == BEFORE:
            print("A candidate goes through the gate; the guide works on.")
            promotion = await asyncio.create_subprocess_exec(
                *(*COD, "promote", "better", "--registry", str(registry), "--packs", "64", "--json"),
                *("--out", str(registry.parent / "gates")),
                stdout=subprocess.DEVNULL,
            )
        if promotion is not None and promotion.returncode is None:
            await asyncio.sleep(2)  # travellers come now and then
        since += served(where) != first
        if since == 1:
            print(f"From now on {served(where)} answers.")
        if since > AFTER or number == MOST:
            break
    if promotion is not None:
        await promotion.wait()
    return rewards


def served(where: str) -> str:
    """The weights that answer now."""
    with urllib.request.urlopen(where.removesuffix("/v1") + "/status") as page:
        return str(json.load(page)["serving"])


@contextmanager
def serving(registry: Path) -> Iterator[dict[str, Any]]:
    """`cod serve`, following the registry; what it says of itself when it is ready."""
    command = (*COD, "serve", "--registry", str(registry), "--engine", "embedded", "--port", "0", "--json")
    server = subprocess.Popen((*command, "--log", str(registry.parent / "serving")), stdout=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in server.stdout or ():
            said += line
            if line == "}\n":
                break
        if not said:
            raise SystemExit("cod serve did not start; it says above why")
        yield json.loads(said)
    finally:
        server.terminate()
        server.wait()


async def main(folder: Path) -> None:
    """A registry with a weak checkpoint that serves and a better one that waits; then the guide."""
    registry, database = folder / "registry.db", folder / "guide.db"
    with Registry(registry, create=True) as opened:
        from cod_agent.policies import folder_of

        weak = opened.add(folder_of("embedded-base"), name="weak")
        opened.promote(weak.name, "the first")
        opened.add(folder_of("embedded"), name="better")
    world = Unrated(FrozenLake("small", seed=5, form="compact"))
    travellers = iter(FrozenLake("small", seed=5, form="compact").pack(MOST + 1))
    with serving(registry) as said:
        sampling = Sampling(max_tokens=40)
        model = OpenAIModel(said["model"], base_url=said["base_url"], exact=True, form="compact", sampling=sampling)
        async with CoDAgent("guide", model=model, memory=database, environment=world) as agent:
            rewards = await guide(agent, world, travellers, said["base_url"], registry)
        await model.aclose()
    print(f"The first ten: {sum(rewards[:10]):.0f} arrived. The last ten: {sum(rewards[-10:]):.0f}.\n", flush=True)
    subprocess.run((*COD, "context", "log", str(database), "--agent", "guide"), check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary)))
