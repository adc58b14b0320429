"""Record the golden database of a release: a small file with every kind of row, for the tests of later ones.

    git worktree add /tmp/release TAG
    PYTHONPATH=/tmp/release:/tmp/release/tests python tests/golden/record.py tests/golden/vN.db

Run by that release's code, once; the file is kept in the repository (`git add -f`), and this script only for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from servers import Fault, ScriptedServer

from cod_agent import CoDAgent, Memory, Sampling, Task, tool
from cod_agent.context import message
from cod_agent.environments import FrozenLake
from cod_agent.models import resolve
from cod_agent.models.openai import OpenAIModel
from cod_agent.models.scripted import ScriptedModel

LAKE = FrozenLake("tiny", seed=3, form="compact")
NOTES = ["", "1: up", "2: down"]
ERRANDS = [Task(id=f"errand-{number}", prompt=f"Buy fruit number {number}.") for number in range(4)]


def words(answer: str, note: str) -> ScriptedModel:
    """A model that always says the same two things."""
    return ScriptedModel(
        "words", lambda messages: note if "new note" in messages[-1].content else answer, form="natural"
    )


async def lake(memory: Memory) -> None:
    """Exact tokens, updates, a fork."""
    model = resolve("embedded", sampling=Sampling(seed=1))
    async with CoDAgent("lake", model=model, memory=memory) as agent:
        async for _ in agent.run(LAKE.pack(3)):
            pass
        async for _ in agent.run(LAKE.pack(2, 1), run="branch", fork=(LAKE.pack(3).id, 1)):
            pass


async def told(memory: Memory) -> None:
    """Contexts that were given."""
    player = ScriptedModel("still", lambda messages: "Direction 1")
    async with CoDAgent("told", model=player, memory=memory, given=lambda run, position: NOTES[position]) as agent:
        async for _ in agent.run(LAKE.pack(3)):
            pass


async def refused(memory: Memory) -> None:
    """Updates that were not taken."""
    async with CoDAgent("refused", model=words("Direction 1", "I will not."), memory=memory, environment=LAKE) as agent:
        async for _ in agent.run(FrozenLake("tiny", seed=3).pack(2)):
            pass


async def fruit(name: str) -> int:
    """How much there is."""
    if name == "durian":
        raise ValueError("not sold here")
    return len(name)


async def shopping(task: Task, context: str, tools: Any) -> str:
    """A solver of an application's own: a tool, another that raises, a model."""
    count = await tools[0]("apple")
    try:
        await tools[0]("durian")
    except Exception as error:
        count = f"{count}, {type(error).__name__}"
    said = await tools.ask([message("user", ("application", f"{task.prompt} There is {count}."))])
    return str(said.text)


async def shop(memory: Memory) -> None:
    """Tools; feedback that came later, or not yet; a task that was given up."""
    model = words("bought", "<context>\nBuy early.\n</context>")
    async with CoDAgent("shop", model=model, memory=memory, solver=shopping, tools=[fruit]) as agent:
        first = await agent.solve(ERRANDS[0])
        await agent.feedback(first, 1.0, "thank you")
        await agent.solve(ERRANDS[1])

    async def fails(task: Task, context: str, tools: Any) -> str:
        await shopping(task, context, tools)
        raise ConnectionError("the power went out")

    async with CoDAgent("shop", model=model, memory=memory, solver=fails, tools=[fruit]) as agent:
        with contextlib.suppress(ConnectionError):
            await agent.solve(ERRANDS[2])
        await agent.abandon(reason="the shop is closed")


async def served(memory: Memory) -> None:
    """Calls over HTTP, and an attempt that failed."""
    with ScriptedServer(lambda request, n: Fault(status=503) if n == 0 else "<context>\n1: up\n</context>") as server:
        model = OpenAIModel("m", base_url=server.url, exact=True, retries=1)
        async with CoDAgent("served", model=model, memory=memory) as agent:
            async for _ in agent.run(FrozenLake("tiny", seed=3).pack(2)):
                pass
        await model.aclose()


async def dies(memory: Memory) -> None:
    """A task that stands open, its lease that of a dead process, with a tool whose crash must be known."""

    @tool(on_crash="ask")
    async def pay(amount: int) -> str:
        memory.write_sync(lambda conn: conn.execute("UPDATE leases SET host = 'elsewhere', pid = 1, expires = 1.0"))
        memory.read_sync(lambda conn: conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        os._exit(0)

    async def paying(task: Task, context: str, tools: Any) -> str:
        await shopping(task, context, tools)
        return str(await tools[1](5))

    model = words("bought", "<context>\nBuy early.\n</context>")
    agent = CoDAgent("dies", model=model, memory=memory, solver=paying, tools=[fruit, pay])
    await agent.solve(ERRANDS[3])


async def whole(path: Path) -> None:
    memory = Memory.open(path, durable=False)
    for life in (lake, told, refused, shop, served, dies):
        await life(memory)


if __name__ == "__main__":
    asyncio.run(whole(Path(sys.argv[1])))
