"""The stable address: a thin proxy in front of the model servers, behind which weights change without a lost request.

    front = Front("policy", port=8000)
    await front.start()                              # 503 to everybody until something serves
    front.add("blue@0f3c5a1e77b2", "http://127.0.0.1:40001/v1")
    front.switch("blue@0f3c5a1e77b2")                # from now on this is what `policy` means
    front.add("green@91be02c4d1aa", "http://127.0.0.1:40002/v1")
    front.switch("green@91be02c4d1aa")               # new requests go there, those under way end where they are
    front.remove("blue@0f3c5a1e77b2")
    await front.drained("blue@0f3c5a1e77b2", 600)    # its last answer is out

Clients ask for the alias. The front writes the name of concrete weights in its place, request by request, and passes the
answer on byte for byte. A model server knows only its own name and refuses any other, so it is the server, not this
proxy, that vouches for the weights of an answer: a request in the wrong place gets an error, never an answer of other weights.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cod_agent.errors import MissingExtra, UsageError
from cod_agent.journal.http import http_module
from cod_train.dialect import Refused
from cod_train.serving.connections import Connections
from cod_train.serving.passing import Receive, Send, asked_model, forwarded, hand_on, renamed, request_to, whole

if TYPE_CHECKING:
    from starlette.applications import Starlette

_IDLE = 3600
"""Seconds a client's connection may rest: agents wait for tools, and a connection closed under a request costs a retry."""
_CLOSING = 0.5
"""Seconds in which connections with nothing under way are closed."""


@dataclass(slots=True)
class _Upstream:
    """A model server under one name."""

    weights: str
    origin: str
    key: str = ""
    under_way: int = 0
    answered: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: bool = False

    def __enter__(self) -> None:
        self.under_way += 1
        self.idle.clear()

    def __exit__(self, *_: object) -> None:
        self.under_way -= 1
        if not self.under_way:
            self.idle.set()


class Front:
    """Listens between `start` and `aclose`, in the event loop that called `start`.

    Args:
        alias: the model's name that clients use.
        host, port: where to listen; port 0 takes a free one.
    """

    def __init__(self, alias: str = "policy", host: str = "127.0.0.1", port: int = 8000) -> None:
        self.alias, self.host, self.port = alias, host, port
        self.serving: str | None = None
        """The weights that answer for the alias; None while nothing does."""
        self.since: float | None = None
        """When they began to, in seconds since the epoch."""
        self.switches = 0
        self.trouble = ""
        """The last thing that went wrong, for /status; whoever runs the servers says it."""
        self.retry_after = 1
        """Seconds after which a client that gets a 503 should ask again."""
        self.beside: Callable[[], Mapping[str, Any]] = dict
        """What `/status` says besides."""
        self._upstreams: dict[str, _Upstream] = {}
        self._answered = 0
        self._connections = Connections()
        self._own: Any = None
        self._server: Any = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def base_url(self) -> str:
        """For clients."""
        return self._url(self.host)

    @property
    def local_url(self) -> str:
        """For this machine, where the host may stand for all of its addresses."""
        return self._url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host))

    def _url(self, host: str) -> str:
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/v1"

    async def start(self) -> None:
        """Listen; until something is switched to, requests get a 503.

        Raises:
            MissingExtra: uvicorn or starlette is not installed.
            UsageError: the port is in use, or this machine has no such host.
        """
        try:
            import uvicorn

            self._own = _own_pages(self)
        except ImportError:
            raise MissingExtra("serving", "train") from None

        class Server(uvicorn.Server):
            def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
                return nullcontext()  # Ctrl-C belongs to the program around

        listening = _bound(self.host, self.port)
        self.port = listening.getsockname()[1]
        config = uvicorn.Config(
            self,
            lifespan="off",
            ws="none",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            log_config=None,
            backlog=2048,
            timeout_keep_alive=_IDLE,
        )
        self._closing, self._server = False, Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.005)

    async def aclose(self, drain: float = 0) -> None:
        """Take no new requests; those under way get `drain` seconds to finish."""
        task, self._task = self._task, None
        if task is None:
            return
        self._closing = True
        self._server.config.timeout_graceful_shutdown = max(drain, _CLOSING)
        self._server.should_exit = True
        await task
        await self._connections.aclose()

    def add(self, weights: str, base_url: str, key: str = "") -> None:
        """A model server that knows itself as `weights`; ready, or it would not be here. `key`: what it asks for, if anything."""
        self._upstreams[weights] = _Upstream(weights, base_url.removesuffix("/v1"), key)
        self._upstreams[weights].idle.set()

    def remove(self, weights: str) -> None:
        """No new requests for it, by whatever name; see `drained`. Of what serves: nothing serves any more."""
        self._upstreams[weights].leaving = True
        if self.serving == weights:
            self.serving = self.since = None

    def switch(self, weights: str) -> None:
        """From now on the alias means `weights`."""
        self.serving, self.since = self._upstreams[weights].weights, time.time()
        self.switches += 1

    def under_way(self, weights: str) -> int:
        """Requests that went to `weights` and are not answered to their end."""
        return self._upstreams[weights].under_way if weights in self._upstreams else 0

    async def drained(self, weights: str, timeout: float) -> bool:
        """Wait until nothing is under way there. False: after `timeout` seconds something still is."""
        if weights in self._upstreams:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._upstreams[weights].idle.wait()
        return not self.under_way(weights)

    def status(self) -> dict[str, Any]:
        """What serves and how it goes, as `/status` says it."""
        return {
            "alias": self.alias,
            "serving": self.serving,
            "since": self.since,
            "under_way": {name: found.under_way for name, found in self._listed(leaving=True).items()},
            "answered": self._answered,
            "switches": self.switches,
            "trouble": self.trouble,
            **self.beside(),
        }

    def names(self) -> list[str]:
        """What requests may ask for: the alias, while something serves, and concrete weights."""
        return [*([self.alias] if self.serving else []), *self._listed(leaving=False)]

    def _listed(self, *, leaving: bool) -> dict[str, _Upstream]:
        shown = {name: found for name, found in self._upstreams.items() if not found.leaving}
        if leaving:  # one that has left is told of while it has something under way
            shown |= {name: found for name, found in self._upstreams.items() if found.under_way}
        return shown

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            return
        if scope["method"] != "POST" or not forwarded(scope["path"]):
            await self._own(scope, receive, send)
            return
        try:
            if self._closing:
                raise self._nothing("this server is being stopped")
            body = await whole(scope, receive)
            if body is None:
                return
            asked = asked_model(body)
            await _unless_left(self._pass(scope, body, asked, send), receive)
        except Refused as refused:
            await _refuse(refused, scope, receive, send, self.retry_after)
        except asyncio.CancelledError:
            if not self._closing:
                raise
            # The time for answers under way is over; uvicorn ends what returns without having answered.

    def _find(self, asked: str) -> _Upstream:
        """Raises: Refused."""
        if asked == self.alias:
            if self.serving is None:
                raise self._nothing(f"nothing serves at the moment{f' ({self.trouble})' if self.trouble else ''}")
            return self._upstreams[self.serving]
        found = self._upstreams.get(asked)
        if found is None or found.leaving:
            raise Refused(
                f"no model called {asked[:200]!r} here; there is {', '.join(self.names()) or 'none yet'}",
                404,
                "model_not_found",
            )
        return found

    def _nothing(self, why: str) -> Refused:
        return Refused(f"{why}; ask again in {self.retry_after} s", 503, "not_ready")

    async def _pass(self, scope: Any, body: bytes, asked: str, send: Send) -> None:
        """Ask a model server and hand on what it answers.

        Raises:
            Refused: there is none, or its connection was lost before the answer began, twice.
        """
        module = http_module()
        for _ in range(2):  # a request whose answer nobody saw may be asked again, of what serves by then
            upstream = self._find(asked)
            request = request_to(upstream.origin, scope, renamed(body, asked, upstream.weights), upstream.key)
            with upstream:
                connection = await self._connections.take(upstream.origin)
                try:
                    response = await connection.handle_async_request(request)
                    pieces = response.stream.__aiter__()
                    first = await anext(pieces, b"")
                except BaseException as error:
                    await connection.aclose()
                    if isinstance(error, module.TransportError):
                        continue
                    raise
                try:
                    await hand_on(response, first, pieces, send)
                except module.TransportError as error:
                    # Returning now makes uvicorn cut the connection: the client sees that the answer has no end.
                    self.trouble = f"{upstream.weights} broke an answer off: {type(error).__name__}"
                    return
                finally:
                    await response.aclose()  # what is not read to its end closes its connection
                self._connections.rests(upstream.origin, connection)
                upstream.answered += 1
                self._answered += 1
                return
        raise self._nothing("the model server was lost before it answered")


def _bound(host: str, port: int) -> socket.socket:
    """Raises: UsageError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delays (40 ms a request) off only where it is told that the protocol is TCP.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    # The port of a server that has just ended is free.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)  # binding alone does not keep another program from it
    except (OSError, OverflowError) as error:
        listening.close()
        raise UsageError(f"cannot listen on {host}, port {port}: {error}; choose another --port or --host") from None
    return listening


async def _unless_left(work: Any, receive: Receive) -> None:
    """Do it; given up when the client leaves, so that no server goes on sampling for nobody."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _refuse(refused: Refused, scope: Any, receive: Receive, send: Send, retry_after: int) -> None:
    from starlette.responses import JSONResponse

    headers = {"retry-after": str(retry_after)} if refused.status == 503 else {}
    if refused.status == 413:
        headers["connection"] = "close"  # the rest of the request is not read
    await JSONResponse(refused.body(), refused.status, headers)(scope, receive, send)


def _own_pages(front: Front) -> Starlette:
    """What the front answers itself."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def models(_: Request) -> Response:
        said: list[Mapping[str, Any]] = [
            {"id": name, "object": "model", "owned_by": "cod_train"} for name in front.names()
        ]
        return JSONResponse({"object": "list", "data": said})

    async def health(_: Request) -> Response:
        return JSONResponse({"serving": front.serving}, 200 if front.serving else 503)

    async def status(_: Request) -> Response:
        return JSONResponse(front.status())

    async def nowhere(request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 404
        why = (
            f"there is no {request.method} {request.url.path[:200]} here: completions are asked for by POST "
            "/v1/chat/completions; /v1/models, /health and /status by GET"
        )
        return JSONResponse(Refused(why, code, "not_found").body(), code)

    routes = [Route("/v1/models", models), Route("/health", health), Route("/status", status)]
    return Starlette(routes=routes, exception_handlers={HTTPException: nowhere})


__all__ = ["Front"]
