"""The service as HTTP: routes, and a guard in front of them that knows whom to let in.

The guard looks at what costs nothing first (host, method, token, length), so that nobody who may not do anything makes the service
work. All that goes wrong has one shape: {"error": {"type": ..., "message": ...}}.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from cod_agent.agent import LIFE
from cod_agent.host import schema, views
from cod_agent.host.errors import (
    LATER,
    RETRY_AFTER,
    BadRequest,
    Invalid,
    MethodNotAllowed,
    NotFound,
    TooLarge,
    TooSlow,
    Unauthorized,
    UnsupportedMediaType,
    WrongHost,
    said_of,
    status_of,
)
from cod_agent.host.events import cursor_of
from cod_agent.host.inbox import Kept
from cod_agent.host.service import Service

log = logging.getLogger("cod_agent.host")

BODY_SECONDS = 30.0
"""That a body may take to come in."""
PAGE = 100
LONGEST_PAGE = 1000
OPEN = ("/health", "/ready")
"""What needs no token anywhere: it says nothing of what agents do."""
READS = ("GET", "HEAD")
_NAME = re.compile(schema.NAME)
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def make_app(service: Service, token: str | None) -> Guard:
    """The ASGI application of an open service.

    Args:
        token: what clients show; None is for tests only, where nobody has to.
    """
    from cod_agent.host.openapi import document

    pages = _Pages(service)
    described = Response(document(service.settings), media_type="application/json")

    async def openapi(_: Request) -> Response:
        return described

    run = "/v1/agents/{agent}/runs/{run}"
    routes = [
        Route("/v1/agents/{agent}/tasks", pages.submit, methods=["POST"]),
        Route(f"{run}/tasks/{{position}}", pages.place),
        Route(f"{run}/tasks/{{position}}/feedback", pages.feedback, methods=["POST"]),
        Route(f"{run}/abandon", pages.abandon, methods=["POST"]),
        Route(f"{run}/held", pages.held),
        Route(f"{run}/decide", pages.decide, methods=["POST"]),
        Route("/v1/agents", pages.agents),
        Route("/v1/agents/{agent}/runs", pages.runs),
        Route("/v1/agents/{agent}/context", pages.context),
        Route("/v1/agents/{agent}/contexts", pages.contexts),
        Route("/v1/agents/{agent}/events", pages.events),
        Route("/v1/events", pages.events),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/openapi.json", openapi),
    ]
    return Guard(Router(routes, redirect_slashes=False), service, token)


class Guard:
    """Lets in whom it should, and turns every error into an answer."""

    def __init__(self, router: Router, service: Service, token: str | None) -> None:
        self.router, self._settings = router, service.settings
        self._token = token.encode() if token else None
        self._hosts = service.settings.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        scope["app"] = self  # has the router raise its 404 and 405 instead of answering in plain text
        started = False

        async def sent(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._admit(scope)
            await self.router(scope, receive, sent)
        except ClientDisconnect:
            log.debug("%s %s: the client left before its body was whole", scope["method"], scope["path"])
        except Exception as error:
            if not isinstance(error, HTTPException) and status_of(error) == 500:
                log.exception("%s %s", scope["method"], scope["path"])
            if started:
                raise
            answer = failure(_ours(error, scope) if isinstance(error, HTTPException) else error)
            await answer(scope, receive, send)

    def _admit(self, scope: Scope) -> None:
        headers = {name: value for name, value in scope["headers"]}
        if self._hosts is not None:
            said = headers.get(b"host", b"").decode("latin-1").lower()
            if re.sub(r":\d*$", "", said) not in self._hosts:
                raise WrongHost(f"this service does not answer for the host {said[:100]!r}: see allowed_hosts")
        reading = scope["method"] in READS
        if scope["path"] not in OPEN and not (reading and self._settings.open_reads):
            self._check_token(headers.get(b"authorization", b""))
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self._settings.max_body:
            raise TooLarge(
                f"the body has {length[:20].decode('latin-1')} bytes, and {self._settings.max_body} are the limit"
            )

    def _check_token(self, shown: bytes) -> None:
        if self._token is None:
            return
        kind, _, token = shown.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise Unauthorized("this needs the service's token: send the header `Authorization: Bearer TOKEN`")


class _Pages:
    """The routes: from a request to the service and back."""

    def __init__(self, service: Service) -> None:
        self._service, self._settings = service, service.settings

    async def submit(self, request: Request) -> Response:
        agent = _name(request, "agent")
        key = request.headers.get("idempotency-key")
        if key is not None and not _KEY.fullmatch(key):
            raise Invalid("Idempotency-Key: 1 to 255 visible ASCII characters are expected")
        asked = schema.read(schema.NewTask, await self._body(request))
        done = await self._service.submit(agent, asked, key)
        if not isinstance(done, Kept):
            return answer(schema.lived(agent, done))
        url = f"/v1/agents/{quote(agent)}/runs/{quote(asked.run)}/tasks/{done.position}"
        where: dict[str, Any] = {"agent": agent, "run": asked.run, "position": done.position, "state": done.state}
        return answer(schema.Accepted(**where, url=url), 202, {"location": url})

    async def place(self, request: Request) -> Response:
        agent, run, position = _name(request, "agent"), _name(request, "run"), _position(request)
        return answer(await asyncio.to_thread(self._service.place, agent, run, position))

    async def feedback(self, request: Request) -> Response:
        agent, run, position = _name(request, "agent"), _name(request, "run"), _position(request)
        said = schema.read(schema.NewFeedback, await self._body(request))
        if said.reward is None and not said.text:
            raise Invalid("feedback says something: a reward, words, or both")
        return answer(schema.lived(agent, await self._service.feedback(agent, run, position, said)))

    async def abandon(self, request: Request) -> Response:
        agent, run = _name(request, "agent"), _name(request, "run")
        return answer(schema.Abandoned(agent=agent, run=run, abandoned=await self._service.abandon(agent, run)))

    async def held(self, request: Request) -> Response:
        after, limit = _number(request, "after", -1), _number(request, "limit", PAGE, 1, LONGEST_PAGE)
        return await self._look(views.held, _name(request, "agent"), _name(request, "run"), after, limit)

    async def decide(self, request: Request) -> Response:
        agent, run = _name(request, "agent"), _name(request, "run")
        said = schema.read(schema.NewDecision, await self._body(request))
        return answer(await self._service.decide(agent, run, said))

    async def agents(self, request: Request) -> Response:
        after, limit = request.query_params.get("after", ""), _number(request, "limit", PAGE, 1, LONGEST_PAGE)
        return await self._look(views.agents, after, limit)

    async def runs(self, request: Request) -> Response:
        agent = _name(request, "agent")
        after, limit = _number(request, "after", 0), _number(request, "limit", PAGE, 1, LONGEST_PAGE)
        return await self._look(views.runs_of, agent, after, limit, lambda run: self._service.waiting(agent, run))

    async def context(self, request: Request) -> Response:
        version = _number(request, "version", None)
        return await self._look(views.context, _name(request, "agent"), _run(request), version)

    async def contexts(self, request: Request) -> Response:
        after, limit = _number(request, "after", -1), _number(request, "limit", PAGE, 1, LONGEST_PAGE)
        return await self._look(views.contexts, _name(request, "agent"), _run(request), after, limit)

    async def events(self, request: Request) -> Response:
        agent = _name(request, "agent") if "agent" in request.path_params else None
        since = request.headers.get("last-event-id") or request.query_params.get("after")
        after = (0, 0, 0) if since == "0" else cursor_of(since) if since is not None else None
        if since is not None and after is None:
            raise Invalid("Last-Event-ID: the id of an event is expected, or 0 for everything that is recorded")
        follow = request.query_params.get("follow", "true")
        if follow not in ("true", "false"):
            raise Invalid("follow: true or false is expected")
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        stream = self._service.hub.stream(self._service.memory, agent, after, follow == "true")
        return StreamingResponse(stream, media_type="text/event-stream", headers={"cache-control": "no-store"})

    async def health(self, _: Request) -> Response:
        return answer(schema.Health(status="ok"))

    async def ready(self, _: Request) -> Response:
        said = await self._service.ready()
        return answer(said, 200 if said.ready else 503, {} if said.ready else {"retry-after": str(RETRY_AFTER)})

    async def _look(self, view: Callable[..., BaseModel], *given: Any) -> Response:
        return answer(await asyncio.to_thread(self._service.look, view, *given))

    async def _body(self, request: Request) -> bytes:
        """The body, which stops being read where it gets too long."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise UnsupportedMediaType("the body has to be JSON: send the header `Content-Type: application/json`")
        pieces: list[bytes] = []
        left = self._settings.max_body
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    left -= len(piece)
                    if left < 0:
                        raise TooLarge(f"the body is longer than {self._settings.max_body} bytes")
                    pieces.append(piece)
        except TimeoutError:
            raise TooSlow(f"the body did not come within {BODY_SECONDS:g} s") from None
        return b"".join(pieces)


def answer(said: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer of the schema."""
    return Response(said.__pydantic_serializer__.to_json(said), status, headers, "application/json")


def failure(error: BaseException) -> Response:
    """An error, as everything that goes wrong looks."""
    kind, message = said_of(error)
    status, headers = status_of(error), {}
    if status in LATER:
        headers["retry-after"] = str(RETRY_AFTER)
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 405:
        headers["allow"] = str(error.__cause__ and getattr(error.__cause__, "headers", {}).get("Allow", ""))
    if status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    return answer(schema.Failure(error=schema.Trouble(type=kind, message=message)), status, headers)


def _ours(error: HTTPException, scope: Scope) -> Exception:
    """Starlette's 404 and 405, as ours."""
    if error.status_code == 405:
        made: Exception = MethodNotAllowed(f"{scope['path']} does not take {scope['method']}")
    elif error.status_code == 404:
        made = NotFound(f"there is nothing at {scope['path'][:200]}: /openapi.json says what is where")
    else:
        made = BadRequest(str(error.detail))
    made.__cause__ = error
    return made


def _name(request: Request, which: str) -> str:
    said = str(request.path_params[which])
    if not _NAME.fullmatch(said):
        raise Invalid(
            f"{which}: letters, digits and . _ : @ ~ - are expected, at most 128, the first one a letter or digit"
        )
    return said


def _run(request: Request) -> str:
    return request.query_params.get("run", LIFE)


def _position(request: Request) -> int:
    said = _digits(str(request.path_params["position"]), "position")
    if said < 0:
        raise Invalid("position: a number from 0 on is expected")
    return said


def _number(request: Request, name: str, default: Any, least: int = -1, most: int = schema.LAST) -> Any:
    said = request.query_params.get(name)
    if said is None:
        return default
    number = _digits(said, name)
    if not least <= number <= most:
        raise Invalid(f"{name}: a number from {least} to {most} is expected")
    return number


def _digits(said: str, name: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,10}", said) or int(said) > schema.LAST:
        raise Invalid(f"{name}: a whole number up to {schema.LAST} is expected")
    return int(said)
