"""Any OpenAI-compatible endpoint, through the OpenAI SDK's low-level `post` and the journal's transport.

`chat.completions.create` spends milliseconds on transforming the messages of a long conversation; `post` sends the bytes the
journal has prepared and keeps the SDK's authentication, base URL, retries (with Retry-After) and errors.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from cod_agent.context import Message
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
from cod_agent.models.base import Completion, OnDelta, Sampling

RETRIES = 4
TIMEOUT = 600.0


class OpenAIModel:
    """`openai:NAME`.

    Args:
        model: the endpoint's name for it.
        sampling: how answers are drawn. Parameters left at None are not sent.
        base_url, api_key: default to OPENAI_BASE_URL and OPENAI_API_KEY; a local server without a key needs none.
        exact: ask for token ids and log-probabilities in vLLM's terms, and for its untruncated distribution. Endpoints that know no
            `return_token_ids` refuse it.
        stream: read answers as they come (`on_delta`).
        concurrency: most requests under way at once.
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
        self._model, self._base_url, self._api_key = model, base_url, api_key
        self._timeout, self._retries = timeout, retries
        self._concurrency = concurrency
        self._params = (sampling or Sampling()).wire() | (_EXACT if exact else {}) | (extra or {})
        if stream:
            self._params |= {"stream": True, "stream_options": {"include_usage": True}}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: Any = None
        self._gate = asyncio.Semaphore(concurrency)

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer; see `Model.complete`."""
        from cod_agent.journal.episode import Episode, current_episode
        from cod_agent.journal.http import Prepared

        episode = current_episode()
        # Without an episode around, one that has no file still knows how a request is written.
        request = (episode or Episode(None, 0, 0)).request(self._model, messages, self._params)  # type: ignore[arg-type]
        if episode is None:
            return await self._send(Prepared(request, on_delta))
        request.occurrence = episode.take(request.key)
        try:
            known = await episode.replay(request)
            if known is not None:
                return known.completion
            return await self._send(Prepared(request, on_delta))
        except BaseException:
            episode.give_back(request.key, request.occurrence)
            raise

    async def _send(self, call: Any) -> Completion:
        import openai

        from cod_agent.journal.http import http_module, prepared

        client = self._connected()
        body = call.request.body
        try:
            async with self._gate:
                with prepared(call):
                    await client.post(
                        "/chat/completions",
                        cast_to=http_module().Response,
                        content=body,
                        options={"headers": {"Content-Type": "application/json"}},
                    )
        except openai.OpenAIError as error:
            raise self._explain(error) from error
        return call.answer.completion  # type: ignore[no-any-return]

    def _connected(self) -> Any:
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            # Connections belong to an event loop; the sync twins may bring a new one each time.
            import os

            import openai

            from cod_agent.journal.http import recording_client

            key = self._api_key or os.environ.get("OPENAI_API_KEY")
            base = self._base_url or os.environ.get("OPENAI_BASE_URL")
            if key is None and base is None:
                raise UsageError(
                    "no endpoint is named: set OPENAI_API_KEY for api.openai.com, or OPENAI_BASE_URL (--base-url) for a server of "
                    "your own; `embedded` needs neither"
                )
            self._client = openai.AsyncOpenAI(
                api_key=key or "none",
                base_url=base,
                timeout=self._timeout,
                max_retries=self._retries,
                http_client=recording_client(timeout=self._timeout),
            )
            self._loop, self._gate = loop, asyncio.Semaphore(self._concurrency)
        return self._client

    def _explain(self, error: Exception) -> ModelError:
        import openai

        where = f"{self._client.base_url} ({self.name})"
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ModelGarbled):
                return ModelGarbled(f"{where}: {cause}; is it an OpenAI-compatible endpoint? (asked {self._retries + 1} times)")
            cause = cause.__cause__
        if isinstance(error, openai.APITimeoutError):
            return ModelTimeout(f"{where} did not answer within {self._timeout:g} s: is it overloaded? Raise the timeout, or resume later")
        if isinstance(error, openai.APIConnectionError):
            return ModelUnreachable(f"cannot reach {where}: {error.__cause__ or error}; check the address and that the server runs")
        if isinstance(error, openai.APIStatusError):
            said = f"{where} answered {error.status_code}: {_message(error)}"
            if error.status_code == 401:
                return ModelRefused(f"{said}; set OPENAI_API_KEY to a key it accepts")
            if error.status_code == 429 or error.status_code >= 500:
                return ModelOverloaded(f"{said} (asked {self._retries + 1} times); resume later")
            return ModelRefused(said)
        return ModelError(f"{where}: {error}")

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            with contextlib.suppress(RuntimeError):  # the loop they belong to may be closed already
                await self._client.close()
            self._client = None


_EXACT = {
    "logprobs": True,
    "return_token_ids": True,
    # vLLM takes what is not said from the model's generation config; training needs the untouched distribution.
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


def _message(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)[:300]
