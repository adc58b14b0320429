"""The history of contexts, for people: which runs a file has, what each task made of the context, every version.

Nothing here writes.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass
from typing import Any

from cod_agent.errors import UnknownName
from cod_agent.memory import gone, read


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run at a glance."""

    id: int
    agent: str
    name: str
    tasks: int
    mean: float | None
    """Mean of the rewards that are known."""
    versions: int
    """Versions written, without the empty one it began with."""
    newest: str
    purpose: str = ""
    """What it was lived for, if not to live and learn: to try a version, or to learn again what remained."""

    def json(self) -> dict[str, Any]:
        said = asdict(self)
        del said["id"]
        return said


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a context."""

    version: int
    body: str
    hash: str
    weights: str
    """Which weights wrote it."""
    position: int | None
    """The task after which it was written; None for the one the run began with."""
    parent: int | None
    sources: list[dict[str, Any]]
    """Where its text came from: the origins its update read, and the version it was made from."""
    held: str = ""
    """Why no task may be solved with it before somebody decides; "" if it was in force at once."""
    decided: str = ""
    """Of one that was held back: adopted, refused, or "" while nobody decided."""
    gone: str = ""
    """Why its text is gone: forgotten or pruned; "" if it is there."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Step:
    """What one task made of the context."""

    position: int
    task: str
    reward: float | None
    update: str
    """written, held, kept, or none."""
    reason: str
    """Why an update was refused or held back."""
    version: int
    """The version it wrote, or else the one that stayed in force."""
    hash: str
    weights: str
    body: str
    gone: str = ""
    """Why that version's text is gone: forgotten or pruned; "" if it is there."""

    def json(self) -> dict[str, Any]:
        return asdict(self)


def find(conn: sqlite3.Connection, agent: str | None = None, run: str | None = None) -> list[RunSummary]:
    """The runs of an agent, oldest first; without an agent those of all.

    Raises:
        UnknownName: the file knows no such agent, or no run of that name.
    """
    agents = [row[0] for row in conn.execute("SELECT DISTINCT agent FROM runs")]
    if agent is not None and agent not in agents:
        raise UnknownName.among("agent", agent, agents)
    found = [
        RunSummary(*row)
        for row in conn.execute(
            "SELECT r.id, r.agent, r.name, (SELECT count(*) FROM tasks t WHERE t.run_id = r.id),"
            " (SELECT avg(t.reward) FROM tasks t WHERE t.run_id = r.id),"
            " (SELECT count(*) - 1 FROM contexts c WHERE c.run_id = r.id),"
            " (SELECT coalesce(c.body, '') FROM contexts c WHERE c.run_id = r.id AND c.held = '' ORDER BY c.version DESC LIMIT 1),"
            " coalesce(json_extract(r.settings, '$.purpose'), '')"
            " FROM runs r WHERE ? IS NULL OR r.agent = ? ORDER BY r.id",
            (agent, agent),
        )
    ]
    if run is None:
        return found
    named = [one for one in found if one.name == run]
    if not named:
        raise UnknownName.among("run", run, [one.name for one in found][-20:])
    return named


def meant(found: list[RunSummary]) -> list[RunSummary]:
    """Those of `find` that somebody may mean who names no run: one that was lived for a purpose is meant only where there is no other."""
    return [one for one in found if not one.purpose] or found


def steps(conn: sqlite3.Connection, run: RunSummary) -> list[Step]:
    """Every task of a run, in order, with the context after it."""
    numbers = "SELECT version FROM contexts WHERE run_id = ? ORDER BY version"
    versions = [version(conn, run, number) for (number,) in conn.execute(numbers, (run.id,)).fetchall()]
    rows = conn.execute(
        "SELECT t.position, t.name, t.reward, coalesce(u.version, c.version), coalesce(e.state, ''), coalesce(e.reason, '') FROM tasks t "
        "JOIN episodes s ON s.run_id = t.run_id AND s.position = t.position AND s.kind = 'solve' "
        "JOIN contexts c ON c.id = s.context_id "
        "LEFT JOIN episodes e ON e.run_id = t.run_id AND e.position = t.position AND e.kind = 'update' "
        "LEFT JOIN contexts u ON u.id = e.context_id WHERE t.run_id = ? ORDER BY t.position",
        (run.id,),
    ).fetchall()
    numbered = {one.version: one for one in versions}
    written = {one.position: one for one in versions if one.position is not None}
    out = []
    for position, task, reward, stayed, update, reason in rows:
        wrote = written.get(position)
        now = wrote or numbered[stayed]
        what = ("held" if wrote.held else "written") if wrote else "kept" if update == "refused" else "none"
        reason = wrote.held if wrote else reason
        weights = wrote.weights if wrote else ""
        out.append(Step(position, task, reward, what, reason, now.version, now.hash, weights, now.body, now.gone))
    return out


def version(conn: sqlite3.Connection, run: RunSummary, number: int | None = None) -> Version:
    """One version of a run's context, the newest in force if no number is given.

    Raises:
        UnknownName: it has no such version.
    """
    which = "c.held = ''" if number is None else "c.version = ?2"
    row = conn.execute(
        "SELECT c.id, c.version, c.body, c.hash, c.weights, e.position, p.version, c.sources, c.held, c.decided FROM contexts c "
        "LEFT JOIN episodes e ON e.id = c.episode_id LEFT JOIN contexts p ON p.id = c.parent_id "
        f"WHERE c.run_id = ?1 AND {which} ORDER BY c.version DESC LIMIT 1",
        (run.id,) if number is None else (run.id, number),
    ).fetchone()
    if row is None:
        raise read.unknown_version(conn, run.id, number)
    row_id, number, body, hashed, weights, position, parent, sources, held, decided = row
    lost = gone.word(conn, row_id, "context") if body is None else ""
    return Version(number, body or "", hashed, weights, position, parent, json.loads(sources), held, decided, lost)
