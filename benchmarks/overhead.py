"""What recording costs: CPU of this process per model call, against a bare `chat.completions.create` loop that stores nothing.

    python benchmarks/overhead.py [--tasks 200] [--turns 100] [--repeats 5]

Both sides have the same conversations with the same scripted local server, in turns, in one run; the runtime records with
synchronous=FULL. Two shapes: tasks of four calls (three answers in a dialogue and an update), and one conversation of many
tool turns. Prints JSON: milliseconds of CPU per call and their ratio, median over the repeats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _server import scripted_server

from cod_agent import CoDAgent, Feedback, Observation, Task
from cod_agent.context import NATURAL, Trajectory, Turn, prompts_for
from cod_agent.models.openai import OpenAIModel
from cod_agent.solvers.tools import ToolSolver

SAID = "You are in a maze. There are four doors, one of them leads on. " * 4


class Maze:
    """Three steps, then a reward."""

    name = "maze"

    def start(self, task: Task) -> Maze:
        made = Maze()
        made.steps = 0
        return made

    def reset(self) -> Observation:
        return Observation(SAID)

    def step(self, answer: str) -> Observation:
        self.steps += 1
        done = self.steps == 3
        return Observation(
            f"Step {self.steps}. {SAID}", done=done, feedback=Feedback(reward=1.0, text="out") if done else None
        )


async def runtime(url: str, tasks: int, path: str) -> tuple[float, int]:
    model = OpenAIModel("scripted", base_url=url, api_key="x")
    calls = 0
    async with CoDAgent("bench", model=model, memory=path, environment=Maze()) as agent:
        await agent.solve(Task(id="warm"), run="warm")
        started = time.process_time()
        async for outcome in agent.run(Task(id=str(i), prompt="Find the way out.") for i in range(tasks)):
            calls += outcome.calls
        spent = time.process_time() - started
    await model.aclose()
    return spent, calls


async def bare(url: str, tasks: int) -> tuple[float, int]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="x")
    calls, context, started = 0, "", 0.0
    for number in range(-1, tasks):
        if number == 0:
            started, calls = time.process_time(), 0
        task, maze = Task(id=str(number), prompt="Find the way out."), Maze().start(Task(id="x"))
        seen = maze.reset()
        messages = [m.wire() for m in NATURAL.solve(task, context, seen)]
        first, turns = seen, []
        while not seen.done:
            said = await client.chat.completions.create(model="scripted", messages=messages, temperature=1.0, top_p=1.0)
            calls += 1
            seen = maze.step(said.choices[0].message.content)
            turns.append(Turn("Answer: go on", seen))
            messages += [{"role": "assistant", "content": "go on"}, {"role": "user", "content": seen.text}]
        update = [m.wire() for m in NATURAL.update(task, context, Trajectory(first, tuple(turns)), seen.feedback)]
        said = await client.chat.completions.create(model="scripted", messages=update, temperature=1.0, top_p=1.0)
        calls += 1
        context = "a note"
    spent = time.process_time() - started
    await client.close()
    return spent, calls


async def look(place: str) -> str:
    """Look at a place."""
    return f"At {place}: {SAID}"


async def runtime_tools(url: str, turns: int, path: str) -> tuple[float, int]:
    model = OpenAIModel("scripted", base_url=url, api_key="x")
    prompts = prompts_for(None)
    async with CoDAgent(
        "bench", model=model, memory=path, tools=[look], solver=ToolSolver(prompts, max_rounds=turns)
    ) as agent:
        started = time.process_time()
        outcome = await agent.solve(Task(id="long", prompt="Find the way out."))
        spent = time.process_time() - started
    await model.aclose()
    return spent, outcome.calls


async def bare_tools(url: str, turns: int) -> tuple[float, int]:
    import openai

    client = openai.AsyncOpenAI(base_url=url, api_key="x")
    arguments = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
    tools = [
        {"type": "function", "function": {"name": "look", "description": "Look at a place.", "parameters": arguments}}
    ]
    messages = [m.wire() for m in NATURAL.solve(Task(id="long", prompt="Find the way out."), "", None)]
    calls, started = 0, time.process_time()
    for turn in range(turns + 1):
        beside = {"tools": tools} if turn < turns else {}
        said = await client.chat.completions.create(
            model="scripted", messages=messages, temperature=1.0, top_p=1.0, **beside
        )
        calls += 1
        spoken = said.choices[0].message
        messages.append(spoken.model_dump(exclude_none=True))
        for call in spoken.tool_calls or []:
            shown = await look(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": shown})
    spent = time.process_time() - started
    await client.close()
    return spent, calls


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tasks", type=int, default=200)
    options.add_argument("--turns", type=int, default=100)
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    spent: dict[str, list[float]] = {"create": [], "runtime": [], "create_tools": [], "runtime_tools": []}

    def note(name: str, measured: tuple[float, int]) -> None:
        spent[name].append(measured[0] / measured[1] * 1e3)

    with scripted_server() as url, tempfile.TemporaryDirectory() as folder:
        asyncio.run(bare(url, 5))  # imports and pools are not what is measured
        asyncio.run(runtime(url, 5, f"{folder}/warm.db"))
        for repeat in range(chosen.repeats):
            note("create", asyncio.run(bare(url, chosen.tasks)))
            note("runtime", asyncio.run(runtime(url, chosen.tasks, f"{folder}/{repeat}.db")))
            note("create_tools", asyncio.run(bare_tools(url, chosen.turns)))
            note("runtime_tools", asyncio.run(runtime_tools(url, chosen.turns, f"{folder}/{repeat}-tools.db")))
    ms = {name: statistics.median(values) for name, values in spent.items()}
    said = {f"{name}_ms": round(value, 3) for name, value in ms.items()}
    said["ratio_four_calls"] = round(ms["runtime"] / ms["create"], 3)
    said["ratio_tool_turns"] = round(ms["runtime_tools"] / ms["create_tools"], 3)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
