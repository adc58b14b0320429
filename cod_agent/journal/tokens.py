"""The tap for models that sample tokens themselves (the embedded engine, a scripted player, a trainer's rollout server)."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cod_agent.completions import Completion
from cod_agent.context import Message
from cod_agent.errors import ModelError
from cod_agent.journal.answers import Answer
from cod_agent.journal.episode import current_episode

Sampler = Callable[[Sequence[Message]], Awaitable[Completion]]


async def record_completion(
    model: str, messages: Sequence[Message], params: dict[str, Any], sample: Sampler
) -> Completion:
    """The recorded answer of this call, or what `sample` answers, recorded; without an episode around, just that.

    Args:
        model: its name, as it stands in the rebuilt request.
        messages: the conversation. `sample` gets it as it is stored: redacted, if there is a redaction.
        params: the sampling parameters, JSON values; they stand beside the messages in the request.
        sample: makes the call.

    Raises:
        ModelError: what `sample` raises; the failed attempt is on record.
    """
    episode = current_episode()
    if episode is None:
        return await sample(messages)
    request = episode.request(model, messages, params)
    request.occurrence = episode.take(request.key)
    try:
        known = await episode.replay(request)
        if known is not None:
            return known.completion
        started = time.time()
        try:
            completion = await sample([episode.tap.ours(said) for said in messages])
        except ModelError as error:
            await episode.failed("call", request.key, request.occurrence, started, f"{type(error).__name__}: {error}")
            raise
        answer = await episode.record(
            request, _wrap(completion), started, on_policy=_untouched(params, completion), lean=True
        )
        return answer.completion
    except BaseException:
        episode.give_back(request.key, request.occurrence)
        raise


def _wrap(completion: Completion) -> Answer:
    message = {"role": "assistant", "content": completion.text}
    return Answer({"choices": [{"message": message}]}, completion)


def _untouched(params: dict[str, Any], completion: Completion) -> bool:
    """Whether the log-probabilities are those of the distribution that was sampled. Our own models send every knob they turn."""
    return completion.tokens is not None and on_policy(params, default_top_k=0)


def on_policy(params: dict[str, Any], default_top_k: int | None) -> bool:
    """Whether these sampling parameters leave the model's distribution as it is.

    Args:
        params: a request's parameters.
        default_top_k: what an absent `top_k` means; None if it is the server's secret (vLLM takes it from the model's
            generation config), which counts as changed.
    """
    top_k = params.get("top_k", default_top_k)
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "min_p": 0}
    return (
        params.get("temperature") == 1
        and params.get("top_p", 1) == 1
        and top_k in (0, -1)
        and all(params.get(name) in (None, value) for name, value in neutral.items())
        and not params.get("logit_bias")
        and not params.get("response_format")
    )
