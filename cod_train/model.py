"""A model whose answers are drawn by whoever trains it: the runtime's messages in, token ids to a rollout server and back.

The conversation is spelt as token ids once (`cod_train.prompts`), the server is asked for ids and log-probabilities, and the
journal records both before the agent sees the answer. Nothing is ever tokenised again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cod_agent.completions import Completion, OnDelta, Tokens
from cod_agent.context import Message
from cod_agent.environments.base import Form
from cod_agent.errors import ModelError
from cod_agent.journal import record_completion
from cod_agent.models.base import Sampling
from cod_train.prompts import PromptIds


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a rollout server answered."""

    token_ids: Sequence[int]
    """The token that ends the turn included."""
    log_probs: Sequence[float]
    """One per sampled token, natural logarithm, of the model's own distribution."""
    finish: str
    """stop or length"""
    weights: str
    """Which weights sampled them."""


Generate = Callable[[str, list[int], dict[str, Any]], Awaitable[Drawn]]
"""(request id, prompt ids, sampling parameters as chat completion APIs name them) -> what was drawn."""


class TokenModel:
    """A `Model` of the runtime over a token-in, token-out server.

    Args:
        name: as it stands in the record.
        tokenizer: a Hugging Face tokenizer with a chat template.
        generate: the server.
        sampling: temperature 1 and top-p 1 are what can be trained on.
        form: how worlds talk to it.
        context_length: longest conversation in tokens, the answer included; None: the server's own affair.
        prompts: shared among the models of one tokenizer, so that what is spelt is remembered once.
        template: variables of the chat template.
        request: a name sent with every request; servers keep the keys and values of one name together.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        generate: Generate,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        form: Form = "natural",
        context_length: int | None = None,
        prompts: PromptIds | None = None,
        template: Mapping[str, Any] | None = None,
        request: str = "",
    ) -> None:
        self.name, self.form, self.sampling = name, form, sampling
        self.context_length, self._template = context_length, dict(template or {})
        self.prompts = prompts or PromptIds(tokenizer)
        self._decode = tokenizer.backend_tokenizer.decode if hasattr(tokenizer, "backend_tokenizer") else None
        self._tokenizer, self._generate, self._request = tokenizer, generate, request or name

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer to `messages`.

        A conversation that fills the context is answered with nothing: the world ends the episode, an update is refused.

        Raises:
            ModelRefused: the chat template does not take the conversation.
            ModelError: the server failed.
        """

        async def answer(messages: Sequence[Message]) -> Completion:
            prompt = self.prompts.ids([message.wire() for message in messages], **self._template)
            if self.context_length is not None and len(prompt) >= self.context_length:
                # The policy has talked until there was no room for an answer, and that is its failure: it says nothing more.
                return Completion("", "length", Tokens(prompt, [], []), "", "", (len(prompt), 0))
            try:
                drawn = await self._generate(self._request, prompt, self.sampling.wire())
            except ModelError:
                raise
            except Exception as error:
                raise ModelError(f"the rollout server failed: {type(error).__name__}: {error}") from error
            sampled = list(drawn.token_ids)
            self.prompts.answered(prompt, sampled)
            tokens, inexact = Tokens(prompt, sampled, list(drawn.log_probs)), ""
            if len(tokens.logprobs) != len(sampled):
                tokens, inexact = None, f"{len(drawn.log_probs)} log-probabilities for {len(sampled)} tokens"  # type: ignore[assignment]
            said = self._spelt(sampled)
            if on_delta is not None:
                on_delta(said)
            return Completion(said, drawn.finish, tokens, inexact, drawn.weights, (len(prompt), len(sampled)))

        return await record_completion(self.name, messages, self.sampling.wire(), answer)

    def _spelt(self, ids: list[int]) -> str:
        if self._decode is not None:
            return str(self._decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
