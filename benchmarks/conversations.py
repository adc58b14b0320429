"""How fast the trainer's engine answers by itself: 64 conversations that go on turn by turn, no environment, no database.

    OMP_NUM_THREADS=1 python benchmarks/conversations.py                  # the shipped base: numpy
    OMP_NUM_THREADS=1 python benchmarks/conversations.py --folder DIR     # another Hugging Face model

A conversation begins with 60 to 110 tokens and ends at 200; an answer takes 3 to 25 and what is said next 25. The weights are made
so small that every token is about as likely, so that answers end where they should. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from cod_agent.policies import folder_of
from cod_train.engines import Engine, engine_for


async def converse(engine: Engine, number: int, until: float, counts: dict[str, int]) -> None:
    source = np.random.default_rng(number)
    while True:
        prompt = source.integers(0, engine.vocabulary, source.integers(60, 110)).tolist()
        new = len(prompt)
        while len(prompt) < 200:
            if time.perf_counter() > until:
                return
            drawn = await asyncio.wrap_future(engine.ask(prompt, max_tokens=int(source.integers(3, 26))))
            counts["calls"] += 1
            counts["read"] += new
            counts["generated"] += len(drawn.ids)
            prompt = [*prompt, *drawn.ids, *source.integers(0, engine.vocabulary, 25).tolist()]
            new = 26  # the last token drawn was not read yet


async def measure(engine: Engine, conversations: int, seconds: float) -> dict[str, int]:
    counts, until = {"calls": 0, "read": 0, "generated": 0}, time.perf_counter() + seconds
    await asyncio.gather(*(converse(engine, number, until, counts) for number in range(conversations)))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=folder_of("embedded-base"))
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    engine = engine_for(arguments.folder, slots=arguments.conversations, length=256, seed=0)
    weights = [load_file(file) for file in sorted(arguments.folder.glob("*.safetensors"))]
    engine.load({name: 0.01 * tensor.astype(np.float32) for part in weights for name, tensor in part.items()})
    asyncio.run(measure(engine, arguments.conversations, 1))
    began, used = time.perf_counter(), time.process_time()
    counts = asyncio.run(measure(engine, arguments.conversations, arguments.seconds))
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    engine.close()
    out = {name: round(count / wall) for name, count in counts.items()}
    out = {f"{name}_per_second": value for name, value in out.items()}
    out |= {"generated_per_cpu_second": round(counts["generated"] / cpu), "cpu_share_percent": round(100 * cpu / wall)}
    print(json.dumps(out, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
