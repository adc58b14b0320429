"""What is descended from a task: the version its update wrote, every version made from that, every episode that saw one of them.

    bad task ──> its update ──> version ──> later versions, in every run      (contexts.parent_id, contexts.episode_id)
                                   └─────> episodes that started from one     (episodes.context_id)
                                                └──> an update over such an episode, wherever it started itself

A version that was given (`CoDAgent(given=...)`) has no lineage: it counts if it came to the run after the task did, or if its
lines are those of a version that counts, in whatever order. Nothing here writes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

from cod_agent.errors import UnknownName

Place = tuple[int, int]
"""(row of the run, position)."""


@dataclass(frozen=True, slots=True)
class Descent:
    """Rows that a task left its mark on."""

    places: frozenset[Place]
    """The task itself, wherever it was lived."""
    contexts: frozenset[int]
    episodes: frozenset[int]
    """The task's own, and those that started from one of `contexts` or read such an episode."""


def places_of(conn: sqlite3.Connection, task: str, agent: str | None = None, run: str | None = None) -> list[Place]:
    """Wherever a task of that id was lived.

    Raises:
        UnknownName: nowhere.
    """
    where = "FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.agent = coalesce(?, r.agent) AND r.name = coalesce(?, r.name)"
    found = conn.execute(f"SELECT t.run_id, t.position {where} AND t.name = ? ORDER BY t.id", (agent, run, task))
    places = [(run_id, position) for run_id, position in found]
    if not places:
        few = conn.execute(f"SELECT DISTINCT t.name {where} LIMIT 200", (agent, run))
        raise UnknownName.among("task", task, [name for (name,) in few][-20:])
    return places


def descended(conn: sqlite3.Connection, places: Iterable[Place], versions: Iterable[int] = ()) -> Descent:
    """Everything descended from the tasks at these places, in one pass over the file's versions and episodes.

    Args:
        versions: rows of contexts that count whatever they come from.
    """
    return _Walk(conn, frozenset(places), frozenset(versions)).walk()


class _Walk:
    def __init__(self, conn: sqlite3.Connection, places: frozenset[Place], versions: frozenset[int]) -> None:
        self._conn, self._places, self._versions = conn, places, versions
        self._contexts: set[int] = set()
        self._lines: set[tuple[str, ...]] = set()
        """Of the versions found so far, each one's in order of the alphabet."""
        rows = conn.execute("SELECT id, run_id, position, kind, context_id FROM episodes ORDER BY id").fetchall()
        self._episodes = {row[0]: row[1:] for row in rows}
        self._solves = {(run_id, at): row_id for row_id, run_id, at, kind, _ in rows if kind == "solve"}

    def walk(self) -> Descent:
        began = {
            run_id: self._episodes[self._solves[run_id, at]][3] for run_id, at in sorted(self._places, reverse=True)
        }
        # A version comes after its parent, and after the one its update started from.
        query = "SELECT id, run_id, parent_id, episode_id, body, sources FROM contexts ORDER BY id"
        for row_id, run_id, parent, episode, body, sources in self._conn.execute(query):
            given = sources.startswith('[{"given":')
            if given:
                found = row_id > began.get(run_id, row_id) or (bool(body) and _sorted(body) in self._lines)
            else:
                found = parent in self._contexts or (episode is not None and self._touched(episode))
            if found or row_id in self._versions:
                self._contexts.add(row_id)
                self._lines |= {lines} if (lines := _sorted(body or "")) else set()
        episodes = frozenset(row_id for row_id in self._episodes if self._touched(row_id))
        return Descent(self._places, frozenset(self._contexts), episodes)

    def _touched(self, episode: int) -> bool:
        run_id, position, kind, context_id = self._episodes[episode]
        if (run_id, position) in self._places or context_id in self._contexts:
            return True
        return bool(kind == "update") and self._touched(self._solves[run_id, position])


def _sorted(body: str) -> tuple[str, ...]:
    return tuple(sorted(line.strip() for line in body.splitlines() if line.strip()))
