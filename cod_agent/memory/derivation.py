"""What is derived again after forgetting, as the file says it: which updates, in which order, starting from which version.

A plan stands in the commit that forgot, `derive` in its detail:

    {"run": "life/forget/1", "from": ["a", "life", 2], "updates": [["a", "life", 4], ["a", "life", 5]], "since": 7}

Update number i is made again at position i of the run that is named, which begins with the version it is derived from. When all are
made, the run that forgot adopts what came of it, and that commit says `derived`. Whatever the run learnt meanwhile, in versions after
`since`, is the plan of that commit. So a process that dies leaves a plan to go on with. Nothing here writes.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.memory import read, versions
from cod_agent.memory.descent import Descent, Place
from cod_agent.memory.runs import Run

PURPOSE = "forget"
"""What the settings of a run say that derives again: it is nobody's training set."""

Named = tuple[str, str, int]
"""Agent, run, and version or position."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Updates to be made again."""

    run: str
    """Name of the run that they are made in."""
    start: Named
    updates: tuple[Named, ...]
    since: int
    """The first version of the run that forgot that nothing forgotten is in."""
    clean: int | None = None
    """Row of the version that the run goes on from meanwhile; None: it does already."""

    def json(self) -> dict[str, Any]:
        return {"run": self.run, "from": self.start, "updates": self.updates, "since": self.since}


def plan_of(conn: sqlite3.Connection, run: Run, descent: Descent) -> Plan | None:
    """What a run has to derive again once `descent` is forgotten; None: its newest version is not of it, and no plan of before is."""
    newest, chain = versions.latest(conn, run.id).id, list[int]()
    at = newest
    while at in descent.contexts:
        chain.append(at)
        at = _parent(conn, at)
    before = pending(conn, run)
    left = tuple(one for one in before.updates if _id(conn, *one) not in descent.places) if before else ()
    if chain:
        made = (
            tuple(named(conn, place) for place in _updates(conn, [*chain, at], descent)) if _learns(conn, run) else ()
        )
        start, updates = _version(conn, at), (*made, *left)
        if before is not None and _row(conn, before.start) not in descent.contexts:
            start, updates = before.start, (*left, *made)
        return Plan(_name(conn, run), start, updates, _next(conn, run), at)
    if before is not None and left != before.updates:
        return Plan(_name(conn, run), before.start, left, before.since)
    return None


def further(conn: sqlite3.Connection, run: Run, plan: Plan) -> tuple[Named, ...]:
    """The updates a run made since it forgot, that its newest version comes from."""
    at: int | None = versions.latest(conn, run.id).id
    chain: list[int] = []
    while at is not None:
        chain.append(at)
        owner, version, parent = conn.execute(
            "SELECT run_id, version, parent_id FROM contexts WHERE id = ?", (at,)
        ).fetchone()
        at = parent if owner != run.id or version > plan.since else None
    return tuple(named(conn, place) for place in _updates(conn, chain, None))


def following(conn: sqlite3.Connection, run: Run, plan: Plan, version: int) -> Plan | None:
    """The plan after a plan: what `further` says, on top of a version of the run that the plan was carried out in."""
    left = further(conn, run, plan)
    return Plan(_name(conn, run), (run.agent, plan.run, version), left, _next(conn, run)) if left else None


def pending(conn: sqlite3.Connection, run: Run) -> Plan | None:
    """The newest plan of a run, unless it was carried out."""
    found: Plan | None = None
    for said in _details(conn, run.id):
        if found is not None and said.get("derived") == found.run:
            found = None
        if "derive" in said:
            found = _read(said["derive"])
    return found


def copies(conn: sqlite3.Connection, places: Iterable[Place]) -> frozenset[Place]:
    """These places, and those where their updates were made again, or which they are copies of."""
    same: list[tuple[Place, Place]] = []
    query = (
        "SELECT r.agent, json_extract(k.detail, '$.derive') FROM commits k JOIN runs r ON r.id = k.run_id "
        "WHERE k.what IN ('forgot', 'adopted') AND json_type(k.detail, '$.derive') IS NOT NULL"
    )
    for agent, derive in conn.execute(query).fetchall():
        plan = _read(json.loads(derive))
        pairs = ((_id(conn, agent, plan.run, number), _id(conn, *update)) for number, update in enumerate(plan.updates))
        same += [(copy, origin) for copy, origin in pairs if copy is not None and origin is not None]
    found = set(places)
    while more := {place for pair in same for place in pair if found.intersection(pair)} - found:
        found |= more
    return frozenset(found)


def named(conn: sqlite3.Connection, place: Place) -> Named:
    """A place by the names of its agent and run."""
    return (*conn.execute("SELECT agent, name FROM runs WHERE id = ?", (place[0],)).fetchone(), place[1])


def _updates(conn: sqlite3.Connection, chain: Sequence[int], descent: Descent | None) -> list[Place]:
    """The updates that a chain of versions comes from, and those that were refused or held back on the way and may fare better."""
    query = (
        "SELECT e.id, e.run_id, e.position, c.id, c.held <> '' AND c.decided = '' FROM episodes e "
        "LEFT JOIN contexts c ON c.episode_id = e.id WHERE e.kind = 'update' AND e.context_id = ?"
    )
    found: dict[int, Place] = {}
    for started in chain:
        for episode, run_id, position, wrote, undecided in conn.execute(query, (started,)):
            place, again = (run_id, position), wrote is None or undecided
            if descent is not None:
                again = again and episode in descent.episodes
            if (again or wrote in chain) and (descent is None or place not in descent.places):
                found[episode] = place
    return [found[episode] for episode in sorted(found)]


def _learns(conn: sqlite3.Connection, run: Run) -> bool:
    """Whether a run's versions are there to be gone on from, not to try or derive something."""
    settings = json.loads(conn.execute("SELECT settings FROM runs WHERE id = ?", (run.id,)).fetchone()[0])
    return not settings.get("purpose") and bool(settings.get("updates", True))


def _name(conn: sqlite3.Connection, run: Run) -> str:
    return f"{run.name}/forget/{1 + sum('derive' in said for said in _details(conn, run.id))}"


def _details(conn: sqlite3.Connection, run_id: int) -> list[dict[str, Any]]:
    """What the commits say that forgot or adopted, in order."""
    query = "SELECT detail FROM commits WHERE run_id = ? AND what IN ('forgot', 'adopted') ORDER BY seq"
    return [json.loads(detail) for (detail,) in conn.execute(query, (run_id,)).fetchall()]


def _read(said: dict[str, Any]) -> Plan:
    agent, run, version = said["from"]
    updates = tuple((agent, run, position) for agent, run, position in said["updates"])
    return Plan(said["run"], (agent, run, version), updates, said["since"])


def _next(conn: sqlite3.Connection, run: Run) -> int:
    """The number of the next version."""
    return int(conn.execute("SELECT max(version) + 1 FROM contexts WHERE run_id = ?", (run.id,)).fetchone()[0])


def _parent(conn: sqlite3.Connection, context_id: int) -> int:
    return int(conn.execute("SELECT parent_id FROM contexts WHERE id = ?", (context_id,)).fetchone()[0])


def _version(conn: sqlite3.Connection, context_id: int) -> Named:
    query = "SELECT r.agent, r.name, c.version FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?"
    agent, run, version = conn.execute(query, (context_id,)).fetchone()
    return agent, run, version


def _row(conn: sqlite3.Connection, version: Named) -> int:
    return read.version_id(conn, *version)


def _id(conn: sqlite3.Connection, agent: str, run: str, position: int) -> Place | None:
    query = (
        "SELECT t.run_id, t.position FROM tasks t JOIN runs r ON r.id = t.run_id "
        "WHERE r.agent = ? AND r.name = ? AND t.position = ?"
    )
    row = conn.execute(query, (agent, run, position)).fetchone()
    return None if row is None else (row[0], row[1])
