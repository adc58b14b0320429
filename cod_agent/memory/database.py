"""One file, one writer: every read and write of a process goes through one connection on one thread.

Writers hand over functions; whatever waits when the thread gets round to it is committed together, in one `BEGIN IMMEDIATE`
transaction with a savepoint each, so that many agents share one fsync and one agent's mistake rolls back alone. `write` returns
when its transaction is on disk (synchronous=FULL, unless the file was opened with durable=False).

SQLite 3.7.0 to 3.51.2 (but 3.44.6 and 3.50.7) can corrupt a file in WAL mode when two connections write or checkpoint at the
same instant (the "WAL-reset" fault). On those versions the writers of all processes take turns by a lock on FILE.lock,
around the whole transaction and the checkpoint inside its commit, so that the instant cannot occur; where the system has no
such locks, the file is put in rollback-journal mode instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from cod_agent.errors import CodError, NotADatabase, StoreBusy, StoreError, StoreFull
from cod_agent.memory import schema

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]

_Settle = Callable[[Any, BaseException | None], None]
_Item = tuple[Job[Any], bool, _Settle]

BUSY_SECONDS = 30.0
_LARGEST_BATCH = 256


def wal_fault(version: tuple[int, ...] = sqlite3.sqlite_version_info) -> bool:
    """Whether this SQLite has the WAL-reset fault."""
    mended = (3, 44, 6) <= version < (3, 45, 0) or (3, 50, 7) <= version < (3, 51, 0) or version >= (3, 51, 3)
    return version >= (3, 7, 0) and not mended


def translate(error: sqlite3.Error, path: str) -> CodError:
    """What a SQLite error means to a user, as one of ours."""
    said = str(error)
    if "locked" in said or "busy" in said:
        return StoreBusy(f"{path} was locked by another program for {BUSY_SECONDS:g} s: close it, then resume ({said})")
    if any(word in said for word in ("full", "readonly", "read-only", "I/O", "unable to open")):
        return StoreFull(
            f"{path} cannot be written ({said}): free space or mend its permissions, then resume; what was recorded is safe"
        )
    if any(word in said for word in ("not a database", "malformed", "encrypted")):
        return NotADatabase(f"{path} is not a run database, or is damaged ({said}): check the path, or restore a backup")
    return StoreError(f"{path}: {said}")


class Memory:
    """The run database of a process. Open it once and share it: `Memory.open(path)` gives the same one for the same file.

    Args:
        path: where the file is, made if absent.
        durable: fsync at each commit (synchronous=FULL). False survives a killed process but not a power cut.

    Raises:
        NotADatabase, SchemaTooNew, StoreBusy, StoreFull: see `cod_agent.errors`.
    """

    _open: dict[str, Memory] = {}
    _registry = threading.Lock()

    def __init__(self, path: str | Path, *, durable: bool = True) -> None:
        self.path = str(path)
        self.durable = durable
        self.cache: dict[bytes, int] = {}
        """Row ids of content already stored (messages and heads by hash); only touched on the writer thread."""
        self._uses = 1
        self._jobs: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._serve, args=(opened,), name=f"memory {self.path}", daemon=True)
        self._thread.start()
        opened.result()

    @classmethod
    def open(cls, path: str | Path, *, durable: bool = True) -> Memory:
        """The process's one `Memory` of this file; each `open` wants a `close`."""
        key = os.path.realpath(path)
        with cls._registry:
            memory = cls._open.get(key)
            if memory is None:
                memory = cls._open[key] = cls(path, durable=durable)
            else:
                memory._uses += 1
            return memory

    def close(self) -> None:
        """Finish what waits and close the file, once every `open` is closed."""
        with self._registry:
            self._uses -= 1
            if self._uses:
                return
            for key in [key for key, memory in self._open.items() if memory is self]:
                del self._open[key]
        self._jobs.put(None)
        self._thread.join()

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; returns once it is on disk.

        Raises:
            StoreBusy, StoreFull: nothing of the job is stored.
        """
        return await self._ask(job, True)

    async def read(self, job: Job[T]) -> T:
        """Run `job` outside of a transaction of its own; it must not write."""
        return await self._ask(job, False)

    def write_sync(self, job: Job[T]) -> T:
        """`write` for code without an event loop."""
        return self._wait(job, True)

    def read_sync(self, job: Job[T]) -> T:
        """`read` for code without an event loop."""
        return self._wait(job, False)

    def _wait(self, job: Job[T], writes: bool) -> T:
        future: Future[T] = Future()

        def settle(value: Any, error: BaseException | None) -> None:
            future.set_result(value) if error is None else future.set_exception(error)

        self._jobs.put((job, writes, settle))
        return future.result()

    async def _ask(self, job: Job[T], writes: bool) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            # The loop may be gone: its owner was stopped while the commit was on its way. The commit stands.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_resolve, future, value, error)

        self._jobs.put((job, writes, settle))
        return await future

    # ---- the writer thread ----

    def _serve(self, opened: Future[None]) -> None:
        try:
            conn = self._connect()
        except sqlite3.Error as error:
            opened.set_exception(translate(error, self.path))
            return
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        while (item := self._jobs.get()) is not None:
            batch = [item]
            while item[1] and len(batch) < _LARGEST_BATCH and not self._jobs.empty():
                following = self._jobs.get()
                if following is None:
                    self._jobs.put(None)
                    break
                batch.append(following)
            self._commit(conn, batch)
        with contextlib.suppress(sqlite3.Error), self._turn():
            conn.close()

    def _connect(self) -> sqlite3.Connection:
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        conn = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            current = schema.check(conn, self.path)
            with self._lock_file() if not current or wal_fault() else contextlib.nullcontext():
                rollback = wal_fault() and fcntl is None
                conn.execute(f"PRAGMA journal_mode = {'TRUNCATE' if rollback else 'WAL'}").fetchone()
                if not schema.check(conn, self.path):
                    schema.migrate(conn)
            conn.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'NORMAL'}")
            conn.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            conn.close()
            raise
        self._guard = open(f"{self.path}.lock", "a") if wal_fault() and fcntl else None  # noqa: SIM115 (held while the file is open)
        return conn

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with open(f"{self.path}.lock", "a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if self._guard is None:
            yield
            return
        fcntl.flock(self._guard, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_UN)

    def _commit(self, conn: sqlite3.Connection, batch: list[_Item]) -> None:
        results: list[tuple[_Settle, Any, BaseException | None]] = []
        if not any(writes for _, writes, _ in batch):
            results = [(settle, *_attempt(job, conn)) for job, _, settle in batch]
        else:
            try:
                with self._turn():
                    conn.execute("BEGIN IMMEDIATE")
                    if len(batch) == 1:
                        results = [(batch[0][2], batch[0][0](conn), None)]
                    else:
                        results = [(settle, *self._savepoint(conn, job)) for job, _, settle in batch]
                    conn.execute("COMMIT")
            except BaseException as error:
                if conn.in_transaction:
                    conn.execute("ROLLBACK")
                self.cache.clear()
                results = [(settle, None, error) for _, _, settle in batch]
        for settle, value, error in results:
            settle(value, translate(error, self.path) if isinstance(error, sqlite3.Error) else error)

    def _savepoint(self, conn: sqlite3.Connection, job: Job[Any]) -> tuple[Any, BaseException | None]:
        conn.execute("SAVEPOINT job")
        value, error = _attempt(job, conn)
        if error is not None:
            # Full disks and the like end the transaction by themselves; then the whole batch fails, at COMMIT.
            if not conn.in_transaction:
                raise error
            conn.execute("ROLLBACK TO job")
            self.cache.clear()
        conn.execute("RELEASE job")
        return value, error


def _resolve(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():  # cancelled meanwhile
        return
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)


def _attempt(job: Job[Any], conn: sqlite3.Connection) -> tuple[Any, BaseException | None]:
    try:
        return job(conn), None
    except BaseException as error:
        return None, error
