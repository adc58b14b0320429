"""An anchor: what lies outside of a run database and says how far it had come.

A file can be cut back to an older state of itself, or exchanged as a whole, and agree with itself: nothing in it can tell. An anchor
is a text file kept elsewhere, on another disk or machine, to which a line is added from time to time:

    {"digest": "...", "links": [["lake", "life", 12, "9f31..."]], "time": 1764000000.1}

Each link is the newest commit of a run (agent, run, number, chain), left out where the run has not moved since the lines above. The
digest is over the line and the digest of the line before, so that no line can be changed or taken out of the middle. Chains only grow:
whatever is lived, pruned or forgotten later, every link that was ever noted stays in the chain of its run.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cod_agent.errors import StoreFull, UsageError, VerificationFailed
from cod_agent.memory import places
from cod_agent.memory.hashing import canonical, chain, value_hash
from cod_agent.memory.verify_rows import Faults

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Named = tuple[str, str]
"""Agent and name of a run."""

_NEWEST = (
    "SELECT r.agent, r.name, c.seq, c.chain FROM runs r JOIN commits c ON c.run_id = r.id"
    " AND c.seq = (SELECT max(seq) FROM commits WHERE run_id = r.id)"
)
_LINK = (
    "SELECT r.id, (SELECT max(seq) FROM commits WHERE run_id = r.id),"
    " (SELECT chain FROM commits WHERE run_id = r.id AND seq = ?) FROM runs r WHERE r.agent = ? AND r.name = ?"
)


_BEGINS = b'{"digest":'
"""Every line does."""


def check_place(path: Path, db: Path) -> None:
    """Raises: UsageError, if there can be no anchor of a run database there: its own file, or a folder that is not there.

    A folder is not made: an anchor in one whose name is mistyped, or whose disk is not mounted, is nowhere.
    """
    if places.is_part(path, db):
        raise UsageError(f"{path} is {db} itself, or a part of it: name another file for the anchor")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}: check the path of the anchor, or make the folder")


class Anchor:
    """A file of anchors, for one run database. Processes may share it.

    Args:
        path: where it is; made by the first `note`, but not its folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read_to, self._digest, self._lines = 0, "", 0
        self._known: dict[Named, tuple[int, str]] = {}

    def note(self, conn: sqlite3.Connection, only: Named | None = None) -> int:
        """Add what is new in a run database; it is on disk when this returns.

        Args:
            only: agent and name of the one run to look at; None: all.

        Returns:
            How many runs went on since they were noted last.

        Raises:
            VerificationFailed: a run is not where it was noted to be, or a line of this file was changed.
            UsageError: the file is no anchor.
            StoreFull: the file cannot be written.
        """
        try:
            with open(self.path, "a+b") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                for _ in self._lines_of(file):
                    pass
                links = [
                    link
                    for link in self._newest(conn, only)
                    if self._known.get((link[0], link[1])) != (link[2], link[3])
                ]
                for agent, run, *_ in links:
                    if (agent, run) in self._known and (fault := _fault(conn, agent, run, *self._known[agent, run])):
                        raise VerificationFailed(f"{fault}: restore the newer file, or begin another anchor")
                if links:
                    file.truncate(self._read_to)  # what a crash left of a line
                    said = {"time": time.time(), "links": links}
                    line = {**said, "digest": chain(self._digest, value_hash(said))}
                    file.write(canonical(line).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                return len(links)
        except OSError as error:
            raise StoreFull(f"{self.path} cannot be written ({error}): choose another place for the anchor") from error

    def check(self, conn: sqlite3.Connection, report: Faults) -> int:
        """Compare every link that was noted with a run database; returns how many it holds.

        Raises:
            UsageError: there is no such file, or it is no anchor.
        """
        held, wrong = 0, set[Named]()
        try:
            with open(self.path, "rb") as file:
                for line in self._lines_of(file):
                    for agent, run, seq, link in line["links"]:
                        if (agent, run) in wrong:
                            continue
                        if fault := _fault(conn, agent, run, seq, link):
                            wrong.add((agent, run))
                            report.wrong(f"{fault} (anchored {_when(line['time'])})")
                        else:
                            held += 1
            if not self._lines:
                raise VerificationFailed(f"{self.path} is empty: restore a copy of it, or begin it with `cod anchor`")
        except OSError as error:
            raise UsageError(
                f"there is no anchor {self.path} ({error.strerror}): check the path, or `cod anchor` makes one"
            ) from None
        except VerificationFailed as error:
            report.anchor_fault = str(error)
        return held

    @staticmethod
    def _newest(conn: sqlite3.Connection, only: Named | None) -> list[list[Any]]:
        if only is None:
            return [list(row) for row in conn.execute(f"{_NEWEST} ORDER BY r.id")]
        return [list(row) for row in conn.execute(f"{_NEWEST} WHERE r.agent = ? AND r.name = ?", only)]

    def _lines_of(self, file: BinaryIO) -> Iterator[dict[str, Any]]:
        """The whole lines that were not read yet. Raises: VerificationFailed: one is not as it was written."""
        file.seek(self._read_to)
        for raw in file:
            if not self._lines and not raw.startswith(_BEGINS[: len(raw)]):
                raise UsageError(f"{self.path} is no anchor, but some other file: check the path")
            if not raw.endswith(b"\n"):  # being written, or cut off by a crash
                break
            self._lines += 1
            try:
                line = json.loads(raw)
                said = {"time": line["time"], "links": line["links"]}
                if chain(self._digest, value_hash(said)) != line["digest"]:
                    raise ValueError
                known = {(agent, run): (seq, link) for agent, run, seq, link in line["links"]}
            except (ValueError, TypeError, KeyError):
                raise VerificationFailed(
                    f"line {self._lines} of {self.path} is not the one written: the anchor itself was changed. "
                    "Restore a copy of it, or begin another one with `cod anchor`"
                ) from None
            self._digest, self._read_to = line["digest"], self._read_to + len(raw)
            self._known |= known
            yield line


def _fault(conn: sqlite3.Connection, agent: str, run: str, seq: int, link: str) -> str:
    """What is wrong with a run that had come to a link, or ""."""
    row = conn.execute(_LINK, (seq, agent, run)).fetchone()
    named = f"run {run!r} of agent {agent!r}"
    if row is None:
        return f"{named} is not there, its anchor knows {seq + 1} commits of it: the run was taken out, or the file exchanged"
    run_id, newest, found = row
    if found is None:
        return (
            f"row ({run_id}, {newest}) of commits is the newest of {named}, its anchor knows number {seq}: "
            "the file is older than its anchor, or its tail was cut"
        )
    if found != link:
        return f"row ({run_id}, {seq}) of commits ({named}) has another chain than its anchor: the file was exchanged or made again"
    return ""


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
