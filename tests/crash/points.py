"""Points: the moments before and after everything a process does to the outside. A process can be told to end at the n-th.

The store's points are made here, by a connection that tells of its statements; the others call `reach` themselves.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

reached = 0
"""How many points this process came by."""

kinds: Counter[str] = Counter()
"""How many of each kind, the first word of what `reach` was told."""

committed: tuple[Callable[[Sequence[int]], object], Sequence[str]] | None = None
"""(who is told after each commit of the store how many rows there are, in which tables)."""

_connect: Any = None
_dies = 0
_fails = 0
_until = 0
_said = ""


def order(dies: int = 0, fails: tuple[int, int, str] | None = None) -> None:
    """Begin to count.

    Args:
        dies: the process kills itself with SIGKILL at this point; 0: it does not.
        fails: (from, to, words): statements in this range of points raise an `OperationalError` that says so.
    """
    global reached, _dies, _fails, _until, _said
    reached, _dies, (_fails, _until, _said) = 0, dies, fails or (0, 0, "")
    kinds.clear()


def reach(what: str) -> None:
    """The process is at a point."""
    global reached
    reached += 1
    kinds[what.split()[0]] += 1
    if reached == _dies:
        os.kill(os.getpid(), signal.SIGKILL)


class Connection(sqlite3.Connection):
    """What `sqlite3.connect` gives in a life that is watched: before each statement is a point, and after each that writes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        super().execute("PRAGMA wal_autocheckpoint = 100")  # so that a short life has checkpoints in its middle

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        reach("read" if sql.startswith("SELECT") else "statement")
        if _fails <= reached < _until and sql != "ROLLBACK":
            raise sqlite3.OperationalError(_said)
        done = super().execute(sql, *values)
        if not sql.startswith("SELECT"):  # after one that only reads, nothing differs from before the next
            reach("statement")
        if sql == "COMMIT" and committed is not None:
            told, table_names = committed
            made = {name for (name,) in super().execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            counts = (super(Connection, self).execute(f"SELECT count(*) FROM {name}") for name in table_names)
            told([count.fetchone()[0] for count in counts] if made.issuperset(table_names) else [0] * len(table_names))
        return done

    def rollback(self) -> None:
        reach("statement")
        super().rollback()


def watch_store() -> None:
    """From now on, connections of this process are watched."""
    global _connect
    if _connect is not None:
        return
    connect = _connect = sqlite3.connect

    def watched(*args: Any, **options: Any) -> sqlite3.Connection:
        return connect(*args, **{"factory": Connection, **options})

    sqlite3.connect = watched  # type: ignore[assignment]
