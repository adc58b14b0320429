"""The body of an HTTP response, piece by piece: not longer than anybody needs, and nothing of it left for the next response.

A server, or something before it, may send more than the one response that was asked for: a second copy, or more bytes than it
announced. A connection that is kept open would take those for the response to the *next* request, and so would every request after it
get the answer of the one before. Nothing in an answer tells that it is another's, so a connection with anything left is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from cod_agent.errors import ModelGarbled

LARGEST = 64 << 20
"""Bytes of a response, unpacked. An answer of 100,000 tokens with their log-probabilities has 20 MB."""


async def pieces(response: Any) -> AsyncIterator[bytes]:
    """The body as it comes, unpacked; afterwards the response is closed.

    Raises:
        ModelGarbled: it is longer than `LARGEST`.
        httpx's errors: it breaks off, or is not packed as it says.
    """
    size = 0
    async for piece in response.aiter_bytes():
        size += len(piece)
        if size > LARGEST:
            raise ModelGarbled(f"the endpoint's answer is longer than {LARGEST >> 20} MB")
        yield piece
    await _close_if_more_came(response)


async def whole(response: Any) -> bytes:
    """All of the body; the response is closed whatever happens. Raises: as `pieces`."""
    try:
        return b"".join([piece async for piece in pieces(response)])
    finally:
        await response.aclose()


async def _close_if_more_came(response: Any) -> None:
    """Close the connection of a response that was read to its end if it has bytes beyond that.

    httpcore has no public way to ask. Where these names change nothing is closed, and tests/test_chaos.py says so.
    """
    connection = response.stream
    for name in ("_httpcore_stream", "_stream", "_connection"):
        connection = getattr(connection, name, None)
    state = getattr(connection, "_h11_state", None)
    if state is not None and state.trailing_data[0]:
        await connection.aclose()
