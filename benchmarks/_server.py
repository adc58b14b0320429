"""The fastest scripted endpoint we can write: one answer, no thinking, in a process of its own. Not a test double: a constant cost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import re
from collections.abc import Iterator

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def _answer(body: bytes) -> bytes:
    update = b"Write the new note" in body or b"Update\\n" in body
    message: dict[str, object] = {
        "role": "assistant",
        "content": "<context>\na note\n</context>" if update else "go on",
    }
    finish = "stop"
    if not update and b'"tools":' in body:
        call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"place": "there"}'}}
        message, finish = {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"
    said = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
    }
    payload = json.dumps(said).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(payload),
        payload,
    )


async def _serve(ready: object) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = _LENGTH.search(head)
                body = await reader.readexactly(int(found[1])) if found else b""
                writer.write(_answer(body))
                await writer.drain()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 24)
    ready.send(server.sockets[0].getsockname()[1])  # type: ignore[attr-defined]
    await server.serve_forever()


def _main(ready: object) -> None:
    asyncio.run(_serve(ready))


@contextlib.contextmanager
def scripted_server() -> Iterator[str]:
    """The base URL of a server that runs while the block does."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_main, args=(there,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}/v1"
    finally:
        process.kill()
        process.join()
