"""The chat completion API as the rollout endpoint speaks it: what a request may ask, what an answer holds.

It is vLLM's dialect (`return_token_ids`, `prompt_token_ids`, `top_k`, ...), so that an agent trains against the same words
it is served with. Whatever cannot be done is refused with a reason: a parameter that is dropped silently would put
something else into the record than what was sampled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any
from uuid import uuid4

from cod_train.tool_calls import ToolCall

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([], ""),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto", "none"),
    "skip_special_tokens": (True,),
    "stream": (True, False),
    "logprobs": (True, False),
    "return_token_ids": (True, False),
}
"""Parameters that are understood, with the values that are: the rest would change what is sampled or said."""
_FREE = ("model", "messages", "tools", "stream_options", "chat_template_kwargs")


class Refused(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        """In the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "code": self.code, "param": None}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A request."""

    messages: list[dict[str, Any]]
    """As chat templates take them."""
    tools: list[dict[str, Any]]
    variables: dict[str, Any]
    """Of the chat template."""
    sampling: dict[str, Any]
    """temperature, top_p, top_k (-1: all), and max_tokens and seed where they were given."""
    calls_tools: bool
    """Whether tool calls in the answer are told apart from its text."""
    stream: bool
    usage: bool
    """Whether the answer counts its tokens."""
    logprobs: bool
    token_ids: bool


@dataclass(frozen=True, slots=True)
class Said:
    """What was sampled, and what it says."""

    prompt: Sequence[int]
    sampled: Sequence[int]
    logprobs: Sequence[float]
    finish: str
    text: str
    calls: Sequence[ToolCall]
    weights: str


def read_request(raw: bytes, model: str) -> Asked:
    """Take a request apart.

    Raises:
        Refused: it is no request, or asks for what cannot be done.
    """
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is not JSON: {error}") from None
    if not isinstance(body, dict) or not isinstance(body.get("messages"), list) or not body["messages"]:
        raise Refused("a request is an object with `messages`, a list that is not empty")
    body = {name: value for name, value in body.items() if value is not None}
    if body.get("model") != model:
        raise Refused(f"no model {body.get('model')!r} here: this is {model!r}", 404, "model_not_found")
    sampling = _sampling(body)
    for name, value in body.items():
        if name in _NEUTRAL and not any(value == known for known in _NEUTRAL[name]):
            allowed = " or ".join(json.dumps(known) for known in _NEUTRAL[name])
            raise Refused(f"`{name}` can only be {allowed} here, not {json.dumps(value)}")
        if name not in _NEUTRAL and name not in _NUMBERS and name not in _FREE:
            raise Refused(f"`{name}` is not understood here: leave it out")
    stream, options = body.get("stream", False), _object(body, "stream_options")
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(map(_is_tool, tools)):
        raise Refused('`tools` is a list of {"type": "function", "function": {"name": ...}}')
    return Asked(
        messages=[_message(message) for message in body["messages"]],
        tools=tools,
        variables=_object(body, "chat_template_kwargs"),
        sampling=sampling,
        calls_tools=bool(tools) and body.get("tool_choice", "auto") == "auto",
        stream=stream,
        usage=bool(options.get("include_usage")) or not stream,
        logprobs=body.get("logprobs", False),
        token_ids=body.get("return_token_ids", False),
    )


_NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (lambda v: _is_number(v) and 0 <= v < inf, "a number from 0 on"),
    "top_p": (lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, at most 1"),
    "top_k": (lambda v: _is_whole(v) and v >= -1, "a whole number; -1 or 0 for all tokens"),
    "max_tokens": (lambda v: _is_whole(v) and v > 0, "a whole number from 1 on"),
    "max_completion_tokens": (lambda v: _is_whole(v) and v > 0, "a whole number from 1 on"),
    "seed": (lambda v: _is_whole(v), "a whole number"),
}


def _sampling(body: dict[str, Any]) -> dict[str, Any]:
    for name, (fits, what) in _NUMBERS.items():
        if name in body and not fits(body[name]):
            raise Refused(f"`{name}` is {what}, not {json.dumps(body[name])}")
    asked: dict[str, Any] = {name: body[name] for name in ("max_tokens", "seed") if name in body}
    if "max_completion_tokens" in body:
        asked["max_tokens"] = body["max_completion_tokens"]
    top_k = body.get("top_k", -1) or -1
    return {"temperature": body.get("temperature", 1.0), "top_p": body.get("top_p", 1.0), "top_k": top_k, **asked}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_tool(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise Refused(f"`{name}` is an object")
    return value


def _message(message: Any) -> dict[str, Any]:
    """As chat templates take it: text for content, objects for arguments, nothing that is null."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise Refused("a message is an object with a `role`")
    said = {name: value for name, value in message.items() if value is not None}
    said["content"] = _text(said.get("content", ""))
    calls = said.get("tool_calls", [])
    if not isinstance(calls, list):
        raise Refused("a message's `tool_calls` are a list")
    if calls:
        said["tool_calls"] = [_call(call) for call in calls]
    return said


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise Refused("the policy reads text: a message's content is a string, or a list of parts of text")
    return "\n".join(map(str, texts))


def _call(call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if isinstance(function["name"], str) and isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    except (TypeError, KeyError, ValueError):
        pass
    raise Refused("a tool call has a `function` with a `name`, and `arguments` that are a JSON object")


def write_answer(asked: Asked, said: Said, model: str, spelling: Callable[[int], str]) -> dict[str, Any]:
    """The `chat.completion`.

    Args:
        spelling: the text of a token.
    """
    message: dict[str, Any] = {"role": "assistant", "content": said.text}
    if said.calls:
        message["content"] = said.text or None
        message["tool_calls"] = [_wire(call) for call in said.calls]
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": "tool_calls" if said.calls and said.finish == "stop" else said.finish,
    }
    body: dict[str, Any] = {
        "id": f"chatcmpl-{uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": said.weights,
        "choices": [choice],
    }
    if asked.logprobs:
        spelt = [(spelling(token), logprob) for token, logprob in zip(said.sampled, said.logprobs, strict=True)]
        choice["logprobs"] = {
            "content": [
                {"token": token, "logprob": logprob, "bytes": [*token.encode()], "top_logprobs": []}
                for token, logprob in spelt
            ]
        }
    if asked.token_ids:
        body["prompt_token_ids"], choice["token_ids"] = [*said.prompt], [*said.sampled]
    if asked.usage:
        asks, says = len(said.prompt), len(said.sampled)
        body["usage"] = {"prompt_tokens": asks, "completion_tokens": says, "total_tokens": asks + says}
    return body


def _wire(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid4().hex}", "type": "function", "function": function}
