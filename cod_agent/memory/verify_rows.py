"""The part of `verify` that looks at each row by itself: schema, guards, content by its hashes, tombstones."""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

from cod_agent.memory import schema
from cod_agent.memory.hashing import content_hash, head_hash, node_hash
from cod_agent.memory.rows import guard_of
from cod_agent.memory.tombstones import PARTS

BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error)
"""What reading a damaged value may raise."""


class Faults(Protocol):
    """What the parts of `verify` report to."""

    requests: int
    pruned: int
    counts: dict[str, int]
    anchor_fault: str

    def wrong(self, fault: str) -> None: ...

    def wrong_row(self, table: str, row: Any, fault: str) -> None: ...


def check_schema(conn: sqlite3.Connection, report: Faults) -> None:
    """Tables, indexes and views are those of the migrations; a program's own ones beside them are its business, triggers are not."""
    found = _objects(conn)
    for name, made in _expected().items():
        if found.get(name) != made:
            report.wrong(f"{made[0]} {name} is {'another than this package makes' if name in found else 'not there'}")
    for name, table in conn.execute("SELECT name, tbl_name FROM sqlite_master WHERE type = 'trigger'"):
        if table in _expected():
            report.wrong(f"trigger {name} on {table} is not of this package: it changes what is written")


@cache
def _expected() -> dict[str, tuple[Any, ...]]:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    schema.migrate(conn)
    made = _objects(conn)
    conn.close()
    return {name: what for name, what in made.items() if not name.startswith(("_", "idx__"))}


def _objects(conn: sqlite3.Connection) -> dict[str, tuple[Any, ...]]:
    """Columns of tables, definitions of indexes and views. A table's own text is as the SQLite that made it wrote it."""
    found: dict[str, tuple[Any, ...]] = {}
    for what, name, sql in conn.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"):
        columns = conn.execute('SELECT name, type, "notnull", dflt_value, pk FROM pragma_table_info(?)', (name,))
        found[name] = (what, tuple(columns) if what == "table" else sql)
    return found


def check_guards(conn: sqlite3.Connection, report: Faults, table: str) -> None:
    """Each row's guard is of its values."""
    for row in each(
        conn, report, table, f"SELECT * FROM {table} ORDER BY {'run_id, seq' if table == 'commits' else 'id'}"
    ):
        if guard_of(row) != row["guard"]:
            named = f"({row['run_id']}, {row['seq']})" if table == "commits" else row["id"]
            report.wrong_row(table, named, "is not the one written: its guard does not agree")


def each(conn: sqlite3.Connection, report: Faults, table: str, query: str) -> Iterator[dict[str, Any]]:
    """The rows a query gives, by column, counted."""
    cursor = conn.execute(query)
    names, count = [column[0] for column in cursor.description], 0
    for row in cursor:
        count += 1
        yield dict(zip(names, row, strict=True))
    if count:
        report.counts[table] = count


def stone(conn: sqlite3.Connection, part: str, row_id: int) -> str | None:
    """What stands on a row's tombstone."""
    found = conn.execute("SELECT hash FROM tombstones WHERE part = ? AND row_id = ?", (part, row_id)).fetchone()
    return None if found is None else str(found[0])


def gone(conn: sqlite3.Connection, report: Faults, part: str, row_id: int) -> None:
    """A part whose text is not there."""
    if stone(conn, part, row_id) is not None:
        report.pruned += 1
    else:
        report.wrong_row(PARTS[part][0], row_id, "has lost its text, and no tombstone says why")


def check_heads(conn: sqlite3.Connection, report: Faults) -> None:
    for row in each(conn, report, "heads", "SELECT id, hash, body FROM heads ORDER BY id"):
        if row["body"] is None:
            gone(conn, report, "head", row["id"])
        elif row["hash"] not in _hashes_of_head(row["body"]):
            report.wrong_row("heads", row["id"], "is not what was sent: its hash does not agree")


def _hashes_of_head(body: str) -> list[bytes]:
    """A request that was no UTF-8 is kept as Latin-1 (style "bytes") and named by its own bytes."""
    try:
        return [head_hash(body), content_hash(body.encode("latin-1"))]
    except UnicodeEncodeError:
        return [head_hash(body)]


def check_messages(conn: sqlite3.Connection, report: Faults) -> None:
    # An answer to a request that could not be taken apart hangs on the request's head.
    query = (
        "SELECT m.id, m.parent_id, m.hash, m.body, m.labels, p.hash AS above FROM messages m"
        " LEFT JOIN messages p ON p.id = m.parent_id AND p.id < m.id ORDER BY m.id"
    )
    alone = "SELECT h.hash FROM calls c JOIN heads h ON h.id = c.head_id WHERE c.prompt_id IS NULL AND c.answer_id = ?"
    for row in each(conn, report, "messages", query):
        if row["body"] is None:
            gone(conn, report, "message", row["id"])
            continue
        above = row["above"] if row["parent_id"] is not None else b""
        if _is(row, above):
            continue
        answered = [] if row["parent_id"] is not None else conn.execute(alone, (row["id"],)).fetchall()
        if not any(_is(row, hashed) for (hashed,) in answered):
            report.wrong_row("messages", row["id"], "is not what was said: its hash does not agree")


def _is(row: dict[str, Any], above: bytes | None) -> bool:
    try:
        return above is not None and node_hash(above, row["body"], row["labels"]) == row["hash"]
    except UnicodeEncodeError:
        return False


def check_tombstones(conn: sqlite3.Connection, report: Faults) -> None:
    """Each stands for a row that is there, has no text, and has that hash; and a commit put it there. Heads and messages, which
    runs share, may have been said again since."""
    query = "SELECT t.id, t.part, t.row_id, t.hash, c.what FROM tombstones t LEFT JOIN commits c USING (run_id, seq) ORDER BY t.id"
    for one in each(conn, report, "tombstones", query):
        if one["what"] not in ("pruned", "forgot"):
            report.wrong_row("tombstones", one["id"], "belongs to no commit that pruned or forgot")
        if one["part"] not in PARTS:
            report.wrong_row("tombstones", one["id"], f"stands for {one['part']!r}, which is no part")
            continue
        table, columns, name = PARTS[one["part"]]
        chosen = f"SELECT {name}, {', '.join(columns)} FROM {table} WHERE id = ?"
        row = conn.execute(chosen, (one["row_id"],)).fetchone()
        back = row is not None and any(value is not None for value in row[1:])
        if row is None or (back and one["part"] not in ("head", "message")):
            state = "not there" if row is None else "there"
            report.wrong_row("tombstones", one["id"], f"stands for row {one['row_id']} of {table}, which is {state}")
        elif table != "tasks" and (row[0].hex() if isinstance(row[0], bytes) else row[0]) != one["hash"]:
            report.wrong_row(
                "tombstones", one["id"], f"is not that of row {one['row_id']} of {table}: its hash does not agree"
            )
