"""Questions about a run, asked of the file: outcomes, trajectories, versions. Nothing here writes."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from cod_agent.context import Trajectory, Turn
from cod_agent.errors import UnknownName
from cod_agent.memory import gone, runs, versions
from cod_agent.memory.observations import unpack_observation
from cod_agent.memory.runs import Lived, Run
from cod_agent.tasks import Observation, Outcome, UpdateStatus


def position(conn: sqlite3.Connection, run: Run, at: int) -> Lived:
    """Raises: UnknownName."""
    known = runs.lived(conn, run.id, at)
    if known is None:
        raise UnknownName(
            f"run {run.name!r} of agent {run.agent!r} has no position {at}: it has lived {runs.next_position(conn, run.id)}"
        )
    return known


def in_state(conn: sqlite3.Connection, run: Run, state: str) -> list[Lived]:
    """The positions of a run that stand in a state with something to do ("open", "judged"), in order."""
    rows = conn.execute(
        # Said twice, for the index over the few tasks that something is to be done with: a long run has thousands of others.
        "SELECT position FROM tasks WHERE run_id = ? AND state = ? AND state IN ('open', 'judged') ORDER BY position",
        (run.id, state),
    ).fetchall()
    return [position(conn, run, row[0]) for row in rows]


def due(conn: sqlite3.Connection, run: Run) -> list[Lived]:
    """The positions whose update is due; one that was begun before comes first, because it has its starting version already."""
    rows = conn.execute(
        "SELECT t.position FROM tasks t LEFT JOIN episodes e ON e.run_id = t.run_id AND e.position = t.position AND e.kind = 'update'"
        " WHERE t.run_id = ? AND t.state = 'judged' AND t.state IN ('open', 'judged') ORDER BY e.id IS NULL, t.position",
        (run.id,),
    ).fetchall()
    return [position(conn, run, row[0]) for row in rows]


def newest_body(conn: sqlite3.Connection, agent: str, run: str | None) -> str:
    """The newest version in force of a run, or of all of an agent's runs."""
    of = "SELECT c.body FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.held = '' AND r.agent = ?1"
    newest = "ORDER BY c.id DESC LIMIT 1" if run is None else "AND r.name = ?2 ORDER BY c.version DESC LIMIT 1"
    row = conn.execute(f"{of} {newest}", (agent, run) if run is not None else (agent,)).fetchone()
    return (row[0] or "") if row else ""


def version_id(conn: sqlite3.Connection, agent: str, run: str, version: int) -> int:
    """Row id of a context version. Raises: UnknownName."""
    found = runs.find_run(conn, agent, run)
    row = conn.execute("SELECT id FROM contexts WHERE run_id = ? AND version = ?", (found.id, version)).fetchone()
    if row is None:
        raise unknown_version(conn, found.id, version)
    return int(row[0])


def unknown_version(conn: sqlite3.Connection, run_id: int, version: int | None) -> UnknownName:
    """The error that a run has no such version, which says what it has."""
    agent, run, newest = conn.execute(
        "SELECT r.agent, r.name, max(c.version) FROM runs r JOIN contexts c ON c.run_id = r.id WHERE r.id = ?",
        (run_id,),
    ).fetchone()
    return UnknownName(f"run {run!r} of agent {agent!r} has no context version {version}: it has 0 to {newest}")


def carried(conn: sqlite3.Connection, run: Run, at: int) -> Any:
    """What the environment remembers at a position: what the last task before it that came to its end left behind; None: nothing."""
    rows = conn.execute(
        "SELECT x.result FROM episodes e JOIN effects x ON x.episode_id = e.id WHERE e.run_id = ? AND e.position < ? "
        "AND e.kind = 'solve' AND x.kind IN ('observe', 'act') AND x.result IS NOT NULL ORDER BY e.position DESC, x.id DESC",
        (run.id, at),
    )
    seen = (unpack_observation(json.loads(result)) for (result,) in rows)
    return next((last.carried for last in seen if last.done), None)


def trajectory(conn: sqlite3.Connection, episode_id: int, known: Lived) -> Trajectory:
    """What a solve episode said and saw, from its record. Where a text is gone, a word in brackets says why."""
    first: Observation | None = None
    turns: list[Turn] = []
    for kind, name, arguments, said in steps(conn, episode_id):
        if kind == "tool":
            shown = said.get("value", said.get("error")) if isinstance(said, dict) else said[-1]
            text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
            turns.append(Turn(f"Called {name} with {arguments}", Observation(text), "tool"))
            continue
        seen = unpack_observation(said)
        if kind == "observe":
            first = seen
        else:
            turns.append(Turn(f"Answer: {json.loads(arguments)}", seen))
    if first is None:
        turns.append(Turn(f"Answer: {known.answer}", Observation("")))
    return Trajectory(first, tuple(turns))


def steps(conn: sqlite3.Connection, episode_id: int) -> list[tuple[str, str, str, Any]]:
    """(kind, name, arguments as JSON, result) of the steps and tool calls of an episode. Where one is gone, a word says why."""
    rows = conn.execute(
        "SELECT id, call_id, kind, name, arguments, result FROM steps WHERE episode_id = ? ORDER BY id", (episode_id,)
    ).fetchall()
    found = []
    for row_id, call_id, kind, name, arguments, result in rows:
        word = _lost(conn, row_id, call_id) if None in (arguments, result) else ""
        said = (
            ({"value": word} if kind == "tool" else [word, "", False, None]) if result is None else json.loads(result)
        )
        found.append((kind, name, json.dumps(word) if arguments is None else arguments, said))
    return found


def _lost(conn: sqlite3.Connection, effect: int, call: int | None) -> str:
    word = gone.word(conn, effect, "effect", "asked") or (gone.word(conn, call, "call") if call else "")
    return f"({word or 'gone'})"


def outcome(conn: sqlite3.Connection, run: Run, at: int) -> Outcome:
    """What came of a position so far."""
    known = position(conn, run, at)
    after, held, refused = int(known.context_id or 0), "", ""
    update: UpdateStatus = "none"
    if known.state == "updated":
        began, refused, wrote, held = conn.execute(
            "SELECT e.context_id, CASE e.state WHEN 'refused' THEN e.reason ELSE '' END, c.id, coalesce(c.held, '')"
            " FROM episodes e LEFT JOIN contexts c ON c.episode_id = e.id"
            " WHERE e.run_id = ? AND e.position = ? AND e.kind = 'update'",
            (run.id, at),
        ).fetchone()
        update = "kept" if wrote is None else "held" if held else "written"
        # Feedback may come late: what the update began with, and left in force, is newer than what the task was solved with.
        after = wrote if update == "written" else began
    context = versions.get(conn, after)
    calls = conn.execute(
        "SELECT count(*) FROM calls c JOIN episodes e ON e.id = c.episode_id WHERE e.run_id = ? AND e.position = ?",
        (run.id, at),
    ).fetchone()[0]
    return Outcome(
        run=run.name,
        position=at,
        task=known.task,
        answer=known.answer,
        reward=known.feedback.reward if known.feedback else None,
        feedback=known.feedback,
        context=context.body,
        version=context.version,
        update=update,
        reason=refused or held or known.reason,
        calls=calls,
    )
