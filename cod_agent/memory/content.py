"""Content stored once: conversations as trees of messages, token ids by shared prefix, requests rebuilt from their parts.

A message row is a node: its hash covers its own text, where that came from, and its parent's hash, so that a conversation
is named by its last node and the 200th request of an episode adds one or two rows. A request is a head (everything but the messages) and a
node. Token ids are int32, log-probabilities float32, little-endian; ids are compressed with zlib, all their lowest bytes first.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.errors import VerificationFailed
from cod_agent.memory import rows
from cod_agent.memory.hashing import compact, node_hash

_CACHE_LIMIT = 20_000
"""Row ids that are kept, about 4 MB; then it begins anew, at the price of a look into the index for each message."""


@dataclass(frozen=True, slots=True)
class Node:
    """A message of a conversation, before or after it is stored."""

    hash: bytes
    body: str
    labels: str


def link(parent: bytes, body: str, labels: str) -> Node:
    """The node of a message under `parent` (the hash of the message before it, or b"")."""
    return Node(node_hash(parent, body, labels), body, labels)


def store_nodes(conn: sqlite3.Connection, cache: dict[bytes, int], nodes: Sequence[Node]) -> int | None:
    """Row id of the last node; whatever is not stored yet is."""
    if len(cache) > _CACHE_LIMIT:
        cache.clear()
    known, at = None, len(nodes)
    while at and known is None:
        at -= 1
        known = cache.get(nodes[at].hash)
    start = 0 if known is None else at + 1
    parent = known
    for node in nodes[start:]:
        parent = store_child(conn, cache, parent, node)
    return parent


def store_child(conn: sqlite3.Connection, cache: dict[bytes, int], parent: int | None, node: Node) -> int:
    """Row id of one node under a stored one."""
    known = cache.get(node.hash)
    if known is None:
        row = conn.execute("SELECT id, body IS NULL FROM messages WHERE hash = ?", (node.hash,)).fetchone()
        if row is not None and row[1]:  # it was pruned or forgotten, and is said again
            rows.update(conn, "messages", row[0], {"body": node.body})
        if row is None:
            said = {"parent_id": parent, "hash": node.hash, "body": node.body, "labels": node.labels}
            row = (rows.insert(conn, "messages", said),)
        known = cache[node.hash] = row[0]
    return known


def store_head(conn: sqlite3.Connection, cache: dict[bytes, int], digest: bytes, body: str) -> int:
    """Row id of a request's head."""
    known = cache.get(digest)
    if known is None:
        row = conn.execute("SELECT id, body IS NULL FROM heads WHERE hash = ?", (digest,)).fetchone()
        if row is not None and row[1]:
            conn.execute("UPDATE heads SET body = ? WHERE id = ?", (body, row[0]))
        if row is None:
            row = (conn.execute("INSERT INTO heads (hash, body) VALUES (?, ?)", (digest, body)).lastrowid,)
        known = cache[digest] = row[0]
    return known


def conversation(conn: sqlite3.Connection, leaf: int | None) -> list[tuple[bytes, str | None, str]]:
    """(hash, body, labels) of the messages up to a node, first to last. A pruned body is None."""
    # A parent is always stored before its children; in a damaged file that keeps the walk from going round for ever.
    found = conn.execute(
        "WITH RECURSIVE up (id, parent_id, hash, body, labels, depth) AS ("
        " SELECT id, parent_id, hash, body, labels, 0 FROM messages WHERE id = ?"
        " UNION ALL SELECT m.id, m.parent_id, m.hash, m.body, m.labels, depth + 1"
        "  FROM messages m JOIN up ON m.id = up.parent_id AND m.id < up.id)"
        " SELECT hash, body, labels FROM up ORDER BY depth DESC",
        (leaf,),
    )
    return [(row[0], row[1], row[2]) for row in found]


def write_request(head: str, bodies: Sequence[str], style: str) -> bytes:
    """The bytes of a request. `style` names how its program wrote JSON: see `styles`."""
    if style in ("raw", "bytes"):
        return head.encode("utf-8" if style == "raw" else "latin-1")
    if style == "own":
        return head.replace('"messages":null', f'"messages":[{",".join(bodies)}]', 1).encode()
    value = json.loads(head)
    value["messages"] = [json.loads(body) for body in bodies]
    return STYLES[style](value).encode()


STYLES = {
    "compact": compact,
    "ascii": lambda value: json.dumps(value, separators=(",", ":")),
    "spaced": lambda value: json.dumps(value, ensure_ascii=False),
    "plain": lambda value: json.dumps(value),
}
"""Ways to write JSON that clients use; a request in none of them is stored whole (style "raw"; "bytes" if it is no UTF-8)."""


def rebuild_request(conn: sqlite3.Connection, call_id: int) -> bytes:
    """The request of a call, byte for byte as the server saw it.

    Raises:
        VerificationFailed: a part was pruned.
    """
    head, style, leaf = conn.execute(
        "SELECT h.body, c.style, c.prompt_id FROM calls c JOIN heads h ON h.id = c.head_id WHERE c.id = ?", (call_id,)
    ).fetchone()
    bodies = [body for _, body, _ in conversation(conn, leaf)]
    if head is None or any(body is None for body in bodies):
        raise VerificationFailed(f"the request of call {call_id} was pruned")
    return write_request(head, [str(body) for body in bodies], style)


def pack_ids(ids: Sequence[int]) -> bytes:
    raw = _bytes("i", ids)
    # Byte by byte: the high ones are nearly all alike, and then compress to nearly nothing.
    return zlib.compress(b"".join(raw[i::4] for i in range(4)), 6)


def unpack_ids(blob: bytes) -> list[int]:
    planes = zlib.decompress(blob)
    raw, count = bytearray(len(planes)), len(planes) // 4
    for i in range(4):
        raw[i::4] = planes[i * count : (i + 1) * count]
    return _values("i", bytes(raw))


def pack_floats(values: Sequence[float]) -> bytes:
    return _bytes("f", values)


def unpack_floats(blob: bytes) -> list[float]:
    return _values("f", blob)


def _bytes(code: str, values: Sequence[Any]) -> bytes:
    made = array(code, values)
    if sys.byteorder == "big":
        made.byteswap()
    return made.tobytes()


def _values(code: str, blob: bytes) -> list[Any]:
    made = array(code)
    made.frombytes(blob)
    if sys.byteorder == "big":
        made.byteswap()
    return made.tolist()


def shared_prefix(before: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens `prompt` has in common with the start of `before`."""
    low, high = 0, min(len(before), len(prompt))
    if before[:high] == prompt[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before[:middle] == prompt[:middle] else (low, middle)
    return low


Exact = tuple[list[int], list[int], list[float]]
"""Prompt ids, sampled ids and log-probabilities of a call."""

TOKEN_COLUMNS = "id, prompt_base_id, prompt_shared, prompt_ids, sampled_ids, logprobs"
"""What `next_tokens` takes of a row of `calls`."""


def next_tokens(told: dict[int, list[int]], row: Sequence[Any]) -> Exact | None:
    """The tokens of a call, or None if they were not all given, or pruned since.

    Args:
        told: prompt and sampled ids of the calls of the same episode before this one, by row; this one's are added.
        row: `TOKEN_COLUMNS`.
    """
    call_id, base, shared, suffix, sampled, logprobs = row
    if suffix is None or sampled is None or logprobs is None or (base is not None and base not in told):
        return None
    prompt = unpack_ids(suffix) if base is None else told[base][:shared] + unpack_ids(suffix)
    drawn = unpack_ids(sampled)
    told[call_id] = prompt + drawn
    return prompt, drawn, unpack_floats(logprobs)


def read_tokens(conn: sqlite3.Connection, call_id: int) -> Exact | None:
    """The tokens of one call. To read those of many, see `next_tokens`."""
    calls: list[Any] = []
    at: int | None = call_id
    while at is not None:
        calls.append(conn.execute(f"SELECT {TOKEN_COLUMNS} FROM calls WHERE id = ?", (at,)).fetchone())
        at = calls[-1][1]
    told: dict[int, list[int]] = {}
    return [next_tokens(told, row) for row in reversed(calls)][-1]
