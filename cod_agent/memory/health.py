"""Is the place a run database lies in good for it, and is the file sound? Findings, each with what to do; nothing is written.

for finding in examine("lake.db"):
    print(finding.level, finding.about, finding.said, finding.do)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cod_agent.errors import CodError, NotADatabase
from cod_agent.memory import lease, places, schema
from cod_agent.memory.database import fcntl, translate, wal_fault
from cod_agent.memory.readonly import connect

Level = Literal["ok", "warning", "problem"]
MB = 1_000_000
LARGE_WAL = 64 * MB
"""SQLite keeps a WAL of about 4 MB; one so large is held open by a reader, or was."""
_LEAST_FREE = 16 * MB
_LONG_TURN = 2.0
"""Seconds; a transaction takes a few milliseconds."""
_AHEAD = 60.0
"""Seconds by which clocks of machines may differ."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    said: str
    do: str = ""
    """What to do about it."""

    def json(self) -> dict[str, str]:
        """For `--json`."""
        return asdict(self)


def examine(path: str | Path, *, full: bool = False) -> list[Finding]:
    """Look a run database over, whether or not somebody lives in it.

    Args:
        full: read every page, and check every hash as `cod verify` does; else a quick look, which grows with the file, too.

    Raises:
        UsageError: there is no such file.
    """
    file = Path(path)
    found = [sqlite()]
    with contextlib.closing(connect(file)) as conn:
        try:
            found.extend(_inside(conn, file, full))
        except (CodError, sqlite3.Error) as error:
            said = translate(error, str(file)) if isinstance(error, sqlite3.Error) else error
            found.append(Finding("file", "problem", str(said)))
            if isinstance(said, NotADatabase):  # what it is, nobody knows
                return [*found, _file_system(file)]
    return [*found, _file_system(file), _space(file), *_permissions(file), _wal(file), *_turn(file)]


def sqlite() -> Finding:
    """The SQLite of this Python."""
    version = sqlite3.sqlite_version
    if not wal_fault():
        return Finding("SQLite", "ok", version)
    if fcntl is None:
        return Finding("SQLite", "ok", f"{version} has the WAL-reset fault: files are put in rollback-journal mode")
    handled = (
        "writers of this package take turns by FILE.lock, so that it cannot occur; other programs should only read"
    )
    return Finding("SQLite", "ok", f"{version} has the WAL-reset fault: {handled}")


def _inside(conn: sqlite3.Connection, file: Path, full: bool) -> Iterator[Finding]:
    current = schema.check(conn, str(file))
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    known = len(schema.MIGRATIONS)
    if version == 0:
        yield Finding("schema", "ok", "empty: nothing was recorded in it yet")
        return
    if current:
        yield Finding("schema", "ok", f"{version}, the newest")
    else:
        why = f"{version}; the next program of this version that writes to it migrates it to {known}"
        yield Finding(
            "schema", "ok", why, "older versions cannot open it then: keep a copy (cod backup) if you need them"
        )
    yield _integrity(conn, full)
    if full:
        yield _record(file)
    if current:
        yield from _leases(conn)
        yield _clock(conn)


def _integrity(conn: sqlite3.Connection, full: bool) -> Finding:
    said = [row[0] for row in conn.execute("PRAGMA integrity_check(3)" if full else "PRAGMA quick_check(3)")]
    said = [] if said == ["ok"] else said
    said += [
        f"row {row[1]} of {row[0]} refers to no row of {row[2]}" for row in conn.execute("PRAGMA foreign_key_check")
    ][:3]
    if said:
        do = "let nobody write to it; restore a backup, or save what can be read: sqlite3 FILE .recover | sqlite3 NEW"
        return Finding("integrity", "problem", "; ".join(said), do)
    return Finding(
        "integrity", "ok", "every page and reference" if full else "structure and references; --full reads all of it"
    )


def _record(file: Path) -> Finding:
    from cod_agent.memory.verify import verify

    report = verify(file)
    if report.ok:
        return Finding("record", "ok", "every hash and chain agrees")
    return Finding(
        "record", "problem", report.faults[0], f"cod verify {file} --json lists all faults; restore a backup"
    )


def _leases(conn: sqlite3.Connection) -> Iterator[Finding]:
    query = "SELECT r.agent, r.name, l.host, l.pid, l.expires, l.steady FROM leases l JOIN runs r ON r.id = l.run_id ORDER BY r.id"
    for agent, run, host, pid, expires, steady in conn.execute(query):
        what, machine = f"run {run!r} of agent {agent!r}", host.split("/")[0]
        here = host == lease.HOST
        if (here and lease.gone(pid)) or not lease.left(host, expires, steady):
            yield Finding("lease", "ok", f"{what} was left by process {pid} on {machine}: whoever resumes it goes on")
        else:
            yield Finding("lease", "ok", f"{what} is being lived by process {pid} on {machine}")


def _clock(conn: sqlite3.Connection) -> Finding:
    newest = conn.execute("SELECT max(created) FROM commits").fetchone()[0] or 0.0
    ahead = newest - time.time()
    if ahead > _AHEAD:
        do = "set the clock (NTP): times in the record, and pruning by age, go by it"
        return Finding("clock", "warning", f"the newest commit is {ahead:.0f} s in the future", do)
    return Finding("clock", "ok", "nothing in the file is from the future")


def _file_system(file: Path) -> Finding:
    kind, options = places.mounted(file)
    if kind in places.NETWORK:
        do = "move the file to a local disk: locks over a network are not reliable, and two writers can destroy it"
        return Finding("file system", "problem", f"{kind}: a network or shared folder", do)
    if "ro" in options:
        return Finding("file system", "problem", f"{kind}, mounted read-only", "mount it for writing, or move the file")
    if kind.startswith("fuse"):
        do = "make sure that it keeps POSIX locks and fsync, or move the file to a local disk"
        return Finding("file system", "warning", f"{kind}: a program stands between SQLite and the disk", do)
    if kind in ("tmpfs", "ramfs"):
        return Finding("file system", "warning", f"{kind}: gone when the machine restarts", "move the file to a disk")
    if kind == "overlay":
        do = "if this is a container, keep the file on a volume"
        return Finding("file system", "warning", "overlay: a container's own layer is gone with the container", do)
    return Finding("file system", "ok", kind or "not known on this system")


def _space(file: Path) -> Finding:
    free, size = shutil.disk_usage(file.absolute().parent).free, file.stat().st_size
    said = f"{free / MB:,.0f} MB free; the file has {size / MB:,.1f} MB, its WAL {_size(file, '-wal') / MB:,.1f} MB"
    if free < _size(file, "-wal") + _LEAST_FREE:
        return Finding("space", "problem", said, "free space: agents stop with StoreFull when the disk is full")
    if free < size:
        return Finding("space", "warning", said, "no room for a backup here, nor for cod prune --vacuum")
    return Finding("space", "ok", said)


def _permissions(file: Path) -> Iterator[Finding]:
    """It holds conversations; and whoever may write into its folder may put another file there."""
    if os.name != "posix":
        return
    parts = [found for end in ("", "-wal", "-shm", ".lock") if (found := file.with_name(file.name + end)).exists()]
    wide = [part.name for part in parts if part.suffix != ".lock" and stat.S_IMODE(part.stat().st_mode) & 0o077]
    closed = [part.name for part in parts if not os.access(part, os.R_OK | os.W_OK)]
    folder = stat.S_IMODE(file.absolute().parent.stat().st_mode)
    if wide:
        said = f"other users of this machine may open {', '.join(wide)}"
        yield Finding("permissions", "warning", said, f"chmod 600 {' '.join(wide)}, unless they should")
    if folder & 0o022 and not folder & stat.S_ISVTX:
        said = "other users may put another file in its place"
        yield Finding("permissions", "warning", said, f"chmod go-w {file.absolute().parent}")
    if closed:
        said = f"this user may not write {', '.join(closed)}"
        yield Finding("permissions", "warning", said, "run the agents as its owner, or change the owner")
    if not wide and not closed:
        yield Finding("permissions", "ok", "only its owner may open it")


def _wal(file: Path) -> Finding:
    size, readers = _size(file, "-wal"), places.readers(file)
    if size <= LARGE_WAL:
        return Finding("WAL", "ok", f"{size / MB:,.1f} MB")
    held = f"; held by {', '.join(readers)}" if readers else ""
    do = (
        "end what reads for so long"
        if readers
        else "it shrinks at the next write after a checkpoint; an idle file: open and close it once"
    )
    return Finding("WAL", "warning", f"{size / MB:,.1f} MB: a reader keeps an old state of the file{held}", do)


def _turn(file: Path) -> Iterator[Finding]:
    if wal_fault() and (who := places.keeps_turn(file, _LONG_TURN)):
        said = f"{who} keeps all others from writing"
        yield Finding("turn", "warning", said, "if it was stopped (Ctrl-Z), let it go on (kill -CONT) or end it")


def _size(file: Path, end: str) -> int:
    beside = Path(f"{file}{end}")
    return beside.stat().st_size if beside.exists() else 0
