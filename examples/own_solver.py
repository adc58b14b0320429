"""Three ways to keep an agent of your own and still have its context, its memory and its record.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python examples/own_solver.py MODEL own.db

A solver is any `async (task, context, tools) -> answer`. After a crash it is started again from its beginning and meets
its own recorded past: so it keeps nothing between tasks, and asks for the same things in the same situation (no clock,
no dice).
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from cod_agent import Boundary, CoDAgent, Message, Solver, Task, tool
from cod_agent.context import NATURAL, message
from cod_agent.errors import ToolFailed
from cod_agent.journal.http import recording_client


def sdk_solver(base_url: str | None = None, model: str = "m") -> Solver:
    """A loop on the OpenAI SDK. All it takes to be recorded is the HTTP client; tools are called by their names."""
    import openai

    async def solve(task: Task, context: str, tools: Boundary) -> str:
        kit = {function.__name__: function for function in tools}
        said: list[Any] = [
            {"role": "system", "content": f"What you know so far:\n{context or 'nothing'}"},
            {"role": "user", "content": f"{task.prompt} ({task.id})"},
        ]
        # The journal answers for what was asked before: retries are the SDK's, each attempt is on record.
        async with openai.AsyncOpenAI(base_url=base_url, http_client=recording_client()) as client:
            while True:
                answer = await client.chat.completions.create(model=model, messages=said, tools=described(kit))
                spoken = answer.choices[0].message
                said.append(spoken.model_dump(exclude_none=True))
                if not spoken.tool_calls:
                    return spoken.content or ""
                # Parallel tools are fine: the record knows them by what they were asked, not by their order.
                results = await asyncio.gather(*(run(kit, call.function) for call in spoken.tool_calls))
                for call, result in zip(spoken.tool_calls, results, strict=True):
                    said.append({"role": "tool", "tool_call_id": call.id, "content": result})

    return solve


async def run(kit: dict[str, Any], asked: Any) -> str:
    """A tool's result as text. What the tool raised is its result; any other error is not the model's business."""
    try:
        return str(await kit[asked.name](**json.loads(asked.arguments)))
    except (ToolFailed, KeyError, ValueError, TypeError) as error:
        return f"error: {error}"


def described(kit: dict[str, Any]) -> list[Any]:
    """The tools as the API wants them; here all their parameters are strings or numbers."""
    kinds = {"int": "integer", "float": "number"}
    out = []
    for name, function in kit.items():
        hints = {key: str(kind) for key, kind in function.__annotations__.items() if key != "return"}
        properties = {key: {"type": kinds.get(kind, "string")} for key, kind in hints.items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        about = {"name": name, "description": function.__doc__ or "", "parameters": schema}
        out.append({"type": "function", "function": about})
    return out


async def asking_solver(task: Task, context: str, tools: Boundary) -> str:
    """Two questions to the agent's own model: a draft, then a second look at it."""
    said: list[Message] = NATURAL.solve(task, context, None)
    draft = await tools.ask(said)
    said += [message("assistant", ("model", draft.text)), message("user", ("application", "Check that, then answer."))]
    return (await tools.ask(said)).text


async def modelless_solver(task: Task, context: str, tools: Boundary) -> str:
    """No model at all: whatever an application does already, with its tools recorded."""
    search, *_ = tools
    found = await search(task.prompt)
    return f"{len(found)} found"


@tool(on_crash="repeat")
def search(query: str) -> str:
    """Look something up."""
    return f"three results for {query}"


async def main(model: str, database: str) -> None:
    """One task a day; how it went is known later, and not in order."""
    solver = sdk_solver(model=model)
    async with CoDAgent("own", model=f"openai:{model}", memory=database, solver=solver, tools=[search]) as agent:
        monday = await agent.solve(Task(id="monday", prompt="Where do puffins breed?"))
        tuesday = await agent.solve(Task(id="tuesday", prompt="And terns?"))
        print(monday.answer, tuesday.answer, sep="\n")
        await agent.feedback(tuesday, 0.0, "the names of the islands are missing")
        await agent.feedback(monday, 1.0)
        print(agent.context)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
