"""The tap: every text that is sent or stored passes here first. This is where redaction goes.

Model, record and solver see the same cleaned text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from cod_agent.context import Message, Part, WireMessage
from cod_agent.memory.hashing import canonical, compact
from cod_agent.secrets import MARK, SHORTEST, Secrets

_NUMBER = 10 ** (SHORTEST - 1)
"""The least that is written with as many digits as a secret has."""

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
        """`text` for every text inside a JSON value; a number that is a secret becomes a text."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(k)): self.value(v) for k, v in value.items()}
        if type(value) is int and abs(value) >= _NUMBER and isinstance(self.redact, Secrets):
            said = self.redact(str(value))
            return value if said == str(value) else said
        return [self.value(v) for v in value] if isinstance(value, list | tuple) else value

    def ours(self, message: Message) -> Message:
        """A message of ours with its texts cleaned; the very same if there was nothing to clean."""
        texts = [self.text(part.text) for part in message.parts]
        if all(text == part.text for text, part in zip(texts, message.parts, strict=True)):
            return message
        return Message(message.role, tuple(Part(p.origin, text) for p, text in zip(message.parts, texts, strict=True)))

    def message(self, message: Said) -> Said:
        """Any message with its texts cleaned."""
        if isinstance(message, Message):
            return self.ours(message)
        if self.redact is None:
            return message
        if isinstance(message, WireMessage):
            body = self.written(message.body)
            return message if body is message.body else WireMessage(body, _fitted(message.spans, len(body)))
        return {name: self.value(value) for name, value in message.items()}

    def written(self, body: str) -> str:
        """A JSON text with the texts in it redacted; the very same if there was nothing to redact."""
        if not self.suspects(body):
            return body
        value = json.loads(body)
        cleaned = self.value(value)
        return body if cleaned == value else compact(cleaned)

    def suspects(self, body: str) -> bool:
        """Whether something in a JSON text may have to be redacted."""
        return self.redact.suspects(body) if isinstance(self.redact, Secrets) else self.redact is not None

    def shows(self, body: str) -> bool:
        """Whether a cleaned text has the placeholder of a secret in it: the model is asked about what it cannot see."""
        return isinstance(self.redact, Secrets) and MARK in body

    # ---- tools ----

    @property
    def names(self) -> Collection[str]:
        """Of the secrets that tools may ask for."""
        return self.redact.names if isinstance(self.redact, Secrets) else ()

    def resolve(self, value: Any, names: Collection[str]) -> Any:
        """A tool's argument with the placeholders of the secrets that it may have replaced by their values."""
        return self.redact.resolve(value, names) if names and isinstance(self.redact, Secrets) else value


def _fitted(spans: str, length: int) -> str:
    """A written message's labels for its text of another length: the last one takes the difference."""
    *before, (_, origin) = json.loads(spans)
    return canonical([*before, [max(0, length - sum(size for size, _ in before)), origin]])
