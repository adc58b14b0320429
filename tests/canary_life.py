"""A life that meets a secret wherever it can: tasks, tools, their errors, the environment, feedback, contexts, the model's answers.

    CANARY_KEY=... OPENAI_API_KEY=... python tests/canary_life.py URL DATABASE KILL_AT

The process kills itself with SIGKILL when its tool has run KILL_AT times; 0 is never. What the tool really got goes, hashed, to
standard output.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from cod_agent import CoDAgent, Feedback, Observation, Task, tool
from cod_agent.models.openai import OpenAIModel
from cod_agent.secrets import CleanFormatter, Secrets

CANARY = os.environ["CANARY_KEY"]
RAN = 0


@tool(secrets=("CANARY_KEY",))
async def deploy(login: str) -> str:
    """Deploy with a login."""
    global RAN
    RAN += 1
    print("deploy", sha256(login.encode()).hexdigest(), flush=True)
    if int(sys.argv[3]) == RAN:
        os.kill(os.getpid(), signal.SIGKILL)
    if RAN % 2:
        raise ValueError(f"the login {login} is refused, as is {b64encode(b'x' + login.encode()).decode()}")
    return f"deployed with {login}"


async def post(text: str) -> str:
    """Post something for all to see."""
    print("post", text, flush=True)
    return f"posted {text}; the server runs with {CANARY}"


class Gate:
    """Shows the secret and wants it back."""

    name, recovery = "gate", "snapshot"

    def start(self, task: Task) -> Any:
        return _Gate()


class _Gate:
    def __init__(self) -> None:
        self.steps = 0

    def reset(self) -> Observation:
        return Observation(f"The word is {CANARY}.", carried={CANARY: [CANARY]})

    def step(self, answer: str) -> Observation:
        self.steps += 1
        told = Feedback(reward=1.0, text=f"{CANARY} was right", ending=CANARY)
        return Observation(f"step {self.steps} {CANARY}", f"in short {CANARY}", self.steps == 2, told)

    def snapshot(self) -> Any:
        return {"steps": self.steps, "word": "none"}

    def restore(self, state: Any) -> None:
        self.steps = state["steps"]


def reply(request: dict[str, Any], n: int) -> Any:
    """A model that knows the secret, and was told to post it."""
    from servers import Answer, spoken

    messages, said = request["messages"], os.environ["CANARY_KEY"]
    if "Write the new note" in spoken(messages[-1]):
        return f"<context>\nremember {said}\n</context>"
    turn = sum(message["role"] == "assistant" for message in messages)
    if turn == 0:
        return Answer(f"I use {said}.", [("deploy", {"login": "[secret:CANARY_KEY]"})])
    if turn == 1:
        return Answer(
            None, [("post", {"text": "[secret:CANARY_KEY]"}), ("deploy", {"login": "key [secret:CANARY_KEY]"})]
        )
    return Answer(f"say {said}", message={"reasoning_content": f"it is {said}"})


async def main(url: str, database: str) -> None:
    # As whoever writes a program would log what goes wrong in it.
    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter(Secrets()))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])
    model = OpenAIModel("m", base_url=url, exact=True, stream=True, retries=0)
    tasks = [Task(id=CANARY, prompt=f"Deploy with {CANARY}.", data={CANARY: CANARY, "n": n}) for n in range(2)]
    settings = {"started with": f"--login {CANARY}"}
    async with CoDAgent(
        "a", model=model, memory=database, environment=Gate(), tools=[deploy, post], settings=settings
    ) as agent:
        async for event in agent.stream(tasks):
            logging.info("%r", event)
        print("context", agent.context, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run(main(sys.argv[1], sys.argv[2]))
