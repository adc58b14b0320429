"""Review: versions of a context that were held back are looked at, and accepted or refused; a run goes back to an older one.

    for held in await agent.review().held():
        print(held.version, held.reason, held.diff, sep="\\n")
    await agent.review().accept(3, why="read it, it is so")

Versions are never edited: accepting one, or going back, appends a version that says the same (`runs.adopt`), with the reason in its
commit. A version that was made from another one than is in force would undo what came since; that has to be said (`force`).
"""

from __future__ import annotations

import difflib
import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from cod_agent.errors import UsageError
from cod_agent.memory import read, runs, versions
from cod_agent.trust.blame import Line, blame
from cod_agent.trust.suspicions import Finding

if TYPE_CHECKING:
    from cod_agent.agent import CoDAgent
    from cod_agent.trust.canary import Trial

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """A version that waits for a decision."""

    id: int
    """Row of `contexts`."""
    version: int
    position: int
    """Of the task whose update wrote it."""
    reason: str
    findings: tuple[Finding, ...]
    body: str
    lines: tuple[Line, ...]
    head: int
    """The version in force."""
    diff: str
    """From the version in force to it, unified."""
    moved_on: bool
    """Whether the version in force is another one than it was made from: accepting it undoes what came since."""

    def json(self) -> dict[str, Any]:
        said = {
            name: getattr(self, name) for name in ("version", "position", "reason", "body", "head", "diff", "moved_on")
        }
        lines = [line.json() for line in self.lines]
        return {**said, "findings": [asdict(finding) for finding in self.findings], "lines": lines}


def held(conn: sqlite3.Connection, run: runs.Run) -> list[Held]:
    """The versions of a run that wait for a decision, oldest first; none whose text is gone."""
    head = versions.latest(conn, run.id)
    rows = conn.execute(
        "SELECT c.id, c.version, e.position, c.held, c.sources, c.body, p.hash FROM contexts c JOIN episodes e ON e.id = c.episode_id "
        "JOIN contexts p ON p.id = c.parent_id WHERE c.run_id = ? AND c.held <> '' AND c.decided = '' AND c.body IS NOT NULL "
        "ORDER BY c.version",
        (run.id,),
    ).fetchall()
    found = []
    for row_id, version, position, reason, sources, body, parent in rows:
        findings = tuple(Finding(*one) for one in json.loads(sources)[0].get("findings", ()))
        diff = unified((head.version, head.body), (version, body))  # a text that was pruned is None
        moved_on = parent != head.hash
        lines = blame(conn, row_id)
        found.append(Held(row_id, version, position, reason, findings, body, lines, head.version, diff, moved_on))
    return found


def accept(
    conn: sqlite3.Connection, run: runs.Run, version: int, why: dict[str, Any], *, force: bool = False
) -> versions.Context:
    """Inside a transaction: put a version that is held back in force, as a new version of the same text.

    Args:
        why: kept in the commit.
        force: also if another version came in force since it was written.

    Raises:
        UnknownName: no such version.
        UsageError: it does not wait for a decision, or the context moved on since.
    """
    row_id = read.version_id(conn, run.agent, run.name, version)
    one = next((one for one in held(conn, run) if one.id == row_id), None)
    if one is None:
        raise UsageError(f"version {version} of run {run.name!r} {_state(conn, row_id)}: there is nothing to accept")
    if one.moved_on and not force:
        raise UsageError(
            f"version {version} of run {run.name!r} was not made from version {one.head}, which is in force: accepting it undoes what "
            "came between. Look at the diff, then say so (--force, force=True), or refuse it"
        )
    return runs.adopt(conn, run, row_id, why)


def refuse(conn: sqlite3.Connection, run: runs.Run, version: int, why: dict[str, Any]) -> None:
    """Inside a transaction: a version that is held back will not come in force.

    Raises:
        UnknownName: no such version.
        UsageError: it does not wait for a decision.
    """
    runs.refuse(conn, run, read.version_id(conn, run.agent, run.name, version), why)


def rollback(conn: sqlite3.Connection, run: runs.Run, version: int, why: dict[str, Any]) -> versions.Context:
    """Inside a transaction: go back to what an older version says, as a new version.

    Raises:
        UnknownName: no such version.
        UsageError: it is held back, was refused, lost its text, or says what is in force.
    """
    row_id = read.version_id(conn, run.agent, run.name, version)
    waits, decided = conn.execute("SELECT held, decided FROM contexts WHERE id = ?", (row_id,)).fetchone()
    if waits and decided != "adopted":
        raise UsageError(f"version {version} of run {run.name!r} {_state(conn, row_id)}: it was never in force")
    head = versions.latest(conn, run.id)
    if versions.get(conn, row_id).hash == head.hash:
        raise UsageError(
            f"version {version} of run {run.name!r} says what version {head.version} says, which is in force"
        )
    return runs.adopt(conn, run, row_id, why)


def said(reason: str, why: str) -> dict[str, Any]:
    """What a decision's commit keeps."""
    return {"reason": reason, **({"why": why} if why else {})}


def unified(old: tuple[int, str], new: tuple[int, str]) -> str:
    """The difference of two versions, (number, text) each; "" if there is none."""
    (number, before), (other, after) = old, new
    names = f"version {number}", f"version {other}"
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), *names, lineterm=""))


def _state(conn: sqlite3.Connection, row_id: int) -> str:
    waits, decided, body = conn.execute("SELECT held, decided, body FROM contexts WHERE id = ?", (row_id,)).fetchone()
    if not waits:
        return "was not held back"
    return f"was {decided}" if decided else "has lost its text" if body is None else "is held back"


class Review:
    """The decisions about one run of an agent; `CoDAgent.review` makes it. Each takes the run's lease.

    Every method raises UnknownName for a run or version that is not there, UsageError where the decision makes no sense, and RunLeased
    while another process lives the run: decide there (or stop it first).
    """

    def __init__(self, agent: CoDAgent, run: str) -> None:
        self._agent, self._run = agent, run

    async def held(self) -> list[Held]:
        """What waits for a decision, oldest first."""
        name = self._agent.name
        return await self._agent.memory.read(lambda conn: held(conn, runs.find_run(conn, name, self._run)))

    async def accept(self, version: int, *, why: str = "", force: bool = False) -> int:
        """Put it in force; `force`: although another one came in force since. Returns the new version's number."""
        made = await self._decide(
            lambda conn, run: accept(conn, run, version, self._said("accepted", why), force=force)
        )
        return made.version

    async def refuse(self, version: int, *, why: str = "") -> None:
        """It will not come in force."""
        await self._decide(lambda conn, run: refuse(conn, run, version, self._said("refused", why)))

    async def rollback(self, version: int, *, why: str = "") -> int:
        """Go back to what an older version says. Returns the new version's number."""
        made = await self._decide(lambda conn, run: rollback(conn, run, version, self._said("rollback", why)))
        return made.version

    async def try_held(self) -> list[Trial]:
        """Try what is held back on the gate's canary tasks, and decide by what comes of it (see `cod_agent.trust.canary`)."""
        from cod_agent.trust.canary import try_held

        async with self._living() as opened:
            return await try_held(self._agent, opened)

    def _said(self, reason: str, why: str) -> dict[str, Any]:
        return said(reason, self._agent._tap.text(why))

    async def _decide(self, decision: Callable[[sqlite3.Connection, runs.Run], T]) -> T:
        async with self._living() as opened:
            return await self._agent.memory.write(lambda conn: decision(conn, opened))

    @asynccontextmanager
    async def _living(self) -> AsyncIterator[runs.Run]:
        agent = self._agent
        opened = await agent._opened(self._run, None, None, must_exist=True)
        async with agent._tenancy.living(opened):
            yield opened
