"""`litellm:NAME`: the many providers LiteLLM speaks to, through the journal; its answers carry no exact tokens.

LiteLLM's own retries are off: attempts it makes inside cannot be seen, and every attempt belongs on record. So one
call of LiteLLM is one attempt here, handed to the journal, and the retries are ours. It is imported at the first call
(seconds), with its network look-up at import switched off.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Sequence
from typing import Any

from cod_agent.completions import Completion, OnDelta
from cod_agent.context import Message
from cod_agent.environments.base import Form
from cod_agent.errors import (
    MissingExtra,
    ModelError,
    ModelGarbled,
    ModelOverloaded,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
)
from cod_agent.models.base import Sampling
from cod_agent.models.pace import Pace

RETRIES = 4
TIMEOUT = 600.0
LONGEST_WAIT = 60.0
"""Seconds between two attempts, however long the server asks to wait."""

_INEXACT = "LiteLLM does not hand on token ids: use openai:NAME with a server that gives them"


class LiteLLMModel:
    """`litellm:NAME`.

    Args:
        model: LiteLLM's name for it, PROVIDER/NAME.
        sampling: how answers are drawn.
        api_base, api_key: default to what LiteLLM reads from the environment for that provider.
        timeout: seconds one attempt may take.
        retries: attempts after the first, for time-outs, 429, 5xx, lost connections and garbled answers.
        concurrency: most requests under way at once; fewer, while the provider says it is overloaded.
        stream: read answers as they come (`on_delta`).
        form: how worlds talk to it.

    Raises:
        MissingExtra: litellm is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        sampling: Sampling | None = None,
        api_base: str | None = None,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        retries: int = RETRIES,
        concurrency: int = 32,
        stream: bool = False,
        form: Form = "natural",
    ) -> None:
        from importlib.util import find_spec

        if find_spec("litellm") is None:
            raise MissingExtra(f"litellm:{model}", "litellm")
        self.name, self.form = f"litellm:{model}", form
        self._params = (sampling or Sampling()).wire()
        if self._params.get("top_p") == 1.0:
            # It changes nothing, and some providers refuse it beside a temperature.
            del self._params["top_p"]
        where = {"api_base": api_base, "api_key": api_key}
        self._fixed = {"model": model, "timeout": timeout, "num_retries": 0, "max_retries": 0, "stream": stream}
        self._fixed |= {key: value for key, value in where.items() if value is not None}
        self._timeout, self._retries, self._pace = timeout, retries, Pace(concurrency)

    @property
    def secrets(self) -> dict[str, str]:
        """What must stand in no prompt and no record, by name (see `cod_agent.secrets`)."""
        return {"API_KEY": str(self._fixed.get("api_key", ""))}

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer; see `Model.complete`."""
        from cod_agent.journal import record_completion

        asked_to_wait: list[float] = []

        async def attempt(messages: Sequence[Message]) -> Completion:
            async with self._pace.turn() as began:
                try:
                    answer = await self._attempt(messages, on_delta, asked_to_wait)
                except (ModelOverloaded, ModelTimeout):
                    self._pace.refused(began)
                    raise
                self._pace.answered()
                return answer

        for number in range(self._retries + 1):
            try:
                return await record_completion(self.name, messages, self._params, attempt)
            except (ModelUnreachable, ModelTimeout, ModelOverloaded, ModelGarbled):
                if number == self._retries:
                    raise
                asked = asked_to_wait.pop() if asked_to_wait else 0.0
                await asyncio.sleep(min(max(asked, 0.5 * 2**number * random.uniform(0.75, 1.0)), LONGEST_WAIT))
        raise AssertionError("unreachable")

    async def _attempt(self, messages: Sequence[Message], on_delta: OnDelta | None, waits: list[float]) -> Completion:
        litellm = _library()
        try:
            answer = await litellm.acompletion(
                messages=[message.wire() for message in messages], **self._params, **self._fixed
            )
            if self._fixed["stream"]:
                return await _streamed(answer, on_delta)
        except ModelError:
            raise
        except Exception as error:  # LiteLLM raises whatever its providers' clients raise
            waits.append(_retry_after(error))
            raise self._failure(litellm, error) from error
        return _whole(answer)

    def _failure(self, litellm: Any, error: Exception) -> ModelError:
        status, said = getattr(error, "status_code", None), f"{self.name}: {_first_line(error)}"
        if isinstance(error, litellm.Timeout | TimeoutError):
            return ModelTimeout(f"{said}; no answer within {self._timeout:g} s")
        if _lost(error):
            return ModelUnreachable(f"{said}; check the address and that the server runs")
        if isinstance(status, int) and 400 <= status < 500 and status not in (408, 409, 429):
            return ModelRefused(f"{said} (status {status}; asking again will not help)")
        if isinstance(status, int) and (status in (408, 409, 429) or status >= 500) and not _unreadable(error):
            return ModelOverloaded(f"{said} (status {status})")
        return ModelGarbled(f"{said}; is it the right kind of endpoint?")


def _library() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    import litellm

    litellm.suppress_debug_info = True
    return litellm


def _whole(answer: Any) -> Completion:
    try:
        choice = answer.choices[0]
        text, finish = choice.message.content or "", choice.finish_reason or "stop"
    except (AttributeError, IndexError, TypeError) as error:
        raise ModelGarbled(f"LiteLLM's answer has no message: {error!r}") from None
    return Completion(text, finish, None, _INEXACT, _weights(answer), _usage(answer))


async def _streamed(answer: Any, on_delta: OnDelta | None) -> Completion:
    text, finish, weights = "", "", ""
    async for chunk in answer:
        weights = weights or _weights(chunk)
        for choice in chunk.choices:
            piece = choice.delta.content or ""
            text, finish = text + piece, choice.finish_reason or finish
            if piece and on_delta is not None:
                on_delta(piece)
    # LiteLLM ends a stream that was cut off with a finish reason of its own making.
    if not finish or getattr(answer, "received_finish_reason", finish) is None:
        raise ModelGarbled("the stream ended in the middle of the answer")
    return Completion(text, finish, None, _INEXACT, weights)


def _weights(answer: Any) -> str:
    named = (getattr(answer, "model", None), getattr(answer, "system_fingerprint", None))
    return "@".join(part for part in named if part)


def _usage(answer: Any) -> tuple[int, int] | None:
    used = getattr(answer, "usage", None)
    return (used.prompt_tokens, used.completion_tokens) if used else None


def _retry_after(error: Exception) -> float:
    """What the server asked for, in seconds; 0 if it did not."""
    for cause in _causes(error):
        try:
            return float(cause.response.headers["retry-after"])  # type: ignore[attr-defined]
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return 0.0


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _lost(error: Exception) -> bool:
    return any(isinstance(cause, ConnectionError) or "Connect" in type(cause).__name__ for cause in _causes(error)[1:])


def _unreadable(error: Exception) -> bool:
    """LiteLLM calls it a server error when an answer is no JSON."""
    return any(
        type(cause).__name__ in ("JSONDecodeError", "APIResponseValidationError") for cause in _causes(error)[1:]
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
