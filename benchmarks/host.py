"""What the service costs: model calls per second of the same agents in process and through `cod host`.

    python benchmarks/host.py [--agents 64] [--tasks 8] [--repeats 5] [--plain]

Agents walk frozen lakes (with `--plain`: they are given prompts, and feedback afterwards), all at once, against the same scripted
local server, with synchronous=FULL. In process they share a memory and a model, as in `cod eval`; through the service each is a
keep-alive connection of a client process. The two take turns in one run. Prints JSON, medians over the repeats: calls per second, and
milliseconds of CPU that the process with the agents spends per call, which other work on the machine does not disturb; `ratio` is calls per
second through the service over those in process, `cpu_ratio` the same of calls per second of CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _server import scripted_server

from cod_agent import CoDAgent, Memory, Task
from cod_agent.environments import FrozenLake
from cod_agent.models.openai import OpenAIModel

WORLD, TOKEN, CLIENTS = "frozen-lake:small", "a-token-for-the-benchmark", 2


def tasks_of(agent: int, count: int, plain: bool) -> list[Task]:
    if plain:
        return [Task(id=str(i), prompt="Find the way out. " * 20) for i in range(count)]
    return list(FrozenLake("small", seed=agent).pack(count))


async def in_process(url: str, agents: int, count: int, plain: bool, path: str) -> tuple[float, float]:
    """(Model calls per second, milliseconds of CPU per call)."""
    memory = Memory.open(path)
    model = OpenAIModel("scripted", base_url=url, api_key="x", concurrency=64)
    world = None if plain else FrozenLake("small")
    calls = 0

    async def live(number: int) -> None:
        nonlocal calls
        async with CoDAgent(f"agent-{number}", model=model, memory=memory, environment=world) as agent:
            for position, task in enumerate(tasks_of(number, count, plain)):
                outcome = await agent.solve(task, position=position)
                if plain:
                    outcome = await agent.feedback(outcome, 1.0, "good")
                calls += outcome.calls

    started, before = time.perf_counter(), time.process_time()
    await asyncio.gather(*(live(number) for number in range(agents)))
    spent, cpu = time.perf_counter() - started, time.process_time() - before
    await model.aclose()
    memory.close()
    return calls / spent, cpu / calls * 1e3


class Client:
    """One keep-alive connection, as little of HTTP as will do."""

    async def open(self, port: int) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        return self

    async def post(self, path: str, said: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(said).encode()
        self.writer.write(
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        found = json.loads(await self.reader.readexactly(length))
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"{head!r} {found}")
        return found


def client(port: int, numbers: list[int], count: int, plain: bool, pipe: Any) -> None:
    """A process of several agents: says that it is connected, waits for the word, lives, says how many calls that were."""

    async def live(number: int, connection: Client) -> int:
        calls = 0
        for position, task in enumerate(tasks_of(number, count, plain)):
            where = f"/v1/agents/agent-{number}"
            given = {"id": task.id, "prompt": task.prompt, "data": task.data, "position": position}
            found = await connection.post(f"{where}/tasks", given)
            if plain:
                judged = {"reward": 1.0, "text": "good"}
                found = await connection.post(f"{where}/runs/life/tasks/{position}/feedback", judged)
            calls += found["calls"]
        return calls

    async def whole() -> None:
        connections = [await Client().open(port) for _ in numbers]
        warm = tasks_of(0, 1, plain)[0]  # imports and pools are not what is measured
        await connections[0].post(f"/v1/agents/warm-{numbers[0]}/tasks", warm.model_dump())
        pipe.send("connected")
        pipe.recv()
        pipe.send(sum(await asyncio.gather(*map(live, numbers, connections))))

    asyncio.run(whole())


def through_service(url: str, agents: int, count: int, plain: bool, path: str) -> tuple[float, float]:
    """(Model calls per second, milliseconds of CPU of the service per call)."""
    port = _free_port()
    command = [sys.executable, "-m", "cod_agent.cli", "host", "--model", "openai:scripted", "--base-url", url]
    command += ["--memory", path, "--port", str(port), "--log-level", "warning"]
    command += [] if plain else ["--environment", WORLD]
    environment = {**os.environ, "COD_HOST_TOKEN": TOKEN, "OPENAI_API_KEY": "x"}
    host = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        host.stdout.readline()  # type: ignore[union-attr]
        spawn, workers = multiprocessing.get_context("spawn"), []
        for first in range(CLIENTS):
            here, there = spawn.Pipe()
            numbers = list(range(first, agents, CLIENTS))
            process = spawn.Process(target=client, args=(port, numbers, count, plain, there))
            process.start()
            workers.append((process, here))
        for _, pipe in workers:
            pipe.recv()
        started, before = time.perf_counter(), cpu_of(host.pid)
        for _, pipe in workers:
            pipe.send("go")
        calls = sum(pipe.recv() for _, pipe in workers)
        spent, cpu = time.perf_counter() - started, cpu_of(host.pid) - before
        for process, _ in workers:
            process.join()
        return calls / spent, cpu / calls * 1e3
    finally:
        host.terminate()
        host.wait()


def cpu_of(pid: int) -> float:
    """Seconds of CPU a process has spent."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--agents", type=int, default=64)
    options.add_argument("--tasks", type=int, default=8)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--plain", action="store_true")
    chosen = options.parse_args()
    given = (chosen.agents, chosen.tasks, chosen.plain)
    found: dict[str, list[tuple[float, float]]] = {"in_process": [], "through_service": []}
    with scripted_server() as url, tempfile.TemporaryDirectory() as folder:
        asyncio.run(in_process(url, 4, 2, chosen.plain, f"{folder}/warm.db"))
        for repeat in range(chosen.repeats):
            found["in_process"].append(asyncio.run(in_process(url, *given, f"{folder}/{repeat}.db")))
            found["through_service"].append(through_service(url, *given, f"{folder}/{repeat}-host.db"))
    said: dict[str, Any] = {}
    for name, values in found.items():
        said[name] = round(statistics.median(rate for rate, _ in values), 1)
        said[f"{name}_cpu_ms"] = round(statistics.median(cpu for _, cpu in values), 3)
    said["ratio"] = round(said["through_service"] / said["in_process"], 3)
    said["cpu_ratio"] = round(said["in_process_cpu_ms"] / said["through_service_cpu_ms"], 3)
    sys.stdout.write(json.dumps({"agents": chosen.agents, "plain": chosen.plain, **said}) + "\n")


if __name__ == "__main__":
    main()
