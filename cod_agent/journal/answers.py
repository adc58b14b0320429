"""What a chat endpoint answered, as one object, whether it came whole or as a stream of server-sent events.

Source of the fields: the OpenAI chat completion API, and vLLM's `prompt_token_ids` and `choices[].token_ids`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from cod_agent.completions import Completion, Tokens
from cod_agent.errors import ModelGarbled


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    body: dict[str, Any]
    """The whole `chat.completion` object; a stream's chunks folded into one."""
    completion: Completion

    @property
    def message(self) -> dict[str, Any]:
        """The assistant's message without what is null or empty: as a client would send it back."""
        return {
            k: v for k, v in self.body["choices"][0]["message"].items() if v is not None and v != [] or k == "content"
        }

    def envelope(self, lean: bool) -> dict[str, Any]:
        """The body without what has a column of its own.

        Lean drops the log-probabilities' strings too: for a client that reads the columns, not a replayed answer.
        """
        exact = self.completion.tokens is not None
        drop = {"choices", "prompt_token_ids"} if exact else {"choices"}
        rest = {k: v for k, v in self.body.items() if k not in drop}
        first = self.body["choices"][0]
        kept = {k: v for k, v in first.items() if k != "message" and not (exact and k in ("token_ids", "logprobs"))}
        if exact and not lean:
            kept["logprobs"] = slim_logprobs(first["logprobs"], self.completion.text)
        nulls = {k: v for k, v in first["message"].items() if k not in self.message}
        return {**rest, "choices": [{**kept, "message": nulls}, *self.body["choices"][1:]]}


MOST_TOKENS = 1 << 40
"""A count of tokens above this is none."""


def read_answer(content_type: str, raw: bytes, *, most: int = 1) -> Answer:
    """Parse an answer with status 200.

    Args:
        content_type: what it is said to be; what it is, its first byte says.
        most: choices that were asked for.

    Raises:
        ModelGarbled: it is not a chat completion, or not one to this request, or a stream that was cut off or has another's parts.
    """
    streamed = raw.startswith(b"data:") or ("event-stream" in content_type and not raw.lstrip().startswith(b"{"))
    try:
        answer = _read(streamed, raw)
        if b"\\ud" in raw or b"\\uD" in raw:  # a lone surrogate is no text, and nothing that can be kept
            json.dumps(answer.body, ensure_ascii=False).encode()
        if len(answer.body["choices"]) > most:
            raise ModelGarbled(
                f"the endpoint's answer is to another request: {len(answer.body['choices'])} choices, {most} asked for"
            )
        return answer
    except ValueError as error:
        raise ModelGarbled(f"the endpoint answered with something that is not JSON: {_excerpt(raw)}") from error
    except (TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ModelGarbled(
            f"the endpoint's answer is no chat completion (fields of a wrong type): {_excerpt(raw)}"
        ) from error


def _read(streamed: bool, raw: bytes) -> Answer:
    body = fold(_events(raw)) if streamed else json.loads(raw)
    if not isinstance(body, dict) or not isinstance(body.get("choices"), list) or not body["choices"]:
        raise ModelGarbled(f"the endpoint's answer is no chat completion (no choices): {_excerpt(raw)}")
    first = body["choices"][0]
    if not isinstance(first, dict) or not isinstance(first.get("message"), dict):
        raise ModelGarbled(f"the endpoint's answer is no chat completion (no message): {_excerpt(raw)}")
    if not isinstance(first["message"].get("content"), str | list | None):
        raise TypeError("content that is no text")
    if streamed:
        _check_stream(body, first)
    return Answer(body, _completion(body))


def _check_stream(body: dict[str, Any], first: dict[str, Any]) -> None:
    """Raises: ModelGarbled, where pieces are missing or came twice, as far as the server's own count of tokens tells."""
    if not first.get("finish_reason"):
        raise ModelGarbled("the endpoint's stream was cut off before the answer ended")
    sampled, usage = first.get("token_ids"), _usage(body)
    if sampled is not None and usage is not None and len(body["choices"]) == 1 and usage[1] != len(sampled):
        raise ModelGarbled(
            f"the endpoint's stream has pieces missing or twice: {len(sampled)} sampled ids, and it counts {usage[1]}"
        )


def _usage(body: dict[str, Any]) -> tuple[int, int] | None:
    """(prompt tokens, sampled tokens) as the server counts them; None if it does not, or says what cannot be."""
    said = body.get("usage")
    if not isinstance(said, dict):
        return None
    counts = (said.get("prompt_tokens") or 0, said.get("completion_tokens") or 0)
    possible = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MOST_TOKENS for n in counts)
    return counts if possible and any(counts) else None


def _completion(body: dict[str, Any]) -> Completion:
    first = body["choices"][0]
    content = first["message"].get("content")
    tokens, inexact = read_token_fields(body)
    return Completion(
        text=content if isinstance(content, str) else "" if content is None else json.dumps(content),
        finish_reason=str(first.get("finish_reason") or ""),
        tokens=tokens,
        inexact=inexact,
        weights="/".join(str(body[k]) for k in ("model", "system_fingerprint") if body.get(k)),
        usage=_usage(body),
    )


def read_token_fields(body: dict[str, Any]) -> tuple[Tokens | None, str]:
    """The exact tokens of an answer, or None and what is missing."""
    first = body["choices"][0]
    if len(body["choices"]) > 1:
        return None, "several choices were asked for"
    prompt: Any = body.get("prompt_token_ids")
    sampled: Any = first.get("token_ids")
    entries: Any = (first.get("logprobs") or {}).get("content")
    missing = [
        n for n, v in (("prompt ids", prompt), ("sampled ids", sampled), ("log-probabilities", entries)) if v is None
    ]
    if missing:
        return None, f"the server gave no {', no '.join(missing)}"
    try:
        # As they are stored: what is seen live is what a replay shows.
        logprobs = array("f", [float(entry["logprob"]) for entry in entries]).tolist()
        if len(logprobs) != len(sampled):
            return None, f"{len(sampled)} sampled ids but {len(logprobs)} log-probabilities"
        counted = (body.get("usage") or {}).get("completion_tokens")
        if counted is not None and counted != len(sampled):
            return None, f"{len(sampled)} sampled ids but the server counts {counted}"
        if not all(map(isfinite, logprobs)):
            return None, "a log-probability is not finite"
        return Tokens(array("i", prompt).tolist(), array("i", sampled).tolist(), logprobs), ""
    except (TypeError, KeyError, ValueError, OverflowError):
        return None, "the server's token fields are malformed"


def _events(raw: bytes) -> Iterator[dict[str, Any]]:
    for line in raw.replace(b"\r\n", b"\n").split(b"\n"):
        if line.startswith(b"data:"):
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if not isinstance(event, dict):
                raise ValueError("an event that is no object")
            yield event


def fold(events: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """A stream's chunks as the one object a request without `stream` would have got."""
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("id") and body.get("id") and event["id"] != body["id"]:
            raise ModelGarbled(f"the endpoint's stream has parts of two answers: {body['id']!r} and {event['id']!r}")
        body.update({k: v for k, v in event.items() if k != "choices" and v is not None})
        for piece in event.get("choices") or []:
            choice = choices.setdefault(piece.get("index", 0), {"index": piece.get("index", 0), "message": {}})
            delta = piece.get("delta") or {}
            if choice.get("finish_reason") and any(v for k, v in delta.items() if k != "role"):
                raise ModelGarbled(
                    "the endpoint's stream goes on after the answer's end: pieces came twice, or in disorder"
                )
            _fold_delta(choice["message"], delta)
            if piece.get("token_ids"):
                choice["token_ids"] = choice.get("token_ids", []) + piece["token_ids"]
            if piece.get("logprobs"):
                entries = choice.setdefault("logprobs", {"content": []})["content"]
                entries += piece["logprobs"].get("content") or []
            choice.update(
                {
                    k: v
                    for k, v in piece.items()
                    if k not in ("delta", "index", "token_ids", "logprobs") and v is not None
                }
            )
    for choice in choices.values():
        choice["message"].setdefault("content", None)
    return {**body, "object": "chat.completion", "choices": [choices[i] for i in sorted(choices)]} if choices else body


def _fold_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "tool_calls":
            for call in value or []:
                calls = message.setdefault("tool_calls", [])
                if call.get("index", 0) > len(calls) + 64:
                    raise TypeError("a tool call out of nowhere")
                while len(calls) <= call.get("index", 0):
                    calls.append({})
                _fold_call(calls[call.get("index", 0)], call)
        elif isinstance(value, str) and isinstance(message.get(name), str) and name != "role":
            message[name] += value
        elif value is not None:
            message[name] = value


def _fold_call(known: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if name == "function":
            function = known.setdefault("function", {"name": "", "arguments": ""})
            function["name"] += (value or {}).get("name") or ""
            function["arguments"] += (value or {}).get("arguments") or ""
        elif name != "index" and value is not None:
            known[name] = value


def slim_logprobs(logprobs: dict[str, Any], text: str) -> dict[str, Any]:
    """Log-probability entries without the numbers (they have a column): token lengths where the tokens spell the answer."""
    entries = logprobs["content"]
    if any(entry.get("top_logprobs") for entry in entries):
        return logprobs
    tokens = [str(entry.get("token", "")) for entry in entries]
    return {"lengths": [len(token) for token in tokens]} if "".join(tokens) == text else {"tokens": tokens}


def restore_logprobs(choice: dict[str, Any], values: Sequence[float]) -> None:
    """Undo `slim_logprobs` in a recorded choice; numbers come back as float32."""
    slim = choice.get("logprobs")
    if not slim or "content" in slim:
        return
    tokens, text, at = slim.get("tokens"), choice["message"].get("content") or "", 0
    if tokens is None:
        tokens = []
        for length in slim["lengths"]:
            tokens.append(text[at : at + length])
            at += length
    choice["logprobs"] = {
        "content": [
            {"token": token, "logprob": value, "bytes": list(token.encode()), "top_logprobs": []}
            for token, value in zip(tokens, values, strict=True)
        ]
    }


def delta_text(line: bytes) -> str:
    """The text a line of a stream adds, for showing it early; nothing if it adds none."""
    if not line.startswith(b"data:") or b'"content"' not in line:
        return ""
    try:
        choices = json.loads(line[5:]).get("choices") or [{}]
        return str((choices[0].get("delta") or {}).get("content") or "")
    except (ValueError, AttributeError, IndexError, TypeError):
        return ""


def as_stream(body: dict[str, Any]) -> bytes:
    """A recorded answer as the events of a stream: each choice's message in one piece, then the rest."""
    base = {k: v for k, v in body.items() if k not in ("choices", "usage", "object")}
    base["object"] = "chat.completion.chunk"
    chunks = []
    for choice in body["choices"]:
        delta = dict(choice["message"])
        if delta.get("tool_calls"):
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        rest = {k: v for k, v in choice.items() if k not in ("message", "finish_reason")}
        chunks.append({**base, "choices": [{**rest, "delta": delta, "finish_reason": None}]})
        base.pop("prompt_token_ids", None)
        end = {"index": choice.get("index", 0), "delta": {}, "finish_reason": choice.get("finish_reason")}
        chunks.append({**base, "choices": [end]})
    if body.get("usage"):
        chunks.append({**base, "choices": [], "usage": body["usage"]})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def _excerpt(raw: bytes) -> str:
    text = raw[:160].decode("utf-8", "replace")
    return repr(text) if text else "an empty body"
