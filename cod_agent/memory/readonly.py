"""Open a run database to look at it: nothing is made, migrated, locked or written, and a process that lives in it goes
on.
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
    file = Path(path)
    if not file.is_file():
        if file.is_dir():
            raise UsageError(f"{path} is a directory, not a run database: check the path")
        raise UsageError(f"there is no file {path}: check the path")
    try:
        conn = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            if not schema.check(conn, str(path)):
                raise NotADatabase(f"{path} is empty: nothing was recorded in it yet")
            conn.execute("BEGIN")
            yield conn
        finally:
            conn.close()
    except sqlite3.Error as error:
        raise translate(error, str(path)) from error
