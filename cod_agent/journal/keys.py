"""What is on record of one episode, by key: (request hash, occurrence), the n-th time it makes this very request.

An occurrence is taken by whoever makes the request, and given back where that failed. What an earlier process recorded waits to be asked
for; a new request while some of it waits may come from a parallel branch that is ahead, or from a program that changed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass, field
from typing import Any

from cod_agent.errors import ReplayDiverged
from cod_agent.memory.database import Memory

PATIENCE = 1.0
"""Seconds a new request waits while recorded ones are unasked for, in case a parallel branch is about to ask."""


@dataclass(slots=True)
class _Recorded:
    """What the file holds under a key."""

    row: dict[str, Any]
    used: bool = False


@dataclass(slots=True)
class Keys:
    """The keys of an episode."""

    memory: Memory
    episode_id: int
    _known: dict[tuple[bytes, int], _Recorded] = field(default_factory=dict)
    _taken: dict[bytes, set[int]] = field(default_factory=dict)
    _refused: set[bytes] = field(default_factory=set)
    """Calls that failed for good in an earlier process: the program lived with it then, and may again."""

    async def load(self) -> None:
        """Read what an earlier process recorded."""

        def read(conn: sqlite3.Connection) -> set[bytes]:
            for table in ("calls", "effects"):
                for row in _rows(conn, table, "episode_id = ?", self.episode_id):
                    self._known[row["request"], row["occurrence"]] = _Recorded(row)
            failed = "SELECT request FROM attempts WHERE episode_id = ? AND state = 'failed'"
            return {request for (request,) in conn.execute(failed, (self.episode_id,))}

        self._refused = await self.memory.read(read)

    def take(self, key: bytes) -> int:
        """The next occurrence of a request: the smallest that is not taken."""
        taken = self._taken.setdefault(key, set())
        occurrence = 0
        while occurrence in taken:
            occurrence += 1
        taken.add(occurrence)
        return occurrence

    def give_back(self, key: bytes, occurrence: int) -> None:
        """The request failed: whoever makes it again is the same occurrence."""
        self._taken[key].discard(occurrence)

    def __contains__(self, at: tuple[bytes, int]) -> bool:
        return at in self._known

    async def find(self, key: bytes, occurrence: int) -> dict[str, Any] | None:
        """The recorded row under a key, or None if it is new.

        Raises:
            ReplayDiverged: it is new although recorded ones wait that nobody asks for.
        """
        if not self._known:
            return None
        found = self._known.get((key, occurrence))
        if found is not None:
            found.used = True
            return found.row
        waited, left = 0.0, 0 if key in self._refused else self.unused()
        while left and waited < PATIENCE:
            await asyncio.sleep(0.02)
            now = self.unused()
            waited, left = (waited + 0.02, left) if now == left else (0.0, now)
        if left:
            raise ReplayDiverged(
                f"episode {self.episode_id}: the program asks for something it did not ask before the crash, while {left} recorded "
                "answers wait: it changed since. Resume with the program that wrote the record, or start another run"
            )
        return None

    def unused(self) -> int:
        """How many recorded answers nobody asked for yet."""
        return sum(not recorded.used for recorded in self._known.values())

    async def reread(self, table: str, key: bytes, occurrence: int) -> None:
        """A program gave up while its result was being stored: if it asks again, there it is."""

        def read(conn: sqlite3.Connection) -> list[dict[str, Any]]:
            where = "episode_id = ? AND request = ? AND occurrence = ?"
            return _rows(conn, table, where, self.episode_id, key, occurrence)

        for row in await self.memory.read(read):
            self._known[key, occurrence] = _Recorded(row, used=True)


def _rows(conn: sqlite3.Connection, table: str, where: str, *values: Any) -> list[dict[str, Any]]:
    cursor = conn.execute(f"SELECT * FROM {table} WHERE {where}", values)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]
