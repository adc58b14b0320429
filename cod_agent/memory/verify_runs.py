"""The part of `verify` that walks a run: each commit's hash is of what was committed, each link of the last one."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from cod_agent.memory.hashing import chain, text_hash, value_hash
from cod_agent.memory.tombstones import digest
from cod_agent.memory.verify_rows import BROKEN, Faults, stone
from cod_agent.tasks import Feedback, Task

_AFTER = {"solved": "solved", "judged": "judged", "updated": "updated", "kept": "updated", "closed": "closed"}
"""The state a task is in after a commit."""

DETAILED = ("adopted", "refused", "forgot", "pruned")
"""Commits that say in `detail` what they committed."""

Row = dict[str, Any]


def _was_given(row: Row) -> bool:
    """Whether a context is one that was given: no update wrote it, no run began with it, it says nothing that an older one said."""
    return bool(row["version"]) and row["episode_id"] is None and row["sources"].startswith('[{"given":')


def check_run(conn: sqlite3.Connection, report: Faults, run_id: int) -> None:
    """Check a run's row, tasks, contexts, the states of its episodes, and its chain of commits."""
    _Walk(conn, report, run_id).walk()


class _Walk:
    def __init__(self, conn: sqlite3.Connection, report: Faults, run_id: int) -> None:
        self._conn, self._report = conn, report
        self.run = self._rows("SELECT * FROM runs WHERE id = ?", run_id)[0]
        tasks = self._rows("SELECT * FROM tasks WHERE run_id = ? ORDER BY position", run_id)
        self.tasks = {row["position"]: row for row in tasks}
        self.contexts = self._rows("SELECT * FROM contexts WHERE run_id = ? ORDER BY version", run_id)
        self.by_id = {row["id"]: row for row in self.contexts}
        self.by_version = {row["version"]: row for row in self.contexts}
        self.by_episode = {row["episode_id"]: row for row in self.contexts}
        episodes = self._rows("SELECT * FROM episodes WHERE run_id = ? ORDER BY id", run_id)
        self.episodes = {(row["position"], row["kind"]): row for row in episodes}
        self.commits = self._rows("SELECT * FROM commits WHERE run_id = ? ORDER BY seq", run_id)
        self._decisions: dict[int, str] = {}
        self._last: dict[int, str] = {}
        """The state of each task after its commits."""
        self._ended: dict[int, str] = {}
        """The state of each update episode after its task's commits."""
        self._versions = 1
        """How many there must be: the first one, and those that were written, adopted or given."""

    def _rows(self, query: str, *values: Any) -> list[Row]:
        cursor = self._conn.execute(query, values)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    def _wrong(self, table: str, row: Row, fault: str) -> None:
        """What is wrong with a row; of the run's row itself if there is none of another table."""
        named = f"({row['run_id']}, {row['seq']})" if table == "commits" else row["id"]
        what = {
            "runs": "",
            "contexts": "version {version} of ",
            "tasks": "task {position} of ",
            "episodes": "{kind} task {position} of ",
            "commits": "{what} task {position} in " if row.get("position") is not None else "{what} in ",
        }[table].format(**row)
        where = f"({what}run {self.run['name']!r} of agent {self.run['agent']!r})"
        self._report.wrong_row(table, named, f"{where} {fault}")

    @contextlib.contextmanager
    def _at(self, table: str, row: Row) -> Iterator[None]:
        """What breaks while a row is looked at is a fault of that row."""
        try:
            yield
        except BROKEN as error:
            self._wrong(table, row, f"is malformed, or what it refers to ({type(error).__name__}: {error})")

    def walk(self) -> None:
        """Contexts and tasks by themselves, then the commits, then what the commits leave no room for."""
        for row in self.contexts:
            with self._at("contexts", row):
                self._context(row)
        for row in self.tasks.values():
            with self._at("tasks", row):
                self._task(row)
        self._chain()
        for row in self.tasks.values():
            last = self._last.get(row["position"], "open")
            if row["state"] != last:
                self._wrong("tasks", row, f"is {row['state']}, its commits say {last}")
        self._check_versions()
        for row in self.episodes.values():
            if row["state"] not in self._may_be(row):
                self._wrong("episodes", row, f"is {row['state']}, its commits say otherwise")

    # ---- contexts and tasks ----

    def _gone(self, part: str, table: str, row: Row) -> None:
        if stone(self._conn, part, row["id"]) is not None:
            self._report.pruned += 1
        else:
            self._wrong(table, row, "has lost its text, and no tombstone says why")

    def _context(self, row: Row) -> None:
        if row["body"] is None:
            self._gone("context", "contexts", row)
        elif text_hash(row["body"]) != row["hash"]:
            self._wrong("contexts", row, "is not the one written: its hash does not agree")

    def _check_versions(self) -> None:
        """Each version but the first was written by an update, adopted, or given to a task that was solved with it."""
        given = [row for row in self.contexts if _was_given(row)]
        expected = self._versions + len(given)
        if [row["version"] for row in self.contexts] != list(range(expected)):
            self._wrong("runs", self.run, f"has {len(self.contexts)} context versions, its commits say {expected}")
        for row in self.contexts:
            if row["held"] and row["episode_id"] is None:
                self._wrong("contexts", row, "is held back, and no update wrote it")
            if row["decided"] != self._decisions.get(row["version"], "") and not self._elsewhere(row):
                self._wrong("contexts", row, f"is {row['decided'] or 'undecided'}, its commits say otherwise")
        used = {row["context_id"] for row in self.episodes.values() if row["kind"] == "solve"}
        for row in given:
            above = self.by_id.get(row["parent_id"])
            if row["id"] not in used or row["weights"] or above is None or above["version"] != row["version"] - 1:
                self._wrong("contexts", row, "was neither written by an update nor given to a task")

    def _elsewhere(self, row: Row) -> bool:
        """Whether another run adopted a version that was held back in this one."""
        query = "SELECT 1 FROM contexts WHERE parent_id = ? AND run_id <> ? AND sources LIKE '[{\"adopted\"%'"
        found = self._conn.execute(query, (row["id"], row["run_id"])).fetchone()
        return row["decided"] == "adopted" and bool(row["held"]) and found is not None

    def _task(self, row: Row) -> None:
        said = self._stone(row)
        if said is not None and said[0] == row["fingerprint"] and said[3] == row["reward"]:
            self._report.pruned += 1
            return
        self._report.pruned += sum(self._buried(row, column) is not None for column in ("answer", "feedback"))
        if row["body"] is None:
            self._wrong("tasks", row, "has lost its text, and no tombstone says why")
        else:
            task = Task.model_validate_json(row["body"])
            if task.fingerprint != row["fingerprint"] or task.id != row["name"]:
                self._wrong("tasks", row, "is not the one that was given: its fingerprint does not agree")
        reward = Feedback.model_validate_json(row["feedback"]).reward if row["feedback"] else None
        known = self._buried(row, "feedback") is None  # what stands in the tombstone's place is under the row's guard
        if known and row["reward"] != (None if reward is None or reward != reward else reward):
            self._wrong("tasks", row, f"shows a reward of {row['reward']}, its feedback says {reward}")
        if (row["position"], "solve") not in self.episodes:
            self._wrong("tasks", row, "has no solve episode")

    def _stone(self, row: Row) -> list[Any] | None:
        """What stands on a task's tombstone: its fingerprint, the hashes of answer and feedback, its reward."""
        said = stone(self._conn, "task", row["id"]) if row["body"] is None else None
        return None if said is None else list(json.loads(said))

    def _buried(self, row: Row, column: str) -> str | None:
        """The hash on the tombstone of a task's answer or feedback."""
        return stone(self._conn, column, row["id"]) if row[column] is None else None

    def _hash_of(self, row: Row, column: str) -> str | None:
        """Of a task's answer or feedback, there or buried: what the commit was made of."""
        if row[column] is not None:
            return text_hash(row[column])
        whole = self._stone(row)
        return self._buried(row, column) if whole is None else whole[1 if column == "answer" else 2]

    # ---- commits ----

    def _chain(self) -> None:
        """Every commit, and what they leave behind: states, number of versions, decisions."""
        previous = ""
        for number, row in enumerate(self.commits):
            if row["seq"] != number or (row["what"] == "began") != (number == 0):
                self._wrong("commits", row, "is out of order: one is missing")
            if row["chain"] != chain(previous, row["hash"]):
                self._wrong("commits", row, "does not follow from the one before it: the chain is broken")
            previous = row["chain"]
            with self._at("commits", row):
                self._commit(row)
            what, position = row["what"], row["position"]
            if what in _AFTER:
                self._last[position] = _AFTER[what]
            if what in ("updated", "kept"):
                self._ended[position] = "done" if what == "updated" else "refused"
            self._versions += what in ("updated", "adopted")
        if not self.commits:
            self._wrong("runs", self.run, "has no commits, not even the one that begins it")

    def _commit(self, row: Row) -> None:
        what, position = row["what"], row["position"]
        if what in DETAILED:
            said = json.loads(row["detail"]) if row["detail"] else None
            said = said if said is not None and self._holds(what, row["seq"], said) else None
        else:
            said = self._said(what, position)
            if row["detail"] is not None:
                self._wrong("commits", row, "says something that commits of its kind do not say")
        if said is None or value_hash({"what": what, "position": position, **said}) != row["hash"]:
            self._wrong("commits", row, "committed something else than what is stored now")

    def _holds(self, what: str, seq: int, said: dict[str, Any]) -> bool:
        """Whether what a commit says of itself is what is stored."""
        if what in ("pruned", "forgot"):
            counts = "SELECT part, count(*) FROM tombstones WHERE run_id = ? AND seq = ? GROUP BY part"
            buried = dict(self._conn.execute(counts, (self.run["id"], seq)).fetchall())
            return bool(said["rows"] == buried and said["digest"] == digest(self._conn, self.run["id"], seq))
        row = self.by_version.get(said["version"])
        if row is None or row["hash"] != said["context"]:
            return False
        if what == "refused":
            self._decisions[row["version"]] = "refused"
            return bool(row["held"])
        origin = self._named(row["parent_id"])
        if origin[:2] == [self.run["agent"], self.run["name"]] and self.by_version[origin[2]]["held"]:
            self._decisions.setdefault(origin[2], "adopted")
        adopted = (json.loads(row["sources"]), row["held"], row["weights"]) == ([{"adopted": origin[:3]}], "", "")
        return bool(origin == [*said["of"], row["hash"]] and adopted)

    def _named(self, context_id: int) -> list[Any]:
        """Agent, run, version and hash of a context, which may be another run's."""
        query = (
            "SELECT r.agent, r.name, c.version, c.hash FROM contexts c JOIN runs r ON r.id = c.run_id WHERE c.id = ?"
        )
        return list(self._conn.execute(query, (context_id,)).fetchone())

    def _said(self, what: str, position: int) -> dict[str, Any] | None:
        """What a commit must have said, from what is stored now; None if something is missing."""
        if what == "began":
            return self._began()
        task = self.tasks.get(position)
        if task is None:
            return None
        if what == "judged":
            feedback = self._hash_of(task, "feedback")
            return {"feedback": feedback} if feedback else None
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
        answer = self._hash_of(task, "answer")
        if task["reason"] != episode["reason"] or answer is None:
            return None
        said |= {"fingerprint": task["fingerprint"], "answer": answer}
        said |= {"given": json.loads(before["sources"])} if _was_given(before) else {}
        return {**said, "state": episode["state"], "reason": task["reason"]}

    def _began(self) -> dict[str, Any] | None:
        run, first = self.run, self.contexts[0] if self.contexts else None
        if first is None or first["episode_id"] is not None or (first["sources"], first["weights"]) != ("[]", ""):
            return None
        return {
            "agent": run["agent"],
            "run": run["name"],
            "environment": run["environment"],
            "pack": run["pack"] and json.loads(run["pack"]),
            "length": run["length"],
            "model": run["model"],
            "settings": json.loads(run["settings"]),
            "context": first["hash"],
            "origin": None if first["parent_id"] is None else self._named(first["parent_id"])[:3],
        }

    def _findings(self, version: int) -> list[str] | None:
        """Of a version that was held back and is gone: the hashes of why, and of where its text came from."""
        took = (json.loads(row["detail"]) for row in self.commits if row["what"] in ("forgot", "pruned"))
        return next((said["held"][str(version)] for said in took if str(version) in said.get("held", {})), None)

    def _updated(self, said: dict[str, Any], episode: Row) -> dict[str, Any] | None:
        new = self.by_episode.get(episode["id"])
        if new is None or new["parent_id"] != episode["context_id"] or episode["reason"]:
            return None
        sources = json.loads(new["sources"])
        said |= {"version": new["version"], "context": new["hash"], "sources": sources, "weights": new["weights"]}
        if new["held"]:
            gone = self._findings(new["version"]) if new["body"] is None else None
            held, sources = gone or (text_hash(new["held"]), value_hash(sources))
            said |= {"held": held, "sources": sources}
        return said

    def _may_be(self, episode: Row) -> tuple[str, ...]:
        """The states an episode may be in. Of a solve episode that ended, its commit's hash knows which."""
        if episode["kind"] == "update":
            return (self._ended.get(episode["position"], "live"),)
        return ("live",) if self._last.get(episode["position"], "open") == "open" else ("done", "aborted")
