"""How fast the embedded policy answers: generated tokens a second over concurrent packs of frozen-lake:small.

    taskset -c 0 python benchmarks/engine.py            # through CoDAgent, every call recorded in a run database
    taskset -c 0 python benchmarks/engine.py --bare     # the same dialogue without agent and database
    taskset -c 0 python benchmarks/engine.py --bare --llama-cpp     # computed by llama.cpp instead of numpy

Prints one JSON object. Tokens are those the engine counts; the end of every turn is one of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cod_agent import CoDAgent, Memory
from cod_agent.context import COMPACT, Message, Trajectory, Turn, UpdateRefused, message, parse_update
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.models import Completion, Model, Sampling, resolve
from cod_agent.models.embedded import GgufModel
from cod_agent.policies import folder_of
from cod_agent.tasks import Pack


class Counted:
    """A model that counts what it generates."""

    def __init__(self, model: Model) -> None:
        self._model, self.name, self.form = model, model.name, model.form
        self.calls = self.prompt = self.generated = self.inexact = 0

    async def complete(self, messages: Sequence[Message], **options: object) -> Completion:
        completion = await self._model.complete(messages, **options)
        self.calls += 1
        self.inexact += completion.tokens is None
        if completion.usage:
            self.prompt += completion.usage[0]
            self.generated += completion.usage[1]
        return completion


async def live_bare(model: Counted, pack: Pack) -> float:
    """A pack lived by hand: the rewards' mean."""
    context, won = "", 0.0
    for task in pack.tasks:
        session = pack.environment.start(task)
        seen = first = session.reset()
        said, turns = COMPACT.solve(task, context, seen), list[Turn]()
        while not seen.done:
            answer = (await model.complete(said)).text
            seen = session.step(answer)
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
            turns.append(Turn(answer, seen))
        won += seen.feedback.reward or 0.0
        update = COMPACT.update(task, context, Trajectory(first, tuple(turns)), seen.feedback)
        with contextlib.suppress(UpdateRefused):
            context = parse_update((await model.complete(update)).text, 4000)
    return won / len(pack.tasks)


async def live(model: Counted, pack: Pack, memory: Memory) -> float:
    """A pack lived by the real agent: the rewards' mean."""
    agent = CoDAgent(pack.id, model=model, memory=memory)
    rewards = [outcome.reward or 0.0 async for outcome in agent.run(pack)]
    return sum(rewards) / len(rewards)


async def measure(arguments: argparse.Namespace, model: Counted, memory: Memory | None) -> list[float]:
    lake = FrozenLake("small", seed=arguments.seed, form="compact")
    waiting = iter(range(arguments.packs))
    rewards: list[float] = []

    async def worker() -> None:
        for index in waiting:
            pack = lake.pack(arguments.pack_size, index)
            rewards.append(await (live(model, pack, memory) if memory else live_bare(model, pack)))

    await asyncio.gather(*(worker() for _ in range(arguments.concurrent)))
    return rewards


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--bare", action="store_true", help="without agent and database")
    parser.add_argument("--llama-cpp", action="store_true", help="have llama.cpp compute what numpy would")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--packs", type=int, default=128)
    parser.add_argument("--pack-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model: Model = resolve(arguments.model, concurrency=arguments.concurrent)
    if arguments.llama_cpp:
        file = folder_of(arguments.model) / "model.gguf"
        model.close()
        model = GgufModel(
            file, form="compact", sampling=Sampling(max_tokens=40), parallel=arguments.concurrent, small=False
        )
    counted = Counted(model)
    with tempfile.TemporaryDirectory() as folder:
        memory = None if arguments.bare else Memory.open(Path(folder) / "runs.db")
        began, used = time.perf_counter(), cpu()
        rewards = asyncio.run(measure(arguments, counted, memory))
        wall, used = time.perf_counter() - began, cpu() - used
        if memory:
            memory.close()
    model.close()
    out = {
        "through": "bare loop" if arguments.bare else "CoDAgent",
        "cores": len(os.sched_getaffinity(0)),
        "concurrent_packs": arguments.concurrent,
        "calls": counted.calls,
        "prompt_tokens_per_call": round(counted.prompt / counted.calls, 1),
        "generated_tokens_per_call": round(counted.generated / counted.calls, 2),
        "inexact_calls": counted.inexact,
        "seconds": round(wall, 2),
        "cpu_seconds": round(used, 2),
        "generated_tokens_per_second": round(counted.generated / wall),
        "generated_tokens_per_cpu_second": round(counted.generated / used),
        "mean_reward": round(sum(rewards) / len(rewards), 3),
    }
    print(json.dumps(out, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
