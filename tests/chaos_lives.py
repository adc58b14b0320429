"""Lives through a chaotic endpoint, in a process that may be killed: python tests/chaos_lives.py URL DATABASE LIVES TASKS

A quarter of them each: our own model, plain and streamed with exact tokens, and the OpenAI SDK through the recording transport, plain and
streamed. A task is `TURNS` calls and an update. Whatever an endpoint refuses for too long is resumed, as `run` is: by calling it again.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

TURNS = 4
"""Calls of a solve episode."""
PATIENCE = 2.0
"""Seconds an attempt may take."""


def lives(url: str, database: str, count: int, tasks: int) -> None:
    """Live them all; returns when they are done."""
    import openai._base_client

    import cod_agent.journal.bodies
    import cod_agent.models.openai
    from cod_agent import Memory

    # What is waited for and read takes a second of a test's time, not a minute.
    cod_agent.models.openai.FIRST_WAIT = openai._base_client.INITIAL_RETRY_DELAY = 0.02
    openai._base_client.MAX_RETRY_DELAY = 0.1
    cod_agent.journal.bodies.LARGEST = 1 << 20

    async def all_of_them() -> None:
        memory = Memory.open(database)
        places = asyncio.Semaphore(32)
        try:
            await asyncio.gather(*(_life(memory, places, url, number, tasks) for number in range(count)))
        finally:
            memory.close()

    asyncio.run(all_of_them())


async def _life(memory: Any, places: asyncio.Semaphore, url: str, number: int, tasks: int) -> None:
    from cod_agent import CoDAgent, Task
    from cod_agent.errors import ModelError
    from cod_agent.models.openai import OpenAIModel

    stream = number % 2 == 1
    model = OpenAIModel("m", base_url=url, api_key="k", stream=stream, exact=stream, timeout=PATIENCE)
    ways: dict[str, Any] = {"environment": Stairs()} if number % 4 < 2 else {"solver": sdk_solver(url, stream)}
    async with places, CoDAgent(f"life-{number}", model=model, memory=memory, **ways) as agent:
        todo = [Task(id=f"{number}/{k}", prompt=f"Climb stairs {number}/{k}.") for k in range(tasks)]
        while True:
            try:
                async for outcome in agent.run(todo):
                    if outcome.reward is None and number % 4 >= 2:
                        await agent.feedback(outcome, 1.0)
                break
            except ModelError:
                pass
        await model.aclose()


class Stairs:
    """`TURNS` steps, each of which says what was said."""

    name = "stairs"

    def start(self, task: Any) -> Any:
        return _Climb(task)


class _Climb:
    def __init__(self, task: Any) -> None:
        self.task, self.steps = task, 0

    def reset(self) -> Any:
        from cod_agent import Observation

        self.steps = 0
        return Observation(f"You stand before the stairs {self.task.id}.")

    def step(self, answer: str) -> Any:
        from cod_agent import Feedback, Observation

        self.steps += 1
        done = self.steps == TURNS
        feedback = Feedback(reward=1.0) if done else None
        return Observation(f"step {self.steps} of {self.task.id}", done=done, feedback=feedback)


def sdk_solver(url: str, stream: bool) -> Any:
    """A loop on the OpenAI SDK that tries again whatever goes wrong."""
    import openai

    from cod_agent.errors import ModelGarbled
    from cod_agent.journal.http import http_module, recording_client

    async def solve(task: Any, context: str, tools: Any) -> str:
        client = openai.AsyncOpenAI(
            base_url=url, api_key="k", max_retries=1, http_client=recording_client(timeout=PATIENCE)
        )
        said: list[Any] = [{"role": "user", "content": f"{context} {task.prompt}"}]
        async with client:
            for turn in range(TURNS):
                text = ""
                while not text:
                    try:
                        text = await ask(client, said)
                    except (openai.APIError, ModelGarbled, http_module().HTTPError):
                        await asyncio.sleep(0.01)
                said += [{"role": "assistant", "content": text}, {"role": "user", "content": f"turn {turn}"}]
        return said[-2]["content"]

    async def ask(client: Any, said: list[Any]) -> str:
        answer = await client.chat.completions.create(model="m", messages=said, stream=stream)
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join([piece.choices[0].delta.content or "" async for piece in answer if piece.choices])

    return solve


if __name__ == "__main__":
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent)]
    lives(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
