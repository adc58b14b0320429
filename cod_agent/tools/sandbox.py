"""Where a command runs: in a bubblewrap of its own, which sees the system's programs, one folder and nothing else.

    root            read-only: /usr and what little of /etc programs need; no home, no /var, no sockets, none of this machine's data
    the folder      readable and writable, at its own path
    /tmp, /dev/shm  empty, in memory, limited
    namespaces      processes, network, IPC, host name and users of its own: no network, no process of the machine to be seen
    environment     PATH, HOME, LANG, TMPDIR; nothing of this process's

The kernel is shared, and no system call is filtered: this keeps a mistaken or misled agent in its folder, not an attacker who
has a fault of the kernel. bubblewrap (https://github.com/containers/bubblewrap) does all of it; nothing here needs root.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from cod_agent.errors import UsageError

_SEEN = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_OF_ETC = ("alternatives", "ca-certificates", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl", "pki")
_OF_NETWORK = ("hosts", "nsswitch.conf", "resolv.conf")
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


def bubblewrap(folder: Path, readable: Sequence[Path], network: bool, tmp: int) -> list[str]:
    """The beginning of a command line that runs what follows it in a sandbox.

    Args:
        folder: absolute and resolved; the only place that lasts.
        readable: more of the machine to be seen, such as an interpreter's folder.
        network: share the machine's network, its abstract sockets included.
        tmp: size of /tmp and of /dev/shm, in bytes.
    """
    words = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    words += ["--hostname", "sandbox"]
    words += ["--share-net"] if network else []
    # Names, not numbers, of what may not be there: distributions differ.
    for path in _SEEN:
        if Path(path).is_symlink():
            words += ["--symlink", str(Path(path).readlink()), path]
        elif Path(path).exists():
            words += ["--ro-bind", path, path]
    for name in (*_OF_ETC, *(_OF_NETWORK if network else ())):
        words += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for more in readable:
        words += ["--ro-bind", str(more), str(more)]
    words += ["--proc", "/proc", "--dev", "/dev", "--size", str(tmp), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
    words += ["--size", str(tmp), "--tmpfs", "/tmp"]
    words += ["--bind", str(folder), str(folder), "--remount-ro", "/", "--chdir", str(folder)]
    for name, value in {**ENVIRONMENT, "HOME": str(folder), "TMPDIR": "/tmp"}.items():
        words += ["--setenv", name, value]
    return [*words, "--"]


@cache
def require_bubblewrap() -> None:
    """Raises: UsageError, where bubblewrap is not installed or may not make its namespaces."""
    instead = "or give sandbox='none' if commands may do here whatever this process may"
    if shutil.which("bwrap") is None:
        raise UsageError(
            f"commands run in a sandbox, which needs bubblewrap: install it (apt-get install bubblewrap), {instead}"
        )
    tried = subprocess.run(
        [*bubblewrap(Path("/usr"), (), False, 1 << 20), "true"], capture_output=True, text=True, timeout=30
    )
    if tried.returncode:
        why = tried.stderr.strip() or f"exit {tried.returncode}"
        raise UsageError(
            f"bubblewrap may not make a sandbox here ({why}): allow unprivileged user namespaces, in a container as well, {instead}"
        )


def usage(pid: int, most: int) -> tuple[int, int]:
    """(processes, bytes of memory of their own) below a process. A sandbox's processes cannot leave that tree.

    Args:
        most: processes after which it looks no further: a tree that grows fast must not be looked at for long.

    Source: proc_pid_status(5), proc_pid_task(5); both are 0 where the system has no such files.
    """
    found, size, todo = 0, 0, [pid]
    while todo and found <= most:
        at = todo.pop()
        found += 1
        try:
            for task in Path(f"/proc/{at}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
            for line in Path(f"/proc/{at}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    size += int(line.split()[1]) * 1024
        except (OSError, ValueError):  # it ended meanwhile
            continue
    return found, size
