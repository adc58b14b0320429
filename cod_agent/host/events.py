"""What happens, as server-sent events.

Two sorts. What the database holds (`solved`, `judged`, `context_written`, `context_held`, `context_kept`) has an id, and a client that
comes back with Last-Event-ID gets all of it, also across restarts: nothing recorded is missed, and what was recorded within a second of
the last id may come again under the same id. What happens on the way (`task_begun`, `observed`, `delta`, `answered`, `task_ended`) has no
id and is told to whoever listens at that moment; a client that is too slow for it gets `missed` with their number instead.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sqlite3
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import fields
from typing import Any
from weakref import WeakSet

from pydantic import BaseModel

from cod_agent.events import ContextHeld, ContextKept, ContextWritten, Event, Judged, Solved, TaskEnded
from cod_agent.host.errors import Busy
from cod_agent.memory.database import Memory
from cod_agent.memory.readonly import look

RECORDED = (Solved, Judged, ContextWritten, ContextHeld, ContextKept)
"""Events that are links of a run's chain."""
KEEP_ALIVE = 15.0
BACKLOG = 1000
"""Events on the way that a slow client may be behind."""
STREAMS = 64
"""Clients that may listen at once: each reads what is recorded from the file by itself, about a millisecond of CPU to an event."""
_PAGE = 500
_OVERLAP_US = 1_000_000
_CURSOR = re.compile(r"(\d{1,17})-(\d{1,18})-(\d{1,18})")

Cursor = tuple[int, int, int]
"""(microseconds since 1970, row id of the run, place in its chain): the id of a recorded event."""


def cursor_of(text: str) -> Cursor | None:
    """What Last-Event-ID says; None if it is none of ours."""
    found = _CURSOR.fullmatch(text)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


class Listener:
    """One client: events on the way, and a bell for what is recorded."""

    def __init__(self, agent: str | None) -> None:
        self.agent, self.missed = agent, 0
        self.passing: deque[bytes | None] = deque()
        """Events on the way, in order; None: something was recorded."""
        self.bell = asyncio.Event()

    def tell(self, piece: bytes | None) -> None:
        if piece is not None and len(self.passing) >= BACKLOG:
            self.missed += 1
        elif piece is not None or not self.passing or self.passing[-1] is not None:
            self.passing.append(piece)
        self.bell.set()


class Hub:
    """Who listens. It costs nothing while nobody does."""

    def __init__(self) -> None:
        self._listeners: WeakSet[Listener] = WeakSet()  # a stream that nobody begins to read is gone with its listener
        self._closed = False

    def __len__(self) -> int:
        return len(self._listeners)

    def tell(self, agent: str, event: Event) -> None:
        """Something happened in a run of `agent`."""
        heard = [one for one in self._listeners if one.agent in (None, agent)]
        if not heard:
            return
        pieces: list[bytes | None] = [None] if type(event) in RECORDED else [sse(agent, event)]
        if isinstance(event, TaskEnded):  # whatever it recorded without an event, as an abandoned task does
            pieces.insert(0, None)
        for listener in heard:
            for piece in pieces:
                listener.tell(piece)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for listener in list(self._listeners):
            listener.bell.set()

    def stream(
        self, memory: Memory, agent: str | None, after: Cursor | None, follow: bool
    ) -> AsyncGenerator[bytes, None]:
        """The bytes of a stream. Without `after` it begins now; without `follow` it ends with what is recorded.

        Raises:
            Busy: as many listen as may.
        """
        if len(self._listeners) >= STREAMS:
            raise Busy(f"{STREAMS} clients listen, as many as may: come back later")
        listener = Listener(agent)
        self._listeners.add(listener)
        return self._pieces(listener, _Told(memory.path, agent), after, follow)

    async def _pieces(
        self, listener: Listener, told: _Told, after: Cursor | None, follow: bool
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield b": the host's events; see docs/deploying.md\n\n"
            if after is None:
                await asyncio.to_thread(told.skip)
            else:
                async for piece in told.replay(after):
                    yield piece
            while follow and not self._closed:
                while listener.passing:
                    passing = listener.passing.popleft()
                    if passing is not None:
                        yield passing
                        continue
                    while page := await asyncio.to_thread(told.fresh):
                        for recorded in page:
                            yield recorded
                if listener.missed:
                    missed, listener.missed = listener.missed, 0
                    yield _piece("missed", {"type": "missed", "count": missed})
                listener.bell.clear()
                if listener.passing or self._closed:  # the bell may have rung before it was stilled
                    continue
                try:
                    async with asyncio.timeout(KEEP_ALIVE):
                        await listener.bell.wait()
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self._listeners.discard(listener)


_SELECT = """
SELECT CAST(k.created * 1000000 AS INTEGER) AS at, k.run_id, k.seq, r.agent, r.name, k.what, k.position,
  t.answer, t.feedback, e.reason, c.version, c.body, c.held
FROM commits k JOIN runs r ON r.id = k.run_id
JOIN tasks t ON t.run_id = k.run_id AND t.position = k.position
LEFT JOIN episodes e ON e.run_id = k.run_id AND e.position = k.position AND e.kind = 'update'
LEFT JOIN contexts c ON c.run_id = k.run_id AND c.episode_id = e.id
WHERE k.what IN ('solved', 'judged', 'updated', 'kept') AND
"""


class _Told:
    """How far one stream has told what is recorded, by run."""

    def __init__(self, path: str, agent: str | None) -> None:
        self._path, self._agent = path, agent
        self._seq: dict[int, int] = {}

    def skip(self) -> None:
        """Begin now."""
        with look(self._path) as conn:
            self._seq = self._newest(conn)

    def fresh(self) -> list[bytes]:
        """What was recorded since: a page of it, however long the client did not read; nothing if that is all."""
        rows: list[tuple[Any, ...]] = []
        with look(self._path) as conn:
            for run_id, seq in self._newest(conn).items():
                if seq > (before := self._seq.get(run_id, -1)) and len(rows) < _PAGE:
                    some = conn.execute(
                        f"{_SELECT} k.run_id = ? AND k.seq > ? ORDER BY k.seq LIMIT {_PAGE}", (run_id, before)
                    ).fetchall()
                    rows += some
                    self._seq[run_id] = some[-1][2] if len(some) == _PAGE else seq
        return [recorded(row) for row in sorted(rows, key=lambda row: row[:3])]

    async def replay(self, after: Cursor) -> AsyncIterator[bytes]:
        """What was recorded after an event, page by page."""
        cursor: Cursor = (max(after[0] - _OVERLAP_US, 0), 0, 0) if after[0] else after
        while True:
            page, self._seq = await asyncio.to_thread(self._page, cursor)
            for row in page:
                if row[:3] != after:
                    yield recorded(row)
            if len(page) < _PAGE:
                return
            cursor = page[-1][:3]

    def _page(self, cursor: Cursor) -> tuple[list[tuple[Any, ...]], dict[int, int]]:
        with look(self._path) as conn:
            rows = conn.execute(
                f"{_SELECT} (? IS NULL OR r.agent = ?) AND (at, k.run_id, k.seq) > (?, ?, ?)"
                f" ORDER BY at, k.run_id, k.seq LIMIT {_PAGE}",
                (self._agent, self._agent, *cursor),
            ).fetchall()
            return rows, self._newest(conn)

    def _newest(self, conn: sqlite3.Connection) -> dict[int, int]:
        return dict(
            conn.execute(
                "SELECT r.id, (SELECT max(seq) FROM commits k WHERE k.run_id = r.id) FROM runs r WHERE ? IS NULL OR r.agent = ?",
                (self._agent, self._agent),
            )
        )


def recorded(row: tuple[Any, ...]) -> bytes:
    """A link of a run's chain as the event it was."""
    at, run_id, seq, agent, run, what, position, answer, feedback, reason, version, body, held = row
    said: dict[str, Any] = {"agent": agent, "run": run, "position": position}
    if what == "solved":
        name, more = "solved", {"answer": answer or ""}
    elif what == "judged":
        told = _plain(json.loads(feedback)) if feedback else None
        name, more = "judged", {"feedback": told and {"reward": told["reward"], "text": told["text"]}}
    elif what == "updated":
        name, more = "context_written", {"context": body or "", "version": version}
        if held:
            name, more = "context_held", {**more, "reason": held}
    else:
        name, more = "context_kept", {"reason": reason or ""}
    return _piece(name, {"type": name, **said, **more}, f"{at}-{run_id}-{seq}")


def sse(agent: str, event: Event) -> bytes:
    """An event on the way."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    said = {field.name: _plain(getattr(event, field.name)) for field in fields(event)}
    return _piece(name, {"type": name, "agent": agent, **said})


def _piece(name: str, said: dict[str, Any], at: str = "") -> bytes:
    data = json.dumps(said, ensure_ascii=False, allow_nan=False)
    return f"{f'id: {at}' + chr(10) if at else ''}event: {name}\ndata: {data}\n\n".encode()


def _plain(value: Any) -> Any:
    """As JSON can hold it; what is not finite is null."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump())
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


__all__ = ["Hub", "cursor_of"]
