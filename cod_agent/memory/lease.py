"""A lease keeps two processes from living the same run.

It is a row with an expiry that the living process renews with its commits. A process that finds the row of another one
waits for nobody: it takes over at once if that process is provably dead (same machine, its pid gone), or once the lease has
expired; otherwise it is refused. Whoever lost its lease finds out at its next commit, inside the transaction, and stops.

The expiry is kept by two clocks. Between processes of one boot of one machine the steady clock decides, which nobody sets; only
where that says nothing, as after a reboot, the time of day does. A clock that was set may end a lease early then, which loses
nothing, but never lengthens it: what seems to last longer than a lease can is over.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import time
import uuid
from pathlib import Path

from cod_agent.errors import RunLeased

SECONDS = 60.0
"""How long a silent process keeps its run. Renewed at the first commit after half of it, and by a timer in between."""

OWNER = uuid.uuid4().hex


def _host() -> str:
    try:  # containers may share a host name, and have process ids of their own: a pid says something only among equals
        with open("/proc/sys/kernel/random/boot_id") as boot:
            return f"{socket.gethostname()}/{boot.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


HOST = _host()


def take(conn: sqlite3.Connection, run_id: int, agent: str, run: str) -> None:
    """Take the run's lease, or take it over from a dead process.

    Raises:
        RunLeased: another process lives the run.
    """
    row = conn.execute("SELECT owner, host, pid, expires, steady FROM leases WHERE run_id = ?", (run_id,)).fetchone()
    if row is not None and row[0] != owner():
        _, host, pid, expires, steady = row
        rest = left(host, expires, steady)
        if rest and not (host == HOST and gone(pid)):
            raise RunLeased(
                f"run {run!r} of agent {agent!r} is being lived by process {pid} on {host.split('/')[0]}: stop it, or wait "
                f"{rest:.0f} s if it is dead, then try again"
            )
    conn.execute(
        "INSERT OR REPLACE INTO leases (run_id, owner, host, pid, expires, steady) VALUES (?, ?, ?, ?, ?, ?)",
        (run_id, owner(), HOST, os.getpid(), *_ends()),
    )


def ours(conn: sqlite3.Connection, run_id: int) -> bool:
    """Whether nobody took the run since we did."""
    row = conn.execute("SELECT owner FROM leases WHERE run_id = ?", (run_id,)).fetchone()
    return row is not None and row[0] == owner()


def hold(conn: sqlite3.Connection, run_id: int) -> None:
    """Make sure the lease is still ours, and renew it when half of it is gone.

    Raises:
        RunLeased: another process took it.
    """
    row = conn.execute("SELECT owner, host, expires, steady FROM leases WHERE run_id = ?", (run_id,)).fetchone()
    if row is None or row[0] != owner():
        raise RunLeased(
            "this process was silent for so long that another one took over its run; nothing was overwritten"
        )
    if left(*row[1:]) < SECONDS / 2:
        conn.execute("UPDATE leases SET expires = ?, steady = ? WHERE run_id = ?", (*_ends(), run_id))


def release(conn: sqlite3.Connection, run_id: int) -> None:
    conn.execute("DELETE FROM leases WHERE run_id = ? AND owner = ?", (run_id, owner()))


def owner() -> str:
    """This process, and not the one it was forked from."""
    return f"{OWNER}/{os.getpid()}"


def _ends() -> tuple[float, float]:
    """When a lease that is renewed now ends, by the time of day and by the steady clock."""
    return time.time() + SECONDS, time.monotonic() + SECONDS


def left(host: str, expires: float, steady: float | None) -> float:
    """Seconds a lease still has; 0: it is over, or its end makes no sense."""
    same_clock = steady is not None and _boot(host) == _boot(HOST)
    rest = steady - time.monotonic() if same_clock and steady is not None else expires - time.time()
    return rest if 0 < rest <= SECONDS else 0.0


def _boot(host: str) -> str:
    """What the processes of one boot of one machine have in common, whatever containers they are in."""
    return host.split("/")[1] if "/" in host else host


def gone(pid: int) -> bool:
    """Whether a process of this machine is dead."""
    try:
        os.kill(pid, 0)
        # One that is dead but was not waited for, as under a container's first process that waits for nobody, has its pid still.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:
        return False
