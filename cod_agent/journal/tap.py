"""The tap: every text that is sent or stored passes here first. This is where redaction goes.

Model, record and solver see the same cleaned text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cod_agent.context import Message, Part, WireMessage
from cod_agent.memory.hashing import compact

Redact = Callable[[str], str]
Said = Message | WireMessage | dict[str, Any]
"""A message of a call: ours, written once, or as it goes over the wire."""


@dataclass(frozen=True, slots=True)
class Tap:
    """Cleans what passes."""

    redact: Redact | None = None

    def text(self, text: str) -> str:
        """`text` as it may be sent and stored: redacted, and encodable (a lone surrogate is no text)."""
        if self.redact is not None:
            text = self.redact(text)
        return text if text.isascii() else text.encode("utf-8", "replace").decode()

    def value(self, value: Any) -> Any:
        """`text` for every text inside a JSON value."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(k)): self.value(v) for k, v in value.items()}
        return [self.value(v) for v in value] if isinstance(value, list | tuple) else value

    def ours(self, message: Message) -> Message:
        """A message of ours with its texts cleaned."""
        return Message(message.role, tuple(Part(part.origin, self.text(part.text)) for part in message.parts))

    def message(self, message: Said) -> Said:
        """Any message with its texts cleaned."""
        if isinstance(message, Message):
            return self.ours(message)
        if self.redact is None:
            return message
        if isinstance(message, WireMessage):
            return WireMessage(compact(self.value(json.loads(message.body))), message.spans)
        return {name: self.value(value) for name, value in message.items()}
