"""What tests of model servers share: checkpoints as they stand in a registry, lives through a server, servers with faults."""

from __future__ import annotations

import os
import sqlite3
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cod_agent.policies import folder_of
from cod_train.serving import Engine, Launch, ModelServer

FAULTY = Path(__file__).with_name("faulty_server.py")


def checkpoint(
    folder: Path, name: str = "tiny", *, kind: Any = "full", base: Path | None = None, digit: str = "a"
) -> Any:
    """A checkpoint that no registry holds."""
    from cod_train.checkpoints import Checkpoint

    return Checkpoint(name, None, "candidate", kind, folder, base, digit * 64, None, "", "", {}, "", 0.0)


async def trains_from(server: Any, memory: Path) -> set[str]:
    """Live a pack through `server`, check that all of it can train, and say which weights were recorded."""
    from cod_agent import CoDAgent
    from cod_agent.environments import FrozenLake
    from cod_agent.models.openai import OpenAIModel
    from cod_train.rollouts import read_rollouts

    lake = FrozenLake("small", seed=5, form="compact")
    key = server.key or None
    model = OpenAIModel(server.weights, base_url=server.base_url, api_key=key, exact=True, form="compact", retries=0)
    async with CoDAgent("a", model=model, memory=memory, environment=lake) as agent:
        outcomes = [outcome async for outcome in agent.run(lake.pack(3))]
    await model.aclose()
    assert len(outcomes) == 3
    with sqlite3.connect(memory) as conn:
        kept = conn.execute("SELECT inexact, on_policy, weights FROM calls").fetchall()
    assert len(kept) >= 5 and {row[:2] for row in kept} == {("", 1)}
    _, account = read_rollouts([memory])
    assert (account.segments, account.usable, account.refused) == (5, 5, {})
    return {row[2] for row in kept}


@dataclass(frozen=True)
class Faulty(Engine):
    """Starts `faulty_server.py`."""

    fault: str = "none"

    def launch(self, checkpoint: Any, port: int) -> Launch:
        command = [sys.executable, str(FAULTY), self.fault, str(port), checkpoint.weights]
        return Launch(command, {}, "the faulty server")


async def started(folder: Path, fault: str = "none", **options: Any) -> ModelServer:
    """A server with a fault, for the shipped policy; its log is in folder/logs."""
    return await ModelServer.start(
        checkpoint(folder_of("embedded-base")), Faulty(fault=fault), folder / "logs", **options
    )


def alive(pid: int) -> bool:
    """Whether it runs; what is dead and waits for its parent does not."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end_within(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(map(alive, pids))


def pids_in(log: Path) -> list[int]:
    """Of the faulty server and its child, from the last start in its log."""
    (said,) = [line for line in log.read_text().splitlines() if line.startswith("pids ")][-1:]
    return [int(word) for word in said.split()[1:]]
