"""What passes through the front: which requests, with whose name in them and which headers, and their answers.

Requests and answers are bytes here. Of a request only the model's name is changed, of an answer nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from cod_agent.journal.http import http_module
from cod_train.dialect import Refused

Receive = Callable[[], Any]
Send = Callable[[Any], Any]

LARGEST = 64 * 2**20
"""Bytes of a request."""
_CONNECT = 5
"""Seconds that connecting may take; everything is on this machine."""

_WHERE = re.compile(r"/v1/[a-z_]+(/[a-z_]+)*|/(de)?tokenize|/inference/v1/generate")
_REFUSED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""What is served is the registry's business: clients don't load weights."""

_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade"),
}
"""Headers of one connection (RFC 9110, 7.6.1): not passed on."""
_REWRITTEN = {b"host", b"content-length", b"expect"}
"""Headers of a request that are the front's own."""


def forwarded(path: str) -> bool:
    """Whether requests to this path go on to a model server."""
    return _WHERE.fullmatch(path) is not None and path not in _REFUSED


async def whole(scope: Any, receive: Receive) -> bytes | None:
    """The body of a request; None if the client has left.

    Raises:
        Refused: it is too large.
    """
    too_large = Refused(f"a request may have {LARGEST // 2**20} MiB", 413, "request_too_large")
    said = dict(scope["headers"]).get(b"content-length", b"0")
    if said.isdigit() and int(said) > LARGEST:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > LARGEST:
            raise too_large
        if not message.get("more_body"):
            return bytes(body)


def asked_model(body: bytes) -> str:
    """The model that a request names.

    Raises:
        Refused: it is no JSON object, or names none.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise Refused("the request is no JSON object")
    if not isinstance(request.get("model"), str):
        raise Refused("the request names no model")
    return str(request["model"])


def renamed(body: bytes, asked: str, weights: str) -> bytes:
    """The request with another model's name, and otherwise as it came wherever that can be told.

    Quotes inside of JSON strings are escaped, so a single `"model": "NAME"` is the one that was read.
    """
    if asked == weights:
        return body
    named = re.compile(rb'"model"(\s*:\s*)' + re.escape(json.dumps(asked).encode()))
    found = named.findall(body)
    if len(found) == 1:
        return named.sub(lambda match: b'"model"' + match[1] + json.dumps(weights).encode(), body)
    return json.dumps({**json.loads(body), "model": weights}).encode()


def request_to(origin: str, scope: Any, body: bytes, key: str = "") -> Any:
    """The request as it goes on to a model server; one that asks for a key is shown that instead of what the client showed."""
    query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
    headers = _kept(scope["headers"], _REWRITTEN | ({b"authorization"} if key else set()))
    return http_module().Request(
        "POST",
        f"{origin}{scope['path']}{query}",
        headers=[*headers, (b"authorization", f"Bearer {key}".encode())] if key else headers,
        content=body,
        extensions={"timeout": {"connect": _CONNECT}},
    )


def _kept(headers: Any, dropped: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Headers that go on to the other side."""
    of_connection = {
        word.strip().lower() for name, value in headers if name.lower() == b"connection" for word in value.split(b",")
    }
    gone = _HOP | of_connection | dropped
    return [(name.lower(), value) for name, value in headers if name.lower() not in gone]


async def hand_on(response: Any, first: bytes, pieces: Any, send: Send) -> None:
    """An answer, as it comes: its first piece, which is here, and those that follow."""
    headers = _kept(response.headers.raw, set())
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    async for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
