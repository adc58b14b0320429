"""Token ids -> text, for byte-level vocabularies in the GPT-2 manner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_CONTROL, _USER_DEFINED = 3, 4


class Spelling:
    """Spells token ids. Control tokens are silent; bytes that are no UTF-8 show as U+FFFD.

    Args:
        metadata: of the GGUF file, with its vocabulary.
    """

    def __init__(self, metadata: dict[str, Any]) -> None:
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        byte_of = _bytes_by_character()
        self._pieces = [
            b""
            if kind == _CONTROL
            else token.encode()
            if kind == _USER_DEFINED or any(character not in byte_of for character in token)
            else bytes(byte_of[character] for character in token)
            for token, kind in zip(tokens, types, strict=True)
        ]

    def __call__(self, ids: Iterable[int]) -> str:
        return b"".join(self._pieces[one] for one in ids).decode("utf-8", "replace")


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on, in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}
