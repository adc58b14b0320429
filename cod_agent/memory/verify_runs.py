"""The part of `verify` that walks a run: each commit's hash is of what was committed, each link of the last one."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Container, Mapping
from typing import Any, Protocol

from cod_agent.memory.hashing import chain, text_hash, value_hash
from cod_agent.memory.tombstones import digest
from cod_agent.tasks import Feedback, Task

_AFTER = {"solved": "solved", "judged": "judged", "updated": "updated", "kept": "updated", "closed": "closed"}
"""The state a task is in after a commit."""


DETAILED = ("adopted", "refused", "forgot", "pruned")
"""Commits that say in `detail` what they committed."""


class Faults(Protocol):
    """What a walk reports to."""

    pruned: int
    counts: dict[str, int]

    def wrong(self, fault: str) -> None: ...


Row = dict[str, Any]


def _was_given(row: Row) -> bool:
    """Whether a context is one that was given: no update wrote it, no run began with it, it says nothing that an older one said."""
    return bool(row["version"]) and row["episode_id"] is None and row["sources"].startswith('[{"given":')


def check_run(
    conn: sqlite3.Connection, report: Faults, run_id: int, tasks: Mapping[int, str], contexts: Container[int]
) -> None:
    """Check a run's row, tasks, contexts, the states of its episodes, and its chain of commits.

    Args:
        tasks, contexts: rows that lie buried; of tasks, what their tombstones say.
    """
    _Walk(conn, report, run_id, tasks, contexts).walk()


class _Walk:
    def __init__(
        self,
        conn: sqlite3.Connection,
        report: Faults,
        run_id: int,
        tasks: Mapping[int, str],
        contexts: Container[int],
    ) -> None:
        self._conn, self._report = conn, report
        self._buried_tasks, self._buried_contexts = tasks, contexts
        self.run = self._rows("SELECT * FROM runs WHERE id = ?", run_id)[0]
        self.tasks = {row["position"]: row for row in self._rows("SELECT * FROM tasks WHERE run_id = ?", run_id)}
        self.contexts = self._rows("SELECT * FROM contexts WHERE run_id = ? ORDER BY version", run_id)
        self._decisions: dict[int, str] = {}
        self.by_id = {row["id"]: row for row in self.contexts}
        episodes = self._rows("SELECT * FROM episodes WHERE run_id = ?", run_id)
        self.episodes = {(row["position"], row["kind"]): row for row in episodes}
        self.commits = self._rows("SELECT * FROM commits WHERE run_id = ? ORDER BY seq", run_id)
        for table, rows in (("tasks", self.tasks), ("contexts", self.contexts), ("commits", self.commits)):
            report.counts[table] = report.counts.get(table, 0) + len(rows)

    def _rows(self, query: str, *values: Any) -> list[Row]:
        cursor = self._conn.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def _wrong(self, fault: str) -> None:
        self._report.wrong(f"run {self.run['name']!r} of agent {self.run['agent']!r}: {fault}")

    def walk(self) -> None:
        """Contexts and tasks by themselves, then the commits, then what the commits leave no room for."""
        for row in self.contexts:
            if row["body"] is None:
                self._gone(f"context version {row['version']}", row["id"] in self._buried_contexts)
            elif text_hash(row["body"]) != row["hash"]:
                self._wrong(f"context version {row['version']} is not the one written: its hash does not agree")
        for position, row in self.tasks.items():
            self._task(position, row)
        last, written, adopted = self._chain()
        for position, row in self.tasks.items():
            if row["state"] != last.get(position, "open"):
                self._wrong(f"task {position} is {row['state']}, its commits say {last.get(position, 'open')}")
        self._versions(written, adopted)
        for (position, kind), row in self.episodes.items():
            if row["state"] != self._ended(position, kind, last):
                self._wrong(f"the {kind} episode of task {position} is {row['state']}, its commits say otherwise")

    def _gone(self, what: str, buried: bool) -> None:
        if buried:
            self._report.pruned += 1
        else:
            self._wrong(f"{what} has lost its text, and no tombstone says why")

    def _versions(self, written: int, adopted: int) -> None:
        """Each version but the first was written by an update, adopted, or given to a task that was solved with it."""
        given = [row for row in self.contexts if _was_given(row)]
        expected = 1 + written + adopted + len(given)
        if [row["version"] for row in self.contexts] != list(range(expected)):
            self._wrong(f"it has {len(self.contexts)} context versions, its commits say {expected}")
        for row in self.contexts:
            if row["held"] and row["episode_id"] is None:
                self._wrong(f"context version {row['version']} is held back, and no update wrote it")
            if row["decided"] != self._decisions.get(row["version"], "") and not self._elsewhere(row):
                self._wrong(
                    f"context version {row['version']} is {row['decided'] or 'undecided'}, its commits say otherwise"
                )
        used = {row["context_id"] for (_, kind), row in self.episodes.items() if kind == "solve"}
        for row in given:
            above = self.by_id.get(row["parent_id"])
            if row["id"] not in used or row["weights"] or above is None or above["version"] != row["version"] - 1:
                self._wrong(f"context version {row['version']} was neither written by an update nor given to a task")

    def _elsewhere(self, row: Row) -> bool:
        """Whether another run adopted a version that was held back in this one."""
        query = "SELECT 1 FROM contexts WHERE parent_id = ? AND run_id <> ? AND sources LIKE '[{\"adopted\"%'"
        found = self._conn.execute(query, (row["id"], row["run_id"])).fetchone()
        return row["decided"] == "adopted" and bool(row["held"]) and found is not None

    def _task(self, position: int, row: Row) -> None:
        stone = self._stone(row)
        if stone is not None and stone[0] == row["fingerprint"] and stone[3] == row["reward"]:
            self._report.pruned += 1
            return
        if row["body"] is None:
            self._wrong(f"task {position} has lost its text, and no tombstone says why")
        else:
            task = Task.model_validate_json(row["body"])
            if task.fingerprint != row["fingerprint"] or task.id != row["name"]:
                self._wrong(f"task {position} is not the one that was given: its fingerprint does not agree")
        said = Feedback.model_validate_json(row["feedback"]).reward if row["feedback"] else None
        if row["reward"] != (None if said is None or said != said else said):
            self._wrong(f"task {position} shows a reward of {row['reward']}, its feedback says {said}")
        if (position, "solve") not in self.episodes:
            self._wrong(f"task {position} has no solve episode")

    def _stone(self, row: Row) -> list[Any] | None:
        """What stands on a task's tombstone: its fingerprint, the hashes of answer and feedback, its reward."""
        said = self._buried_tasks.get(row["id"])
        return None if said is None else json.loads(said)

    def _chain(self) -> tuple[dict[int, str], int, int]:
        """Checks every commit; returns the state of each task after them, and how many versions were written and adopted."""
        last: dict[int, str] = {}
        written = adopted = 0
        previous = ""
        for number, row in enumerate(self.commits):
            what, position = row["what"], row["position"]
            where = f"commit {row['seq']} ({what}{'' if position is None else f' task {position}'})"
            if row["seq"] != number or (what == "began") != (number == 0):
                self._wrong(f"{where} is out of order: one is missing")
            if row["chain"] != chain(previous, row["hash"]):
                self._wrong(f"{where} does not follow from the one before it: the chain is broken")
            previous = row["chain"]
            said = self._detailed(row) if what in DETAILED else self._said(what, position)
            if what not in DETAILED and row["detail"] is not None:
                self._wrong(f"{where} says something that commits of its kind do not say")
            if said is None or value_hash({"what": what, "position": position, **said}) != row["hash"]:
                self._wrong(f"{where} committed something else than what is stored now")
            if what in _AFTER:
                last[position] = _AFTER[what]
            written += what == "updated"
            adopted += what == "adopted"
        if not self.commits:
            self._wrong("it has no commits, not even the one that begins it")
        return last, written, adopted

    def _detailed(self, row: Row) -> dict[str, Any] | None:
        """What a commit says of itself, if it is also what is stored."""
        said = json.loads(row["detail"]) if row["detail"] else None
        return said if said is not None and self._holds(row["what"], row["seq"], said) else None

    def _holds(self, what: str, seq: int, said: dict[str, Any]) -> bool:
        """Whether what a commit says of itself is what is stored."""
        if what in ("pruned", "forgot"):
            counts = "SELECT part, count(*) FROM tombstones WHERE run_id = ? AND seq = ? GROUP BY part"
            rows = dict(self._conn.execute(counts, (self.run["id"], seq)).fetchall())
            return said["rows"] == rows and said["digest"] == digest(self._conn, self.run["id"], seq)
        row = next((row for row in self.contexts if row["version"] == said["version"]), None)
        if row is None or row["hash"] != said["context"]:
            return False
        if what == "refused":
            self._decisions[row["version"]] = "refused"
            return bool(row["held"])
        query = (
            "SELECT r.agent, r.name, c.version, c.hash FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?"
        )
        *origin, hashed = self._conn.execute(query, (row["parent_id"],)).fetchone()
        if origin[:2] == [self.run["agent"], self.run["name"]]:
            of = self.contexts[origin[2]]
            if of["held"]:
                self._decisions.setdefault(of["version"], "adopted")
        return (
            origin == said["of"]
            and hashed == row["hash"]
            and (json.loads(row["sources"]), row["held"], row["weights"]) == ([{"adopted": origin}], "", "")
        )

    def _said(self, what: str, position: int) -> dict[str, Any] | None:
        """What a commit must have said, from what is stored now; None if something is missing."""
        if what == "began":
            return self._began()
        task = self.tasks.get(position)
        if task is None:
            return None
        texts = (task["answer"], task["feedback"])
        stone = self._stone(task) or [None, *(None if said is None else text_hash(said) for said in texts)]
        if what == "judged":
            return {"feedback": stone[2]} if stone[2] else None
        if what == "closed":
            return {}
        episode = self.episodes.get((position, "solve" if what == "solved" else "update"))
        before = episode and self.by_id.get(episode["context_id"])
        if not episode or not before:
            return None
        said = {"episode": episode["digest"], "from": [before["version"], before["hash"]]}
        if what == "kept":
            return {**said, "reason": episode["reason"]}
        if what == "updated":
            return self._updated(said, episode)
        if task["reason"] != episode["reason"] or stone[1] is None:
            return None
        said |= {"fingerprint": task["fingerprint"], "answer": stone[1]}
        said |= {"given": json.loads(before["sources"])} if _was_given(before) else {}
        return {**said, "state": episode["state"], "reason": task["reason"]}

    def _began(self) -> dict[str, Any] | None:
        run, first = self.run, self.contexts[0] if self.contexts else None
        if first is None or first["episode_id"] is not None or (first["sources"], first["weights"]) != ("[]", ""):
            return None
        origin = None
        if first["parent_id"] is not None:
            query = "SELECT r.agent, r.name, c.version FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?"
            origin = list(self._conn.execute(query, (first["parent_id"],)).fetchone())
        return {
            "agent": run["agent"],
            "run": run["name"],
            "environment": run["environment"],
            "pack": run["pack"] and json.loads(run["pack"]),
            "length": run["length"],
            "model": run["model"],
            "settings": json.loads(run["settings"]),
            "context": first["hash"],
            "origin": origin,
        }

    def _updated(self, said: dict[str, Any], episode: Row) -> dict[str, Any] | None:
        new = next((row for row in self.contexts if row["episode_id"] == episode["id"]), None)
        if new is None or new["parent_id"] != episode["context_id"] or episode["reason"]:
            return None
        said |= {"version": new["version"], "context": new["hash"], **({"held": new["held"]} if new["held"] else {})}
        return {**said, "sources": json.loads(new["sources"]), "weights": new["weights"]}

    def _ended(self, position: int, kind: str, last: dict[int, str]) -> str:
        """The state an episode must be in."""
        state = self.episodes[position, kind]["state"]
        if kind == "solve":  # done or aborted: the commit's hash knows which
            return "live" if last.get(position, "open") == "open" else state if state != "live" else "done"
        whats = {row["what"] for row in self.commits if row["position"] == position}
        return "done" if "updated" in whats else "refused" if "kept" in whats else "live"
