"""The default solver where there are tools: the model calls functions until it answers. No framework.

Arguments are checked against the function's signature before it runs; what is malformed is told to the model as the tool's
result and nothing is run. What a tool raises is its result, too. Several calls in one answer run in parallel.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from cod_agent.context import Message, Origin, Prompts, WireMessage, defuse, next_turn
from cod_agent.errors import ToolFailed
from cod_agent.journal.boundary import Boundary
from cod_agent.memory.hashing import canonical, compact
from cod_agent.tasks import Task


class ToolSolver:
    """Function calling with the agent's own model.

    Args:
        prompts: how messages are worded; a tool's result is its own message, and delimiters in it are defused.
        max_rounds: answers with tool calls after which the model is asked for its answer without tools.
    """

    def __init__(self, prompts: Prompts, *, max_rounds: int = 100) -> None:
        self._prompts, self._max_rounds = prompts, max_rounds

    async def __call__(self, task: Task, context: str, tools: Boundary) -> str:
        seen = await tools.observe() if tools.in_environment else None
        said = self._prompts.solve(task, context, seen)
        messages: list[Message | WireMessage] = [*said]
        kit = [_Tool(function) for function in tools]
        described = [tool.described for tool in kit]
        rounds, answer = 0, ""
        while seen is None or not seen.done:
            beside: dict[str, Any] = {"tools": described} if rounds < self._max_rounds else {}
            spoken = (await tools.exchange(messages, **beside)).message
            messages.append(_wire(spoken, "model"))
            if spoken.get("tool_calls"):
                results = await asyncio.gather(*(_call(kit, call) for call in spoken["tool_calls"]))
                for call, result in zip(spoken["tool_calls"], results, strict=True):
                    messages.append(
                        _wire({"role": "tool", "tool_call_id": call.get("id", ""), "content": defuse(result)}, "tool")
                    )
                rounds += 1
                continue
            answer = str(spoken.get("content") or "")
            if seen is None:
                break
            seen = await tools.act(answer)
            messages.append(next_turn(self._prompts, seen))
        return answer


def _wire(said: dict[str, Any], origin: Origin) -> WireMessage:
    body = compact(said)
    return WireMessage(body, canonical([[len(body), origin]]))


class _Tool:
    """A function, its description for the model and the check of its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.name = getattr(function, "__name__", "tool")
        self._arguments = arguments_of(function)
        schema = self._arguments.model_json_schema()
        schema.pop("title", None)
        about = {"name": self.name, "description": inspect.getdoc(function) or "", "parameters": schema}
        self.described = {"type": "function", "function": about}

    async def run(self, arguments: str) -> str:
        try:
            checked = self._arguments.model_validate_json(arguments or "{}")
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
            return f"error: the arguments of {self.name} are malformed, so it was not run: {wrong}"
        given = {name: getattr(checked, name) for name in checked.model_fields_set}
        try:
            result = await self.function(**given)
        except ToolFailed as error:
            return f"error: {error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def arguments_of(function: Callable[..., Any]) -> type[BaseModel]:
    """A pydantic model of a function's parameters; parameters without annotation take anything."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (kind, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(getattr(function, "__name__", "tool"), __config__=ConfigDict(extra="forbid"), **fields)


async def _call(kit: Sequence[_Tool], call: dict[str, Any]) -> str:
    asked = call.get("function") or {}
    found = next((tool for tool in kit if tool.name == asked.get("name")), None)
    if found is None:
        return f"error: there is no tool {asked.get('name')!r}; there are {', '.join(tool.name for tool in kit)}"
    return await found.run(asked.get("arguments") or "{}")
