"""The hashes of the record: what is hashed, in which form. `cod verify` recomputes every one of them.

Everything is SHA-256 over canonical JSON (sorted keys, no spaces, UTF-8) or over bytes; rows are named by its first half.
Chains run over hashes, not over
content, so that content can be pruned and leave a tombstone that still verifies.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

# Made once: json.dumps makes a new encoder at each call that asks for anything but its defaults.
canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode
"""The one JSON text of a value."""

compact = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
"""JSON without spaces, keys in their own order: how requests are written and messages stored."""


def content_hash(content: bytes) -> bytes:
    """The first 128 bits of SHA-256: how rows name content. There are millions of them, and chains run over whole hashes."""
    return hashlib.sha256(content).digest()[:16]


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def value_hash(value: Any) -> str:
    return text_hash(canonical(value))


def node_hash(parent: bytes, body: str, labels: str) -> bytes:
    """A message's hash: of the conversation up to it, of itself, and of where its text came from."""
    return content_hash(b"\0".join((parent, labels.encode(), body.encode("utf-8", "surrogatepass"))))


def head_hash(body: str) -> bytes:
    """A request's head: everything but the messages."""
    return content_hash(body.encode("utf-8", "surrogatepass"))


def request_hash(head: bytes, leaf: bytes) -> bytes:
    """A call's request: its head (everything but the messages) and the last message's node."""
    return content_hash(head + leaf)


def call_hash(
    key: bytes,
    occurrence: int,
    answer: bytes,
    said: dict[str, Any],
    tokens: tuple[Sequence[int], Sequence[int], bytes] | None,
) -> bytes:
    """A call's content: its key, its answer's node, what was said beside it, its exact tokens.

    Args:
        said: style, finish_reason, weights, inexact, on_policy and usage, as the columns have them.
        tokens: prompt ids, sampled ids, and the log-probabilities as stored: what is hashed must be what can be read back.
    """
    exact = tokens and [value_hash(list(tokens[0])), value_hash(list(tokens[1])), tokens[2].hex()]
    return _value([key.hex(), occurrence, answer.hex(), said, exact])


def effect_key(kind: str, name: str, arguments: Any) -> bytes:
    """A tool's call or a step: what was asked for."""
    return _value([kind, name, arguments])


def effect_hash(key: bytes, occurrence: int, result: str, snapshot: str | None) -> bytes:
    """A tool's call or a step with what came of it."""
    return _value([key.hex(), occurrence, result, snapshot])


def checksum(text: str) -> int:
    """Of what a server said beside the answer (its ids and times): guarded against damage, but no part of any chain."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


def _value(value: Any) -> bytes:
    return content_hash(canonical(value).encode("utf-8", "surrogatepass"))


def digest(hashes: Iterable[bytes]) -> str:
    """An episode's digest: of the hashes of its calls and effects, whatever order parallel ones finished in."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def chain(previous: str, entry: str) -> str:
    """The next link of a run's chain of commits."""
    return text_hash(previous + entry)
