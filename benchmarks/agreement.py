"""Whether transformers, vLLM, llama.cpp and our own engine say the same of the same tokens.

    python benchmarks/agreement.py                  # 200 recorded calls of `embedded`, served by vLLM
    python benchmarks/agreement.py --serve embedded # served by the project's own engine, where there is no vLLM

Agents live packs of frozen-lake:small on a real model server; what it said of the tokens it sampled is in the run database. Then every
recorded call is scored again, its own tokens one after the other: by transformers in 32 bits, by the numpy engine and by llama.cpp from
the GGUF file. Prints one JSON object: for each, the largest and the mean difference to the server, in nats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from cod_agent import CoDAgent
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.models import Sampling
from cod_agent.models.gguf import read_metadata
from cod_agent.models.llama_engine import Engine as LlamaEngine
from cod_agent.models.openai import OpenAIModel
from cod_agent.models.small_llama import SmallLlama
from cod_agent.policies import folder_of
from cod_train.rollouts import read_rollouts
from cod_train.sequences import Call

Score = Callable[[list[int], list[int]], list[float]]
"""(prompt ids, sampled ids) -> the log-probability of every sampled id."""


async def recorded(base_url: str, name: str, calls: int, database: Path) -> list[Call]:
    """The first `calls` calls that agents made on that server, four packs at a time."""
    model = OpenAIModel(name, base_url=base_url, exact=True, form="compact", sampling=Sampling(max_tokens=40))
    lake = FrozenLake("small", seed=11, form="compact")
    found: list[Call] = []
    for first in range(0, calls, 4):

        async def live(pack: Any) -> None:
            async with CoDAgent("agent", model=model, memory=database) as agent:
                async for _ in agent.run(pack):
                    pass

        await asyncio.gather(*(live(lake.pack(4, first + index)) for index in range(4)))
        rollouts, _ = read_rollouts([database])
        found = [call for rollout in rollouts for segment in rollout.segments for call in segment.calls]
        if len(found) >= calls:
            break
    await model.aclose()
    return found[:calls]


def by_transformers(folder: Path) -> Score:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(prompt: list[int], sampled: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + sampled])).logits[0, len(prompt) - 1 : -1].double()
        said = logits.log_softmax(-1)[torch.arange(len(sampled)), torch.tensor(sampled)]
        return said.tolist()

    return score


def by_numpy(file: Path) -> Score:
    model = SmallLlama.of_file(file, read_metadata(file), 1, 1024)

    def score(prompt: list[int], sampled: list[int]) -> list[float]:
        out = []
        for at, token in enumerate(sampled):
            new, start = (prompt, 0) if at == 0 else ([sampled[at - 1]], len(prompt) + at - 1)
            logits = model.step(np.array([new]), np.array([start]), np.array([0]), np.array([len(new) - 1]))[0]
            shifted = (logits - logits.max()).astype(np.float64)
            out.append(float(shifted[token] - np.log(np.exp(shifted).sum())))
        return out

    return score


def by_llama_cpp(file: Path) -> Score:
    metadata = read_metadata(file)
    engine = LlamaEngine(file, metadata, 1, 1, 1024)
    vocabulary = int(metadata["llama.vocab_size"])
    request = {
        "temperature": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 1,
        "logprobs": vocabulary,
        "cache_prompt": True,
    }

    def score(prompt: list[int], sampled: list[int]) -> list[float]:
        out = []
        for at, token in enumerate(sampled):
            _, _, (said, *_), _ = engine.complete([*prompt, *sampled[:at]], request, None)
            out.append(next(one["logprob"] for one in said["top_logprobs"] if one["id"] == token))
        return out

    return score


def differences(calls: list[Call], score: Score) -> dict[str, float]:
    """How far `score` is from what the server said, over all tokens."""
    off = np.concatenate([np.abs(np.subtract(score(call.prompt, call.sampled), call.logprobs)) for call in calls])
    return {"largest": float(off.max()), "mean": float(off.mean())}


async def served(engine: str, folder: Path, calls: int, where: Path) -> tuple[list[Call], str]:
    """Calls recorded on a server of the given kind, and what it calls its weights."""
    from cod_train.serving.server import Engine, ModelServer

    checkpoint: Any = SimpleNamespace(folder=folder, weights=f"{folder.name}@agreement", kind="full", base=None)
    server = await ModelServer.start(checkpoint, Engine(kind=engine, dtype="float32"), where)
    try:
        found = await recorded(server.base_url, checkpoint.weights, calls, where / "calls.db")
    finally:
        await server.stop()
    return found, found[0].weights


def scores(folder: Path) -> Iterator[tuple[str, Score]]:
    yield "transformers", by_transformers(folder)
    yield "numpy", by_numpy(folder / "model.gguf")
    yield "llama.cpp", by_llama_cpp(folder / "model.gguf")


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--policy", default="embedded")
    parse.add_argument("--serve", default="vllm", choices=["vllm", "embedded"])
    parse.add_argument("--calls", type=int, default=200)
    said = parse.parse_args()
    folder = folder_of(said.policy)
    with tempfile.TemporaryDirectory() as where:
        calls, weights = asyncio.run(served(said.serve, folder, said.calls, Path(where)))
    tokens = sum(len(call.sampled) for call in calls)
    found = {name: differences(calls, score) for name, score in scores(folder)}
    said_of_all = {"served by": weights, "calls": len(calls), "tokens": tokens, "off": found}
    sys.stdout.write(json.dumps(said_of_all, indent=2) + "\n")


if __name__ == "__main__":
    main()
