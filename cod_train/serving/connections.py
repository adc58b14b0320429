"""Connections to model servers, as many as there are requests under way: a server has a queue of its own, and a good one.

httpx's own pool looks at all its connections twice a request, with a system call for each that rests: with a hundred agents a third
of the front's CPU. Here a request takes the connection that rested last, however many there are.
"""

from __future__ import annotations

import ssl
import time
from collections import defaultdict, deque
from typing import Any

from cod_agent.journal.http import http_module

_REST = 4.0
"""Seconds a connection may rest: less than the 5 after which vLLM closes it."""


class Connections:
    """Those of one event loop."""

    def __init__(self) -> None:
        self._resting: defaultdict[str, deque[tuple[float, Any]]] = defaultdict(deque)
        """By origin: since when (monotonic), and a transport of one connection; the newest is at the end."""
        self._plain = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # of no use here, but each transport would make one

    async def take(self, origin: str) -> Any:
        """A transport with at most one connection, and nothing under way on it."""
        until = time.monotonic() - _REST
        for resting in self._resting.values():
            while resting and resting[0][0] < until:
                await resting.popleft()[1].aclose()
        if self._resting[origin]:
            return self._resting[origin].pop()[1]
        module = http_module()
        limits = module.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=_REST)
        return module.AsyncHTTPTransport(verify=self._plain, trust_env=False, limits=limits)

    def rests(self, origin: str, transport: Any) -> None:
        """The answer on it has been read to its end, and closed."""
        self._resting[origin].append((time.monotonic(), transport))

    async def aclose(self) -> None:
        """Close those that rest."""
        for resting in self._resting.values():
            while resting:
                await resting.pop()[1].aclose()
