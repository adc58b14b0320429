"""What a model answers, with the exact tokens where the server gave them: what models make, the journal keeps, training reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tokens:
    """The exact tokens of a call, as the server sampled them; never made by re-tokenising text."""

    prompt: Sequence[int]
    sampled: Sequence[int]
    logprobs: Sequence[float]
    """One per sampled token, natural logarithm, of the model's own distribution (temperature 1, untruncated)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer."""

    text: str
    finish_reason: str = "stop"
    """stop, length (cut by max_tokens), or what else the server says."""
    tokens: Tokens | None = None
    """None where the server did not give them all: the call is then recorded as inexact, with `inexact` as the reason."""
    inexact: str = ""
    weights: str = ""
    """Which weights answered, as precisely as the server says."""
    usage: tuple[int, int] | None = None
    """(prompt tokens, sampled tokens) as the server counts them."""


OnDelta = Callable[[str], None]
"""Called with each piece of text of a streaming answer; provisional until `complete` returns."""
