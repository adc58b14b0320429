"""What a model is to the runtime: `complete(messages) -> Completion`, exact where the server is exact.

Recording is not the model's business. A model that speaks HTTP does so through the journal's transport; one that samples
tokens itself hands request and answer to the journal (`cod_agent.journal`). Either way an answer is on disk before
`complete` returns, and a resumed episode gets the recorded one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cod_agent.completions import Completion, OnDelta, Tokens
from cod_agent.context import Message
from cod_agent.environments.base import Form


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer is drawn. The defaults are the model's own distribution, untruncated: what training needs."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = None
    """Longest answer, in tokens; None leaves it to the server."""
    seed: int | None = None

    def wire(self) -> dict[str, Any]:
        """As chat completion APIs take it, without what is not set."""
        said = {"temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens, "seed": self.seed}
        return {name: value for name, value in said.items() if value is not None}

    @property
    def untouched(self) -> bool:
        """Whether answers are drawn from the model's own distribution, so that its log-probabilities are those of sampling."""
        return self.temperature == 1.0 and self.top_p == 1.0


class Model(Protocol):
    """Anything that answers messages."""

    name: str
    """As on the command line, e.g. `openai:gpt-5` or `embedded`."""
    form: Form
    """How worlds should talk to it."""

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        """One answer to `messages`.

        Raises:
            ModelError: the kind of trouble, after the model's own retries.
        """
        ...


__all__ = ["Completion", "Model", "OnDelta", "Sampling", "Tokens"]
