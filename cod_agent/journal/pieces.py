"""What may be seen of an unfinished answer: all but what could be the beginning of a secret, which waits for what follows.

`Pieces` is for texts, `Events` for the streams that other programs read. Nothing that was shown is ever taken back: pieces are cut where
no secret can go across (`Secrets.settled`), so that together they are the redacted text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cod_agent.completions import OnDelta
from cod_agent.journal.answers import Answer, as_stream
from cod_agent.journal.tap import Redact
from cod_agent.secrets import Secrets

_Path = tuple[Any, ...]
_WHOLE = ("role", "type", "id", "name")
"""What does not come in pieces: nothing follows that would settle it."""


class Pieces:
    """A text that comes piece by piece. Under a redaction of one's own it is held to its end: who knows what that looks for."""

    def __init__(self, redact: Redact | None, tell: OnDelta) -> None:
        self._redact, self._tell, self._held = redact, tell, ""

    def add(self, piece: str) -> None:
        """Tell what may be told now."""
        if self._redact is None:
            self._tell(piece)
            return
        self._held += piece
        if isinstance(self._redact, Secrets) and (settled := self._redact.settled(self._held)):
            said, self._held = self._redact(self._held[:settled]), self._held[settled:]
            self._tell(said)

    def end(self) -> None:
        """Nothing follows: tell the rest."""
        if self._held and self._redact is not None:
            said, self._held = self._redact(self._held), ""
            self._tell(said)


class Events:
    """A stream of server-sent events as a program may read it before its end.

    Events pass as they came, each as soon as all its texts are settled. From the first one with a secret on none does: what is left of
    the answer is then said anew.
    """

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._broken = False
        self._left = b""
        """An event that has not come to its end."""
        self._waiting: list[tuple[bytes, dict[_Path, int]]] = []
        """Events, and how much of each text there is with them."""
        self._texts: dict[_Path, str] = {}
        self._settled: dict[_Path, int] = {}
        self._closed: set[_Path] = set()
        """Texts behind which another one has begun: a thought, where the answer follows. What is left of them has no secret in it."""
        self._shown: dict[_Path, int] = {}
        """Characters, by where the text stands in the choices."""

    def add(self, piece: bytes) -> bytes:
        """What may be passed on now."""
        *events, self._left = (self._left + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            self._read(event + b"\n\n")
        passed = b""
        while self._waiting and not self._broken:
            event, reached = self._waiting[0]
            if any(self._settled[path] < length and path not in self._closed for path, length in reached.items()):
                break
            self._shown |= reached
            passed += event
            del self._waiting[0]
        return passed

    def rest(self, answer: Answer) -> bytes:
        """What follows at the end; `answer`: the whole, redacted."""
        if not self._broken and all(map(self._clean_end, self._texts)):
            return b"".join(event for event, _ in self._waiting) + self._left
        choices = [
            {**choice, "message": self._unseen(choice["message"], (choice.get("index", 0),))}
            for choice in answer.body["choices"]
        ]
        return as_stream({**answer.body, "choices": choices})

    def _read(self, event: bytes) -> None:
        reached: dict[_Path, int] = {}
        said = event.decode("utf-8", "replace")
        self._broken = self._broken or self._secrets(said) != said  # in what is no part of a text
        for path, text in _texts_of(event):
            self._closed = {other for other in self._texts if other != path and self._clean_end(other)}
            whole = self._texts[path] = self._texts.get(path, "") + text
            reached[path] = len(whole)
            begin = self._settled.get(path, 0)
            end = self._settled[path] = begin + self._secrets.settled(whole[begin:])
            self._broken = self._broken or self._secrets(whole[begin:end]) != whole[begin:end]
        self._waiting.append((event, reached))

    def _clean_end(self, path: _Path) -> bool:
        tail = self._texts[path][self._settled[path] :]
        return self._secrets(tail) == tail

    def _unseen(self, said: Any, path: _Path) -> Any:
        if isinstance(said, str):
            return said[self._shown.get(path, 0) :]
        if isinstance(said, list):
            return [self._unseen(inner, (*path, at)) for at, inner in enumerate(said)]
        if isinstance(said, dict):
            left = {name: self._unseen(inner, (*path, name)) for name, inner in said.items()}
            return {name: inner for name, inner in left.items() if inner not in ("", {})}
        return said


def _texts_of(event: bytes) -> Iterator[tuple[_Path, str]]:
    """The texts that an event adds to, by where they stand in the choices."""
    for line in event.split(b"\n"):
        if line.startswith(b"data:"):
            try:
                choices = json.loads(line[5:])["choices"]
                for choice in choices:
                    yield from _leaves(choice.get("delta"), (choice.get("index", 0),))
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # no part of an answer: `read_answer` says so at the end, if it matters


def _leaves(said: Any, path: _Path) -> Iterator[tuple[_Path, str]]:
    if isinstance(said, str):
        if said and path[-1] not in _WHOLE:
            yield path, said
    elif isinstance(said, dict):
        for name, inner in said.items():
            yield from _leaves(inner, (*path, name))
    elif isinstance(said, list):
        for at, inner in enumerate(said):
            yield from _leaves(inner, (*path, inner.get("index", at) if isinstance(inner, dict) else at))
