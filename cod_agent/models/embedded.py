"""Any GGUF file as a model, in this process: llama.cpp through xllamacpp. Exact, or it says why not.

The prompt is made of token ids once (the file's own chat template, the engine's own tokeniser) and sent as ids. What
comes back is the id and the natural log-probability of every sampled token, the one that ends the turn included, from
the model's own distribution: llama.cpp reports them before temperature and truncation. What it leaves out (tokens that
end within a UTF-8 character) shows as a difference to its own count, and the answer is then marked inexact.

Files of 32-bit weights are computed with a 32-bit cache and plain attention, so that log-probabilities agree with a
trainer's; others with llama.cpp's defaults. Calls wait in threads without holding the interpreter; those that wait
together are decoded together. The smallest of them, such as the shipped policies, are decoded in numpy, which is several times
faster there (`small_llama`); llama.cpp then reads their prompts only.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cod_agent.completions import Completion, OnDelta, Tokens
from cod_agent.context import Message
from cod_agent.environments.base import Form
from cod_agent.errors import ModelError, ModelGarbled, ModelRefused
from cod_agent.models.base import Sampling
from cod_agent.models.gguf import fingerprint, read_metadata
from cod_agent.models.llama_engine import Engine, Listener
from cod_agent.models.small_llama import SmallEngine, fits
from cod_agent.models.spelling import Spelling

LONG = 256
"""Tokens. Answers that may be longer are read piece by piece, so that they end when nobody waits for them any more."""


class GgufModel:
    """A language model in a GGUF file.

    Args:
        path: the file.
        name: as on the command line; `gguf:PATH` if not given.
        form: how worlds should talk to it.
        sampling: how answers are drawn. A seed makes an answer a function of its prompt.
        parallel: how many answers are drawn at once, at most; fewer where their caches would take over a gigabyte.
        threads: of the computation.
        context_length: longest conversation in tokens; what the model was trained for, at most 8,192, if not given.
        small: decode a small model in numpy; False has llama.cpp do it, as it does all others.

    Raises:
        MissingExtra: xllamacpp is not installed.
        UsageError: no such file, or not one llama.cpp can load.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        form: Form = "natural",
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        parallel: int = 32,
        threads: int = 1,
        context_length: int | None = None,
        small: bool = True,
    ) -> None:
        self.name, self.form, self.sampling = name or f"gguf:{path}", form, sampling
        path = Path(path)
        metadata = read_metadata(path)
        small = small and fits(path, metadata)
        # An engine that only reads prompts needs one slot.
        self._engine: Engine | None = Engine(path, metadata, 1 if small else parallel, threads, context_length)
        self.weights = fingerprint(path)
        self.context_length = self._engine.context_length
        self._small = SmallEngine(path, metadata, parallel, self.context_length) if small else None
        self._spelling = Spelling(metadata) if small else None
        self._pool = ThreadPoolExecutor(self._engine.parallel, thread_name_prefix="llama")
        self._request, self._closing = _request(sampling), threading.Event()

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer to `messages`.

        Raises:
            ModelRefused: the conversation does not fit the context window, or the chat template does not take it.
            ModelGarbled: the engine's answer is of an unknown shape.
            ModelError: the model is closed, or the engine failed.
        """
        from cod_agent.journal import record_completion

        async def answer(messages: Sequence[Message]) -> Completion:
            loop, given_up = asyncio.get_running_loop(), threading.Event()
            listen = self._listener(loop, on_delta, given_up)
            try:
                if self._small is not None:
                    return await self._small_answer(self._small, messages, on_delta, given_up)
                return await loop.run_in_executor(self._pool, self._answer, messages, listen)
            finally:
                given_up.set()

        if self._engine is None:
            raise ModelError(f"{self.name} is closed")
        return await record_completion(self.name, messages, self.sampling.wire(), answer)

    def close(self) -> None:
        """Waits for short answers under way, breaks off long ones and frees the memory; the model is then of no use."""
        self._closing.set()
        self._pool.shutdown(wait=True)
        if self._small is not None:
            self._small.close()
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _listener(
        self, loop: asyncio.AbstractEventLoop, on_delta: OnDelta | None, given_up: threading.Event
    ) -> Listener | None:
        """What hears each piece of an answer and may end it; None where it is not worth the time, for short answers."""
        if on_delta is None and (self.sampling.max_tokens or LONG) < LONG:
            return None

        def listen(text: str) -> bool:
            if given_up.is_set() or self._closing.is_set():
                return False
            if on_delta is not None and text:
                loop.call_soon_threadsafe(on_delta, text)
            return True

        return listen

    def _answer(self, messages: Sequence[Message], listen: Listener | None) -> Completion:
        engine, prompt = self._prompt(messages)
        text, finish, scored, usage = engine.complete(prompt, self._request, listen)
        tokens, inexact = _exact(prompt, scored, usage)
        return Completion(text, finish, tokens, inexact, self.weights, usage)

    async def _small_answer(
        self, small: SmallEngine, messages: Sequence[Message], on_delta: OnDelta | None, given_up: threading.Event
    ) -> Completion:
        _, prompt = self._prompt(messages)
        asked = small.ask(prompt, self.sampling, lambda: given_up.is_set() or self._closing.is_set())
        drawn = await asyncio.wrap_future(asked)
        text = self._spelling(drawn.ids) if self._spelling else ""
        if on_delta is not None:
            on_delta(text)
        tokens = Tokens(prompt, drawn.ids, drawn.logprobs)
        return Completion(text, drawn.finish, tokens, "", self.weights, (len(prompt), len(drawn.ids)))

    def _prompt(self, messages: Sequence[Message]) -> tuple[Engine, list[int]]:
        engine = self._engine
        if engine is None:
            raise ModelError(f"{self.name} is closed")
        prompt = engine.tokenize(engine.template.render(messages))
        if len(prompt) >= self.context_length:
            raise ModelRefused(
                f"the conversation is {len(prompt)} tokens long, and {self.name} takes {self.context_length} with the answer: "
                "shorten the context or the task, or raise context_length if the model allows"
            )
        return engine, prompt


def _request(sampling: Sampling) -> dict[str, Any]:
    """Everything that shapes the distribution, said aloud: llama.cpp's own defaults truncate."""
    stages = ["temperature"] if sampling.top_p >= 1 else ["temperature", "top_p"]
    out: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0, "min_p": 0.0}
    out |= {"samplers": stages, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    out |= {"logprobs": 1, "cache_prompt": True}
    out["max_tokens"] = -1 if sampling.max_tokens is None else sampling.max_tokens
    if sampling.seed is not None:
        out["seed"] = sampling.seed & 0xFFFFFFFF
    return out


def _exact(prompt: list[int], scored: list[dict[str, Any]], usage: tuple[int, int]) -> tuple[Tokens | None, str]:
    """The tokens, or None and why they are not all there."""
    if len(prompt) != usage[0]:
        return None, f"the engine read {usage[0]} prompt tokens, {len(prompt)} were sent"
    if len(scored) != usage[1]:
        missing = usage[1] - len(scored)
        return None, f"llama.cpp left out {missing} of {usage[1]} sampled tokens, which end within a UTF-8 character"
    try:
        sampled, logprobs = [int(one["id"]) for one in scored], [float(one["logprob"]) for one in scored]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelGarbled(f"llama.cpp gave log-probabilities of an unknown shape: {error!r}") from None
    if not all(math.isfinite(value) and value > -1e30 for value in logprobs):
        return None, "a sampled token has no finite log-probability"
    return Tokens(prompt, sampled, logprobs), ""
