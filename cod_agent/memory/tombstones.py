"""Tombstones: the text of a row goes, its hash stays, and a commit says which rows, how many and why.

A row whose text is gone without a tombstone is damage; so is one that has both, and `cod verify` tells them apart. Only a message
or a head may come back: they are stored once for all runs, and a later call that says the same again fills its row (`content`). The
commit's `detail` holds the number of rows of each part and a digest over their hashes, so that no row can be added to it afterwards.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any

from cod_agent.memory import rows, runs
from cod_agent.memory.gone import WORDS
from cod_agent.memory.hashing import canonical, text_hash, value_hash

PARTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "head": ("heads", ("body",), "hash"),
    "message": ("messages", ("body",), "hash"),
    "call": ("calls", ("envelope", "prompt_ids", "sampled_ids", "logprobs"), "hash"),
    "effect": ("effects", ("arguments", "result", "snapshot"), "hash"),
    "asked": ("effects", ("arguments",), "hash"),
    "task": ("tasks", ("body", "answer", "feedback"), "fingerprint"),
    "answer": ("tasks", ("answer",), "fingerprint"),
    "feedback": ("tasks", ("feedback",), "fingerprint"),
    "context": ("contexts", ("body",), "hash"),
}
"""Part -> its table, the columns that go, and the column whose hash stays for them; of tasks, the hashes that commits are made of."""


def bury(
    conn: sqlite3.Connection,
    run_id: int,
    what: str,
    position: int | None,
    why: dict[str, Any],
    buried: Mapping[str, Iterable[int]],
) -> dict[str, int]:
    """Inside a transaction: take the text out of rows, put a tombstone on each, and commit that to the run's chain.

    Args:
        what: "pruned" or "forgot".
        why: kept in the commit beside counts and digest.
        buried: row ids by part; those that lie buried already are passed over.

    Returns:
        How many rows of each part were buried now.
    """
    seq = conn.execute("SELECT max(seq) + 1 FROM commits WHERE run_id = ?", (run_id,)).fetchone()[0]
    counts: dict[str, int] = {}
    found: dict[str, list[str]] = {}
    for part, ids in buried.items():
        counts[part] = sum(_bury(conn, run_id, seq, part, row_id) for row_id in sorted(set(ids)))
        found |= _bury_findings(conn, ids, WORDS[what]) if part == "context" else {}
    counts = {part: count for part, count in counts.items() if count}
    said = {**why, "rows": counts, "digest": digest(conn, run_id, seq), **({"held": found} if found else {})}
    runs.commit(conn, run_id, what, position, said, detailed=True)
    return counts


def _bury_findings(conn: sqlite3.Connection, ids: Iterable[int], word: str) -> dict[str, list[str]]:
    """Why versions were held back quotes them; returns the hashes of what goes, by version."""
    hashes = {}
    for row_id in sorted(set(ids)):
        query = "SELECT version, held, sources FROM contexts WHERE id = ? AND held NOT IN ('', ?)"
        for version, held, sources in conn.execute(query, (row_id, f"({word})")).fetchall():
            before = json.loads(sources)
            hashes[str(version)] = [text_hash(held), value_hash(before)]
            left = [{key: value for key, value in source.items() if key != "findings"} for source in before]
            rows.update(conn, "contexts", row_id, {"held": f"({word})", "sources": canonical(left)})
    return hashes


def _bury(conn: sqlite3.Connection, run_id: int, seq: int, part: str, row_id: int) -> int:
    table, columns, name = PARTS[part]
    known = conn.execute("SELECT 1 FROM tombstones WHERE part = ? AND row_id = ?", (part, row_id)).fetchone()
    hashed, *texts = conn.execute(
        f"SELECT {name}, {', '.join(columns)} FROM {table} WHERE id = ?", (row_id,)
    ).fetchone()
    if known is not None and not any(text is not None for text in texts):
        return 0
    hashed = hashed.hex() if isinstance(hashed, bytes) else hashed
    if table == "tasks":  # commits are made of the hashes of these
        reward = conn.execute("SELECT reward FROM tasks WHERE id = ?", (row_id,)).fetchone()[0]
        answer, feedback = (_hash_of(conn, column, row_id) for column in ("answer", "feedback"))
        hashed = {"task": canonical([hashed, answer, feedback, reward]), "answer": answer, "feedback": feedback}[part]
    rows.update(conn, table, row_id, dict.fromkeys(columns))
    conn.execute(
        "INSERT INTO tombstones (run_id, seq, part, row_id, hash) VALUES (?, ?, ?, ?, ?)",
        (run_id, seq, part, row_id, hashed),
    )
    return 1


def _hash_of(conn: sqlite3.Connection, column: str, task: int) -> str | None:
    """Of a task's answer or feedback, which may have been buried by itself before."""
    said = conn.execute(f"SELECT {column} FROM tasks WHERE id = ?", (task,)).fetchone()[0]
    stone = "SELECT hash FROM tombstones WHERE part = ? AND row_id = ?"
    row = (text_hash(said),) if said is not None else conn.execute(stone, (column, task)).fetchone()
    return row and str(row[0])


def digest(conn: sqlite3.Connection, run_id: int, seq: int) -> str:
    """Of the tombstones of one commit, in no order."""
    stones = conn.execute("SELECT part, hash FROM tombstones WHERE run_id = ? AND seq = ?", (run_id, seq))
    return text_hash("\n".join(sorted(f"{part}:{hashed}" for part, hashed in stones)))
