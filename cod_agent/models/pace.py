"""How many requests are under way at once: as many as the server takes, and never more than a limit.

A server that is asked too much says so: 429, 503, or no answer in time. Each round of that halves the number, and as many answers as
there may be requests under way let it grow by one again, as TCP finds the speed of a line (additive increase, multiplicative
decrease: Chiu and Jain, 1989). Refusals of requests that were under way before the number was last halved are of the same round, and
say nothing new.

    async with pace.turn() as began:        # waits, first come, first served
        ...
        pace.answered()                     # or pace.refused(began)

Whoever waits before it tries again has no turn meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """Turns to ask a server.

    Args:
        limit: most turns at once; it begins with as many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = self.now = limit
        self.halved = 0
        """How often the number was halved."""
        self._under_way = self._answers = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[int]:
        """A turn, when there is one. What it gives goes to `refused`."""
        await self._come()
        try:
            yield self.halved
        finally:
            self._go()

    def answered(self) -> None:
        """A request was answered: the server keeps up."""
        self._answers += 1
        if self._answers >= self.now < self.limit:
            self.now, self._answers = self.now + 1, 0
            self._admit()

    def refused(self, began: int) -> None:
        """The server had too much to do for a request, whose turn began with `began`."""
        if began == self.halved:
            self.now, self.halved, self._answers = max(1, self.now // 2), self.halved + 1, 0

    async def _come(self) -> None:
        if self._under_way < self.now and not self._waiting:
            self._under_way += 1
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._waiting.remove(mine)
            else:  # the turn came at the same moment: the next one has it
                self._go()
            raise

    def _go(self) -> None:
        self._under_way -= 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._under_way < self.now:
            first = self._waiting.popleft()
            if not first.done():
                self._under_way += 1
                first.set_result(None)
