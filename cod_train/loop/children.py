"""The commands that a loop runs beside itself: processes that end with it, whatever ends it, and tell in a log file."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cod_agent.errors import CodError
from cod_train.serving import _keeper

LOOK = 0.2
"""Seconds between two looks at a process or at what it serves."""
GRACE = 30.0
"""Seconds a command gets to end by itself: a server's last answers, a trainer's last file."""


class Child:
    """A `cod` command under the keeper that also keeps model servers: it dies with us, kill -9 included.

    Args:
        words: of the command, after `cod`.
        log: its output is added to this file.
        environment: beside our own.
    """

    def __init__(self, words: list[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.words, self.log = words, log
        self._began = log.stat().st_size if log.is_file() else 0
        keeper = [sys.executable, "-I", "-S", str(_keeper.__file__), str(os.getpid())]
        with log.open("ab") as told:
            self._process = subprocess.Popen(
                [*keeper, sys.executable, "-m", "cod_agent.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for the loop, which ends its commands in order
            )

    @property
    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def last_words(self) -> str:
        """Why it ended: our own error as it stands, else its last line."""
        with self.log.open("rb") as told:
            told.seek(self._began)
            said = "\n" + told.read().decode(errors="replace")
        _, ours, message = said.rpartition("\nError: ")
        lines = [line for line in said.splitlines() if line.strip()]
        return message.strip() if ours else (lines or ["it said nothing"])[-1].strip()[-1500:]

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL for its group after GRACE."""
        if self.ended is None:
            self._process.terminate()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE):
                    while self.ended is None:
                        await asyncio.sleep(LOOK)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # also what an orderly end has left behind
        await asyncio.to_thread(self._process.wait)


class Server:
    """`cod serve` on a registry: agents of all rounds talk to one address, whatever serves behind it.

    Args:
        words: flags of `cod serve`.
        log: of its output.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        self._words, self._log = words, log
        self._child: Child | None = None
        self._address = ""

    @property
    def base_url(self) -> str:
        """For clients, while it runs."""
        return f"{self._address}/v1"

    def start(self) -> None:
        """Start it; one that runs already stays."""
        if self._child is None:
            port = _free_port()
            self._address = f"http://127.0.0.1:{port}"
            self._child = Child(["serve", *self._words, "--host", "127.0.0.1", "--port", str(port)], self._log)

    async def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            await child.stop()

    async def status(self) -> dict[str, Any]:
        """What `/status` says; {} while it does not listen yet.

        Raises:
            CodError: it has ended, and why.
        """
        from cod_agent.journal.http import http_module

        if self._child is not None and self._child.ended is not None:
            raise CodError(
                f"`cod serve` ended: {self._child.last_words()}\nIts log is {self._log}; the same command goes on"
            )
        module = http_module()
        try:
            async with module.AsyncClient(trust_env=False, timeout=10) as client:
                found: dict[str, Any] = (await client.get(f"{self._address}/status")).json()
                return found
        except (module.HTTPError, ValueError):
            return {}


def _free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("127.0.0.1", 0))
        port: int = tried.getsockname()[1]
        return port
