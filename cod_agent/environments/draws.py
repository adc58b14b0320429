"""Randomness that is the same on every machine and Python version.

Every draw comes from SHA-256 of what names it and uses `random.Random.random` only, which Python promises not to change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


def randomness(*names: object) -> Random:
    """A generator that depends on `names` alone, in every process and Python version. Draw with `.random()` only."""
    digest = hashlib.sha256("\x1f".join(map(str, names)).encode()).digest()
    return Random(int.from_bytes(digest, "big"))


def below(rng: Random, n: int) -> int:
    """A whole number in [0, n)."""
    return int(rng.random() * n)


def between(rng: Random, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    return low + below(rng, high - low + 1)


def uniform(rng: Random, low: float, high: float) -> float:
    """A number in [low, high)."""
    return low + rng.random() * (high - low)


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """`items` in random order (Fisher and Yates)."""
    out = list(items)
    for last in range(len(out) - 1, 0, -1):
        other = below(rng, last + 1)
        out[last], out[other] = out[other], out[last]
    return out


def of_eval(text: str) -> bool:
    """Whether what `text` describes belongs to the eval split: a quarter of everything, by its hash."""
    return hashlib.sha256(text.encode()).digest()[0] < 64
