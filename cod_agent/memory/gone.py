"""What stands where a text was that is gone: a word that says why, in brackets."""

from __future__ import annotations

import sqlite3

WORDS = {"forgot": "forgotten", "pruned": "pruned"}
"""By the commit that took the text."""


def word(conn: sqlite3.Connection, row_id: int, *parts: str) -> str:
    """Why a row has lost its text: "forgotten" or "pruned"; "" if no tombstone of these parts lies on it."""
    query = (
        "SELECT c.what FROM tombstones t JOIN commits c USING (run_id, seq) WHERE t.part = ? AND t.row_id = ? LIMIT 1"
    )
    rows = (conn.execute(query, (part, row_id)).fetchone() for part in parts)
    return next((WORDS[row[0]] for row in rows if row), "")


def shown(conn: sqlite3.Connection, row_id: int, *parts: str) -> str:
    """The word as people and models see it."""
    return f"({word(conn, row_id, *parts) or 'gone'})"
