"""What the front costs: time and CPU of a request through it, against the same request sent to the server itself, in one run.

    python benchmarks/front.py [--requests 480] [--repeats 5]

Client and front share this process, the server that answers at once has one of its own. Prints JSON: milliseconds a request, median over
the repeats, with one client, with 16 and with 128 at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _server import scripted_server

from cod_agent.journal.http import http_module, transport_to
from cod_train.serving.front import Front

WEIGHTS = "scripted@000000000000"


async def spent(transport: Any, base: str, model: str, requests: int, clients: int) -> tuple[float, float]:
    """Milliseconds a request: by the clock, and of this process's CPU."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "x" * 1500}]}).encode()
    module = http_module()

    async def ask() -> None:
        for _ in range(requests // clients):
            response = await transport.handle_async_request(
                module.Request("POST", f"{base}/chat/completions", content=body)
            )
            await response.aread()
            await response.aclose()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(ask() for _ in range(clients)))
    return (time.perf_counter() - began) / requests * 1e3, (time.process_time() - cpu) / requests * 1e3


async def measure(url: str, requests: int, repeats: int) -> dict[str, float]:
    front = Front(port=0)
    await front.start()
    front.add(WEIGHTS, url)
    front.switch(WEIGHTS)
    transport, out = transport_to(url), {}
    ways = {"direct": (url, WEIGHTS), "front": (front.base_url, "policy")}
    for base, model in ways.values():  # connections and imports are not what is measured
        await spent(transport, base, model, 64, 16)
    for clients in (1, 16, 128):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(repeats):
            for name, (base, model) in ways.items():
                found[name].append(await spent(transport, base, model, requests, clients))
        for name, figures in found.items():
            for what, values in zip(("ms", "cpu_ms"), zip(*figures, strict=True), strict=True):
                out[f"{name}_{clients}_{what}"] = round(statistics.median(values), 3)
    await transport.aclose()
    await front.aclose()
    return out


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--requests", type=int, default=512)
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    with scripted_server() as url:
        sys.stdout.write(json.dumps(asyncio.run(measure(url, chosen.requests, chosen.repeats))) + "\n")


if __name__ == "__main__":
    main()
