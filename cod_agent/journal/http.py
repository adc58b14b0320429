"""The tap for everything that speaks HTTP: a transport for the OpenAI SDK (or any httpx client) that records and replays.

    client = openai.AsyncOpenAI(http_client=recording_client())

Whatever uses that client inside an agent's episode is recorded, byte for byte, streams and failed attempts included; outside
of an episode it is a plain transport. This is the only route that sees every attempt and every token field: SDK objects and
frameworks' callbacks lose some of them. The last piece of a stream is held back until the whole of it is on disk.

The SDK speaks httpx (openai 2) or httpx2 (openai 3); the transport is built for the one it uses.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from cod_agent.completions import OnDelta
from cod_agent.errors import ModelGarbled
from cod_agent.journal.answers import Answer, as_stream, delta_text, read_answer
from cod_agent.journal.bodies import pieces, whole
from cod_agent.journal.episode import STOPS, Episode, current_episode
from cod_agent.journal.pieces import Events
from cod_agent.journal.requests import Request, clean_request, read_request
from cod_agent.journal.tokens import on_policy
from cod_agent.memory.hashing import effect_key
from cod_agent.secrets import Secrets


@dataclass(slots=True)
class Prepared:
    """A call our own model is about to make: saves the transport from parsing what was just written."""

    request: Request
    on_delta: OnDelta | None = None
    answer: Answer | None = None
    """Set by the transport once the answer may be seen."""
    limit: asyncio.Timeout | None = None
    """How long the attempt may take; what is being stored may take longer."""
    check: Callable[[Answer], None] | None = None
    """Raises `ModelGarbled` for an answer to another request."""


@cache
def http_module() -> ModuleType:
    """httpx2 or httpx: the one the installed OpenAI SDK speaks."""
    import openai

    name = "httpx2" if int(openai.__version__.split(".")[0]) >= 3 else "httpx"
    return __import__(name)


async def attempt(call: Prepared, http_request: Any, inner: Any) -> Any:
    """One attempt of a call of our own: the response, read to its end; with status 200, `call.answer` is set.

    Raises:
        ModelGarbled: status 200 with something that is no answer.
        httpx's transport errors: no answer at all. Either way the failed attempt is on record.
    """
    response = await _Call(http_module(), current_episode(), call).live(http_request, inner, call.request)
    if call.answer is None:  # a refusal, or a stream
        await response.aread()
        await response.aclose()
    return response


def transport_to(url: str) -> Any:
    """A plain transport for `url`, through the environment's proxy if it has one for it."""
    module = http_module()
    address = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    if proxy and urllib.request.proxy_bypass(address.hostname or ""):
        proxy = None
    # Reading the certificates takes 50 ms, which plain HTTP has no use for.
    verify = address.scheme == "https" or proxy is not None
    return module.AsyncHTTPTransport(
        proxy=proxy, verify=verify, limits=module.Limits(max_connections=1000, max_keepalive_connections=100)
    )


def recording_client(**options: Any) -> Any:
    """An `AsyncClient` that records, for `openai.AsyncOpenAI(http_client=...)` or any code of yours.

    `options` are those of httpx.AsyncClient, without `transport`. Proxies are taken from the environment as usual.
    """
    module = http_module()
    proxies = urllib.request.getproxies()
    options.setdefault("timeout", 600.0)
    options.setdefault("follow_redirects", True)
    plain = _transport()(module.AsyncHTTPTransport(limits=module.Limits(max_connections=1000)))
    mounts = {
        f"{scheme}://": _transport()(module.AsyncHTTPTransport(proxy=url))
        for scheme, url in proxies.items()
        if scheme in ("http", "https", "all")
    }
    if mounts:
        hosts = [h.strip().lstrip(".") for h in proxies.get("no", "").split(",") if h.strip()] + [
            "localhost",
            "127.0.0.1",
        ]
        mounts |= {f"all://{host}": plain for host in hosts if host != "*"}
    return module.AsyncClient(transport=plain, mounts=mounts, **options)


@cache
def _transport() -> Any:
    module = http_module()

    class Recording(module.AsyncBaseTransport):  # type: ignore[name-defined]
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        async def handle_async_request(self, request: Any) -> Any:
            episode = current_episode()
            if episode is None or request.method != "POST":
                return await self.inner.handle_async_request(request)
            try:
                return await _Call(module, episode, None).answer(request, self.inner)
            except STOPS as error:
                episode.stopped = error
                # A client takes an exception for a lost connection and asks again, at a price; this it hands on at once.
                said = {"error": {"message": str(error), "type": type(error).__name__}}
                return module.Response(507, headers={"x-should-retry": "false"}, json=said, request=request)

        async def aclose(self) -> None:
            await self.inner.aclose()

    return Recording


@dataclass(slots=True)
class _Call:
    """One HTTP attempt of a call."""

    module: ModuleType
    episode: Episode | None
    prepared: Prepared | None
    started: float = 0.0
    storing: bool = False
    answered: Any = None

    async def answer(self, http_request: Any, inner: Any) -> Any:
        """A call of some program: from the record, or made and recorded."""
        episode = self.episode
        if episode is None:
            return await inner.handle_async_request(http_request)
        raw = await http_request.aread()
        if not http_request.url.path.endswith("/chat/completions"):
            return await self._other(episode, http_request, inner, raw)
        request = read_request(raw)
        cleaned = clean_request(request, episode.tap)
        if cleaned is not request:
            request, http_request = cleaned, _with_body(self.module, http_request, cleaned.body)
        request.occurrence = episode.take(request.key)
        try:
            known = await episode.replay(request)
            if known is not None:
                return self._response(http_request, known, bool(request.params.get("stream")))
            return await self.live(http_request, inner, request)
        except BaseException:
            episode.give_back(request.key, request.occurrence)
            raise

    async def _other(self, episode: Episode, http_request: Any, inner: Any, raw: bytes) -> Any:
        """Anything but a chat completion (embeddings, say) is recorded as a tool's call: its text in, its text out."""
        decoded = raw.decode("utf-8", "replace")
        text = episode.tap.text(decoded)
        if text != decoded:
            http_request = _with_body(self.module, http_request, text.encode())
        name, refused = episode.tap.text(f"POST {http_request.url.path}"), list[Any]()

        async def do(occurrence: int) -> tuple[Any, None]:
            started, detail = time.time(), ""
            try:
                response = await inner.handle_async_request(http_request)
                body = await whole(response)
                if response.status_code != 200:
                    body = _without_key(http_request, body)
                    refused.append(self._copy(http_request, response, content=body))
                    detail = f"HTTP {response.status_code}: {body[:500].decode('utf-8', 'replace')}"
                    raise _NotOk
                return [response.headers.get("content-type", ""), body.decode("utf-8", "replace")], None
            except BaseException as error:
                key = effect_key("tool", name, text)
                await episode.failed("tool", key, occurrence, started, detail or _happened(error))
                raise

        try:
            (kind, body), _, _ = await episode.effect("tool", name, text, do)
        except _NotOk:
            return refused[0]
        return self.module.Response(200, headers={"content-type": kind}, content=body.encode(), request=http_request)

    def _response(self, http_request: Any, answer: Answer, stream: bool) -> Any:
        content = as_stream(answer.body) if stream else json.dumps(answer.body).encode()
        kind = "text/event-stream" if stream else "application/json"
        return self.module.Response(200, headers={"content-type": kind}, content=content, request=http_request)

    async def live(self, http_request: Any, inner: Any, request: Request) -> Any:
        """Make the attempt; what it answers is on disk before it can be read to its end."""
        self.started = time.time()
        raw = b""
        try:
            response = await inner.handle_async_request(http_request)
            kind, stream = response.headers.get("content-type", ""), bool(request.params.get("stream"))
            redact = self.episode and self.episode.redact
            in_pieces = self.prepared is not None or redact is None or isinstance(redact, Secrets)
            in_pieces = in_pieces and stream and "event-stream" in kind and response.status_code == 200
            if not in_pieces:
                raw = await whole(response)
                await self._came_in_time()
        except BaseException as error:
            await self._failed(request, _happened(error))
            raise
        if response.status_code != 200:
            raw = self._clean(_without_key(http_request, raw))
            again = f"; retry-after {response.headers['retry-after']}" if "retry-after" in response.headers else ""
            await self._failed(request, f"HTTP {response.status_code}{again}: {raw[:500].decode('utf-8', 'replace')}")
            return self._copy(http_request, response, content=raw)
        if in_pieces:
            if self.prepared is None and self.episode is not None and self.episode.meter is not None:
                self.episode.meter.hand((request.key, request.occurrence))
            return self._copy(http_request, response, stream=_held_back(self.module)(self, response, request, kind))
        as_it_came = await self.finish(request, kind, raw)
        if self.prepared is not None:  # our own model reads the answer, not the response
            return response
        if as_it_came and ("event-stream" if stream else "json") in kind:
            return self._copy(http_request, response, content=raw)
        return self._response(http_request, self.answered, stream)  # redacted, or not of the kind the program waits for

    def _clean(self, raw: bytes) -> bytes:
        """A body that is no answer, redacted before any of it is cut off."""
        if self.episode is None or self.episode.redact is None:
            return raw
        said = raw.decode("utf-8", "replace")
        cleaned = self.episode.tap.text(said)
        return raw if cleaned == said else cleaned.encode()

    async def _came_in_time(self) -> None:
        """From here on the answer is stored, and nothing is cut off any more; unless time was up just now."""
        limit = self.prepared and self.prepared.limit
        if limit and limit.expired():
            await asyncio.sleep(0)
        elif limit:
            limit.reschedule(None)

    def _copy(self, http_request: Any, response: Any, **content: Any) -> Any:
        """The response with its body decoded."""
        decoded = ["content-encoding", "content-length", "transfer-encoding"]
        if response.status_code in (301, 302, 303):
            decoded.append("location")  # a client would follow it with a GET, whose answer would be on nobody's record
        headers = [(k, v) for k, v in response.headers.items() if k.lower() not in decoded]
        return self.module.Response(response.status_code, headers=headers, request=http_request, **content)

    async def finish(self, request: Request, kind: str, raw: bytes) -> bool:
        """The answer is complete: store it, then let it be seen. Whether it may be seen as it came, unredacted."""
        try:
            answer = read_answer(kind, raw, most=request.params.get("n") or 1)
            if self.prepared is not None and self.prepared.check is not None:
                self.prepared.check(answer)
        except ModelGarbled as error:
            if self._clean(raw) != raw:  # the error shows its beginning, where a secret may be cut in two
                error.args = ("the endpoint's answer is no chat completion, and is not shown: it holds a secret",)
            await self._failed(request, str(error))
            raise
        came = answer
        if self.episode is not None:
            self.storing = True
            policy = answer.completion.tokens is not None and on_policy(request.params, default_top_k=None)
            answer = await self.episode.record(
                request, answer, self.started, on_policy=policy, lean=self.prepared is not None
            )
        if self.prepared is not None:
            self.prepared.answer = answer
        self.answered = answer
        return answer is came

    async def _failed(self, request: Request, detail: str) -> None:
        if self.episode is None:
            return
        await self.episode.failed("call", request.key, request.occurrence, self.started, detail)
        if self.prepared is None:  # our own model keeps its occurrence through its retries
            self.episode.give_back(request.key, request.occurrence)


class _NotOk(Exception):
    pass


@cache
def _held_back(module: ModuleType) -> Any:
    class HeldBack(module.AsyncByteStream):  # type: ignore[name-defined]
        """A stream whose end, from the finish reason on, comes only after the whole is on disk."""

        def __init__(self, call: _Call, response: Any, request: Request, kind: str) -> None:
            self.call, self.response, self.request, self.kind = call, response, request, kind
            self.begun = self.settled = False

        async def __aiter__(self) -> AsyncIterator[bytes]:
            if self.begun:  # the SDK reads on after [DONE], from the beginning as it were
                return
            self.begun = True
            said, held, told, ends = bytearray(), b"", 0, False
            on_delta = self.call.prepared.on_delta if self.call.prepared else None
            redact = self.call.episode and self.call.episode.redact
            # Our own model reads the answer, not the stream; the pieces it tells are looked after where they are told.
            events = Events(redact) if isinstance(redact, Secrets) and self.call.prepared is None else None
            try:
                async for piece in pieces(self.response):
                    said += piece
                    ends = ends or _END.search(said, max(0, len(said) - len(piece) - 40)) is not None
                    if held and not ends:
                        yield held
                        held = b""
                    held += piece if events is None else events.add(piece)
                    if on_delta is not None:
                        told = _tell(on_delta, said, told)
                await self.call._came_in_time()
                await self.call.finish(self.request, self.kind, bytes(said))
                self.settled = True
            except BaseException as error:
                self.settled = True
                if isinstance(error, STOPS) and self.call.episode is not None:
                    self.call.episode.stopped = error
                elif not isinstance(error, ModelGarbled) and not self.call.storing:
                    await self.call._failed(self.request, f"cut off: {_happened(error)}")
                raise
            if events is not None:
                held += events.rest(self.call.answered)
            if held:
                yield held

        async def aclose(self) -> None:
            if not self.settled:
                self.settled = True
                await self.call._failed(self.request, "the program stopped reading before the stream ended")
            await self.response.aclose()

    return HeldBack


_END = re.compile(rb'"finish_reason": ?"|data: ?\[DONE\]')


def _happened(error: BaseException) -> str:
    return (
        "no answer: the program stopped waiting"
        if isinstance(error, asyncio.CancelledError)
        else f"{type(error).__name__}: {error}"
    )


def _without_key(http_request: Any, raw: bytes) -> bytes:
    """An error's body without the keys it may repeat."""
    for name in _KEYS:
        key = http_request.headers.get(name, "").rpartition(" ")[2].encode()
        raw = raw.replace(key, b"[key]") if key else raw
    return raw


_KEYS = ("authorization", "proxy-authorization", "api-key", "x-api-key", "x-goog-api-key")


def _tell(on_delta: OnDelta, whole: bytearray, told: int) -> int:
    end = whole.rfind(b"\n")
    for line in bytes(whole[told : max(end, told)]).split(b"\n"):
        if text := delta_text(line):
            on_delta(text)
    return max(end, told)


def _with_body(module: ModuleType, request: Any, body: bytes) -> Any:
    headers = [(k, v) for k, v in request.headers.items() if k.lower() != "content-length"]
    return module.Request(request.method, request.url, headers=headers, content=body, extensions=request.extensions)
