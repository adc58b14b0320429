"""Open a run database to look at it: nothing in it is made, migrated, locked or written, and a process that lives in it goes
on. A file of an older schema is read through a private copy that is migrated, so that its own program can still open it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from cod_agent.errors import NotADatabase, UsageError
from cod_agent.memory import schema
from cod_agent.memory.database import translate


@contextlib.contextmanager
def look(path: str | Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the file, from the first question to the last.

    Raises:
        UsageError: there is no such file.
        NotADatabase, SchemaTooNew, StoreError: see `cod_agent.errors`.
    """
    try:
        with contextlib.closing(connect(path)) as conn:
            if schema.check(conn, str(path)):
                conn.execute("BEGIN")
                yield conn
            elif not conn.execute("PRAGMA user_version").fetchone()[0]:
                raise NotADatabase(f"{path} is empty: nothing was recorded in it yet")
            else:
                with contextlib.closing(_migrated(conn)) as copy:
                    yield copy
    except sqlite3.Error as error:
        raise translate(error, str(path)) from error


def connect(path: str | Path) -> sqlite3.Connection:
    """A connection that cannot write, to a file that may be anything.

    Raises:
        UsageError: there is no such file.
    """
    file = Path(path)
    if not file.is_file():
        if file.is_dir():
            raise UsageError(f"{path} is a directory, not a run database: check the path")
        raise UsageError(f"there is no file {path}: check the path")
    return sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)


def _migrated(conn: sqlite3.Connection) -> sqlite3.Connection:
    """A copy without a name: in memory, and in a temporary file as far as it does not fit; gone when it is closed."""
    copy = sqlite3.connect("", isolation_level=None)
    try:
        conn.backup(copy)
        schema.migrate(copy)
        copy.execute("PRAGMA query_only = ON")
    except BaseException:
        copy.close()
        raise
    return copy
