"""One file, one connection per process: transactions that agents of one event loop ask for together are committed together.

Writers hand over functions. What was asked for in the same turn of the loop becomes one `BEGIN IMMEDIATE` transaction with a
savepoint each, so that many agents share one fsync and one agent's mistake rolls back alone. `write` returns when its
transaction is on disk (synchronous=FULL, unless the file was opened with durable=False). A commit is made right on the loop's
thread, which is several times cheaper than handing it to another; where the disk is slow, or another process has the lock, a
worker thread waits instead of the loop, and whatever is asked for meanwhile forms the next transaction.

SQLite 3.7.0 to 3.51.2 (but 3.44.6 and 3.50.7) can corrupt a file in WAL mode when two connections write or checkpoint at the
same instant (the "WAL-reset" fault). On those versions the writers of all processes take turns by a lock on FILE.lock,
around the whole transaction and the checkpoint inside its commit, so that the instant cannot occur; where the system has no
such locks, the file is put in rollback-journal mode instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

from cod_agent.errors import CodError, NotADatabase, StoreBusy, StoreError, StoreFull
from cod_agent.memory import schema

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Job = Callable[[sqlite3.Connection], T]
_Result = tuple[Any, BaseException | None]

BUSY_SECONDS = 30.0
WAL_LIMIT = 16_000_000
"""Bytes of FILE-wal that are enough. It grows beyond while somebody reads an old state: no write waits for that for long."""
_SHRINK_MS, _PATIENCE_MS = 25, 3200
"""How long a large WAL waits for readers: for each `WAL_LIMIT` of its size, and at most. All writers wait with it."""
_LARGEST_BATCH = 256
_SLOW_SECONDS = 0.005
"""A commit that took longer than this on average sends the next ones to a worker thread."""


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
        return NotADatabase(
            f"{path} is not a run database, or is damaged ({said}): check the path, or restore a backup"
        )
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
        """Row ids of content already stored (messages and heads by hash); only touched inside a job."""
        self._stones: int | None = None
        """The newest tombstone when `cache` was last known to be right."""
        self._uses = 1
        self._lock = threading.Lock()
        # By event loop, as locks belong to one and the sync twins bring a new one each time; a lock is there while anybody has it.
        self._locks: WeakKeyDictionary[asyncio.AbstractEventLoop, WeakValueDictionary[str, asyncio.Lock]] = (
            WeakKeyDictionary()
        )
        self._queues: dict[asyncio.AbstractEventLoop, _Queue] = {}
        self._commit_seconds = 0.0
        self._large_wal = 0
        """Bytes of the WAL when it could not be emptied; 0: SQLite's own checkpoints keep it small."""
        self._waited_at = 0
        """Bytes of the WAL when readers were last waited for."""
        self._guard: Any = None
        try:
            self._conn = self._connect()
        except sqlite3.Error as error:
            raise translate(error, self.path) from error
        except OSError as error:
            raise StoreFull(
                f"{self.path} cannot be opened ({error}): choose another place, or mend its permissions"
            ) from error

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
        """Close the file, once every `open` is closed. Writes that were awaited are on disk already."""
        with self._registry:
            self._uses -= 1
            if self._uses != 0:
                return
            for key in [key for key, memory in self._open.items() if memory is self]:
                del self._open[key]
        with self._lock, contextlib.suppress(sqlite3.Error), self._turn():
            self._conn.close()
        if self._guard is not None:
            self._guard.close()

    async def write(self, job: Job[T]) -> T:
        """Run `job` in a transaction; returns once it is on disk.

        Who is cancelled meanwhile hears of it when the job is done: it is under way, and cannot be called back. If it failed, the
        `CancelledError` names as its cause why.

        Raises:
            StoreBusy, StoreFull: nothing of the job is stored.
        """
        self._check_open()
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            # Loops come and go (the sync twins bring one each): forget those that are over.
            self._queues = {known: kept for known, kept in self._queues.items() if not known.is_closed()}
            queue = self._queues[loop] = _Queue(self, loop)
        asked = queue.ask(job)
        try:
            return await asked
        except asyncio.CancelledError as cut:
            raise cut from asked.exception()

    async def read(self, job: Job[T]) -> T:
        """Run `job` outside of a transaction of its own; it must not write."""
        return self.read_sync(job)

    def lock(self, name: str) -> asyncio.Lock:
        """A lock that agents of this process share: a lease keeps other processes away, not another agent of this one."""
        locks = self._locks.setdefault(asyncio.get_running_loop(), WeakValueDictionary())
        return locks.setdefault(name, asyncio.Lock())

    def write_sync(self, job: Job[T]) -> T:
        """`write` for code without an event loop."""
        ((value, error),) = self._commit([job])
        if error is not None:
            raise error
        return value

    def read_sync(self, job: Job[T]) -> T:
        """`read` for code without an event loop."""
        with self._lock:
            self._check_open()
            try:
                return job(self._conn)
            except sqlite3.Error as error:
                raise translate(error, self.path) from error

    def vacuum(self) -> None:
        """Write the file anew, without what was taken out of it, and give the room back; other writers wait meanwhile.

        Raises:
            StoreBusy, StoreFull: it needs as much free space again as it has pages in use; nothing is changed then.
        """
        with self._lock:
            self._check_open()
            try:
                with self._turn():
                    self._conn.execute("VACUUM")
                    # Somebody who reads an older state may go on for long: the log is emptied when they have gone.
                    self._conn.execute("PRAGMA busy_timeout = 500")
                    self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error as error:
                raise translate(error, self.path) from error
            finally:
                self._conn.execute(f"PRAGMA busy_timeout = {int(BUSY_SECONDS * 1000)}")

    # ---- inside ----

    def _connect(self) -> sqlite3.Connection:
        if self.path.startswith((":", "file:")):
            raise NotADatabase(f"{self.path!r} is no path: a memory is a file, so that it outlives the process")
        if Path(self.path).is_dir():
            raise NotADatabase(f"{self.path} is a directory: name a file in it")
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        if Path(self.path).is_file() and 0 < Path(self.path).stat().st_size < 512:
            # SQLite takes what is shorter than its smallest page for an empty file, and would overwrite it.
            raise sqlite3.DatabaseError("file is not a database")
        # What agents saw is nobody else's: SQLite gives what it puts beside the file the same mode.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        conn = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            current = schema.check(conn, self.path)
            with self._lock_file() if not current or wal_fault() else contextlib.nullcontext():
                rollback = wal_fault() and fcntl is None
                conn.execute(f"PRAGMA journal_mode = {'TRUNCATE' if rollback else 'WAL'}").fetchone()
                if not schema.check(conn, self.path):
                    schema.migrate(conn)
            conn.execute(f"PRAGMA synchronous = {'FULL' if self.durable else 'NORMAL'}")
            conn.execute("PRAGMA foreign_keys = ON")
            conn.execute(f"PRAGMA journal_size_limit = {WAL_LIMIT}").fetchone()
            if wal_fault() and fcntl is not None:
                self._guard = self._lock_opened()  # held while the file is open
        except BaseException:
            conn.close()
            raise
        return conn

    def _check_open(self) -> None:
        if self._uses <= 0:
            raise StoreError(f"{self.path} was closed by this program: open it again with Memory.open")

    def _lock_opened(self) -> IO[str]:
        """FILE.lock, made if absent, for whoever may write the file itself."""
        mode = stat.S_IMODE(os.stat(self.path).st_mode)
        return open(f"{self.path}.lock", "a", opener=lambda path, flags: os.open(path, flags, mode))

    @contextlib.contextmanager
    def _lock_file(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with self._lock_opened() as held:
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

    def _free(self) -> bool:
        """Whether a commit can be made on the loop's thread without keeping it waiting."""
        if self._commit_seconds > _SLOW_SECONDS or self._lock.locked():
            return False
        if self._guard is None:
            return True
        try:
            fcntl.flock(self._guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True  # `_turn` takes it again, which is free for who has it
        except (OSError, ValueError):  # another process has it; or the file was closed, which `_commit` says
            return False

    def _commit(self, jobs: list[Job[Any]]) -> list[_Result]:
        """One transaction of all jobs: their results, or the error that kept each from being stored."""
        with self._lock:
            conn, started = self._conn, time.perf_counter()
            try:
                self._check_open()
                with self._turn():
                    conn.execute("BEGIN IMMEDIATE")
                    results: list[_Result] = (
                        [(self._do(conn, jobs[0]), None)]
                        if len(jobs) == 1
                        else [self._savepoint(conn, job) for job in jobs]
                    )
                    conn.execute("COMMIT")
                    self._shrink(conn)
            except BaseException as error:
                with contextlib.suppress(sqlite3.Error):  # closed, or the disk is gone altogether
                    conn.rollback()
                self.cache.clear()
                results = [(None, error)] * len(jobs)
            self._commit_seconds += 0.1 * (time.perf_counter() - started - self._commit_seconds)
        return [(value, translate(e, self.path) if isinstance(e, sqlite3.Error) else e) for value, e in results]

    def _shrink(self, conn: sqlite3.Connection) -> None:
        """Readers that follow each other without a gap would keep the WAL from ever beginning anew. One that is large is emptied as soon
        as nobody reads; each time it has doubled, readers are waited for, the longer the larger it is. In between nothing is tried: it
        would cost each commit two fsyncs."""
        with contextlib.suppress(OSError, sqlite3.Error):  # the transaction is on disk, whatever comes of this
            size, before = os.stat(f"{self.path}-wal").st_size, self._large_wal
            if size > before + WAL_LIMIT:
                doubled = size > 2 * self._waited_at
                self._waited_at = size if doubled else self._waited_at
                patience = min(size // WAL_LIMIT * _SHRINK_MS, _PATIENCE_MS) if doubled else 0
                conn.execute(f"PRAGMA busy_timeout = {patience}").fetchone()
                busy = conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                conn.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}").fetchone()
                self._large_wal = size if busy else 0
            elif size < before:  # another process had more luck
                self._large_wal = 0
            if bool(self._large_wal) != bool(before):
                conn.execute(f"PRAGMA wal_autocheckpoint = {0 if self._large_wal else 1000}").fetchone()
                self._waited_at = self._waited_at if self._large_wal else 0

    def _do(self, conn: sqlite3.Connection, job: Job[Any]) -> Any:
        stones = conn.execute("SELECT max(id) FROM tombstones").fetchone()[0]
        if stones != self._stones:  # texts were taken out, by whomever: who says them again stores them again
            self._stones = stones
            self.cache.clear()
        return job(conn)

    def _savepoint(self, conn: sqlite3.Connection, job: Job[Any]) -> _Result:
        conn.execute("SAVEPOINT job")
        try:
            value = self._do(conn, job)
        except BaseException as error:
            # Full disks and the like end the transaction by themselves; then the whole batch fails.
            if not conn.in_transaction:
                raise
            conn.execute("ROLLBACK TO job")
            self.cache.clear()
            conn.execute("RELEASE job")
            return None, error
        conn.execute("RELEASE job")
        return value, None


class _Asked(asyncio.Future[T]):
    """A write that was asked for. Whoever awaits it may be cancelled and is told so when it is done."""

    def cancel(self, msg: Any = None) -> bool:
        return False


class _Queue:
    """The writes one event loop asks for."""

    def __init__(self, memory: Memory, loop: asyncio.AbstractEventLoop) -> None:
        self._memory, self._loop = memory, loop
        self._waiting: list[tuple[Job[Any], _Asked[Any]]] = []
        self._busy = False
        """Whether a flush is scheduled, or under way on the worker."""
        self._worker: ThreadPoolExecutor | None = None

    def ask(self, job: Job[T]) -> _Asked[T]:
        asked: _Asked[T] = _Asked(loop=self._loop)
        self._waiting.append((job, asked))
        if not self._busy:
            self._busy = True
            self._loop.call_soon(self._flush)
        return asked

    def _flush(self) -> None:
        batch, self._waiting = self._waiting[:_LARGEST_BATCH], self._waiting[_LARGEST_BATCH:]
        jobs = [job for job, _ in batch]
        if self._memory._free():
            self._settle(batch, self._memory._commit(jobs))
        else:
            self._worker = self._worker or ThreadPoolExecutor(1, "cod-memory")
            working = self._loop.run_in_executor(self._worker, self._memory._commit, jobs)
            working.add_done_callback(lambda done: self._settle(batch, done.result()))

    def _settle(self, batch: list[tuple[Job[Any], _Asked[Any]]], results: list[_Result]) -> None:
        self._busy = bool(self._waiting)
        if self._waiting:
            self._loop.call_soon(self._flush)
        for (_, asked), (value, error) in zip(batch, results, strict=True):
            if error is None:
                asked.set_result(value)
            else:
                asked.set_exception(error)
