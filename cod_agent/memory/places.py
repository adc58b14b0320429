"""What the system says of the place where a file lies: its file system, who reads the file, who keeps it from being written.

Empty where the system says nothing.
"""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path

from cod_agent.memory.database import fcntl

NETWORK = {
    *("nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "lustre", "beegfs", "gpfs"),
    *("9p", "virtiofs", "vboxsf", "prl_fs", "vmhgfs", "drvfs", "orangefs"),
    *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.glusterfs", "fuse.ceph", "fuse.vmhgfs-fuse"),
}
"""File systems whose locks end at the machine, or nowhere."""

_FIRST_READER, _LAST_READER = 123, 127
"""The bytes of FILE-shm that connections hold while they read a state of the file (SQLite's WAL_READ_LOCK)."""
_BESIDE = ("-wal", "-shm", "-journal", ".lock")
"""How the files that belong to a run database end."""


def is_part(file: Path, of: Path) -> bool:
    """Whether a file is a run database, or belongs to it: nothing else may be written there. Symbolic links are followed."""
    return file.resolve() in {
        path for base in (of.absolute(), of.resolve()) for path in (base, *(Path(f"{base}{end}") for end in _BESIDE))
    }


def mounted(file: Path, table: Path = Path("/proc/self/mounts")) -> tuple[str, list[str]]:
    """Type and options of the file system that a file lies on."""
    best, found = -1, ("", list[str]())
    where = file.resolve()
    for line in _lines(table):
        _, point, kind, options, *_ = line.split(" ")
        at = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        if where.is_relative_to(at) and len(at.parts) >= best:  # of two at one place, the later covers the earlier
            best, found = len(at.parts), (kind, options.split(","))
    return found


def readers(file: Path, table: Path = Path("/proc/locks")) -> list[str]:
    """The processes that hold a state of a file in WAL mode, as "process 12 (python)"."""
    shared = Path(f"{file}-shm")
    if not shared.exists():
        return []
    inode, found = shared.stat().st_ino, set[int]()
    for line in _lines(table):
        said = re.search(r"POSIX +ADVISORY +READ +(\d+) +\S+:(\d+) +(\d+) ", line)
        if said and int(said[2]) == inode and _FIRST_READER <= int(said[3]) <= _LAST_READER:
            found.add(int(said[1]))
    return [f"process {pid} ({_name(pid)})" for pid in sorted(found)]


def keeps_turn(file: Path, seconds: float, table: Path = Path("/proc/locks")) -> str:
    """Who has had the turn of writing (FILE.lock) for so long; "" if nobody."""
    lock = Path(f"{file}.lock")
    if fcntl is None or not lock.exists():
        return ""
    until = time.monotonic() + seconds
    with lock.open() as opened:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return ""
            time.sleep(0.01)
    for line in _lines(table):
        said = re.match(r"\d+: FLOCK +ADVISORY +WRITE +(\d+) +\S+:(\d+) ", line)
        if said and int(said[2]) == lock.stat().st_ino:
            return f"process {said[1]} ({_name(int(said[1]))})"
    return "a process"


def _name(pid: int) -> str:
    return next(iter(_lines(Path(f"/proc/{pid}/comm"))), "?")


def _lines(table: Path) -> list[str]:
    try:
        return table.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
