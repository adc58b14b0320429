"""A proxy that does to an endpoint's answers what networks, gateways and overloaded servers do; it keeps a log of all that it was asked.

    with ScriptedServer(honest) as server, Chaos(server.port, seed=1) as chaos:
        model = OpenAIModel("m", base_url=chaos.url)
        ...
        chaos.reached, chaos.unread, chaos.done       # requests by their bytes; cut off before they were read; faults by name

What is done to a request is drawn from the seed, its bytes and how often it came: never more than `row` faults one after the other, so
that whoever tries again often enough gets an answer. As vLLM does, it names an answer after the request's X-Request-Id.
"""

from __future__ import annotations

import asyncio
import email.utils
import gzip
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from random import Random
from typing import Any

from servers import Answer

LONGEST = 1 << 20
"""Bytes of a body that is meant to be too long."""
FILLER = " and so the answer goes on for some words more, as answers do"


def expected(body: bytes) -> str:
    """What the honest server answers to a request: nothing else ever does."""
    mark = sha256(body).hexdigest()[:16]
    return f"<context>\n{mark}\n</context>" if b"Write the new note." in body else f"{mark}{FILLER}"


def honest(request: dict[str, Any], n: int) -> Answer:
    """The reply of a `ScriptedServer` whose answers are `expected`; it must see the same bytes as the client sent."""
    return Answer(expected(json.dumps(request, ensure_ascii=False, separators=(",", ":")).encode()))


@dataclass
class Got:
    """The honest answer to a request, taken apart, and what may be known of the request."""

    body: bytes
    """A whole answer's; b"" for a stream."""
    events: list[bytes]
    """A stream's, each with its blank line; [] for a whole answer."""
    ours: bool
    """Whether it was asked by a client that says X-Request-Id."""
    exact: bool
    dice: Random
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Answers to other requests; none for a client that has not seen yet how answers are named."""

    def changed(self, change: Callable[[dict[str, Any]], Any]) -> bytes:
        """The whole answer with something changed."""
        said = json.loads(self.body)
        change(said)
        return json.dumps(said).encode()

    def event(self, at: int, change: Callable[[dict[str, Any]], Any]) -> list[bytes]:
        """The stream with one event changed."""
        said = json.loads(self.events[at][5:])
        change(said)
        return [*self.events[:at], _event(said), *self.events[at + 1 :]]

    @property
    def end(self) -> int:
        """Which event has the finish reason."""
        return next(i for i, event in enumerate(self.events) if b'"finish_reason": "' in event)


def _event(said: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(said).encode() + b"\n\n"


class Line:
    """A connection to a client."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer, self.open, self.named = writer, True, False

    async def say(
        self, status: int, body: bytes, kind: str = "application/json", *, length: int | None = None, **headers: str
    ) -> None:
        """A whole response."""
        names = {"content-type": kind, "content-length": str(len(body) if length is None else length)}
        names |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in names.items())
        await self.raw(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body)

    async def stream(self, events: list[bytes], kind: str = "text/event-stream", *, ended: bool = True) -> None:
        """A streamed one; `ended`: as HTTP ends it."""
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n" * ended
        head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n"
        await self.raw(head.encode() + chunks)
        if not ended:
            self.hang_up()

    async def honest(self, got: Got) -> None:
        await (self.stream(got.events) if got.events else self.say(200, got.body))

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def hang_up(self) -> None:
        """No more is sent."""
        self.open = False
        self.writer.close()

    def reset(self) -> None:
        """As a process that dies, or a firewall that forgot."""
        self.open = False
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()


Fault = Callable[[Line, Got], Awaitable[None]]
FAULTS: dict[str, Fault] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__.strip("_").replace("_", "-")] = function
    return function


def _error(status: int) -> bytes:
    return json.dumps({"error": {"message": f"chaos {status}", "type": "chaos", "code": status}}).encode()


@fault
async def busy(line: Line, got: Got) -> None:
    now = email.utils.formatdate(usegmt=True)
    waits = [{}, {"retry_after": "0"}, {"retry_after": now}, {"retry_after_ms": "5"}, {"retry_after": "soon"}]
    await line.say(429, _error(429), **got.dice.choice(waits))


@fault
async def broken_server(line: Line, got: Got) -> None:
    status = got.dice.choice([500, 502, 503, 504, 529, 408, 409])
    await line.say(status, _error(status))


@fault
async def html(line: Line, got: Got) -> None:
    page = b"<html><body><h1>Bad Gateway</h1></body></html>"
    await line.say(got.dice.choice([200, 502]), page, "text/html")


@fault
async def reset_before_the_answer(line: Line, got: Got) -> None:
    line.reset()


@fault
async def reset_in_the_body(line: Line, got: Got) -> None:
    body = got.body or b"".join(got.events)
    await line.say(200, body[: len(body) // 2], length=len(body))
    await asyncio.sleep(0.005)
    line.reset()


@fault
async def closed_in_the_body(line: Line, got: Got) -> None:
    if got.events:
        return await line.stream(got.events[: got.end], ended=False)
    await line.say(200, got.body[:-9], length=len(got.body))
    return line.hang_up()


@fault
async def closed_without_an_answer(line: Line, got: Got) -> None:
    line.hang_up()


@fault
async def slow(line: Line, got: Got) -> None:
    """Byte after byte; the answer is good."""
    whole = got.body or b"".join(got.events)
    kind = "text/event-stream" if got.events else "application/json"
    await line.raw(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(whole)}\r\n\r\n".encode())
    for at in range(0, len(whole), 150):
        await line.raw(whole[at : at + 150])
        await asyncio.sleep(0.001)


@fault
async def cut_stream(line: Line, got: Got) -> None:
    """Ended as HTTP ends, with or without [DONE], and not as an answer ends; a whole answer is cut with its right length."""
    if not got.events:
        return await line.say(200, got.body[: got.dice.randrange(1, len(got.body) - 1)])
    done = [b"data: [DONE]\n\n"] * got.dice.randrange(2)
    return await line.stream([*got.events[: got.dice.randrange(got.end)], *done])


GARBAGE = (
    b"",
    b"not json",
    b"[]",
    b"{}",
    b'{"choices":[]}',
    b'{"choices":[{"message":null}]}',
    b'{"choices":[{"message":{"content":5},"finish_reason":"stop"}]}',
    b'{"choices":[{"message":{"role":"assistant","content":"\\ud800"},"finish_reason":"stop"}]}',
    b'{"error":{"message":"overloaded"}}',
    b"[" * 100_000,
    b"data: [DONE]\n\n",
    b"data: {not json}\n\n",
    b"\xff\xfe\x00",
)


@fault
async def garbage(line: Line, got: Got) -> None:
    kind = "text/event-stream" if got.events else "application/json"
    await line.say(200, got.dice.choice(GARBAGE), kind)


@fault
async def wrong_length(line: Line, got: Got) -> None:
    """Shorter than the body: the rest lies in the connection, for the next answer to begin with."""
    body = got.body or b"".join(got.events)
    await line.say(200, body, length=len(body) - 20)


@fault
async def not_packed_as_it_says(line: Line, got: Got) -> None:
    body = got.body or b"".join(got.events)
    lie = got.dice.choice([body, gzip.compress(body)[:40]])
    await line.say(got.dice.choice([200, 503]), lie, content_encoding="gzip")


@fault
async def packed(line: Line, got: Got) -> None:
    """As it says; the answer is good."""
    body, kind = got.body or b"".join(got.events), "text/event-stream" if got.events else "application/json"
    await line.say(200, gzip.compress(body), kind, content_encoding="gzip")


@fault
async def said_twice(line: Line, got: Got) -> None:
    """Two responses to one request: the second lies in wait for the next one."""
    await line.honest(got)
    await line.honest(got)


@fault
async def early(line: Line, got: Got) -> None:
    """Informational responses before the real one, which is good."""
    await line.raw(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
    await line.honest(got)


@fault
async def flood_of_headers(line: Line, got: Got) -> None:
    flood = "".join(f"x-{i}: {'y' * 100}\r\n" for i in range(2000))
    await line.raw(f"HTTP/1.1 200 OK\r\n{flood}content-length: 0\r\n\r\n".encode())
    line.hang_up()


@fault
async def wrong_type(line: Line, got: Got) -> None:
    """The answer is good, and said to be something else."""
    kinds = ["text/plain", "application/octet-stream", "application/json" if got.events else "text/event-stream"]
    body = got.body or b"".join(got.events)
    await line.say(200, body, got.dice.choice(kinds))


@fault
async def absurd_counts(line: Line, got: Got) -> None:
    """The answer is good."""
    count: Any = got.dice.choice([-1, 1e30, "many", 2**70, None, [], True])
    usage = {"prompt_tokens": count, "completion_tokens": count}
    if not got.events:
        return await line.say(200, got.changed(lambda said: said.update(usage=usage)))
    at = next((i for i, event in enumerate(got.events) if b'"usage": {' in event), None)
    events = got.events if at is None else got.event(at, lambda said: said.update(usage=usage))
    return await line.stream(events)


@fault
async def more_choices(line: Line, got: Got) -> None:
    if got.events:
        more = got.event(0, lambda said: said["choices"].append({"index": 1, "delta": {"content": "x"}}))
        return await line.stream(more)
    return await line.say(200, got.changed(lambda said: said["choices"].append(said["choices"][0])))


@fault
async def pieces_twice(line: Line, got: Got) -> None:
    """Where the server counts its tokens; else nobody can tell, and nothing is done."""
    if got.events and got.exact:
        at = got.dice.randrange(1, got.end)
        return await line.stream([*got.events[:at], got.events[at], *got.events[at:]])
    return await line.honest(got)


@fault
async def disorder(line: Line, got: Got) -> None:
    """The end comes before the rest."""
    if not got.events:
        return await line.honest(got)
    at = got.end
    return await line.stream([got.events[0], got.events[at], *got.events[1:at], *got.events[at + 1 :]])


@fault
async def parts_of_two(line: Line, got: Got) -> None:
    if not got.events:
        return await line.honest(got)
    return await line.stream(
        got.event(got.dice.randrange(1, got.end + 1), lambda said: said.update(id="chatcmpl-other"))
    )


@fault
async def another_answer(line: Line, got: Got) -> None:
    """The answer to another request, or an earlier one again; told by its name, where answers are named after their requests."""
    if not got.ours or got.events or not got.earlier:
        return await line.honest(got)
    return await line.say(200, json.dumps(got.dice.choice(got.earlier)).encode())


@fault
async def too_long(line: Line, got: Got) -> None:
    if got.dice.random() < 0.8:  # it takes a while
        return await line.honest(got)
    return await line.say(200, b" " * (LONGEST + 1) + got.body)


@fault
async def stall(line: Line, got: Got) -> None:
    """Nothing more comes, for longer than anybody waits."""
    if got.dice.random() < 0.8:
        return await line.honest(got)
    body = got.body or b"".join(got.events)
    await line.say(200, body[:50], length=len(body))
    try:
        await asyncio.sleep(60)
    finally:
        line.reset()


@fault
async def comments(line: Line, got: Got) -> None:
    """Server-sent events with all that may stand between them; the answer is good."""
    if not got.events:
        return await line.honest(got)
    between = [
        part for event in got.events for part in (b": ping\n\n", b"event: chunk\n" + event.replace(b"\n", b"\r\n"))
    ]
    return await line.stream(between)


@fault
async def redirect(line: Line, got: Got) -> None:
    """Of a client that follows them: ours does not."""
    if got.ours:
        return await line.honest(got)
    status = got.dice.choice([307, 307, 308, 302])
    return await line.say(status, b"", "text/html", location="/v1/chat/completions")


class Chaos:
    """The proxy; it serves from construction on until closed.

    Args:
        upstream: port of the honest server.
        share: of requests that something is done to.
        row: most faults that one request meets one after the other.
        faults: their names; all if not given.
    """

    def __init__(
        self, upstream: int, *, seed: int = 0, share: float = 0.4, row: int = 2, faults: tuple[str, ...] = ()
    ) -> None:
        self._upstream, self._seed, self._share, self._row = upstream, seed, share, row
        self._faults = faults or tuple(FAULTS)
        self.reached: Counter[bytes] = Counter()
        self.unread = 0
        self.done: Counter[str] = Counter()
        self._earlier: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def count(self) -> int:
        """Requests that came, read or not."""
        return self.reached.total() + self.unread

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> Chaos:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024))
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(writer)
        try:
            while line.open:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                names = dict(part.split(": ", 1) for part in head.split("\r\n")[1:] if ": " in part)
                dice = Random(f"{self._seed}/{self.count}")
                if "reset-before-the-answer" in self._faults and dice.random() < self._share / 50:
                    self.unread += 1
                    line.reset()
                    return
                await self._answer(line, names, await reader.readexactly(int(names["content-length"])))
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client is gone
        except asyncio.CancelledError:
            return
        finally:
            writer.close()

    async def _answer(self, line: Line, names: dict[str, str], raw: bytes) -> None:
        n = self.reached[raw]
        self.reached[raw] += 1
        dice = Random(f"{self._seed}/{sha256(raw).hexdigest()}/{n}")
        name = "none"
        if n % (self._row + 1) < self._row and dice.random() < self._share:
            name = dice.choice(self._faults)
        got = await self._honest(raw, names.get("x-request-id", ""), dice)
        if not line.named:
            got.earlier = []
        line.named = line.open and name == "none" and bool(names.get("x-request-id"))
        self.done[name] += 1
        await (FAULTS[name](line, got) if name in FAULTS else line.honest(got))

    async def _honest(self, raw: bytes, name: str, dice: Random) -> Got:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        head_said = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: (\d+)", head_said)
        body = await (reader.readexactly(int(length[1])) if length else reader.read())
        writer.close()
        exact = b'"return_token_ids":true' in raw
        if b"event-stream" in head_said:
            parts = [part for part in body.split(b"\r\n") if part.startswith(b"data: ")]
            events = [part if part.endswith(b"\n\n") else part + b"\n\n" for part in parts]
            if name:
                events = [_named(event, name) for event in events]
            return Got(b"", events, bool(name), exact, dice)
        answer = json.loads(body)
        if name:
            answer["id"] = f"chatcmpl-{name}"
        got = Got(json.dumps(answer).encode(), [], bool(name), exact, dice, self._earlier[-8:])
        if name:
            self._earlier.append(answer)
            del self._earlier[:-8]
        return got


def _named(event: bytes, name: str) -> bytes:
    if event.startswith(b"data: ["):
        return event
    return _event({**json.loads(event[5:]), "id": f"chatcmpl-{name}"})
