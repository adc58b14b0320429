"""Echoes: what the environment, a tool or the application said after the model, in the model's words.

In an episode that started from a bad note the model may say what the note says, and be answered with it: `you said ...`, a tool that
keeps what it is handed, the next task made from the last answer. An echo is a text that has, from the beginning of a word, `QUOTED`
characters on end in common with what the model said before it, or a word like a name in a computer (a digit or a sign in it, or all
capitals, and `NAMED` characters long), where the model did not have them from this episode's task, observations and results. Case and white
space do not count. What is shorter, or said in other words, is not recognised.

Nothing here writes.
"""

from __future__ import annotations

import json
import re
import sqlite3
import string
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from cod_agent.memory.descent import Descent, Place

QUOTED = 20
_WORD = re.compile(r"\b\w")
NAMED = 8
_LIKE_A_NAME = re.compile(r"[\d@/_]|[A-Z\d-]{8}")
_AROUND = string.punctuation + "‘’“”«»…"


@dataclass(slots=True)
class Echoes:
    """Rows that repeat what was said in a descent."""

    effects: set[int] = field(default_factory=set)
    feedback: set[int] = field(default_factory=set)
    """Rows of tasks."""
    places: set[Place] = field(default_factory=set)
    """Tasks that were made from what was said."""


def echoes(conn: sqlite3.Connection, descent: Descent) -> Echoes:
    """What was answered to the solve episodes of a descent that repeats them."""
    found, said = Echoes(), set[str]()
    runs = {run for run, _ in descent.places}
    for episode, run_id, position, task_id, body, feedback in conn.execute(_SOLVES):
        place, marked = (run_id, position), episode in descent.episodes
        task = marks(json.loads(body)) if body and (marked or run_id in runs) else set[str]()
        if place not in descent.places and task & said:
            found.places.add(place)
        if not marked:
            continue
        heard = task
        for effect, words, answer in list(_turns(conn, episode)):
            said |= marks(words) - heard
            shown = marks(answer)
            if shown & said:
                found.effects.add(effect)
            heard |= shown
        said |= marks(_answers(conn, episode)) - heard
        if feedback and marks(json.loads(feedback)) & said:
            found.feedback.add(task_id)
    return found


_SOLVES = """
SELECT e.id, e.run_id, e.position, t.id, t.body, t.feedback
FROM episodes e JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position WHERE e.kind = 'solve' ORDER BY e.id
"""


def _turns(conn: sqlite3.Connection, episode: int) -> Iterator[tuple[int, Any, Any]]:
    """(row, what the model said to take it, what came of it) of an episode's steps and tool calls."""
    query = "SELECT id, kind, arguments, result, snapshot FROM steps WHERE episode_id = ? ORDER BY id"
    for row_id, kind, arguments, result, snapshot in conn.execute(query, (episode,)):
        yield row_id, _json(arguments if kind != "observe" else None), [_json(result), _json(snapshot)]


def _answers(conn: sqlite3.Connection, episode: int) -> list[Any]:
    """Everything the model said in an episode, and the answer it came to."""
    query = "SELECT m.body FROM calls c JOIN messages m ON m.id = c.answer_id WHERE c.episode_id = ?"
    said = [_json(body) for (body,) in conn.execute(query, (episode,))]
    query = (
        "SELECT t.answer FROM episodes e JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position WHERE e.id = ?"
    )
    return [*said, *(answer for (answer,) in conn.execute(query, (episode,)))]


def _json(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError:
        return text


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def marks(value: Any) -> set[str]:
    """What the texts of a JSON value are recognised by."""
    found: set[str] = set()
    for text in texts(value):
        plain = " ".join(text.split())
        names = (word.strip(_AROUND) for word in plain.split(" "))
        found |= {name.casefold() for name in names if len(name) >= NAMED and _LIKE_A_NAME.search(name)}
        plain = plain.casefold()
        starts = (word.start() for word in _WORD.finditer(plain, 0, len(plain) - QUOTED + 1))
        found |= {plain[at : at + QUOTED] for at in starts}
    return found


def quotes(text: str, wanted: Collection[str]) -> bool:
    """Whether a text, or the texts in its JSON, has one of these in it; case and white space do not count."""
    plain = " ".join("\n".join([text, *texts(_json(text))]).casefold().split())
    return any(" ".join(one.casefold().split()) in plain for one in wanted)
