"""A tool-using AgentScope agent that rewrites its context after every task.

    pip install 'connect-the-dots[agentscope]'
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/agentscope_agent.py MODEL shop.db

Kill it whenever you like and start it again: it goes on where it was, and repeats nothing that is on record.
"""

from __future__ import annotations

import asyncio
import sys

from cod_agent import CoDAgent, Task, idempotency_key, tool
from cod_agent.solvers import AgentScopeSolver

STOCK = {"pears": 4, "apples": 11}


def stock(fruit: str) -> int:
    """How many there are.

    Args:
        fruit: which, in the plural.
    """
    return STOCK.get(fruit, 0)


@tool(on_crash="ask")
async def order(fruit: str, number: int) -> str:
    """Order fruit. It costs money, so a crash in the middle is looked into by a person."""
    return f"ordered {number} {fruit} (receipt {idempotency_key()[:8]})"


TASKS = [
    Task(id="pears", prompt="We need ten pears in all. Order what is missing."),
    Task(id="apples", prompt="We need ten apples in all. Order what is missing."),
]


async def main(model: str, database: str, base_url: str | None = None) -> None:
    """Live through the tasks; the application judges each answer."""
    async with (
        AgentScopeSolver(model, base_url=base_url, max_iters=10) as solver,
        CoDAgent("shop", model=f"openai:{model}", memory=database, solver=solver, tools=[stock, order]) as agent,
    ):
        async for outcome in agent.run(TASKS):
            print(outcome.task.id, "->", outcome.answer)
            await agent.feedback(outcome, 1.0 if "order" in outcome.answer.lower() else 0.5)
        print(agent.context)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
