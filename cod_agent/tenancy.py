"""The runs an agent has opened, and their leases: taken when a run is opened, renewed while something slow goes on, given up at the end."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator

from cod_agent.memory import lease, runs
from cod_agent.memory.database import Job, Memory


class Tenancy:
    """What one agent lives in, of one memory.

    Args:
        agent: its name.
        lent: runs that somebody else opened for it, and gives up.
    """

    def __init__(self, memory: Memory, agent: str, lent: dict[str, runs.Run] | None = None) -> None:
        self._memory, self._agent = memory, agent
        self._lent = lent or {}
        self._open = dict(self._lent)

    def guest(self, agent: str) -> Tenancy:
        """For what is done in this agent's name, or another's, and then given up without touching what this one has open."""
        return Tenancy(self._memory, agent, self._open if agent == self._agent else None)

    async def take(self, name: str, begin: Job[runs.Run]) -> runs.Run:
        """The run of that name, with its lease; `begin` opens it, in a transaction, if it is not open yet.

        Raises:
            RunLeased: another process lives it.
        """
        known = self._open.get(name)
        if known is None:
            known = self._open[name] = await self._memory.write(begin)
        elif not await self._memory.read(lambda conn: lease.ours(conn, known.id)):
            await self._memory.write(lambda conn: lease.take(conn, known.id, self._agent, name))
        return known

    def lock(self, name: str) -> asyncio.Lock:
        """What agents of this process wait for: a lease keeps other processes away only."""
        return self._memory.lock(f"{self._agent}\0{name}")

    @contextlib.asynccontextmanager
    async def renewed(self, opened: runs.Run) -> AsyncIterator[None]:
        """Keep the lease while something slow goes on."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(lease.SECONDS / 3)
                with contextlib.suppress(Exception):  # the next commit says what is wrong
                    await self._memory.write(lambda conn: lease.hold(conn, opened.id))

        renewing = asyncio.create_task(renew())
        try:
            yield
        finally:
            renewing.cancel()

    @contextlib.asynccontextmanager
    async def living(self, opened: runs.Run) -> AsyncIterator[None]:
        """`lock` and `renewed` together."""
        async with self.lock(opened.name), self.renewed(opened):
            yield

    def release(self, conn: sqlite3.Connection) -> None:
        """Inside a transaction: give up all leases but those of lent runs."""
        for name, opened in self._open.items():
            if name not in self._lent:
                lease.release(conn, opened.id)
