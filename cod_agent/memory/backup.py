"""A copy of a run database while agents live in it: one state of the file, verified before it gets its name.

    backup("lake.db", "copies/lake-monday.db")

The copy is read from one snapshot, page by page, so that writers go on and it still ends. It lies beside its goal under the name
of a part until it is whole, verified and on disk; a backup that is killed leaves that part, which the next one to the same
place clears away, and nothing else. The copy is one file, with nothing beside it (rollback-journal mode): whoever lives in it
puts it in WAL mode again.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from cod_agent.errors import StoreFull, UsageError
from cod_agent.memory import lease, places, schema
from cod_agent.memory.database import translate
from cod_agent.memory.readonly import connect
from cod_agent.memory.verify import Report, verify

_PAGES = 1024
"""Copied between two reports of progress: 4 MB."""


def backup(
    path: str | Path,
    to: str | Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Copy a run database; what `verify` says of the copy.

    Args:
        force: replace a file that is there.
        progress: told pages copied and pages in all, now and then.

    Raises:
        UsageError: there is no such file, or one where the copy should go.
        VerificationFailed: it does not agree with itself. No copy is made: an older one may be better.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
    """
    goal = Path(to)
    _check_goal(Path(path), goal, force)
    part = part_of(goal)
    try:
        with contextlib.closing(connect(path)) as conn:
            _copy(conn, str(path), part, progress)
        report = verify(part)
        report.path = str(path)
        report.require()
        publish(part, goal, Path(path).stat().st_mode & 0o777)
    except OSError as error:
        raise StoreFull(f"{goal} cannot be written ({error}): choose another place, or mend its permissions") from error
    finally:
        part.unlink(missing_ok=True)
    report.path = str(goal)
    return report


def _copy(conn: sqlite3.Connection, path: str, part: Path, progress: Callable[[int, int], None] | None) -> None:
    try:
        schema.check(conn, path)
        # A snapshot that is held for the whole copy; without one, SQLite begins again each time somebody writes.
        conn.execute("BEGIN")
        conn.execute("SELECT count(*) FROM sqlite_master").fetchone()
        with contextlib.closing(sqlite3.connect(part, isolation_level=None)) as copy:
            copy.execute("PRAGMA synchronous = OFF")  # the whole is put on disk at the end
            told = None if progress is None else (lambda _, left, total: progress(total - left, total))
            conn.backup(copy, pages=_PAGES, progress=told, sleep=0)
            copy.execute("PRAGMA journal_mode = DELETE").fetchone()
    except sqlite3.Error as error:
        raise translate(error, path) from error


def _check_goal(path: Path, goal: Path, force: bool) -> None:
    if goal.is_dir():
        raise UsageError(f"{goal} is a directory: name the file of the copy, as {goal / path.name}")
    if places.is_part(goal, path) or (goal.exists() and path.exists() and goal.samefile(path)):
        raise UsageError(f"{goal} is the file itself, or a part of it: name another one for the copy")
    if goal.exists() and not force:
        raise UsageError(f"{goal} is there: name another file, or say --force to replace it")
    for end in ("-wal", "-journal"):
        beside = Path(f"{goal}{end}")
        if beside.exists() and beside.stat().st_size:
            # SQLite would take it for a part of the copy, and mix the two.
            raise UsageError(
                f"{beside} belongs to a database that is lived in, or died: name another file for the copy"
            )


def part_of(goal: Path) -> Path:
    """Where a file is made before it gets its name; what killed processes left there is cleared away."""
    goal.parent.mkdir(parents=True, exist_ok=True)
    for left in goal.parent.glob(f".{goal.name}.*.part*"):
        pid = left.name.removeprefix(f".{goal.name}.").partition(".")[0]
        if pid.isdigit() and lease.gone(int(pid)):
            left.unlink(missing_ok=True)
    part = goal.parent / f".{goal.name}.{os.getpid()}.part"
    part.unlink(missing_ok=True)
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    return part


def publish(part: Path, goal: Path, mode: int) -> None:
    """Give a file its name once it is on disk, and put the name on disk."""
    part.chmod(mode)
    _sync(part)
    part.replace(goal)
    with contextlib.suppress(OSError):  # Windows does not open directories
        _sync(goal.parent)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
