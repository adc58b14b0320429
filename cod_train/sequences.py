"""An episode's calls as the trainer sees them: merged into one sequence where each continues the one before.

A chat that only grows sends its whole past again with every call. Where a prompt is the prompt and answer before it, token
for token, and then something more, one sequence with a mask says the same in fewer tokens: every sampled token is seen once,
after the very tokens it was sampled after, so that the gradient is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["solve", "update"]


@dataclass(frozen=True, slots=True)
class Call:
    """One model call, exactly as the server sampled it."""

    prompt: list[int]
    sampled: list[int]
    logprobs: list[float]
    """One per sampled token, natural logarithm."""
    weights: str
    """Which weights answered, as precisely as the server said."""


@dataclass(frozen=True, slots=True)
class Segment:
    """An episode seen as a unit of credit."""

    kind: Kind
    position: int
    status: str
    """The episode's: done, refused (an update that wrote no context), aborted, live."""
    calls: tuple[Call, ...]
    """Empty if it cannot train."""
    refused: str = ""
    """Why it cannot train; "" if it can, as a refused update can."""
    where: str = ""
    """Which episode, and which call of it, that reason speaks of."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One row of a training batch: one call, or several that continue each other."""

    prompt: list[int]
    """Ids before the first sampled token."""
    response: list[int]
    """Sampled ids, and what lies between them."""
    mask: list[int]
    """1 where the id was sampled; as long as `response`."""
    logprobs: list[float]
    """Of the sampling distribution; 0.0 where `mask` is 0."""
    calls: int


def sequences(segment: Segment, merge: bool = True) -> list[Sequence]:
    """The sequences of a segment, in order; `merge=False` makes each call one."""
    made: list[Sequence] = []
    told: list[int] = []
    for call in segment.calls:
        sampled, known = [1] * len(call.sampled), len(told)
        if merge and made and call.prompt[:known] == told:
            last, between = made[-1], call.prompt[known:]
            last.response.extend(between + call.sampled)
            last.mask.extend([0] * len(between) + sampled)
            last.logprobs.extend([0.0] * len(between) + call.logprobs)
            made[-1] = Sequence(last.prompt, last.response, last.mask, last.logprobs, last.calls + 1)
        else:
            made.append(Sequence(call.prompt, list(call.sampled), sampled, list(call.logprobs), 1))
        told = call.prompt + call.sampled
    return made
