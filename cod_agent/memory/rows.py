"""Rows that guard themselves: each carries a checksum over its own values.

The hashes of the record cover what was said and done. A row holds more than that: times, what belongs to what, attempts that
failed, and what hashes can no longer be computed from once texts are pruned. `guard`, the CRC-32 over every other value of
the row but its id, tells that any of it was changed, and in which row. It is no part of a chain, because two lives that say
the same were not lived at the same time. Values that are NULL or empty do not count, so that a later schema may add columns.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from cod_agent.memory.hashing import canonical, checksum

GUARDED = ("runs", "contexts", "tasks", "episodes", "messages", "calls", "effects", "attempts", "commits")
"""Tables whose rows have a guard. Heads are their hashes, tombstones are in their commit's digest."""


def guard_of(row: Mapping[str, Any]) -> int:
    """The checksum of a row, by column; types have to be those that the file gives back."""
    kept = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in row.items()
        if name not in ("id", "guard") and value is not None and value != ""
    }
    return checksum(canonical(kept))


def insert(conn: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> int:
    """Inside a transaction: store a row with its guard; returns its id."""
    cursor = conn.execute(_insert(table, tuple(row)), (*row.values(), guard_of(row)))
    return int(cursor.lastrowid or 0)


def update(conn: sqlite3.Connection, table: str, row_id: int, changes: Mapping[str, Any]) -> None:
    """Inside a transaction: change values of a row, and its guard where it has one."""
    if table in GUARDED:
        cursor = conn.execute(f"SELECT * FROM {table} WHERE id = ?", (row_id,))
        names = [column[0] for column in cursor.description]
        changes = {**changes, "guard": guard_of({**dict(zip(names, cursor.fetchone(), strict=True)), **changes})}
    conn.execute(_update(table, tuple(changes)), (*changes.values(), row_id))


def guard_function(names: str, *values: Any) -> int:
    """`guard_of` for a migration's SQL, which names columns and gives their values."""
    return guard_of(dict(zip(names.split(), values, strict=True)))


@lru_cache
def _insert(table: str, names: tuple[str, ...]) -> str:
    return f"INSERT INTO {table} ({', '.join(names)}, guard) VALUES ({', '.join('?' * (len(names) + 1))})"


@lru_cache
def _update(table: str, names: tuple[str, ...]) -> str:
    return f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in names)} WHERE id = ?"
