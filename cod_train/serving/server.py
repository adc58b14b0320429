"""A model server in a process of its own: started, known to answer exactly, ended with all that it has started.

    server = await ModelServer.start(checkpoint, Engine("embedded"), Path("logs"))
    ... OpenAIModel(server.weights, base_url=server.base_url, exact=True) ...
    await server.stop()

It is ready when a completion came back as the runtime asks for it: under the checkpoint's own name, with token ids and
log-probabilities. Servers exist that answer `/health` with 200 and die at the first completion.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import CodError, ModelGarbled, UsageError
from cod_agent.journal.answers import read_answer
from cod_agent.journal.http import http_module
from cod_agent.models.openai import EXACT
from cod_train.serving import _keeper
from cod_train.serving.engine import Engine, Launch

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint

_LOOK = 0.1
"""Seconds between two looks at a process, or two attempts to reach it."""
_TRIES = 3
"""Ports tried where another program takes the one that was free."""
_CLOSING = 5.0
"""Seconds that a server that failed gets to end by itself."""
_ADAPTER = 120.0
"""Seconds that loading or unloading an adapter may take."""


class ServerFailed(CodError):
    """A model server did not start, or does not answer as it must; the message has the last telling lines of its log."""


class ModelServer:
    """One running model server; `start` makes it.

    It ends with this process, whatever ends that: kill -9, too, on every system with process groups (Linux, macOS). Only
    where its keeper is killed in the same moment can it be left behind.
    """

    def __init__(self, checkpoint: Checkpoint, launch: Launch, port: int, log: Path) -> None:
        self.weights, self.log, self.what = checkpoint.weights, log, launch.what
        self.base_url = f"http://127.0.0.1:{port}/v1"
        self.serves: set[str] = {checkpoint.weights}
        """Names that it answers to: its checkpoint's, and those of the adapters loaded since."""
        self.key = launch.key
        """What it asks for; "" where it asks for nothing."""
        self._base = (checkpoint.base or checkpoint.folder).resolve()
        self._code: int | None = None
        self._began = log.stat().st_size if log.is_file() else 0
        keeper = [sys.executable, "-I", "-S", str(_keeper.__file__), str(os.getpid())]
        with log.open("ab") as told:
            self._process = subprocess.Popen(
                [*keeper, *launch.command],
                stdin=subprocess.DEVNULL,
                stdout=told,
                stderr=subprocess.STDOUT,
                env={**os.environ, **launch.env},
                start_new_session=True,  # Ctrl-C in a terminal is for the program that started it
            )

    @classmethod
    async def start(
        cls, checkpoint: Checkpoint, engine: Engine, log_folder: Path, *, ready_timeout: float = 300
    ) -> ModelServer:
        """Start a server; returns when it has answered a completion with every exact field.

        Args:
            log_folder: its output goes to the file WEIGHTS.log in it, after what is there.
            ready_timeout: seconds until then.

        Raises:
            UsageError: the engine cannot serve this checkpoint, or is not installed.
            ServerFailed: it ended, was not ready in time, or answers otherwise than it must. No process is left.
        """
        log_folder.mkdir(parents=True, exist_ok=True)
        left = _TRIES
        while True:
            left, port = left - 1, _free_port()
            launch = await asyncio.to_thread(engine.launch, checkpoint, port)
            server = cls(checkpoint, launch, port, log_folder / f"{checkpoint.weights}.log")
            try:
                await server._ready(ready_timeout)
                return server
            except BaseException as error:
                await server.stop(_CLOSING)
                taken = "address already in use" in server._said().lower()  # by another program, since we looked
                if not (isinstance(error, ServerFailed) and taken and left):
                    raise

    @property
    def ended(self) -> int | None:
        """The exit code, if the process is gone; None while it runs."""
        if self._code is None and self._process.poll() is not None:
            self._kill()  # what it has left behind
        return self._code

    async def stop(self, grace: float = 20) -> None:
        """SIGTERM, and SIGKILL for whatever of its process group is there after `grace` seconds."""
        try:
            if self.ended is None:
                self._process.terminate()
            until = time.monotonic() + grace
            while self.ended is None and time.monotonic() < until:
                await asyncio.sleep(_LOOK)
        finally:
            if self._code is None:
                self._kill()

    def _kill(self) -> None:
        """End the whole group, once: later its number, which is its leader's, may be another's."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._code = self._process.wait()

    # ---- adapters ----

    async def load_adapter(self, checkpoint: Checkpoint) -> None:
        """Serve an adapter of the same base, too, under its own weights name. One name never changes what it stands for.

        Raises:
            UsageError: it is no adapter of this server's base.
            ServerFailed: the server refuses it, or does not answer exactly under its name.
        """
        if checkpoint.kind != "adapter" or (checkpoint.base or checkpoint.folder).resolve() != self._base:
            raise UsageError(f"{checkpoint.name} is no adapter of {self._base}, which is what this server has loaded")
        try:
            await self._adapter("load", {"lora_name": checkpoint.weights, "lora_path": str(checkpoint.folder)})
            status, said = await self._asked("chat/completions", _question(checkpoint.weights), _ADAPTER)
            self._check(checkpoint.weights, status, said)
        except BaseException:
            # Also where the loading was given up: it may have ended nevertheless, and a name is loaded only once.
            with contextlib.suppress(ServerFailed):
                await self._adapter("unload", {"lora_name": checkpoint.weights})
            raise
        self.serves.add(checkpoint.weights)

    async def unload_adapter(self, weights: str) -> None:
        """Serve it no more; requests for it get a 404.

        Raises:
            ServerFailed: the server refuses.
        """
        self.serves.discard(weights)
        await self._adapter("unload", {"lora_name": weights})

    async def _adapter(self, what: str, body: dict[str, Any]) -> None:
        status, said = await self._asked(f"{what}_lora_adapter", body, _ADAPTER)
        if status != 200:
            hint = "; start it with adapters (lora) allowed" if status == 404 else ""
            raise self._failed(f"did not {what} the adapter {body['lora_name']} ({status}: {_excerpt(said)}){hint}")

    # ---- is it ready? ----

    async def _ready(self, timeout: float) -> None:
        """Wait for the first real completion."""
        until, trouble = time.monotonic() + timeout, "nobody listened"
        while self.ended is None:
            left = until - time.monotonic()
            if left <= 0:
                raise self._failed(
                    f"was not ready within {timeout:g} seconds ({trouble}): give it longer, or a smaller model"
                )
            try:
                status, said = await self._asked("chat/completions", _question(self.weights), left)
            except ServerFailed as error:
                trouble = str(error)
                await asyncio.sleep(_LOOK)
                continue
            if status != 503:  # it says itself that it is not ready
                return self._check(self.weights, status, said)
            trouble = f"it answered 503: {_excerpt(said)}"
            await asyncio.sleep(_LOOK)
        raise self._failed(f"ended with exit code {self.ended} before it was ready")

    def _check(self, weights: str, status: int, said: bytes) -> None:
        """Raise ServerFailed unless this is an exact completion of `weights`."""
        if status != 200:
            raise self._failed(f"answered a completion with {status}: {_excerpt(said)}")
        try:
            answer = read_answer("application/json", said)
        except ModelGarbled as error:
            raise self._failed(f"answered a completion with something else: {error}") from None
        if (name := answer.body.get("model")) != weights:
            raise self._failed(f"answers as {name!r} when asked for {weights!r}: it serves other weights")
        if answer.completion.tokens is None:
            raise self._failed(f"does not answer exactly ({answer.completion.inexact}): training needs that")

    async def _asked(self, path: str, body: dict[str, Any], timeout: float) -> tuple[int, bytes]:
        """POST: status and body.

        Raises:
            ServerFailed: no answer.
        """
        module = http_module()
        try:
            # Straight to loopback, whatever proxy the environment names.
            async with (
                asyncio.timeout(timeout),
                module.AsyncClient(transport=module.AsyncHTTPTransport(verify=False), timeout=timeout) as client,
            ):
                response = await client.post(f"{self.base_url}/{path}", json=body, headers=bearer(self.key))
                return int(response.status_code), bytes(response.content)
        except (TimeoutError, module.HTTPError) as error:
            raise ServerFailed(f"no answer at {self.base_url}: {str(error) or type(error).__name__}") from None

    # ---- what its log says ----

    def _failed(self, what: str) -> ServerFailed:
        return ServerFailed(
            f"{self.what} for {self.weights} {what}.\n{telling_lines(self._said())}\nThe whole log is {self.log}"
        )

    def _said(self) -> str:
        """Its output since this start."""
        with self.log.open("rb") as told:
            told.seek(self._began)
            return told.read().decode(errors="replace")


def bearer(key: str) -> dict[str, str]:
    """The header that shows a key, if there is one."""
    return {"authorization": f"Bearer {key}"} if key else {}


def telling_lines(said: str, most: int = 3) -> str:
    """The lines of a log that say what went wrong: the last errors named in it, or else its end."""
    lines = [_PREFIX.sub("", line).strip() for line in said.splitlines()]
    errors = [line for line in lines if _ERROR.search(line) and "See root cause above" not in line]
    chosen = list(dict.fromkeys(errors or filter(None, lines)))[-most:]
    return "\n".join(f"  {line[:400]}" for line in chosen) or "  It said nothing."


_PREFIX = re.compile(
    r"^(\x1b\[[0-9;]*m)*\([^()]* pid=\d+\)(\x1b\[[0-9;]*m)*( (ERROR|INFO|WARNING) [\d:. -]+\[[^\]]*\])?"
)
"""What vLLM puts before each line of its processes."""
_ERROR = re.compile(r"^(\w+\.)*\w*(Error|Exception)\b|\berror: ")


def _question(model: str) -> dict[str, Any]:
    """A short completion with every field that the runtime's exact calls have."""
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": model, "messages": messages, "max_tokens": 2, "temperature": 1.0, "top_p": 1.0, **EXACT}


def _excerpt(said: bytes) -> str:
    return said[:300].decode(errors="replace")


def _free_port() -> int:
    with socket.socket() as looking:
        looking.bind(("127.0.0.1", 0))
        return int(looking.getsockname()[1])
