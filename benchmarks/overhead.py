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
from cod_agent.context import NATURAL, Trajectory, Turn
from cod_agent.models.openai import OpenAIModel

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
        return Observation(f"Step {self.steps}. {SAID}", done=done, feedback=Feedback(reward=1.0, text="out") if done else None)


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


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--tasks", type=int, default=200)
    options.add_argument("--repeats", type=int, default=5)
    chosen = options.parse_args()
    ours, theirs = [], []
    with scripted_server() as url, tempfile.TemporaryDirectory() as folder:
        for repeat in range(chosen.repeats):
            spent, calls = asyncio.run(bare(url, chosen.tasks))
            theirs.append(spent / calls * 1e3)
            spent, calls = asyncio.run(runtime(url, chosen.tasks, f"{folder}/{repeat}.db"))
            ours.append(spent / calls * 1e3)
    a, b = statistics.median(ours), statistics.median(theirs)
    print(json.dumps({"runtime_ms": round(a, 3), "create_ms": round(b, 3), "ratio": round(a / b, 3)}))


if __name__ == "__main__":
    main()
