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

    @property
    def body(self) -> bytes:
        return write_request(self.head, [node.body for node in self.nodes], self.style)


class Conversation:
    """The calls of one episode: each usually begins as the one before it, and that part is not worked on again."""

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._spoken: tuple[list[Said], list[Node]] = ([], [])

    def request(
        self, model: str, messages: Sequence[Said], params: dict[str, Any], origins: Sequence[str | None] = ()
    ) -> Request:
        """A call of our own.

        Args:
            messages: ours, or as they go over the wire: plain dictionaries are labelled by `origins` (canonical JSON of
                `cod_agent.context.labels`), or by their role where it has None.
        """
        said, nodes = self._spoken
        fresh: list[Node] = []
        parent, same = b"", True
        for at, message in enumerate(messages):
            same = same and at < len(said)
            if same and said[at] is message and not isinstance(message, dict):
                node = nodes[at]
            else:
                message = self._tap.message(message)
                body = _body(message)
                same = same and nodes[at].body == body
                node = nodes[at] if same else link(parent, body, _spans(message, body, origins[at : at + 1]))
            fresh.append(node)
            parent = node.hash
        self._spoken = (list(messages), fresh)
        params = params if self._tap.redact is None else self._tap.value(params)
        head = compact({"model": model, "messages": None, **params})
        digest = head_hash(head)
        return Request(head, digest, fresh, "own", {"model": model, **params}, request_hash(digest, parent))


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
    """The request with its texts redacted, or the very same if there was nothing to redact."""
    if tap.redact is None:
        return request
    if request.style in ("raw", "bytes"):
        head = tap.text(request.head)
        if head == request.head:
            return request
        digest = content_hash(write_request(head, [], request.style))
        return Request(head, digest, [], request.style, request.params, request_hash(digest, b""))
    body = json.loads(request.body)
    cleaned = tap.value(body)
    return request if cleaned == body else _build(cleaned, request.style)
