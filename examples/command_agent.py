"""An agent that works in a folder with shell commands, in a sandbox, and learns from task to task what works there.

    pip install connect-the-dots      # and bubblewrap: apt-get install bubblewrap
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/command_agent.py MODEL ops.db work

The model needs function calling. The tasks judge themselves by what is in the folder afterwards.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cod_agent import CoDAgent, Task
from cod_agent.tools import command_tool

TASKS = [
    Task(
        id="count", prompt="Write the number of lines of access.log into the file lines.txt.", data={"lines.txt": "5"}
    ),
    Task(id="errors", prompt="Write the number of answers with status 500 into errors.txt.", data={"errors.txt": "2"}),
    Task(id="slowest", prompt="Write the path of the slowest request into slowest.txt.", data={"slowest.txt": "/b"}),
]
LOG = "GET /a 200 12\nGET /b 500 90\nGET /a 200 11\nGET /c 500 31\nGET /c 200 14\n"


async def main(model: str, memory: str, work: str) -> None:
    folder = Path(work)
    run_command = command_tool(folder, seconds=20, memory=256)
    (folder / "access.log").write_text(LOG)
    async with CoDAgent("ops", model=f"openai:{model}", memory=memory, tools=[run_command]) as agent:
        for position, task in enumerate(TASKS):
            outcome = await agent.solve(task, position=position)
            if outcome.reward is None:
                right = [
                    (folder / name).exists() and (folder / name).read_text().strip() == text
                    for name, text in task.data.items()
                ]
                outcome = await agent.feedback(outcome, reward=float(all(right)))
            print(f"{task.id}: {outcome.reward}")
        print(agent.context)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))
