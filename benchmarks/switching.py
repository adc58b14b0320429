"""A switch of weights under load: what is lost, and whose answers are recorded under whose name.

    python benchmarks/switching.py [--engine embedded|vllm] [--agents 16] [--requests 600] [--json]

`cod serve` runs as a process of its own and follows a registry in which `embedded-base` is promoted. Agents live in frozen-lake:small,
each in one life; when half of the requests are answered, `embedded` is promoted. Then every recorded call is scored again by
transformers with the weights that the call names, and with the other ones: an answer of other weights than the named ones would differ.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.memory import history
from cod_agent.memory.content import read_tokens
from cod_agent.memory.readonly import look
from cod_agent.models.openai import OpenAIModel
from cod_agent.policies import folder_of
from cod_train.checkpoints import Registry
from cod_train.probe import TOLERANCE, load_exactly
from cod_train.sequences import Call

BEFORE, AFTER = "embedded-base", "embedded"
LONGEST = 400
"""Tasks in a life, if the switch takes that long."""


@contextlib.contextmanager
def served(registry: Path, engine: str) -> Iterator[tuple[dict[str, Any], Path]]:
    """`cod serve` as a process: what it says of itself, and the log of its events."""
    command = [
        sys.executable,
        "-m",
        "cod_agent.cli",
        "serve",
        "--registry",
        str(registry),
        "--engine",
        engine,
        "--port",
        "0",
    ]
    log = registry.parent / "serving"
    with (registry.parent / "serve.err").open("w") as told:
        process = subprocess.Popen(
            [*command, "--json", "--log", str(log)], stdout=subprocess.PIPE, stderr=told, text=True
        )
    assert process.stdout is not None
    said = ""
    try:
        while not said.endswith("}\n"):
            line = process.stdout.readline()
            if not line:
                sys.exit((registry.parent / "serve.err").read_text())
            said += line
        yield json.loads(said), log / "serve.jsonl"
    finally:
        process.terminate()
        process.wait()


def events(log: Path, name: str) -> list[dict[str, Any]]:
    return [event for line in log.read_text().splitlines() if (event := json.loads(line))["event"] == name]


async def live(number: int, model: OpenAIModel, memory: Path, told: Any) -> int:
    """One life, until `told` says that it is enough; its tasks."""
    lake = FrozenLake("small", seed=100 + number, form="compact")
    tasks = 0
    async with CoDAgent(f"agent-{number}", model=model, memory=memory) as agent:
        async for outcome in agent.run(lake.pack(LONGEST)):
            tasks += 1
            if told(outcome.calls):
                break
    return tasks


async def load(base_url: str, log: Path, registry: Path, memory: Path, agents: int, requests: int) -> dict[str, float]:
    """Live, promote in the middle, and go on for a while after the switch."""
    model = OpenAIModel("policy", base_url=base_url, exact=True, form="compact")
    count, promoted, switched = 0, 0.0, 0.0
    at_switch = 0

    def told(calls: int) -> bool:
        nonlocal count, promoted, switched, at_switch
        count += calls
        if not promoted and count >= requests / 2:
            with Registry(registry) as kept:
                kept.promote(AFTER, "the benchmark's switch")
            promoted = time.time()
        if promoted and not switched and len(found := events(log, "switched")) > 1:
            switched, at_switch = found[-1]["time"], count
        return bool(switched) and count >= max(requests, at_switch + requests / 4)

    began = time.time()
    lives = (live(number, model, memory, told) for number in range(agents))
    lost = [error for error in await asyncio.gather(*lives, return_exceptions=True) if isinstance(error, BaseException)]
    ended = time.time()
    await model.aclose()
    for error in lost:  # a request that failed for good ends its life
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    return {
        "lost": len(lost),
        "seconds": ended - began,
        "to_switch": switched - promoted,
        "promoted": promoted,
        "switched": switched,
    }


def largest_differences(calls: list[Call], folder: Path) -> list[float]:
    """For each call, the largest difference of a token's log-probability to what these weights give it; nats."""
    import torch

    model, _ = load_exactly(folder)
    out = []
    with torch.inference_mode():
        for call in calls:
            logits = model(torch.tensor([call.prompt + call.sampled])).logits[0, len(call.prompt) - 1 : -1].double()
            said = logits.log_softmax(-1).gather(1, torch.tensor(call.sampled)[:, None])[:, 0]
            out.append(float((said - torch.tensor(call.logprobs).double()).abs().max()))
    return out


def judged(registry: Path, memory: Path) -> dict[str, Any]:
    """Every recorded call, held against the weights that it names."""
    with look(memory) as conn:
        rows = conn.execute("SELECT id, weights FROM calls ORDER BY id").fetchall()
        exact = [(weights, read_tokens(conn, number)) for number, weights in rows]
        failed = [detail for (detail,) in conn.execute("SELECT detail FROM attempts")]
        by_life = [{step.weights.partition("@")[0] for step in history.steps(conn, run)} for run in history.find(conn)]
    calls = [Call(*tokens, weights) for weights, tokens in exact if tokens is not None]
    with Registry(registry) as kept:
        named = {weights: kept.of_weights(weights) for weights in {call.weights for call in calls}}
        folders = {name: kept.get(name).folder for name in (BEFORE, AFTER)}
    off = {name: largest_differences(calls, folder) for name, folder in folders.items()}
    wrong, worst, told_apart = 0, 0.0, 0
    for index, call in enumerate(calls):
        checkpoint = named[call.weights]
        own = off[checkpoint.name][index] if checkpoint is not None else float("inf")
        wrong += own > TOLERANCE
        worst = max(worst, own)
        told_apart += max(values[index] for values in off.values()) > TOLERANCE
    return {
        "recorded": len(rows),
        "compared": len(calls),
        "by_weights": dict(Counter(call.weights for call in calls)),
        "wrong_weights": wrong,
        "largest_difference": worst,
        "told_apart": told_apart,
        "retries": len(failed),
        "retried_because": dict(Counter(failed)),
        "lives": len(by_life),
        "lives_whose_contexts_name_both": sum({BEFORE, AFTER} <= names for names in by_life),
    }


def measure(engine: str, agents: int, requests: int, folder: Path) -> dict[str, Any]:
    registry, memory = folder / "registry.db", folder / "lives.db"
    with Registry(registry, create=True) as kept:
        for name in (BEFORE, AFTER):
            kept.add(folder_of(name), name=name)
        kept.promote(BEFORE, "where the benchmark begins")
    with served(registry, engine) as (said, log):
        timed = asyncio.run(load(said["base_url"], log, registry, memory, agents, requests))
        with contextlib.suppress(IndexError):
            timed["drain"] = events(log, "drained")[0]["time"] - timed["switched"]
    found = judged(registry, memory)
    timed = {key: value for key, value in timed.items() if key not in ("promoted", "switched")}
    return {
        "engine": engine,
        "agents": agents,
        "sent": found["recorded"] + found["retries"],
        **found,
        **timed,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--engine", choices=("embedded", "vllm"), default="embedded")
    options.add_argument("--agents", type=int, default=16)
    options.add_argument("--requests", type=int, default=600)
    options.add_argument("--json", action="store_true")
    chosen = options.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(chosen.engine, chosen.agents, chosen.requests, Path(folder))
    if chosen.json:
        sys.stdout.write(json.dumps(found) + "\n")
        return
    for key, value in found.items():
        sys.stdout.write(f"{key.replace('_', ' '):32s} {f'{value:.3g}' if isinstance(value, float) else value}\n")


if __name__ == "__main__":
    main()
