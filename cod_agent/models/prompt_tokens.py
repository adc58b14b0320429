"""Token ids of a prompt, where each distinct line is tokenised once.

A conversation is sent whole with every turn, and little of it is new. Byte-level BPE in the GPT-2 manner never joins
characters across a control token, or across a line break that stands between two characters which are not spaces:
between such places a prompt can be cut, and the pieces tokenised apart and remembered, with the very same result.
Where a file's tokeniser is of another kind, or its special tokens could overlap a cut, prompts are tokenised whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any

Tokenize = Callable[[str], list[int]]

REMEMBERED = 8192
"""Pieces kept."""

_CONTROL, _USER_DEFINED = 3, 4
_CUT = r"(?<=\S)\n(?=\S)"


class PromptTokens:
    """text -> token ids, as `whole` would give them.

    Args:
        metadata: of the GGUF file; it has the vocabulary only if that is small.
        whole: the engine's own tokeniser.
    """

    def __init__(self, metadata: dict[str, Any], whole: Tokenize) -> None:
        self._whole = whole
        self._pieces = lru_cache(REMEMBERED)(lambda piece: tuple(whole(piece)))
        cut = _where_to_cut(metadata)
        self._split = cut.split if cut else None

    def __call__(self, text: str) -> list[int]:
        if self._split is None:
            return self._whole(text)
        return list(chain.from_iterable(self._pieces(piece) for piece in self._split(text) if piece))


def _where_to_cut(metadata: dict[str, Any]) -> re.Pattern[str] | None:
    """What separates independent pieces (and is one itself), or None if nothing safely does."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    manner = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if manner != ("gpt2", "gpt-2") or not tokens or not types:
        return None
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    controls = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    if any("\n" in token for token in special) or any(_overlap(a, b) for a in controls for b in special if a != b):
        return None
    # The lines are cut within what lies between control tokens: a control token ends with no space.
    return re.compile(f"({'|'.join([*map(re.escape, controls), _CUT])})")


def _overlap(a: str, b: str) -> bool:
    """Whether a text can hold `a` and `b` with characters in common."""
    if a in b or b in a:
        return True
    return any(a[-size:] == b[:size] or b[-size:] == a[:size] for size in range(1, min(len(a), len(b))))
