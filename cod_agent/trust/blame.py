"""Blame: which task each line of a context came from, and whose words it quotes.

An update's lines are held against those of the version it was made from: a line that was there keeps what is known of it, wherever it
stands now; any other is the update's own, and where it quotes what the update read (`QUOTED` characters on end), its origin is that of
the quoted text, not the model. What comes of it is kept with the version in `contexts.sources`, run-length encoded, because the versions
before it may be pruned or forgotten:

    {"position": 5, "version": 4, "origins": [...], "lines": [[2, 3, "model"], [1, 5, "environment"], [1, 0, "model", "lake", "a-run"]]}

says: two lines of task 3's update, one of task 5's own that quotes the environment, and one that came through a fork or an adoption
from task 0 of run a-run of agent lake. A version without `lines` (an adopted one, the first of a fork, one of an older file) is derived by
walking its parents.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from cod_agent.context import Message, Origin

QUOTED = 20
"""Characters on end, in the words of somebody else, that make a line a quotation."""

_OTHERS: tuple[Origin, ...] = ("tool", "environment", "application")
"""Whose words a line may quote, the least trusted first."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a context."""

    text: str
    position: int | None
    """The task after which it was written; None for text that was given from outside, or whose version is gone."""
    origin: Origin
    """Whose words it is: of the model, or of the environment, a tool or the application where it quotes them."""
    run: tuple[str, str] | None = None
    """Agent and run it was written in, if that is not the run of the version."""
    new: bool = False
    """Whether the update of this very version wrote it."""

    def json(self) -> dict[str, Any]:
        said = {"text": self.text, "position": self.position, "origin": self.origin, "new": self.new}
        return {**said, "agent": self.run[0], "run": self.run[1]} if self.run else said


def read_by(messages: Sequence[Message]) -> dict[Origin, str]:
    """What an update reads in the words of others, by origin: text to hold its lines against."""
    read: dict[Origin, list[str]] = defaultdict(list)
    for said in messages:
        for part in said.parts:
            if part.origin in _OTHERS:
                read[part.origin].append(part.text)
    return {origin: "\n".join(texts) for origin, texts in read.items()}


def follow(before: Iterable[Line], body: str, position: int | None, read: Mapping[Origin, str]) -> tuple[Line, ...]:
    """The lines of a context that an update made from another.

    Args:
        before: lines of the version it was made from.
        position: of the update's task.
        read: what it read, as `read_by` gives it.
    """
    known: dict[str, deque[Line]] = defaultdict(deque)
    for line in before:
        known[_key(line.text)].append(line)
    others = {origin: _spaced(read[origin]) for origin in _OTHERS if origin in read}
    made = []
    for text in body.splitlines():
        kept = known.get(_key(text))
        if kept:
            made.append(replace(kept.popleft(), text=text, new=False))
        else:
            made.append(Line(text, position, _origin(text, others), new=True))
    return tuple(made)


def quoted(text: str, others: str, least: int = QUOTED) -> str:
    """The first words of `text`, `least` characters or more, that stand in `others`, which has single spaces; "" if none do."""
    said = _spaced(text)
    starts = (found.start() for found in re.finditer(r"\S+", said))
    return next(
        (said[at : at + least] for at in starts if len(said) >= at + least and said[at : at + least] in others), ""
    )


def _origin(text: str, others: Mapping[Origin, str]) -> Origin:
    return next((origin for origin, said in others.items() if quoted(text, said)), "model")


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _key(text: str) -> str:
    """What makes two lines the same: their words."""
    return _spaced(text)


def encode(lines: Iterable[Line]) -> list[list[Any]]:
    """Lines as `contexts.sources` keeps them: [count, position, origin], with agent and run where they are another's."""
    groups = groupby(lines, key=lambda line: (line.position, line.origin, *(line.run or ())))
    return [[len(list(group)), *key] for key, group in groups]


def blame(conn: sqlite3.Connection, context_id: int) -> tuple[Line, ...]:
    """The lines of a version (a row of `contexts`), none if its text was pruned or forgotten."""
    above: list[_Version] = []
    at: int | None = context_id
    while at is not None:
        above.append(_version(conn, at))
        at = None if above[-1].settled else above[-1].parent_id
    lines: tuple[Line, ...] = ()
    owner = above[-1].owner
    for version in reversed(above):
        if version.owner != owner:  # what came from another run is named, what came home is not
            lines = tuple(replace(line, run=_named(line.run or owner, version.owner)) for line in lines)
            owner = version.owner
        lines = version.lines(lines)
    return lines


def _named(run: tuple[str, str], owner: tuple[str, str]) -> tuple[str, str] | None:
    return None if run == owner else run


@dataclass(frozen=True, slots=True)
class _Version:
    body: str | None
    parent_id: int | None
    owner: tuple[str, str]
    position: int | None
    source: dict[str, Any]

    @property
    def settled(self) -> bool:
        """Whether its lines are known without its parent."""
        return "lines" in self.source or "given" in self.source or self.parent_id is None

    def lines(self, before: tuple[Line, ...]) -> tuple[Line, ...]:
        if self.body is None:
            return ()
        texts = self.body.splitlines()
        if "lines" in self.source:
            return tuple(_decoded(texts, self.source["lines"], self.position))
        if "given" in self.source:
            return tuple(Line(text, None, "application", new=True) for text in texts)
        if self.position is None:  # adopted, or the first of a fork: what it was made from, word for word
            return tuple(replace(line, new=False) for line in before) or tuple(
                Line(text, None, "context") for text in texts
            )
        return follow(before, self.body, self.position, {})


def _version(conn: sqlite3.Connection, context_id: int) -> _Version:
    body, parent_id, agent, run, position, sources = conn.execute(
        "SELECT c.body, c.parent_id, r.agent, r.name, e.position, c.sources FROM contexts c JOIN runs r ON r.id = c.run_id "
        "LEFT JOIN episodes e ON e.id = c.episode_id WHERE c.id = ?",
        (context_id,),
    ).fetchone()
    found = json.loads(sources)
    return _Version(body, parent_id, (agent, run), position, found[0] if found else {})


def _decoded(texts: Sequence[str], runs: Sequence[Sequence[Any]], position: int | None) -> Iterable[Line]:
    at = 0
    for count, wrote, origin, *named in runs:
        run = (named[0], named[1]) if named else None
        for text in texts[at : at + count]:
            yield Line(text, wrote, origin, run, new=run is None and wrote == position)
        at += count


__all__ = ["QUOTED", "Line", "blame", "encode", "follow", "quoted", "read_by"]
