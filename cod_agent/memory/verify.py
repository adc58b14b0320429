"""Does a run database still say what was recorded? Everything is made again from its parts and compared.

    heads, messages     each hash is of the text, and a message's also of the message before it
    calls, effects      the request is rebuilt; key, answer, exact tokens, result: one hash each
    episodes            the digest is of their calls and effects
    runs, tasks, contexts and commits: each commit's hash is of what it committed, each link of the one before

What is left out, and only that: times, failed attempts and leases. A part that was pruned is no fault: its hash
stands for it, and it is counted. Hashes show damage and careless edits; whoever edits with care can compute them
too.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cod_agent.errors import VerificationFailed
from cod_agent.memory.content import conversation, unpack_floats, unpack_ids, write_request
from cod_agent.memory.hashing import (
    call_hash,
    checksum,
    compact,
    digest,
    effect_hash,
    effect_key,
    head_hash,
    node_hash,
    request_hash,
)
from cod_agent.memory.readonly import look
from cod_agent.memory.tombstones import PARTS
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
    faults: list[str] = field(default_factory=list)
    """A sentence each; the first `MOST`."""

    @property
    def ok(self) -> bool:
        return not self.faults

    def wrong(self, fault: str) -> None:
        """Note a fault."""
        if len(self.faults) < MOST:
            self.faults.append(fault)

    def require(self) -> None:
        """Raises: VerificationFailed, with the first fault."""
        if self.faults:
            more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            raise VerificationFailed(
                f"{self.path} does not agree with itself: {self.faults[0]}{more}; do not train on it or resume it, "
                "restore a backup"
            )

    def json(self) -> dict[str, Any]:
        """As `cod verify --json` prints it."""
        said = {"path": self.path, "ok": self.ok, "counts": self.counts, "requests": self.requests}
        return {**said, "pruned": self.pruned, "faults": self.faults}


def verify(path: str | Path) -> Report:
    """Check a run database, whether or not somebody lives in it; nothing is written.

    Raises:
        UsageError: there is no such file.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`. What was found wrong is in the report.
    """
    report = Report(str(path))
    with look(path) as conn:
        if _sound(conn, report):
            buried = _tombstones(conn, report)
            _heads(conn, report, buried["head"])
            nodes = _messages(conn, report, buried["message"])
            hashes = _calls(conn, report, nodes, buried["call"])
            _effects(conn, report, hashes, buried["effect"])
            _episodes(conn, report, hashes)
            for (run_id,) in _rows(conn, report, "runs", "SELECT id FROM runs ORDER BY id"):
                try:
                    check_run(conn, report, run_id, buried["task"], buried["context"])
                except (ValueError, TypeError, LookupError) as error:
                    report.wrong(
                        f"row {run_id} of runs or what belongs to it is malformed ({type(error).__name__}: {error})"
                    )
    return report


def _sound(conn: sqlite3.Connection, report: Report) -> bool:
    """SQLite's own checks. What fails them is not walked."""
    said = [row[0] for row in conn.execute("PRAGMA integrity_check(5)")]
    if said != ["ok"]:
        report.wrong(f"SQLite finds the file damaged ({said[0]})")
        return False
    for table, row_id, parent, _ in conn.execute("PRAGMA foreign_key_check"):
        report.wrong(f"row {row_id} of {table} refers to a row of {parent} that is not there")
    return report.ok


def _rows(conn: sqlite3.Connection, report: Report, table: str, query: str) -> Iterator[Any]:
    count = 0
    for row in conn.execute(query):
        count += 1
        yield row
    report.counts[table] = count


def _tombstones(conn: sqlite3.Connection, report: Report) -> dict[str, dict[int, str]]:
    """Hashes on the tombstones of each part, by row; each stands for the row it names."""
    found: dict[str, dict[int, str]] = {part: {} for part in PARTS}
    query = "SELECT t.id, t.part, t.row_id, t.hash, c.what FROM tombstones t LEFT JOIN commits c USING (run_id, seq)"
    for row_id, part, of, hashed, what in _rows(conn, report, "tombstones", query):
        found[part][of] = hashed
        if what not in ("pruned", "forgot"):
            report.wrong(f"row {row_id} of tombstones belongs to no commit that pruned or forgot")
    if not report.counts["tombstones"]:
        del report.counts["tombstones"]
    for part, rows in found.items():
        table, columns, name = PARTS[part]
        for of, hashed in rows.items():
            row = conn.execute(f"SELECT {name}, {', '.join(columns)} FROM {table} WHERE id = ?", (of,)).fetchone()
            if row is None or any(value is not None for value in row[1:]):
                report.wrong(f"row {of} of {table} has a tombstone, and is {'not there' if row is None else 'there'}")
            elif part != "task" and (row[0].hex() if isinstance(row[0], bytes) else row[0]) != hashed:
                report.wrong(f"row {of} of {table} has the tombstone of another: its hash does not agree")
    return found


def _gone(report: Report, table: str, row_id: int, buried: Container[int]) -> None:
    """A part whose text is not there."""
    if row_id in buried:
        report.pruned += 1
    else:
        report.wrong(f"row {row_id} of {table} has lost its text, and no tombstone says why")


def _heads(conn: sqlite3.Connection, report: Report, buried: Container[int]) -> None:
    for row_id, hashed, body in _rows(conn, report, "heads", "SELECT id, hash, body FROM heads"):
        if body is None:
            _gone(report, "heads", row_id, buried)
        elif head_hash(body) != hashed:
            report.wrong(f"row {row_id} of heads is not what was sent: its hash does not agree")


def _messages(conn: sqlite3.Connection, report: Report, buried: Container[int]) -> dict[int, bytes]:
    """Checks every node; returns hashes by row id."""
    # An answer to a request that could not be taken apart hangs on the request's head.
    alone = dict(
        conn.execute(
            "SELECT c.answer_id, h.hash FROM calls c JOIN heads h ON h.id = c.head_id WHERE c.prompt_id IS NULL"
        )
    )
    nodes: dict[int, bytes] = {}
    query = "SELECT id, parent_id, hash, body, labels FROM messages ORDER BY id"
    for row_id, parent, hashed, body, labels in _rows(conn, report, "messages", query):
        nodes[row_id] = hashed
        above = nodes.get(parent, b"?") if parent is not None else alone.get(row_id, b"")
        if body is None:
            _gone(report, "messages", row_id, buried)
        elif node_hash(above, body, labels) != hashed:
            report.wrong(f"row {row_id} of messages is not what was said: its hash does not agree")
    return nodes


_CALLS = (
    "SELECT c.id, c.episode_id, c.request, c.occurrence, h.hash AS head_hash, h.body AS head, c.prompt_id, c.style,"
    " c.answer_id, c.envelope, c.envelope_crc, c.finish_reason, c.model, c.weights, c.prompt_base_id, c.prompt_shared,"
    " c.prompt_ids, c.sampled_ids, c.logprobs, c.on_policy, c.inexact, c.prompt_tokens, c.sampled_tokens, c.hash"
    " FROM calls c JOIN heads h ON h.id = c.head_id ORDER BY c.episode_id, c.id"
)


def _calls(
    conn: sqlite3.Connection, report: Report, nodes: dict[int, bytes], buried: Container[int]
) -> dict[int, list[bytes]]:
    """Checks every call; returns the hashes of calls by episode."""
    hashes: dict[int, list[bytes]] = {}
    told: dict[int, list[int]] = {}
    episode = None
    names: list[str] = []
    for values in _rows(conn, report, "calls", _CALLS):
        names = names or [column[0] for column in conn.execute(f"{_CALLS} LIMIT 0").description]
        row = dict(zip(names, values, strict=True))
        if row["episode_id"] != episode:
            episode, told = row["episode_id"], {}
        hashes.setdefault(row["episode_id"], []).append(row["hash"])
        try:
            fault = _call(conn, report, row, nodes, told, row["id"] in buried)
        except (ValueError, TypeError, KeyError, ArithmeticError, zlib.error) as error:
            fault = f"is malformed ({type(error).__name__}: {error})"
        if fault:
            report.wrong(f"row {row['id']} of calls {fault}")
    return hashes


def _call(
    conn: sqlite3.Connection,
    report: Report,
    row: dict[str, Any],
    nodes: dict[int, bytes],
    told: dict[int, list[int]],
    buried: bool,
) -> str:
    """What is wrong with a call, or ""."""
    if request_hash(row["head_hash"], nodes.get(row["prompt_id"], b"")) != row["request"]:
        return "is another request than its key says"
    if row["envelope"] is None:
        if not buried:
            return "has lost what the server said beside the answer, and no tombstone says why"
        report.pruned += 1
    elif checksum(row["envelope"]) != row["envelope_crc"]:
        return "has another envelope than the server sent: its checksum does not agree"
    if fault := _rebuilt(conn, report, row):
        return fault
    said = {
        "style": row["style"],
        "finish_reason": row["finish_reason"],
        "weights": row["weights"],
        "inexact": row["inexact"],
        "on_policy": {0: False, 1: True}.get(row["on_policy"]),
        "usage": (row["prompt_tokens"], row["sampled_tokens"]),
    }
    exact = _tokens(row, told)
    answer = nodes[row["answer_id"]]
    if call_hash(row["request"], row["occurrence"], answer, said, exact) == row["hash"]:
        return ""
    if exact is None and not row["inexact"] and buried:
        return ""
    return "is not the call that was recorded: its hash does not agree"


def _rebuilt(conn: sqlite3.Connection, report: Report, row: dict[str, Any]) -> str:
    """Write the request again, and read it."""
    bodies = [body for _, body, _ in conversation(conn, row["prompt_id"])]
    if row["head"] is None or any(body is None for body in bodies):
        return ""
    written = write_request(row["head"], [str(body) for body in bodies], row["style"])
    report.requests += 1
    if row["style"] == "raw":
        return "" if _model_of(row["head"]) == row["model"] else "names another model than its request"
    read = json.loads(written)
    if [compact(message) for message in read["messages"]] != bodies or compact({**read, "messages": None}) != row[
        "head"
    ]:
        return "has a request that cannot be rebuilt from its parts"
    return "" if str(read.get("model", "")) == row["model"] else "names another model than its request"


def _model_of(head: str) -> str:
    try:
        body = json.loads(head)
    except ValueError:
        return ""
    return str(body.get("model", "")) if isinstance(body, dict) else ""


def _tokens(row: dict[str, Any], told: dict[int, list[int]]) -> tuple[list[int], list[int], bytes] | None:
    """(prompt ids, sampled ids, log-probabilities as stored), or None; `told` are the calls of the episode so far."""
    if row["prompt_ids"] is None or row["sampled_ids"] is None or row["logprobs"] is None:
        return None
    base, shared = row["prompt_base_id"], row["prompt_shared"]
    before = [] if base is None else told[base]
    if shared > len(before):
        raise ValueError(f"shares {shared} tokens with a call that has {len(before)}")
    prompt, sampled = before[:shared] + unpack_ids(row["prompt_ids"]), unpack_ids(row["sampled_ids"])
    if len(unpack_floats(row["logprobs"])) != len(sampled):
        raise ValueError("as many log-probabilities as sampled tokens were expected")
    told[row["id"]] = prompt + sampled
    return prompt, sampled, row["logprobs"]


def _effects(conn: sqlite3.Connection, report: Report, hashes: dict[int, list[bytes]], buried: Container[int]) -> None:
    columns = "id, episode_id, kind, name, request, occurrence, arguments, result, snapshot, hash"
    for row in _rows(conn, report, "effects", f"SELECT {columns} FROM steps ORDER BY id"):
        row_id, episode, kind, name, key, occurrence, arguments, result, snapshot, hashed = row
        hashes.setdefault(episode, []).append(hashed)
        if result is None:
            _gone(report, "effects", row_id, buried)
            continue
        if arguments is None:  # those of a step whose answer was pruned with its call
            if effect_hash(key, occurrence, result, snapshot) != hashed:
                report.wrong(
                    f"row {row_id} of effects has another result than the one recorded: its hash does not agree"
                )
            continue
        try:
            asked = effect_key(kind, name, json.loads(arguments))
        except ValueError:
            asked = b""
        if asked != key:
            report.wrong(f"row {row_id} of effects is another step or tool call than its key says")
        elif effect_hash(key, occurrence, result, snapshot) != hashed:
            report.wrong(f"row {row_id} of effects has another result than the one recorded: its hash does not agree")


def _episodes(conn: sqlite3.Connection, report: Report, hashes: dict[int, list[bytes]]) -> None:
    for row_id, state, stored in _rows(conn, report, "episodes", "SELECT id, state, digest FROM episodes"):
        expected = None if state == "live" else digest(hashes.get(row_id, []))
        if stored != expected:
            report.wrong(
                f"row {row_id} of episodes has other calls and effects than when it ended: its digest does not agree"
            )
