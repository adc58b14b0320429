"""Who still needs a message: texts are stored once for all calls, and may only go when the last call that needs them has gone.

Requests are trees: a call stands on its prompt's last message and on its answer, a message on the one before it. Counting, for
each message, the calls and the needed messages that stand on it tells what falls when a call goes: itself, and upwards until
something else stands there. A head (everything but the messages) counts the calls that have it.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterable

_LIVING = "NOT EXISTS (SELECT 1 FROM tombstones s WHERE s.part = 'call' AND s.row_id = c.id)"


class References:
    """The counts of a file, as of the last `update`: 16 bytes for each message."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._parents, self._counts = array("q", [0]), array("q", [0])
        self._heads: Counter[int] = Counter()
        self._call = 0
        self.update(conn)

    def update(self, conn: sqlite3.Connection) -> None:
        """Take in what was recorded since."""
        for row_id, parent in conn.execute(
            "SELECT id, coalesce(parent_id, 0) FROM messages WHERE id >= ? ORDER BY id", (len(self._parents),)
        ):
            missing = row_id - len(self._parents)
            self._parents.extend([*([0] * missing), parent])
            self._counts.extend([0] * (missing + 1))
        new = (
            f"SELECT c.id, c.prompt_id, c.answer_id, c.head_id FROM calls c WHERE c.id > ? AND {_LIVING} ORDER BY c.id"
        )
        for call, prompt, answer, head in conn.execute(new, (self._call,)):
            self._call = call
            self._hold(prompt)
            self._hold(answer)
            self._heads[head] += 1

    def needed(self, part: str, row_id: int) -> bool:
        """Whether a call that is there needs this row of "message" or "head"."""
        return bool(self._counts[row_id] if part == "message" else self._heads[row_id])

    def drop(self, conn: sqlite3.Connection, calls: Iterable[int]) -> dict[str, list[int]]:
        """What nobody needs once these calls are gone: rows of "message" and of "head"."""
        messages: list[int] = []
        heads: list[int] = []
        for call in calls:
            prompt, answer, head = conn.execute(
                "SELECT prompt_id, answer_id, head_id FROM calls WHERE id = ?", (call,)
            ).fetchone()
            messages += [*self._drop(prompt), *self._drop(answer)]
            self._heads[head] -= 1
            heads += [] if self._heads[head] else [head]
        return {"message": messages, "head": heads}

    def _hold(self, message: int | None) -> None:
        at = message or 0
        while at:
            self._counts[at] += 1
            at = self._parents[at] if self._counts[at] == 1 else 0

    def _drop(self, message: int | None) -> list[int]:
        fallen, at = list[int](), message or 0
        while at:
            self._counts[at] -= 1
            if self._counts[at]:
                break
            fallen.append(at)
            at = self._parents[at]
        return fallen
