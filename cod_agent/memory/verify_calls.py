"""The part of `verify` that looks into episodes: requests rebuilt, answers, exact tokens, results of tools and steps, digests."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from cod_agent.memory.content import conversation, unpack_floats, unpack_ids, write_request
from cod_agent.memory.hashing import call_hash, checksum, compact, digest, effect_hash, effect_key, request_hash
from cod_agent.memory.verify_rows import BROKEN, Faults, each, gone, stone

_CALLS = (
    "SELECT c.*, h.hash AS head_hash, h.body AS head, p.hash AS prompt_hash, a.hash AS answer_hash FROM calls c"
    " JOIN heads h ON h.id = c.head_id LEFT JOIN messages p ON p.id = c.prompt_id LEFT JOIN messages a ON a.id = c.answer_id"
    " ORDER BY c.episode_id, c.id"
)


def check_calls(conn: sqlite3.Connection, report: Faults) -> None:
    """Every call, episode by episode."""
    told: dict[int, list[int]] = {}
    episode = None
    for row in each(conn, report, "calls", _CALLS):
        if row["episode_id"] != episode:
            episode, told = row["episode_id"], {}
        try:
            fault = _call(conn, report, row, told)
        except BROKEN as error:
            fault = f"is malformed ({type(error).__name__}: {error})"
        if fault:
            report.wrong_row("calls", row["id"], fault)


def _call(conn: sqlite3.Connection, report: Faults, row: dict[str, Any], told: dict[int, list[int]]) -> str:
    """What is wrong with a call, or ""."""
    if request_hash(row["head_hash"], row["prompt_hash"] or b"") != row["request"]:
        return "is another request than its key says"
    buried = row["envelope"] is None and stone(conn, "call", row["id"]) is not None
    if buried:
        report.pruned += 1
    elif row["envelope"] is None:
        return "has lost what the server said beside the answer, and no tombstone says why"
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
    if call_hash(row["request"], row["occurrence"], row["answer_hash"], said, exact) == row["hash"]:
        return ""
    if exact is None and not row["inexact"] and buried:  # what its hash was made of is gone; its guard covers the rest
        return ""
    return "is not the call that was recorded: its hash does not agree"


def _rebuilt(conn: sqlite3.Connection, report: Faults, row: dict[str, Any]) -> str:
    """Write the request again, and read it."""
    bodies = [body for _, body, _ in conversation(conn, row["prompt_id"])]
    if row["head"] is None or any(body is None for body in bodies):
        return ""
    written = write_request(row["head"], [str(body) for body in bodies], row["style"])
    report.requests += 1
    if row["style"] in ("raw", "bytes"):
        return "" if _model_of(row["head"]) == row["model"] else "names another model than its request"
    read = json.loads(written)
    parts = [compact(message) for message in read["messages"]]
    if parts != bodies or compact({**read, "messages": None}) != row["head"]:
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
    given = [row[name] is not None for name in ("prompt_ids", "sampled_ids", "logprobs")]
    if not any(given):
        return None
    if not all(given):
        raise ValueError("it has some of its tokens and not all")
    base, shared = row["prompt_base_id"], row["prompt_shared"]
    before = [] if base is None else told[base]
    if shared > len(before):
        raise ValueError(f"shares {shared} tokens with a call that has {len(before)}")
    prompt, sampled = before[:shared] + unpack_ids(row["prompt_ids"]), unpack_ids(row["sampled_ids"])
    if len(unpack_floats(row["logprobs"])) != len(sampled):
        raise ValueError("as many log-probabilities as sampled tokens were expected")
    told[row["id"]] = prompt + sampled
    return prompt, sampled, row["logprobs"]


def check_effects(conn: sqlite3.Connection, report: Faults) -> None:
    """Every tool call and step."""
    columns = "id, kind, name, request, occurrence, call_id, arguments, result, snapshot, hash"
    for row in each(conn, report, "effects", f"SELECT {columns} FROM steps ORDER BY id"):
        if row["result"] is None:
            gone(conn, report, "effect", row["id"])
            continue
        if row["arguments"] is None:
            if row["call_id"] is None:  # else it is the call's answer that is gone
                gone(conn, report, "asked", row["id"])
        else:
            try:
                asked = effect_key(row["kind"], row["name"], json.loads(row["arguments"]))
            except BROKEN:
                asked = b""
            if asked != row["request"]:
                report.wrong_row("effects", row["id"], "is another step or tool call than its key says")
                continue
        if effect_hash(row["request"], row["occurrence"], row["result"], row["snapshot"]) != row["hash"]:
            report.wrong_row("effects", row["id"], "has another result than the one recorded: its hash does not agree")


def check_episodes(conn: sqlite3.Connection, report: Faults) -> None:
    """The digest of each episode that ended."""
    hashes = "SELECT hash FROM calls WHERE episode_id = ? UNION ALL SELECT hash FROM effects WHERE episode_id = ?"
    for row in each(conn, report, "episodes", "SELECT id, state, digest FROM episodes ORDER BY id"):
        expected = None
        if row["state"] != "live":
            expected = digest(hashed for (hashed,) in conn.execute(hashes, (row["id"], row["id"])))
        if row["digest"] != expected:
            report.wrong_row(
                "episodes", row["id"], "has other calls and effects than when it ended: its digest does not agree"
            )
