"""Forgetting, the part in the file: everything descended from a task is taken out in one transaction, and what remains goes on.

    the task itself           body, answer, feedback; its episodes' requests, answers, tokens, steps and tool calls
    descended versions        their texts
    descended episodes        requests, answers, tokens, and what the model handed to tools and environment; the answer they came to
    echoes of any of these    (`cod_agent.memory.echoes`), and whatever quotes a text that is named

A message that an innocent call needs as well stays. What remains of later tasks: their texts, what environment and tools showed,
rewards, feedback. A descended episode that is not over is given up first. A run whose newest version goes takes on the last
clean one, and the commit says what is to be derived again: `{"run": ..., "from": [agent, run, version], "updates": [...]}`.
"""

from __future__ import annotations

import getpass
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from cod_agent.memory import lease, read, rows, runs
from cod_agent.memory.derivation import Plan, copies, named, pending, plan_of
from cod_agent.memory.descent import Descent, Place, descended
from cod_agent.memory.echoes import echoes, quotes
from cod_agent.memory.references import References
from cod_agent.memory.runs import Run
from cod_agent.memory.tombstones import bury
from cod_agent.tasks import Feedback

Parts = dict[str, set[int]]
"""Rows by part, as `bury` takes them."""

REASON = "forgotten"
"""Why an episode that was not over was given up."""


@dataclass(slots=True)
class Removed:
    """What was taken out, or would be."""

    tasks: list[tuple[str, str, int]] = field(default_factory=list)
    """Agent, run and position of the tasks that were forgotten: those that were named, and those made from what they led to."""
    runs: list[tuple[str, str]] = field(default_factory=list)
    """Agent and name of the runs it reached."""
    rows: Counter[str] = field(default_factory=Counter)
    """By part."""


class Removal:
    """What has to go with the tasks at some places, and the way to take it out: `Removal(conn, places).remove("an attack")`.

    Args:
        places: where the tasks were lived.
        quoting: any text in the file that has one of these in it goes, too, whatever it is descended from.
    """

    def __init__(self, conn: sqlite3.Connection, places: Iterable[Place], quoting: Collection[str] = ()) -> None:
        self._conn, self._quoting = conn, quoting
        self._descent = self._whole(places)
        self._taken = set(self._descent.episodes)
        self._parts: dict[int, Parts] = defaultdict(lambda: defaultdict(set))
        """By run."""
        self._owners = dict(conn.execute("SELECT id, run_id FROM episodes").fetchall())
        self._mark()
        self._runs = {
            run: _run(conn, run) for run in sorted(self._parts.keys() | {run for run, _ in self._descent.places})
        }
        self.removed = Removed(
            [named(conn, place) for place in sorted(self._descent.places)],
            [(run.agent, run.name) for run in self._runs.values()],
            Counter(
                {part: count for part in _ORDER if (count := sum(len(parts[part]) for parts in self._parts.values()))}
            ),
        )

    def remove(self, reason: str) -> Removed:
        """Inside a transaction, the one it was made in: take it out.

        Args:
            reason: kept in the commits.

        Raises:
            RunLeased: another process lives a run that is reached.
        """
        conn = self._conn
        conn.execute("PRAGMA secure_delete = ON")  # for what no VACUUM follows
        plans: dict[int, Plan | None] = {}
        held = {run for run in self._runs if lease.ours(conn, run)}
        for run in self._runs.values():
            lease.take(conn, run.id, run.agent, run.name)
            plans[run.id] = plan_of(conn, run, self._descent)
        for run in self._runs.values():
            self._settle(run)
        for episode in self._taken:
            for (attempt,) in conn.execute(
                "SELECT id FROM attempts WHERE episode_id = ? AND detail <> ''", (episode,)
            ).fetchall():
                rows.update(conn, "attempts", attempt, {"detail": ""})
        for run in self._runs.values():
            self._bury(run, reason, plans[run.id])
        for run_id in self._runs.keys() - held:
            lease.release(conn, run_id)
        return self.removed

    # ---- what goes ----

    def _whole(self, places: Iterable[Place]) -> Descent:
        """With the copies that an earlier forgetting made of these tasks, and the tasks that were made from what they led to."""
        query = "SELECT id, body FROM contexts WHERE body IS NOT NULL"
        versions = [row[0] for row in self._conn.execute(query) if quotes(row[1], self._quoting)]
        query = "SELECT run_id, position, body FROM tasks WHERE body IS NOT NULL"
        saying = [(row[0], row[1]) for row in self._conn.execute(query) if quotes(row[2], self._quoting)]
        found = descended(self._conn, copies(self._conn, [*places, *saying]), versions)
        while True:
            more = echoes(self._conn, found)
            wider = copies(self._conn, found.places | more.places)
            if wider == found.places:
                self._echoes = more
                return found
            found = descended(self._conn, wider, versions)

    def _mark(self) -> None:
        conn, descent = self._conn, self._descent
        for row_id, run_id in conn.execute("SELECT id, run_id FROM contexts WHERE body IS NOT NULL"):
            if row_id in descent.contexts:
                self._parts[run_id]["context"].add(row_id)
        for episode in descent.episodes:
            run_id, position, kind = conn.execute(
                "SELECT run_id, position, kind FROM episodes WHERE id = ?", (episode,)
            ).fetchone()
            self._episode(episode, self._parts[run_id], (run_id, position) in descent.places, kind)
        for effect in self._echoes.effects:
            owner = conn.execute("SELECT episode_id FROM effects WHERE id = ?", (effect,)).fetchone()[0]
            self._parts[self._owners[owner]]["effect"].add(effect)
        for task in self._echoes.feedback:
            run_id = conn.execute("SELECT run_id FROM tasks WHERE id = ?", (task,)).fetchone()[0]
            self._parts[run_id]["feedback"].add(task)
        if self._quoting:
            self._quotes(self._quoting)
        for parts in self._parts.values():  # what goes as a whole goes once
            parts["asked"] -= parts["effect"]
            parts["answer"] -= parts["task"]
            parts["feedback"] -= parts["task"]
        self._shared()

    def _episode(self, episode: int, parts: Parts, whole: bool, kind: str) -> None:
        """The rows of one episode. `whole`: of a task that is forgotten; otherwise what came from outside remains."""
        parts["call"] |= self._ids(_CALLS, episode)
        if whole:
            parts["effect"] |= self._ids("SELECT id FROM effects WHERE episode_id = ? AND result IS NOT NULL", episode)
            parts["task"] |= self._ids(_TASK.format("body"), episode)
        elif kind == "solve":
            parts["asked"] |= self._ids(_ASKED, episode)
            parts["answer"] |= self._ids(_TASK.format("answer"), episode)

    def _quotes(self, wanted: Collection[str]) -> None:
        """Everything in the file with such a text in it: calls with their episode's later ones, which share their tokens."""
        conn = self._conn
        for part, query in _TEXTS.items():
            for row_id, run_id, *said in conn.execute(query):
                if any(text is not None and quotes(str(text), wanted) for text in said):
                    self._parts[run_id][part].add(row_id)
        spoken = {
            row[0]
            for row in conn.execute("SELECT id, body FROM messages WHERE body IS NOT NULL")
            if quotes(row[1], wanted)
        }
        heads = {
            row[0]
            for row in conn.execute("SELECT id, body FROM heads WHERE body IS NOT NULL")
            if quotes(row[1], wanted)
        }
        parents = dict(conn.execute("SELECT id, coalesce(parent_id, 0) FROM messages ORDER BY id"))
        tainted: set[int] = set()
        for row_id, parent in parents.items():
            if row_id in spoken or parent in tainted:
                tainted.add(row_id)
        live: set[int] = set()
        for call, episode, prompt, answer, head, envelope in conn.execute(_ALL_CALLS):
            if episode in live or prompt in tainted or answer in tainted or head in heads or quotes(envelope, wanted):
                live.add(episode)
                self._taken.add(episode)
                self._parts[self._owners[episode]]["call"].add(call)

    def _shared(self) -> None:
        """Messages and heads that no other call needs."""
        references = References(self._conn)
        for parts in self._parts.values():
            for part, found in references.drop(self._conn, sorted(parts["call"])).items():
                parts[part] |= set(found)

    def _ids(self, query: str, episode: int) -> set[int]:
        return {row[0] for row in self._conn.execute(query, (episode,))}

    # ---- taking it out ----

    def _settle(self, run: Run) -> None:
        """Give up what is not over: no episode may go on that saw what is forgotten, nor a forgotten task be judged or learnt from."""
        conn = self._conn
        query = "SELECT id, position, kind FROM episodes WHERE run_id = ? AND state = 'live' ORDER BY id"
        for episode, position, kind in conn.execute(query, (run.id,)).fetchall():
            if episode in self._taken and kind == "update":
                runs.kept(conn, run, read.position(conn, run, position), episode, REASON)
        for position in [at for run_id, at in self._descent.places if run_id == run.id] + [
            position for episode, position, kind in conn.execute(query, (run.id,)).fetchall() if episode in self._taken
        ]:
            self._give_up(run, read.position(conn, run, position))

    def _give_up(self, run: Run, known: runs.Lived) -> None:
        if known.state == "open":
            runs.solved(self._conn, run, known, "", state="aborted", reason=REASON)
        if known.state in ("open", "solved"):
            runs.judged(self._conn, run, known, Feedback(reward=runs.NAN, text=REASON))
        if known.state in ("open", "solved", "judged"):
            runs.closed(self._conn, run, known)

    def _bury(self, run: Run, reason: str, plan: Plan | None) -> None:
        conn, parts = self._conn, self._parts[run.id]
        if not any(parts.values()):
            return
        mine = sorted(position for run_id, position in self._descent.places if run_id == run.id)
        why: dict[str, Any] = {"reason": reason, "by": _user(), "positions": mine}
        why |= {"derive": plan.json()} if plan and (plan.updates or pending(conn, run)) else {}
        bury(conn, run.id, "forgot", mine[0] if len(mine) == 1 else None, why, {part: parts[part] for part in _ORDER})
        if plan is not None and plan.clean is not None:
            runs.adopt(conn, run, plan.clean, {"reason": REASON})


def _run(conn: sqlite3.Connection, run_id: int) -> Run:
    return Run(*conn.execute("SELECT id, agent, name, length FROM runs WHERE id = ?", (run_id,)).fetchone())


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name
        return ""


_ORDER = ("context", "task", "answer", "feedback", "call", "effect", "asked", "message", "head")

_CALLS = """
SELECT c.id FROM calls c WHERE c.episode_id = ? AND NOT EXISTS
  (SELECT 1 FROM tombstones s WHERE s.part = 'call' AND s.row_id = c.id)
"""
_ALL_CALLS = """
SELECT c.id, c.episode_id, c.prompt_id, c.answer_id, c.head_id, c.envelope FROM calls c WHERE c.envelope IS NOT NULL ORDER BY c.id
"""
_TASK = """
SELECT t.id FROM episodes e JOIN tasks t ON t.run_id = e.run_id AND t.position = e.position
WHERE e.id = ? AND t.{} IS NOT NULL
"""
_ASKED = "SELECT id FROM effects WHERE episode_id = ? AND kind IN ('act', 'tool') AND arguments IS NOT NULL"
_TEXTS = {
    "answer": "SELECT id, run_id, answer FROM tasks WHERE body IS NOT NULL AND answer IS NOT NULL",
    "feedback": "SELECT id, run_id, feedback FROM tasks WHERE body IS NOT NULL AND feedback IS NOT NULL",
    "effect": "SELECT x.id, e.run_id, x.arguments, x.result, x.snapshot FROM effects x JOIN episodes e ON e.id = x.episode_id "
    "WHERE x.result IS NOT NULL",
}
"""Where a text may be quoted outside of requests and answers, by the part that goes then: (row, run, texts)."""
