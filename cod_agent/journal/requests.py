"""A model call about to be made, in the parts it is stored in: a head and the nodes of a conversation.

Ours are put together from messages (`Conversation`), which costs nothing for those that were said before; somebody else's are
taken apart (`read_request`). Either way the stored parts give back the very bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.context import Message, WireMessage, labels
from cod_agent.journal.tap import Said, Tap
from cod_agent.memory.content import STYLES, Node, link, write_request
from cod_agent.memory.hashing import canonical, compact, content_hash, head_hash, request_hash


@dataclass(slots=True)
class Request:
    """A model call about to be made: its parts as they are stored, its bytes as they are sent."""

    head: str
    head_hash: bytes
    nodes: Sequence[Node]
    style: str
    params: dict[str, Any]
    """What stands beside the messages: the model's name, the sampling parameters, tools."""
    key: bytes
    occurrence: int = 0
    redacted: bool = False
    """Whether a secret was taken out of it, here or before."""

    @property
    def body(self) -> bytes:
        return write_request(self.head, [node.body for node in self.nodes], self.style)


class Conversation:
    """The calls of one episode: each usually begins as the one before it, and that part is not worked on again."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._spoken: tuple[list[Said], list[Node], list[bool]] = ([], [], [])

    def request(
        self, model: str, messages: Sequence[Said], params: dict[str, Any], origins: Sequence[str | None] = ()
    ) -> Request:
        """A call of our own.

        Args:
            messages: ours, or as they go over the wire: plain dictionaries are labelled by `origins` (canonical JSON of
                `cod_agent.context.labels`), or by their role where it has None.
        """
        said, nodes, secret = self._spoken
        fresh, redacted = list[Node](), list[bool]()
        parent, same = b"", True
        for at, message in enumerate(messages):
            same = same and at < len(said)
            if same and said[at] is message and not isinstance(message, dict):
                node = nodes[at]
                redacted.append(secret[at])
            else:
                cleaned = self._tap.message(message)
                body = _body(cleaned)
                same = same and nodes[at].body == body
                node = nodes[at] if same else link(parent, body, _spans(cleaned, body, origins[at : at + 1]))
                redacted.append(self._tap.redact is not None and (cleaned != message or self._tap.shows(body)))
            fresh.append(node)
            parent = node.hash
        self._spoken = (list(messages), fresh, redacted)
        written = compact({"model": model, "messages": None, **params})
        head = self._tap.written(written)
        if head is not written:
            params = {name: value for name, value in json.loads(head).items() if name != "messages"}
        digest = head_hash(head)
        hidden = any(redacted) or head is not written or self._tap.shows(head)
        key = request_hash(digest, parent)
        return Request(head, digest, fresh, "own", {"model": model, **params}, key, redacted=hidden)


def _body(message: Said) -> str:
    """A message's text as it is sent and stored."""
    if isinstance(message, WireMessage):
        return message.body
    return compact(message.wire() if isinstance(message, Message) else message)


def _spans(message: Said, body: str, origin: Sequence[str | None]) -> str:
    if isinstance(message, Message):
        return canonical(labels([message])[0])
    if isinstance(message, WireMessage):
        return message.spans
    return (origin[0] if origin else None) or canonical([[len(body), origin_by_role(message)]])


def origin_by_role(message: Any) -> str:
    """Where a message of somebody else's making came from, as far as its role tells."""
    role = message.get("role") if isinstance(message, dict) else None
    return {"assistant": "model", "tool": "tool"}.get(str(role), "application")


def read_request(raw: bytes) -> Request:
    """A chat request some program wrote, in the parts it is stored in."""
    params: dict[str, Any] = {}
    try:
        body = json.loads(raw)
        params = {k: v for k, v in body.items() if k != "messages"}
        style = next((name for name, write in STYLES.items() if write(body).encode() == raw), "")
        if style and isinstance(body["messages"], list):
            return _build(body, style)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # no JSON, no object, or text that cannot be stored: kept whole
    digest = content_hash(raw)
    try:
        return Request(raw.decode(), digest, [], "raw", params, request_hash(digest, b""))
    except UnicodeDecodeError:
        return Request(raw.decode("latin-1"), digest, [], "bytes", params, request_hash(digest, b""))


def _build(body: dict[str, Any], style: str) -> Request:
    nodes: list[Node] = []
    parent = b""
    for message in body["messages"]:
        text = compact(message)
        nodes.append(link(parent, text, canonical([[len(text), origin_by_role(message)]])))
        parent = nodes[-1].hash
    head = compact({**body, "messages": None})
    digest = head_hash(head)
    params = {k: v for k, v in body.items() if k != "messages"}
    return Request(head, digest, nodes, style, params, request_hash(digest, parent))


def clean_request(request: Request, tap: Tap) -> Request:
    """The request with its texts redacted, or the very same if there was nothing to redact; either way it says which."""
    parts = [request.head, *(node.body for node in request.nodes)]
    if request.style in ("raw", "bytes"):
        cleaned = _clean_raw(request, tap)
    elif any(tap.written(part) is not part for part in parts):
        cleaned = _build(tap.value(json.loads(request.body)), request.style)
    else:
        cleaned = request
    cleaned.redacted = cleaned is not request or any(map(tap.shows, parts))
    return cleaned


def _clean_raw(request: Request, tap: Tap) -> Request:
    """Of a body in a style of its own: rewritten if it is JSON, whatever the escapes a text hides behind."""
    head = tap.text(request.head)
    try:
        body = json.loads(request.head)
        cleaned = tap.value(body)
        if isinstance(body, dict) and isinstance(body.get("messages"), list):
            return request if cleaned == body else _build(cleaned, "compact")
    except (ValueError, RecursionError):
        pass  # no JSON: redacted as it stands
    if head == request.head:
        return request
    digest = content_hash(write_request(head, [], request.style))
    return Request(head, digest, [], request.style, tap.value(request.params), request_hash(digest, b""))
