"""registry.db as a file: opened, asked, written in transactions, its paths relative to where it lies."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from cod_agent.errors import NotADatabase
from cod_agent.memory.database import translate
from cod_train.registry_schema import connect

T = TypeVar("T")


class RegistryFile:
    """One connection, shared by threads; processes take turns by SQLite's locks."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = Path(path).absolute()
        self._lock = threading.RLock()
        with self._translated():
            self._conn = connect(self.path, create=create)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; everything that was said is on disk already."""
        with self._lock:
            self._conn.close()

    def rows(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """What a question is answered with."""
        with self._lock, self._translated():
            return self._conn.execute(sql, values).fetchall()

    def write(self, job: Callable[[sqlite3.Connection], T]) -> T:
        """Run `job` in a transaction; returns once it is on disk."""
        with self._lock, self._translated():
            self._conn.execute("BEGIN IMMEDIATE")
            try:
                value = job(self._conn)
                self._conn.execute("COMMIT")
            except BaseException:
                self._conn.rollback()
                raise
            return value

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            found = translate(error, str(self.path))
            if isinstance(found, NotADatabase):
                said = f"{self.path} is no registry of checkpoints, or is damaged ({error}): check the path"
                found = NotADatabase(said)
            raise found from error

    def stored(self, path: Path) -> str:
        """A path below the registry's folder as seen from there, so that the whole can be moved."""
        here = self.path.parent.resolve()
        path = path.resolve()
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    def absolute(self, stored: str) -> Path:
        """The path that `stored` gave back."""
        return self.path.parent.resolve() / stored
