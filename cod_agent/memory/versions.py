"""The versions of a context: rows that are written once and never edited.

Functions here run inside a transaction on the writer thread; which versions a run gets, and when, is decided in `runs`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cod_agent.errors import UsageError, VerificationFailed
from cod_agent.memory import rows
from cod_agent.memory.hashing import canonical, text_hash

if TYPE_CHECKING:
    from cod_agent.memory.runs import Run


@dataclass(frozen=True, slots=True)
class Context:
    """A row of `contexts`: one version."""

    id: int
    run_id: int
    version: int
    body: str
    hash: str
    gone: bool = False
    """Whether its text was forgotten or pruned; the body is "" then."""


@dataclass(frozen=True, slots=True)
class Given:
    """A context that does not come from the run's own updates, and the name of what gave it."""

    body: str
    name: str


def latest(conn: sqlite3.Connection, run_id: int) -> Context:
    """The newest version that is not held back; version 0 is the empty one, or the one a fork began with."""
    return _version(conn, "run_id = ? AND held = '' ORDER BY version DESC LIMIT 1", run_id)


def get(conn: sqlite3.Connection, context_id: int) -> Context:
    """A version."""
    return _version(conn, "id = ?", context_id)


def _version(conn: sqlite3.Connection, which: str, value: int) -> Context:
    query = f"SELECT id, run_id, version, coalesce(body, ''), hash, body IS NULL FROM contexts WHERE {which}"
    row_id, run_id, version, body, hashed, gone = conn.execute(query, (value,)).fetchone()
    return Context(row_id, run_id, version, body, hashed, bool(gone))


def started_from(conn: sqlite3.Connection, episode_id: int) -> Context:
    """The context an episode started from."""
    return get(conn, conn.execute("SELECT context_id FROM episodes WHERE id = ?", (episode_id,)).fetchone()[0])


def as_written(run: Run, found: Context) -> Context:
    """A version, if its text is the one that was written: nobody is to act on a note that somebody changed in the file.

    Raises:
        VerificationFailed: it is not.
    """
    if not found.gone and text_hash(found.body) != found.hash:
        raise VerificationFailed(
            f"context version {found.version} of run {run.name!r} of agent {run.agent!r} is not the text that was written: somebody "
            "changed it in the file; `cod verify` says what else, restore a backup"
        )
    return found


def give(conn: sqlite3.Connection, before: Context, given: Given) -> Context:
    """A version that no update wrote; the commit of the task that is solved with it says where it came from."""
    return write(conn, before.run_id, before.id, given.body, [{"given": given.name}])


def write(
    conn: sqlite3.Connection,
    run_id: int,
    parent_id: int | None,
    body: str,
    sources: list[dict[str, Any]],
    **written: Any,
) -> Context:
    """A run's next version; `written` by an update: its episode, weights, and why it is held."""
    newest = "SELECT coalesce(max(version) + 1, 0) FROM contexts WHERE run_id = ?"
    version = int(conn.execute(newest, (run_id,)).fetchone()[0])
    hashed = text_hash(body)
    row = {"run_id": run_id, "version": version, "parent_id": parent_id, "body": body, "hash": hashed, **written}
    new_id = rows.insert(conn, "contexts", {**row, "sources": canonical(sources), "created": time.time()})
    return Context(new_id, run_id, version, body, hashed)


def was_given(conn: sqlite3.Connection, before: Context) -> dict[str, Any]:
    """What a commit says of a context that no update wrote."""
    row = conn.execute("SELECT episode_id, sources FROM contexts WHERE id = ?", (before.id,)).fetchone()
    given = before.version and row[0] is None and row[1].startswith('[{"given":')
    return {"given": json.loads(row[1])} if given else {}


def lost(origin: list[Any]) -> UsageError:
    """The error that a version's text is gone; `origin`: its agent, run and number."""
    return UsageError(
        f"version {origin[2]} of run {origin[1]!r} was forgotten or pruned: its text is gone, take another one"
    )
