"""Tool calls in what a model sampled.

The Hermes form (Qwen and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`) is read here, so that the
template gives back the sampled text: of the text before a call one line break is taken, which is the one templates put
there, and nothing else. Other forms are read by verl's parsers, as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.errors import MissingExtra, UnknownName

_HERMES = re.compile(r"\n?<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call a model made."""

    name: str
    arguments: str
    """A JSON object."""


Parse = Callable[[Sequence[int], Sequence[dict[str, Any]]], Awaitable[tuple[str, list[ToolCall]]]]
"""(sampled ids, the request's tools) -> the text before the calls, the calls."""


def parser_called(name: str, tokenizer: Any) -> Parse:
    """The parser called `hermes`, or one of verl's (`qwen3_coder`, `glm`, ...).

    Raises:
        UnknownName: there is no such parser.
        MissingExtra: verl is not installed.
    """
    return _hermes(tokenizer) if name == "hermes" else _verls(name, tokenizer)


def text_of(tokenizer: Any, sampled: Sequence[int]) -> str:
    """An answer's text, without special tokens."""
    return str(tokenizer.decode([*sampled], skip_special_tokens=True, clean_up_tokenization_spaces=False))


def hermes_calls(text: str) -> tuple[str, list[ToolCall]]:
    """The text before the calls, and the calls; all of it is text if one of them is malformed.

    What is said behind a call is dropped, as vLLM drops it: the content of a message is one stretch of what was sampled.
    """
    calls = []
    for block in _HERMES.findall(text):
        try:
            said = json.loads(block)
        except ValueError:
            return text, []
        if not isinstance(said, dict) or not isinstance(said.get("name"), str):
            return text, []
        if not isinstance(said.get("arguments"), dict):
            return text, []
        calls.append(ToolCall(said["name"], json.dumps(said["arguments"], ensure_ascii=False)))
    first = _HERMES.search(text)
    return text[: first.start()] if first else text, calls


def _hermes(tokenizer: Any) -> Parse:
    async def parse(sampled: Sequence[int], tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
        return hermes_calls(text_of(tokenizer, sampled))

    return parse


def _verls(name: str, tokenizer: Any) -> Parse:
    try:
        from verl.experimental.agent_loop.tool_parser import ToolParser
        from verl.tools.schemas import OpenAIFunctionToolSchema
    except ImportError:
        raise MissingExtra(f"the tool parser {name}", "train") from None
    known = ToolParser._registry
    if name not in known:
        raise UnknownName.among("tool parser", name, [*known])
    parser, special = ToolParser.get_tool_parser(name, tokenizer), set(tokenizer.all_special_ids)

    async def parse(sampled: Sequence[int], tools: Sequence[dict[str, Any]]) -> tuple[str, list[ToolCall]]:
        # These parsers leave the end of the turn in the text.
        ids = [*sampled[:-1]] if sampled and sampled[-1] in special else [*sampled]
        schemas = [OpenAIFunctionToolSchema.model_validate(_plain_schema(tool)) for tool in tools]
        try:
            text, calls = await parser.extract_tool_calls(ids, schemas)
        except Exception:  # a malformed call is the policy's mistake: text that calls nothing
            return text_of(tokenizer, ids), []
        return text, [ToolCall(call.name, call.arguments) for call in calls]

    return parse


def _plain_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the one thing about its parameters that verl's parsers want, and refuse to miss: simple types."""
    function = tool["function"]
    properties = (function.get("parameters") or {}).get("properties") or {}
    types = {name: {"type": _simple_type(schema)} for name, schema in properties.items()}
    parameters = {"type": "object", "properties": types}
    described = {"name": function["name"], "description": function.get("description") or "", "parameters": parameters}
    return {"type": "function", "function": described}


def _simple_type(schema: Any) -> str:
    kind = schema.get("type") if isinstance(schema, dict) else None
    # An "object" is read as JSON where it is JSON, and as text where it is not.
    return kind if isinstance(kind, str) else "object"
