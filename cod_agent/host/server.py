"""`cod host` as a process: bind, open, serve, and on SIGTERM drain before anything stops.

While it drains it still listens: /ready says no, new tasks get a 503, and who waits gets an answer. A second signal stops at once;
what is cut off then goes on at the next start all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cod_agent.errors import MissingExtra, UsageError
from cod_agent.host.service import Service
from cod_agent.host.settings import Settings, token_of

log = logging.getLogger("cod_agent.host")

_IDLE = 75
"""Seconds a connection may rest between two requests."""
_CLOSING = 5
"""Seconds that answers get to leave once everything else has stopped."""

_HEAD = 10.0
"""Seconds, at least, that a connection may be without a whole request head; at most twice as long."""


@dataclass(frozen=True, slots=True)
class Running:
    """What a host tells when it serves."""

    url: str
    model: str
    environment: str | None
    memory: str
    left: int
    """Tasks and updates of before that it goes on with."""
    made_token: str | None
    """The token, if it was made up because none was given."""


def serve(settings: Settings, ready: Callable[[Running], None]) -> None:
    """Serve until SIGTERM or SIGINT, and drain.

    Args:
        ready: called once it serves.

    Raises:
        UsageError: there is no token and others could reach it, or the port is taken.
        MissingExtra: uvicorn or starlette is not installed.
        StoreError, UnknownName: see `Service.open`.
    """
    try:
        import uvicorn

        from cod_agent.host.app import make_app
    except ImportError:
        raise MissingExtra("cod host", "host") from None

    class Server(uvicorn.Server):
        def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
            return contextlib.nullcontext()  # `_until_drained` listens

    token = token_of(settings)
    made = None if token else secrets.token_urlsafe(24)
    if made and not settings.loopback:
        raise UsageError(
            f"{settings.host} can be reached by others, and there is no token: set token_file, or COD_HOST_TOKEN, to a secret of "
            "at least 16 characters"
        )
    listening = _bound(settings)

    async def live() -> None:
        service = Service(settings)
        left = await service.open()
        try:
            config = uvicorn.Config(
                make_app(service, token or made),
                lifespan="off",
                ws="none",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                log_config=None,
                timeout_keep_alive=_IDLE,
                timeout_graceful_shutdown=_CLOSING,
            )
            server = Server(config)
            drained = asyncio.create_task(_until_drained(service, server))
            closing = asyncio.create_task(_close_silent(server, _HEAD))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            while not server.started and not serving.done():
                await asyncio.sleep(0.005)
            if server.started:
                ready(_running(service, listening, left, made))
            await serving
            drained.cancel()
            closing.cancel()
        finally:
            await service.drain(0)
            await service.aclose()

    try:
        factory = uvicorn.Config("", log_config=None).get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(live())
    finally:
        listening.close()


async def _close_silent(server: Any, seconds: float) -> None:
    """Close connections that keep a place and say nothing, or a request head byte by byte: uvicorn times only those at rest
    between two requests.
    """
    before: set[Any] = set()
    while True:
        await asyncio.sleep(seconds)
        silent = {
            one
            for one in server.server_state.connections
            if one.cycle is None or (one.cycle.response_complete and one.timeout_keep_alive_task is None)
        }
        for one in silent & before:
            one.transport.close()
        before = silent


async def _until_drained(service: Service, server: Any) -> None:
    """Wait for a signal, drain, and have the server stop."""
    asked, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        if asked.is_set():
            log.warning("stopping at once")
            server.should_exit = server.force_exit = True
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await asked.wait()
    log.info("draining: tasks under way get %g s", service.settings.drain)
    cut = await service.drain(service.settings.drain)
    log.info("drained%s", f"; {cut} runs were cut off and go on at the next start" if cut else "")
    server.should_exit = True


def _bound(settings: Settings) -> socket.socket:
    """Bound before anything slow starts, so that a port in use is said at once."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, number)
    except OSError as error:
        raise UsageError(f"there is no address {settings.host} on this machine: {error}") from None
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(1024)
    except OSError as error:
        made.close()
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}): stop what listens there, or give another --port"
        ) from None
    return made


def _running(service: Service, listening: socket.socket, left: int, made: str | None) -> Running:
    host = f"[{service.settings.host}]" if ":" in service.settings.host else service.settings.host
    return Running(
        url=f"http://{host}:{listening.getsockname()[1]}",
        model=service.model.name,
        environment=service.world.name if service.world else None,
        memory=service.memory.path,
        left=left,
        made_token=made,
    )
