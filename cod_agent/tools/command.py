"""A tool that runs commands: `command_tool("work")` for agents that write files and run programs.

Commands run in a sandbox (`cod_agent.tools.sandbox`) with limits on time, memory, processes and output. Where there can be no sandbox
the tool is refused, unless `sandbox="none"` is asked for. What a command printed, and how it ended, is the tool's result: an
exit status that is not 0 is told, not raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cod_agent.errors import UsageError
from cod_agent.journal.boundary import Policy, tool
from cod_agent.tools.sandbox import ENVIRONMENT, bubblewrap, require_bubblewrap, usage

_LOOK = 0.02
"""Seconds between two looks at what a command uses."""

_SHARED = (
    "/home",
    "/root",
    "/tmp",
    "/usr",
    "/usr/local",
    "/usr/bin",
    "/usr/lib",
    "/var",
    "/var/lib",
    "/opt",
    "/run",
    "/srv",
)
"""Folders that are no folder of one's own; what is in them may be."""
_SYSTEM = ("/etc", "/proc", "/sys", "/dev", "/boot")
"""Nor is anything in these."""

_FLOOD = 64
"""A command that prints this many times what is kept of it is stopped."""


def command_tool(
    folder: str | Path,
    *,
    seconds: float = 60.0,
    memory: int = 1024,
    processes: int = 64,
    output: int = 16_000,
    network: bool = False,
    readable: Sequence[str | Path] = (),
    sandbox: Literal["bubblewrap", "none"] = "bubblewrap",
    on_crash: Policy = "fail",
) -> Callable[..., Any]:
    """`run_command(command)`, for `CoDAgent(tools=[...])` or a world's session.

    Args:
        folder: where commands run; the only place they may write. Made if absent.
        seconds: a command that takes longer is killed, with everything it started.
        memory: MiB that all its processes may take together; one that asks for more at once is refused it.
        processes: most of them at a time.
        output: characters that are kept: the first and the last half.
        network: let commands reach the network.
        readable: more of the machine to be seen, read-only, such as a virtual environment.
        sandbox: "none" lets commands do whatever this process may; only time and output are limited.
        on_crash: what a crash in the middle of a command means (`cod_agent.tool`). "fail" tells the agent that it is not known how
            the command ended; it can look into the folder.

    Raises:
        UsageError: there can be no sandbox here, or the folder is none to hand out.
    """
    if isinstance(readable, str | Path):
        raise UsageError(f"readable is a list of paths: write readable=[{str(readable)!r}]")
    for name, limit in {"seconds": seconds, "memory": memory, "processes": processes, "output": output}.items():
        if not isinstance(limit, int | float) or isinstance(limit, bool) or not limit > 0:
            raise UsageError(f"{name} must be a number above 0, not {limit!r}")
    place = _place(folder)
    seen = tuple(Path(path).resolve() for path in readable)
    if sandbox == "bubblewrap":
        require_bubblewrap()
        start = bubblewrap(place, seen, network, memory << 20)
    elif sandbox == "none":
        start = []
    else:
        raise UsageError(f"sandbox is 'bubblewrap' or 'none', not {sandbox!r}")
    limits = _Limits(seconds, memory << 20, processes, output)

    async def run_command(command: str) -> str:
        if place.resolve() != place:  # whoever may write above it put a link in its place
            raise UsageError(f"{place} leads somewhere else by now: nothing is run there")
        return await _run([*start, "/bin/sh", "-c", command], place, limits, boxed=bool(start))

    where = (
        "only that folder can be written, and there is no network" if start and not network else "the folder is kept"
    )
    run_command.__doc__ = f"""Run a shell command in the folder {place} and get what it prints; {where}.

    Args:
        command: for /bin/sh. It is killed after {seconds:g} seconds.
    """
    return tool(run_command, on_crash=on_crash)


@dataclass(frozen=True, slots=True)
class _Limits:
    seconds: float
    memory: int
    processes: int
    output: int


@dataclass(slots=True)
class _Printed:
    """The first and the last of what a command prints."""

    most: int
    head: bytearray = field(default_factory=bytearray)
    tail: bytearray = field(default_factory=bytearray)
    size: int = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        room = self.most // 2 - len(self.head)
        self.head += piece[: max(room, 0)]
        self.tail += piece[max(room, 0) :]
        del self.tail[: -(self.most - self.most // 2)]

    def text(self) -> str:
        left = self.size - len(self.head) - len(self.tail)
        between = f"\n[... {left} bytes left out ...]\n".encode() if left else b""
        return bytes(self.head + between + self.tail).decode("utf-8", "replace")


def _place(folder: str | Path) -> Path:
    place, home = Path(folder).resolve(), Path.home().resolve()
    above, below = {home, *home.parents, *map(Path, _SHARED)}, map(Path, _SYSTEM)
    if place in above or any(place.is_relative_to(one) for one in below):
        raise UsageError(f"{place} is no folder to hand out: commands may write in it. Name one of its own")
    if place.exists() and not place.is_dir():
        raise UsageError(f"{place} is a file: name a folder that commands may write in")
    place.mkdir(parents=True, exist_ok=True)
    return place


async def _run(words: list[str], place: Path, limits: _Limits, *, boxed: bool) -> str:
    """What a command printed, and how it ended if it did not end well."""
    printed = _Printed(limits.output)
    # A pipe of our own: asyncio's waits until every process that holds it has gone, which without a sandbox may be never.
    ours, theirs = os.pipe()
    reader = asyncio.StreamReader()
    pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, "rb")
    )
    try:
        began = await asyncio.create_subprocess_exec(
            *words,
            cwd=place,
            env={**ENVIRONMENT, "HOME": str(place)},
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_limited(limits) if boxed else None,
        )
    except BaseException:
        pipe.close()
        raise
    finally:
        os.close(theirs)
    stopped = ""
    looking = asyncio.create_task(_watch(began.pid, limits)) if boxed else None
    reading = asyncio.create_task(_read(reader, printed))
    try:
        waiting = [reading, *([looking] if looking else [])]
        done, _ = await asyncio.wait(waiting, timeout=limits.seconds, return_when=asyncio.FIRST_COMPLETED)
        late = f"killed: it took longer than {limits.seconds:g} s"
        stopped = next(iter(done)).result() if done else late
        if not stopped:
            try:
                await asyncio.wait_for(began.wait(), 1.0)
            except TimeoutError:  # it closed its output and goes on
                stopped = "killed: it went on without its output"
    finally:
        for task in (reading, looking):
            if task is not None:
                task.cancel()
        with contextlib.suppress(ProcessLookupError):
            # The first process of a sandbox takes all others with it; without one, those that left the group go on.
            os.killpg(began.pid, signal.SIGKILL)
        await began.wait()
        pipe.close()
    status = began.returncode or 0
    ended = stopped or (f"exit {status}" if status > 0 else f"ended by signal {-status}" if status else "")
    text = printed.text()
    return f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}[{ended}]" if ended else text


async def _read(stream: asyncio.StreamReader, printed: _Printed) -> str:
    """Read to the end; why it was not read further, or ""."""
    while piece := await stream.read(1 << 16):
        printed.add(piece)
        if printed.size > _FLOOD * max(printed.most, 1 << 16):
            return f"killed: it printed more than {_FLOOD * max(printed.most, 1 << 16)} bytes"
    return ""


async def _watch(pid: int, limits: _Limits) -> str:
    """Look at what it uses until that is too much; why it must be killed."""
    most = limits.processes + 2  # bubblewrap has two of its own
    while True:
        await asyncio.sleep(_LOOK)
        count, size = usage(pid, most)
        if count > most:
            return f"killed: more than {limits.processes} processes"
        if size > limits.memory:
            return f"killed: more than {limits.memory >> 20} MiB of memory"


def _limited(limits: _Limits) -> Callable[[], None]:
    import resource  # not on Windows, which has no bubblewrap either

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (max(limits.memory, 256 << 20), max(limits.memory, 256 << 20)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return limit
