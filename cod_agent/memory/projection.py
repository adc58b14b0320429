"""What a run database says, whichever way it came to say it: equal for a run that was killed and resumed and one that
was not.

Everything is named by what it is (agent, run, position, kind of episode, request, occurrence) and not by row ids;
token ids and requests are written out. Left out is what depends on the way there: failed attempts, leases, times,
row ids, and what a server says beside its answer (its own ids and times).
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from cod_agent.errors import VerificationFailed
from cod_agent.memory.content import conversation, read_tokens, rebuild_request
from cod_agent.memory.readonly import look

Entry = tuple[Any, ...]


def projection(path: str | Path) -> list[Entry]:
    """The entries of a file, sorted by what names them. The first element of each is its kind.

        assert projection("resumed.db") == projection("uninterrupted.db")

    Raises:
        UsageError, NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
        VerificationFailed: a part of it was pruned or forgotten, so that it does not say everything any more.
    """
    with look(path) as conn:
        if gone := conn.execute("SELECT count(*) FROM tombstones").fetchone()[0]:
            raise VerificationFailed(
                f"{path} does not say everything any more: {gone} parts were pruned or forgotten; compare copies of before that"
            )
        found: list[Entry] = []
        for run_id, agent, name in conn.execute("SELECT id, agent, name FROM runs ORDER BY agent, name").fetchall():
            found += _of_run(conn, run_id, (agent, name))
        return found


def _of_run(conn: sqlite3.Connection, run_id: int, named: tuple[str, str]) -> list[Entry]:
    said = conn.execute(
        "SELECT environment, pack, length, model, settings FROM runs WHERE id = ?", (run_id,)
    ).fetchone()
    found: list[Entry] = [("run", *named, *said)]
    found += [
        ("context", *named, *row)
        for row in conn.execute(
            "SELECT c.version, r.agent, r.name, p.version, e.position, c.body, c.hash, c.weights, c.sources, c.held, c.decided"
            " FROM contexts c"
            " LEFT JOIN contexts p ON p.id = c.parent_id LEFT JOIN runs r ON r.id = p.run_id"
            " LEFT JOIN episodes e ON e.id = c.episode_id WHERE c.run_id = ? ORDER BY c.version",
            (run_id,),
        )
    ]
    found += [
        ("task", *named, *row)
        for row in conn.execute(
            "SELECT position, name, fingerprint, body, state, answer, reward, feedback, reason FROM tasks"
            " WHERE run_id = ? ORDER BY position",
            (run_id,),
        )
    ]
    episodes = conn.execute(
        "SELECT e.id, e.position, e.kind, c.version, e.state, e.reason, e.digest FROM episodes e"
        " JOIN contexts c ON c.id = e.context_id WHERE e.run_id = ? ORDER BY e.position, e.kind",
        (run_id,),
    ).fetchall()
    for episode_id, position, kind, *rest in episodes:
        where = (*named, position, kind)
        found += [("episode", *where, *rest), *_calls(conn, episode_id, where), *_effects(conn, episode_id, where)]
    found += [
        ("commit", *named, *row)
        for row in conn.execute(
            "SELECT seq, what, position, detail, hash, chain FROM commits WHERE run_id = ? ORDER BY seq", (run_id,)
        )
    ]
    return found


def _calls(conn: sqlite3.Connection, episode_id: int, where: Entry) -> list[Entry]:
    rows = conn.execute(
        "SELECT id, request, occurrence, answer_id, style, finish_reason, model, weights, on_policy, inexact,"
        " prompt_tokens, sampled_tokens, hash FROM calls WHERE episode_id = ? ORDER BY request, occurrence",
        (episode_id,),
    ).fetchall()
    found = []
    for call_id, key, occurrence, answer_id, *rest, hashed in rows:
        answer = conversation(conn, answer_id)[-1][1:]
        request = rebuild_request(conn, call_id).decode()
        found.append(
            ("call", *where, key.hex(), occurrence, request, answer, *rest, read_tokens(conn, call_id), hashed.hex())
        )
    return found


def _effects(conn: sqlite3.Connection, episode_id: int, where: Entry) -> list[Entry]:
    rows = conn.execute(
        "SELECT request, occurrence, kind, name, arguments, result, snapshot, hash FROM steps WHERE episode_id = ?"
        " ORDER BY request, occurrence",
        (episode_id,),
    )
    return [("effect", *where, key.hex(), *rest, hashed.hex()) for key, *rest, hashed in rows]
