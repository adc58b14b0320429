"""A scripted OpenAI-compatible server on loopback: tests say what it answers; it keeps what it was asked, byte by byte.

    def reply(request, n):                     # request: the parsed body; n: 0-based number of the request
        return "an answer"                     # or a message (dict), an Answer, or a Fault

    with ScriptedServer(reply) as server:
        client = AsyncOpenAI(base_url=server.url, api_key="x")
        ...
        server.requests, server.bodies, server.headers, server.paths, server.count, server.most_at_once

It streams when asked to, and gives token ids and log-probabilities in vLLM's fields when asked for (`return_token_ids`,
`logprobs`): a token is a character, so that a prompt extends the prompt and answer before it, as in a real chat.
Whatever it makes up (ids, times, fingerprints) is a function of the request's bytes: the same request gets the same
answer always.

Threads, no event loop: `reply` may sleep, and one slow answer does not hold up the others.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

END = 2
"""The token that ends an answer."""


@dataclass(frozen=True)
class Answer:
    """An answer in full. A `str` is short for its text, a `dict` for its message."""

    text: str | None = None
    tool_calls: Sequence[tuple[str, dict[str, Any] | str]] = ()
    """(name, arguments); arguments as a string are sent as they are, however malformed."""
    finish_reason: str = ""
    """By default "tool_calls" or "stop"."""
    delay: float = 0.0
    """Seconds before the first byte; in a stream, as long again between events."""
    message: dict[str, Any] = field(default_factory=dict)
    """Added to the message: `reasoning_content`, say."""
    weights: str = "w-1"
    """The `system_fingerprint`."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong. Without anything set: the connection is closed without an answer."""

    status: int = 0
    """An HTTP error with a JSON body in OpenAI's form."""
    retry_after: float | None = None
    garbage: bytes | None = None
    """Sent with status 200 (or `status`) instead of an answer."""
    cut_after: int | None = None
    """A good answer is cut off: after so many events of a stream, or bytes of a whole answer."""
    delay: float = 0.0
    """Seconds before anything is sent: longer than the client's timeout makes a timeout."""


Reply = Callable[[dict[str, Any], int], "str | dict[str, Any] | Answer | Fault"]


class ScriptedServer:
    """Serves from construction on until closed.

    Args:
        reply: what to answer. Default: "ok", to everything.
        port: 0 takes any free one; a port that was used before brings a server back where it was.
    """

    def __init__(self, reply: Reply | None = None, *, port: int = 0) -> None:
        self.reply: Reply = reply or (lambda request, n: "ok")
        self.bodies: list[bytes] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        """Names in lower case."""
        self.paths: list[str] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self.port = int(self._http.server_address[1])
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def count(self) -> int:
        """Requests so far, faults included."""
        return len(self.bodies)

    def close(self) -> None:
        """Answer nothing any more: connecting is refused."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self, path: str, headers: dict[str, str], raw: bytes) -> tuple[dict[str, Any], int]:
        try:
            request = json.loads(raw)
        except ValueError:
            request = {}
        with self._lock:
            n = len(self.bodies)
            self.bodies.append(raw)
            self.requests.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return request, n

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1


class _Http(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed cut their connections off: that is what they are for."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def completion(request: dict[str, Any], raw: bytes, answer: Answer) -> dict[str, Any]:
    """The whole `chat.completion` object."""
    name = sha256(raw).hexdigest()[:12]
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, **answer.message}
    if answer.tool_calls:
        message["tool_calls"] = [
            {
                "id": f"call_{name}_{i}",
                "type": "function",
                "function": {"name": tool, "arguments": said if isinstance(said, str) else json.dumps(said)},
            }
            for i, (tool, said) in enumerate(answer.tool_calls)
        ]
    choice: dict[str, Any] = {
        "index": 0,
        "message": message,
        "finish_reason": answer.finish_reason or ("tool_calls" if answer.tool_calls else "stop"),
    }
    prompt, said = prompt_tokens(request.get("messages") or []), spoken(message)
    sampled = [*map(ord, said), END]
    body = {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": request.get("model", ""),
        "system_fingerprint": answer.weights,
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(sampled),
            "total_tokens": len(prompt) + len(sampled),
        },
    }
    if request.get("logprobs"):
        entries = [
            {"token": token, "logprob": logprob(i), "bytes": list(token.encode()), "top_logprobs": []}
            for i, token in enumerate([*said, "<end>"])
        ]
        choice["logprobs"] = {"content": entries}
    if request.get("return_token_ids"):
        choice["token_ids"], body["prompt_token_ids"] = sampled, prompt
    return body


def logprob(i: int) -> float:
    """That of the i-th sampled token; a float32, as vLLM's are."""
    return -0.125 * (i % 7 + 1)


def prompt_tokens(messages: list[dict[str, Any]]) -> list[int]:
    """One token a character, one before each message, `END` after it: an answer is a prefix of the next prompt."""
    out: list[int] = []
    for message in messages:
        out += [{"system": 3, "user": 4, "assistant": 5, "tool": 6}.get(message.get("role", ""), 7)]
        out += [*map(ord, spoken(message)), END]
    return [*out, 5]


def spoken(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    calls = message.get("tool_calls") or []
    return text + "".join(f"<{call['function']['name']}>{call['function']['arguments']}" for call in calls)


def events(body: dict[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
    """The same answer as a stream's events: the text in pieces of four tokens, arguments likewise."""
    choice = body["choices"][0]
    base = {k: v for k, v in body.items() if k not in ("choices", "usage", "prompt_token_ids")}
    base["object"] = "chat.completion.chunk"
    message, ids = choice["message"], choice.get("token_ids")
    entries = (choice.get("logprobs") or {}).get("content")
    extra = {k: v for k, v in message.items() if k not in ("role", "content", "tool_calls")}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "", **extra}]
    text = message.get("content") or ""
    deltas += [{"content": text[i : i + 4]} for i in range(0, len(text), 4)]
    for i, call in enumerate(message.get("tool_calls") or []):
        arguments = call["function"]["arguments"]
        named = {"name": call["function"]["name"], "arguments": ""}
        deltas.append({"tool_calls": [{"index": i, **call, "function": named}]})
        for start in range(0, len(arguments), 4):
            piece = {"arguments": arguments[start : start + 4]}
            deltas.append({"tool_calls": [{"index": i, "function": piece}]})
    out, at = [], 0
    for number, delta in enumerate(deltas):
        piece = {"index": 0, "delta": delta, "finish_reason": None}
        last = number == len(deltas) - 1
        size = (len(ids or entries or []) - at) if last else 4 * bool(number)
        if ids is not None:
            piece["token_ids"] = ids[at : at + size]
        if entries is not None and size:
            piece["logprobs"] = {"content": entries[at : at + size]}
        at += size
        first = {"prompt_token_ids": body["prompt_token_ids"]} if number == 0 and "prompt_token_ids" in body else {}
        out.append({**base, **first, "choices": [piece]})
    out.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if (request.get("stream_options") or {}).get("include_usage"):
        out.append({**base, "choices": [], "usage": body["usage"]})
    return out


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            request, n = server.begin(self.path, headers, raw)
            try:
                said = server.reply(request, n)
                self._say(request, raw, said)
                self.wfile.flush()
            except OSError:  # the client was killed, or gave up
                self.close_connection = True
            finally:
                server.end()

        def _say(self, request: dict[str, Any], raw: bytes, said: Any) -> None:
            fault = said if isinstance(said, Fault) else None
            if fault:
                time.sleep(fault.delay)
                if fault.cut_after is None:
                    return self._fail(fault)
                answer = Answer("This answer was going to be somewhat longer than what arrived of it.")
            elif isinstance(said, dict):
                said = dict(said)
                finish = said.pop("finish_reason", "tool_calls" if said.get("tool_calls") else "stop")
                answer = Answer(said.pop("content", None), message=said, finish_reason=finish)
            else:
                answer = said if isinstance(said, Answer) else Answer(said)
            time.sleep(answer.delay)
            body = completion(request, raw, answer)
            if request.get("stream"):
                return self._stream(body, request, answer.delay, fault)
            whole = json.dumps(body, ensure_ascii=False).encode()
            return self._whole(200, whole, cut=fault.cut_after if fault else None)

        def _fail(self, fault: Fault) -> None:
            if fault.garbage is not None:
                return self._whole(fault.status or 200, fault.garbage)
            if not fault.status:
                self.close_connection = True
                return None
            error = {"error": {"message": f"scripted {fault.status}", "type": "scripted", "code": fault.status}}
            return self._whole(fault.status, json.dumps(error).encode(), retry_after=fault.retry_after)

        def _whole(self, status: int, body: bytes, *, retry_after: float | None = None, cut: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if retry_after is not None:
                self.send_header("Retry-After", f"{retry_after:g}")
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

        def _stream(self, body: dict[str, Any], request: dict[str, Any], delay: float, fault: Fault | None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            said = [json.dumps(event, ensure_ascii=False) for event in events(body, request)] + ["[DONE]"]
            for number, event in enumerate(said):
                if fault and fault.cut_after is not None and number >= fault.cut_after:
                    self.close_connection = True
                    return
                piece = f"data: {event}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
                time.sleep(delay)
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
