"""Any OpenAI-compatible endpoint, on the HTTP transport of the OpenAI SDK (httpx or httpx2) rather than on its client.

`chat.completions.create` spends milliseconds on transforming the messages of a long conversation, and the SDK's low-level `post`
still costs as much again as the request itself (docs/benchmarks.md). So the bytes that the journal has prepared are sent
as they are, and what the SDK would add is here: the key, the base URL, time-outs, retries with Retry-After, and errors that say what to do.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from cod_agent.completions import Completion, OnDelta
from cod_agent.context import Message, WireMessage
from cod_agent.environments.base import Form
from cod_agent.errors import (
    ModelError,
    ModelGarbled,
    ModelOverloaded,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
    UsageError,
)
from cod_agent.models.base import Sampling
from cod_agent.models.pace import Pace
from cod_agent.secrets import password_in, without_login

if TYPE_CHECKING:
    from cod_agent.journal.answers import Answer
    from cod_agent.journal.episode import Request

RETRIES = 4
TIMEOUT = 600.0
FIRST_WAIT = 0.5
"""Seconds before the second attempt, if the endpoint says nothing; twice as long before each after it."""
_LONGEST_WAIT = 120.0
"""Seconds a Retry-After may ask for; an endpoint that wants longer is overloaded."""
_AGAIN = {408, 409, 429}

EXACT = {
    "logprobs": True,
    "return_token_ids": True,
    # vLLM takes what is not said from the model's generation config; training needs the untouched distribution.
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What `exact` adds to a request, in vLLM's terms."""


class OpenAIModel:
    """`openai:NAME`.

    Args:
        model: the endpoint's name for it.
        sampling: how answers are drawn. Parameters left at None are not sent.
        base_url, api_key: default to OPENAI_BASE_URL and OPENAI_API_KEY; a local server without a key needs none.
        exact: ask for token ids and log-probabilities of the untruncated distribution (vLLM's terms; others may refuse them).
        stream: read answers as they come (`on_delta`).
        concurrency: most requests under way at once; fewer, while the endpoint says it is overloaded.
        timeout: seconds one attempt may take.
        retries: attempts after the first, for 408, 409, 429, 5xx, lost connections and garbled answers.
        extra: anything else that belongs in the request's body.
        form: how worlds talk to it.
    """

    def __init__(
        self,
        model: str,
        *,
        sampling: Sampling | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        exact: bool = False,
        stream: bool = False,
        concurrency: int = 32,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        extra: dict[str, Any] | None = None,
        form: Form = "natural",
    ) -> None:
        self.name, self.form = f"openai:{model}", form
        self._model = model
        self._base_url, self._api_key = base_url, api_key
        self._timeout, self._retries, self._concurrency = timeout, retries, concurrency
        self._params = (sampling or Sampling()).wire() | (EXACT if exact else {}) | (extra or {})
        if stream:
            self._params |= {"stream": True, "stream_options": {"include_usage": True}}
        self._connection: _Connection | None = None

    @property
    def secrets(self) -> dict[str, str]:
        """What must stand in no prompt and no record, by name (see `cod_agent.secrets`)."""
        key, base = self._where()
        return {"OPENAI_API_KEY": key or "", "OPENAI_BASE_URL_PASSWORD": password_in(base or "")}

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer; see `Model.complete`."""
        return (await self._recorded(self._request(messages, self._params), on_delta)).completion

    async def exchange(
        self, messages: Sequence[WireMessage | dict[str, Any]], origins: Sequence[str | None] = (), **beside: Any
    ) -> Answer:
        """The whole answer to messages as they go over the wire, for frameworks with tools; recorded like any other call.

        Args:
            messages: as chat completion APIs take them.
            origins: labels of the messages' texts (`cod_agent.context.labels`, as canonical JSON); None goes by the role.
            beside: what stands beside the messages: `tools`, `tool_choice`.

        Raises:
            ModelError: as in `complete`.
        """
        return await self._recorded(self._request(messages, {**self._params, **beside}, origins), None)

    def _request(self, messages: Sequence[Any], params: dict[str, Any], origins: Sequence[str | None] = ()) -> Request:
        from cod_agent.journal.episode import current_episode
        from cod_agent.journal.requests import Conversation
        from cod_agent.journal.tap import Tap

        return (current_episode() or Conversation(Tap())).request(self._model, messages, params, origins)

    async def _recorded(self, request: Request, on_delta: OnDelta | None) -> Answer:
        from cod_agent.journal.episode import current_episode
        from cod_agent.journal.http import Prepared

        episode = current_episode()
        if episode is None:
            return await self._send(Prepared(request, on_delta))
        request.occurrence = episode.take(request.key)
        try:
            return await episode.replay(request) or await self._send(Prepared(request, on_delta))
        except BaseException:
            episode.give_back(request.key, request.occurrence)
            raise

    async def _send(self, call: Any) -> Answer:
        connection = self._connected()
        for left in range(self._retries, -1, -1):
            async with connection.pace.turn() as began:
                trouble, wait = await self._attempt(connection, call)
                if trouble is None:
                    connection.pace.answered()
                    return call.answer
                if isinstance(trouble, ModelOverloaded | ModelTimeout):
                    connection.pace.refused(began)
            if not left or isinstance(trouble, ModelRefused) or (wait or 0) > _LONGEST_WAIT:
                raise trouble
            await asyncio.sleep(
                min(8.0, FIRST_WAIT * 2 ** (self._retries - left)) * random.uniform(0.75, 1) if wait is None else wait
            )
        raise ModelError("unreachable")  # pragma: no cover (the last attempt answers or raises)

    async def _attempt(self, connection: _Connection, call: Any) -> tuple[ModelError | None, float | None]:
        """One attempt: what kept it from an answer, and the seconds the endpoint asks to wait, None if it says nothing."""
        from cod_agent.journal.http import attempt

        module, where = connection.module, f"{connection.base} ({self.name})"
        headers, name = connection.headers, uuid.uuid4().hex
        request = module.Request(
            "POST", connection.url, headers={**headers, "x-request-id": name}, content=call.request.body
        )
        call.check = partial(connection.check, name)
        tried = f"(asked {self._retries + 1} times)"
        try:
            async with asyncio.timeout(self._timeout) as call.limit:
                response = await attempt(call, request, connection.transport)
        except (ModelGarbled, module.DecodingError) as error:
            return ModelGarbled(f"{where}: {error}; is it an OpenAI-compatible endpoint? {tried}"), None
        except (TimeoutError, module.TimeoutException):
            said = f"{where} did not answer within {self._timeout:g} s {tried}"
            return ModelTimeout(f"{said}: is it overloaded? Raise the time-out, or resume later"), None
        except module.HTTPError as error:
            said = f"cannot reach {where}: {str(error) or type(error).__name__} {tried}"
            return ModelUnreachable(f"{said}; check the address and that the server runs, then resume"), None
        if response.status_code == 200:
            return None, None
        return _refusal(where, response, tried), _retry_after(response.headers)

    def _connected(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if self._connection is None or self._connection.loop is not loop:
            # Connections belong to an event loop; the sync twins may bring a new one each time.
            key, base = self._where()
            if key is None and base is None:
                raise UsageError(
                    "no endpoint is named: set OPENAI_API_KEY for api.openai.com, or OPENAI_BASE_URL (--base-url) for a server of "
                    "your own; the model `embedded` needs neither"
                )
            self._connection = _Connection(loop, base or "https://api.openai.com/v1", key, self._concurrency)
        return self._connection

    def _where(self) -> tuple[str | None, str | None]:
        """The key and the base URL."""
        return self._api_key or os.environ.get("OPENAI_API_KEY"), self._base_url or os.environ.get("OPENAI_BASE_URL")

    async def aclose(self) -> None:
        """Close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None and connection.loop is asyncio.get_running_loop():
            await connection.transport.aclose()


class _Connection:
    """What belongs to one event loop: the transport, and how many requests are under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop, base: str, key: str | None, concurrency: int) -> None:
        from cod_agent.journal.http import http_module, transport_to

        # As it is shown in errors. A name and a password in the address are not taken for a login: endpoints want a key.
        self.loop, self.base, self.module = loop, without_login(base.rstrip("/")), http_module()
        self.pace = Pace(concurrency)
        try:
            self.url = self.module.URL(f"{self.base}/chat/completions")
        except self.module.InvalidURL as error:
            raise UsageError(
                f"{self.base!r} is no base URL ({error}): it looks like http://127.0.0.1:8000/v1"
            ) from None
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise UsageError(f"{self.base!r} is no base URL: it looks like http://127.0.0.1:8000/v1")
        self.transport = transport_to(self.base)
        said = {"content-type": "application/json", "accept": "application/json", "user-agent": "connect-the-dots"}
        self.headers = said | ({"authorization": f"Bearer {key}"} if key else {})
        self._echoes = False

    def check(self, name: str, answer: Answer) -> None:
        """vLLM names an answer after its request (`X-Request-Id`): where a server has done so once, all its answers must.

        Raises:
            ModelGarbled: it is the answer to another request.
        """
        said = str(answer.body.get("id") or "")
        if self._echoes and name not in said:
            raise ModelGarbled(f"the answer {said!r} is to another request: to this one it were {name!r}")
        self._echoes = self._echoes or name in said


def _refusal(where: str, response: Any, tried: str) -> ModelError:
    status = response.status_code
    said = f"{where} answered {status}: {_message(response.content)}"
    if status in _AGAIN or status >= 500:
        return ModelOverloaded(f"{said} {tried}; resume later")
    hint = ""
    if status in (401, 403):
        hint = "; set OPENAI_API_KEY to a key it accepts"
    if status == 404:
        hint = "; check the model's name and the base URL (which often ends in /v1)"
    if 300 <= status < 400:
        hint = f"; it redirects to {response.headers.get('location', 'nowhere')}: give that as the base URL, if you trust it"
    refused = ModelRefused(said + hint)
    refused.status = status
    return refused


def _message(raw: bytes) -> str:
    try:
        body = json.loads(raw)
        error = body.get("error", body)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:300]
    except (ValueError, AttributeError):
        return raw[:160].decode("utf-8", "replace") or "nothing"


def _retry_after(headers: Any) -> float | None:
    """Seconds, from `retry-after-ms` or `retry-after` (seconds or a date); None if it says nothing usable."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        said = headers.get("retry-after", "")
        try:
            return max(0.0, float(said))
        except ValueError:
            date = email.utils.parsedate_tz(said)
            return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None
    except ValueError:
        return None
