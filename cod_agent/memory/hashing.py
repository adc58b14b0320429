"""The hashes of the record: what is hashed, in which form. `cod verify` recomputes every one of them.

Everything is SHA-256 over canonical JSON (sorted keys, no spaces, UTF-8) or over bytes. Chains run over hashes, not over
content, so that content can be pruned and leave a tombstone that still verifies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any


def canonical(value: Any) -> str:
    """The one JSON text of a value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def compact(value: Any) -> str:
    """JSON without spaces, keys in their own order: how requests are written and messages stored."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def value_hash(value: Any) -> str:
    return text_hash(canonical(value))


def node_hash(parent: bytes, body: str) -> bytes:
    """A message's hash: of the conversation up to it and itself."""
    return hashlib.sha256(parent + body.encode("utf-8", "surrogatepass")).digest()


def request_hash(head: bytes, leaf: bytes) -> bytes:
    """A call's request: its head (everything but the messages) and the last message's node."""
    return hashlib.sha256(head + leaf).digest()


def digest(hashes: Iterable[bytes]) -> str:
    """An episode's digest: of the hashes of its calls and effects, whatever order parallel ones finished in."""
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def chain(previous: str, entry: str) -> str:
    """The next link of a run's chain of commits."""
    return text_hash(previous + entry)
