"""Does a run database still say what was recorded? Everything is made again from its parts and compared.

    schema              tables, indexes and views are those of this package, and nothing fires when somebody writes
    every row           its guard, or its hash, is of its values; of a message also of the message before it
    calls, effects      the request is rebuilt; key, answer, exact tokens, result: one hash each
    episodes            the digest is of their calls and effects
    runs, tasks, contexts and commits: each commit's hash is of what it committed, each link of the one before

What is left out, and only that: leases, which say who lives a run now and nothing of what was lived. A part that was pruned is no
fault: its hash stands for it, and it is counted. Hashes show damage and careless edits; whoever edits with care can compute
them too, and whoever cuts the newest commits off leaves no trace in the file: an anchor kept elsewhere tells (`cod_agent.memory.anchor`).

The walk is from row to row, tables in the order of the schema, and holds no more than a run's own rows at a time.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cod_agent.errors import VerificationFailed
from cod_agent.memory.anchor import Anchor
from cod_agent.memory.readonly import look
from cod_agent.memory.rows import GUARDED
from cod_agent.memory.verify_calls import check_calls, check_effects, check_episodes
from cod_agent.memory.verify_rows import (
    check_guards,
    check_heads,
    check_messages,
    check_schema,
    check_tombstones,
)
from cod_agent.memory.verify_runs import check_run

MOST = 50
"""Faults that are listed; one is enough to know."""


@dataclass(slots=True)
class Report:
    """What `verify` found."""

    path: str
    counts: dict[str, int] = field(default_factory=dict)
    """Rows walked, by table."""
    requests: int = 0
    """Requests rebuilt."""
    pruned: int = 0
    """Parts that are gone and whose hashes stand for them."""
    anchored: int = 0
    """Links of an anchor that the chains hold."""
    faults: list[str] = field(default_factory=list)
    """A sentence each, which begins with the row and its table; the first `MOST`."""
    anchor_fault: str = ""
    """What is wrong with the anchor itself, which then proves nothing of the file."""

    @property
    def ok(self) -> bool:
        return not (self.faults or self.anchor_fault)

    def wrong(self, fault: str) -> None:
        """Note a fault."""
        if len(self.faults) < MOST:
            self.faults.append(fault)

    def wrong_row(self, table: str, row: Any, fault: str) -> None:
        """Note what is wrong with a row: its id, or what names it, comes first."""
        self.wrong(f"row {row} of {table} {fault}")

    def require(self) -> None:
        """Raises: VerificationFailed, with the first fault."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            raise VerificationFailed(
                f"{self.path} does not agree with itself: {self.faults[0]}{more}; do not train on it or resume it, "
                "restore a backup"
            )
        if self.anchor_fault:
            raise VerificationFailed(
                f"{self.path} agrees with itself, but its anchor proves nothing: {self.anchor_fault}"
            )

    def json(self) -> dict[str, Any]:
        """As `cod verify --json` prints it."""
        faults = [*self.faults, *([self.anchor_fault] if self.anchor_fault else [])]
        said = {"path": self.path, "ok": self.ok, "counts": self.counts, "requests": self.requests}
        return {**said, "pruned": self.pruned, "anchored": self.anchored, "faults": faults}


def verify(path: str | Path, anchor: str | Path | None = None) -> Report:
    """Check a run database, whether or not somebody lives in it; nothing is written.

    Args:
        anchor: a file of anchors that were noted as it was lived; None: what was cut off as a whole is not missed.

    Raises:
        UsageError: there is no such file, or no such anchor.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`. What was found wrong is in the report.
    """
    report = Report(str(path))
    try:
        with look(path) as conn:
            # Damaged text is a fault of its row, and no reason to stop.
            conn.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
            if _sound(conn, report):
                _walk(conn, report)
                if anchor is not None:
                    report.anchored = Anchor(anchor).check(conn, report)
    except UnicodeDecodeError:  # SQLite's own words on what is wrong quote damaged bytes
        report.wrong("SQLite finds the file damaged (the schema is no text)")
    return report


def _walk(conn: sqlite3.Connection, report: Report) -> None:
    for table in GUARDED:
        check_guards(conn, report, table)
    check_heads(conn, report)
    check_messages(conn, report)
    check_tombstones(conn, report)
    check_calls(conn, report)
    check_effects(conn, report)
    check_episodes(conn, report)
    for (run_id,) in conn.execute("SELECT id FROM runs ORDER BY id").fetchall():
        check_run(conn, report, run_id)


def _sound(conn: sqlite3.Connection, report: Report) -> bool:
    """SQLite's own checks, and the schema. What fails them is not walked."""
    said = [row[0] for row in conn.execute("PRAGMA integrity_check(5)")]
    if said != ["ok"]:
        report.wrong(f"SQLite finds the file damaged ({said[0]})")
        return False
    check_schema(conn, report)
    for table, row_id, parent, _ in conn.execute("PRAGMA foreign_key_check"):
        report.wrong_row(table, row_id or "?", f"refers to a row of {parent} that is not there")
    return report.ok
