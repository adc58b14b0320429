"""A layer between SQLite and the operating system, by ctypes: each write, sync, truncation and deletion is a point, may fail, and
can be kept for `power` to play back.

SQLite reaches files through a table of functions, its VFS. This one is a copy of the default, whose files write through us first.
It is the very SQLite of Python's `sqlite3`, not another one.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crash.points import reach

OK, FULL, IOERR_WRITE, IOERR_FSYNC, IOERR_TRUNCATE = 0, 13, 778, 1034, 1546
_CREATED_JOURNALS = 0x800 | 0x80000
"""SQLITE_OPEN_MAIN_JOURNAL, SQLITE_OPEN_WAL: files whose first sync includes their directory."""

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_OPEN = ctypes.CFUNCTYPE(_I, _P, _P, _P, _I, _P)
_DELETE = ctypes.CFUNCTYPE(_I, _P, ctypes.c_char_p, _I)
_WRITE = ctypes.CFUNCTYPE(_I, _P, _P, _I, _L)
_TRUNCATE = ctypes.CFUNCTYPE(_I, _P, _L)
_SYNC = ctypes.CFUNCTYPE(_I, _P, _I)


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("version", _I),
        ("os_file", _I),
        ("longest", _I),
        ("next", _P),
        ("name", ctypes.c_char_p),
        ("data", _P),
    ]
    _fields_ += [("open", _P), ("delete", _P), *((f"rest{n}", _P) for n in range(14))]


class _Methods(ctypes.Structure):
    _fields_ = [("version", _I), ("close", _P), ("read", _P), ("write", _P), ("truncate", _P), ("sync", _P)]
    _fields_ += [(f"rest{n}", _P) for n in range(13)]


class Op(NamedTuple):
    """What happened to a file."""

    what: str
    """open (it was made), write, truncate, sync, delete; or said: a line of the life's own."""
    path: str
    at: int = 0
    """The offset of a write, the size after a truncation, for a sync whether the directory was synced with it."""
    data: bytes = b""


class Disk:
    """The layer, once `install`ed: `ops`, if set to a list, is told what happens; `fault(op)` may give an error code."""

    def __init__(self) -> None:
        self.ops: list[Op] | None = None
        self.fault: Callable[[Op], int] | None = None
        self._files: dict[int, tuple[str, int]] = {}
        self._kept: list[Any] = []
        self._tables: dict[int, tuple[_Methods, Any]] = {}

    def install(self) -> None:
        """Raises: AttributeError, where Python's SQLite hides its functions."""
        import _sqlite3

        if self._kept:
            return
        sqlite = ctypes.CDLL(_sqlite3.__file__)
        find = sqlite.sqlite3_vfs_find
        find.restype = _P
        plain = find(None)
        vfs = _Vfs()
        ctypes.memmove(ctypes.byref(vfs), plain, ctypes.sizeof(vfs))
        vfs.name = b"crash"
        inner_open, inner_delete = _OPEN(vfs.open), _DELETE(vfs.delete)

        def opened(_: int, name: int | None, file: int, flags: int, out: int) -> int:
            # The name is handed on where it is: SQLite keeps no copy of it.
            path = ctypes.string_at(name).decode() if name else ""
            made = bool(path) and not Path(path).exists()
            if path:
                reach("open")
            code = inner_open(plain, name, file, flags, out)
            if code == OK and path:
                self._files[file] = (path, flags & _CREATED_JOURNALS if made else 0)
                if made:
                    self._tell(Op("open", path))
                self._hook(file)
            return int(code)

        def deleted(_: int, name: bytes, synced: int) -> int:
            op = Op("delete", name.decode(), synced)
            reach("delete")
            code = self._check(op) or inner_delete(plain, name, synced)
            if code == OK:
                self._tell(op)
            return int(code)

        self._kept += [vfs, _OPEN(opened), _DELETE(deleted)]
        vfs.open, vfs.delete = (ctypes.cast(f, _P).value for f in self._kept[1:3])
        sqlite.sqlite3_vfs_register(ctypes.byref(vfs), 1)

    def say(self, line: str) -> None:
        """A line between the operations: what the life knew then."""
        self._tell(Op("said", line))

    def _tell(self, op: Op) -> None:
        if self.ops is not None:
            self.ops.append(op)

    def _check(self, op: Op) -> int:
        return self.fault(op) if self.fault is not None else OK

    def _hook(self, file: int) -> None:
        """Have the file's writes, truncations and syncs go through us: its table of functions is replaced by a copy of ours."""
        table = ctypes.cast(file, ctypes.POINTER(_P))
        known = int(table[0] or 0)
        if known not in self._tables:
            methods = _Methods()
            ctypes.memmove(ctypes.byref(methods), known, ctypes.sizeof(methods))
            self._tables[known] = (methods, self._replaced(methods))
        table[0] = ctypes.addressof(self._tables[known][0])

    def _replaced(self, methods: _Methods) -> Any:
        write, truncate, sync = _WRITE(methods.write), _TRUNCATE(methods.truncate), _SYNC(methods.sync)

        def done(op: Op, really: Callable[[], int]) -> int:
            reach(op.what)
            code = self._check(op) or really()
            if code == OK:
                self._tell(op)
            return int(code)

        def written(file: int, data: int, amount: int, offset: int) -> int:
            op = Op("write", self._files[file][0], offset, ctypes.string_at(data, amount))
            return done(op, lambda: write(file, data, amount, offset))

        def truncated(file: int, size: int) -> int:
            return done(Op("truncate", self._files[file][0], size), lambda: truncate(file, size))

        def synced(file: int, flags: int) -> int:
            path, made = self._files[file]
            self._files[file] = (path, 0)
            return done(Op("sync", path, int(bool(made))), lambda: sync(file, flags))

        kept = (_WRITE(written), _TRUNCATE(truncated), _SYNC(synced))
        methods.write, methods.truncate, methods.sync = (ctypes.cast(f, _P).value for f in kept)
        return kept


DISK = Disk()


@contextlib.contextmanager
def failing(first: int, last: float, full: bool) -> Iterator[None]:
    """The writes and syncs from the first-th to before the last-th fail: a full disk, or I/O errors."""
    codes = {"sync": IOERR_FSYNC, "truncate": IOERR_TRUNCATE}
    seen = 0

    def fault(op: Op) -> int:
        nonlocal seen
        if op.what == "delete" or (full and op.what != "write"):
            return OK
        seen += 1
        return (FULL if full else codes.get(op.what, IOERR_WRITE)) if first <= seen < last else OK

    DISK.fault = fault
    try:
        yield
    finally:
        DISK.fault = None
