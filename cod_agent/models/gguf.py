"""GGUF files: what a model file says about itself, read without loading it, and the weights of one that holds plain floats.

Of the head, long arrays (large vocabularies, merges) are stepped over. Source: the GGUF specification, versions 2 and 3,
little-endian.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from cod_agent.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALL_F32 = 0
_F32 = 0
LONGEST_ARRAY = 4096
"""Elements; what is longer is not kept."""


class _Damaged(Exception):
    pass


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file by key, without long arrays.

    Raises:
        UsageError: no such file, not a GGUF file, or a damaged one.
    """
    return _read(path, lambda file, size: _head(file, size)[0])


def read_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The weights of a file whose tensors are all 32-bit floats, by name; rows as they are multiplied (outputs first).

    Raises:
        UsageError: as `read_metadata`, or a tensor is of another kind.
    """
    return _read(path, _tensors)


def _read(path: Path, read: Callable[[BinaryIO, int], T]) -> T:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if file.read(4) != b"GGUF":
                raise UsageError(f"{path} is not a GGUF model file: it does not start with 'GGUF'")
            return read(file, size)
    except FileNotFoundError:
        raise UsageError(f"no model file {path}: give the path of a GGUF file") from None
    except (_Damaged, UnicodeDecodeError):
        raise UsageError(f"the GGUF file {path} is damaged or cut off: fetch or export it again") from None
    except OSError as error:
        raise UsageError(f"the model file {path} cannot be read: {error.strerror or error}") from None


def all_f32(metadata: dict[str, Any]) -> bool:
    """Whether every weight is a 32-bit float, so that the engine can compute as exactly as the trainer does."""
    return metadata.get("general.file_type") == _ALL_F32


def fingerprint(path: Path) -> str:
    """The first 16 hexadecimal digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _head(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The metadata and the number of tensors."""
    version, tensors, entries = struct.unpack("<IQQ", _take(file, 20, size))
    if version not in (2, 3):
        raise UsageError(f"GGUF version {version} of {file.name} is not supported: convert it to version 3")
    out: dict[str, Any] = {}
    for _ in range(entries):
        key = _string(file, size)
        value = _value(file, _number(file, "I", size), size)
        if value is not None:
            out[key] = value
    return out, tensors


def _tensors(file: BinaryIO, size: int) -> dict[str, NDArray[np.float32]]:
    import numpy as np

    metadata, count = _head(file, size)
    places: dict[str, tuple[tuple[int, ...], int]] = {}
    for _ in range(count):
        name = _string(file, size)
        shape = struct.unpack(f"<{(rank := _number(file, 'I', size))}Q", _take(file, 8 * rank, size))
        kind, offset = struct.unpack("<IQ", _take(file, 12, size))
        if kind != _F32:
            raise UsageError(f"tensor {name} of {file.name} holds no 32-bit floats")
        places[name] = (shape[::-1], offset)
    step = int(metadata.get("general.alignment", 32))
    start = -(-file.tell() // step) * step
    out = {}
    for name, (shape, offset) in places.items():
        file.seek(start + offset)
        raw = _take(file, 4 * math.prod(shape), size)
        out[name] = np.frombuffer(raw, "<f4").astype(np.float32).reshape(shape)
    return out


def _take(file: BinaryIO, count: int, size: int) -> bytes:
    # A damaged length must not make us ask for terabytes.
    taken = file.read(count) if count <= size else b""
    if len(taken) != count:
        raise _Damaged
    return taken


def _number(file: BinaryIO, code: str, size: int) -> Any:
    return struct.unpack(f"<{code}", _take(file, struct.calcsize(f"<{code}"), size))[0]


def _string(file: BinaryIO, size: int) -> str:
    return _take(file, _number(file, "Q", size), size).decode("utf-8")


def _value(file: BinaryIO, kind: int, size: int) -> Any:
    """The value, or None for a long array, which is stepped over."""
    if kind in _SCALARS:
        return _number(file, _SCALARS[kind], size)
    if kind == _STRING:
        return _string(file, size)
    if kind != _ARRAY:
        raise _Damaged
    inner, count = struct.unpack("<IQ", _take(file, 12, size))
    # An element takes a byte at least: a count beyond the file's size is damage.
    if count > size or inner not in (*_SCALARS, _STRING):
        raise _Damaged
    if inner == _STRING:
        texts = [_take(file, _number(file, "Q", size), size) for _ in range(count)]
        return None if count > LONGEST_ARRAY else [text.decode("utf-8") for text in texts]
    form = f"<{count}{_SCALARS[inner]}"
    taken = _take(file, struct.calcsize(form), size)
    return None if count > LONGEST_ARRAY else list(struct.unpack(form, taken))
