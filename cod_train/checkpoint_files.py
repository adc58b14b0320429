"""A checkpoint as a folder: whether it could serve, what is in it, and whether it speaks its parent's language.

Read with numpy and json alone, a few megabytes at a time: a folder is judged before anything loads it. A checkpoint is a Hugging
Face folder (`full`), or a PEFT folder (`adapter`) whose `adapter_config.json` names its base.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cod_agent.environments.base import Form
from cod_agent.errors import UsageError
from cod_agent.memory.hashing import text_hash, value_hash
from cod_agent.policies import POLICIES, folder_of

Kind = Literal["full", "adapter"]

_SERVED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_BESIDE = ("probe.json",)
_SAME = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SAME_IF_SAID = ("intermediate_size", "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "sliding_window")
_CHUNK = 1 << 24
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
}
"""What a number is stored in, and its exponent bits: all of them set is an infinity or no number."""

_BYTES = {name: np.dtype(kind).itemsize for name, (kind, _) in _EXPONENTS.items()}
_BYTES |= {"F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint's folder holds."""

    kind: Kind
    folder: Path
    base: Path | None
    files: dict[str, str]
    """SHA-256 of each served file by name; of an adapter also those of its base, as `base/NAME`."""
    template: str
    """SHA-256 of the chat template's text."""
    gguf: Path | None

    @property
    def digest(self) -> str:
        """SHA-256 over the served files."""
        return value_hash(self.files)


def contents(folder: Path) -> Contents:
    """Hash what is served from `folder`.

    Raises:
        UsageError: it is no checkpoint.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}: give the folder of a Hugging Face model")
    base = base_of(folder)
    files = served_files(folder)
    if base is not None:
        files |= {f"base/{name}": digest for name, digest in served_files(base).items()}
    template = text_hash(chat_template(speaks(folder, base)))
    gguf = folder / "model.gguf"
    return Contents(
        "full" if base is None else "adapter", folder, base, files, template, gguf if gguf.is_file() else None
    )


def served_files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder that a server reads, by name. Raises: UsageError: something of such a name is no file."""
    found = {path for pattern in _SERVED for path in folder.glob(pattern) if path.name not in _BESIDE}
    if odd := sorted(path for path in found if not path.is_file()):
        raise UsageError(f"{odd[0]} is a folder, or a link to nothing: a checkpoint's files lie side by side")
    return {path.name: _sha256(path) for path in sorted(found)}


def base_of(folder: Path) -> Path | None:
    """The base of an adapter; None for a full checkpoint.

    Raises:
        UsageError: the adapter's base is no folder here.
    """
    said = _json(folder / "adapter_config.json")
    if said is None:
        return None
    named = str(said.get("base_model_name_or_path") or "")
    base = Path(named) if Path(named).is_absolute() else folder / named
    if not named or not (base / "config.json").is_file():
        raise UsageError(
            f"{folder / 'adapter_config.json'} names the base {named!r}, which is no folder with a config.json: write the "
            "path of the base's folder there"
        )
    return base.resolve()


def speaks(folder: Path, base: Path | None) -> Path:
    """The folder whose tokenizer and template are used: the base's, unless the adapter brings its own."""
    return base if base is not None and not (folder / "tokenizer_config.json").is_file() else folder


def check_servable(folder: Path, base: Path | None) -> None:
    """Config, weights, tokenizer and chat template are there and whole, and every weight is a number.

    Raises:
        UsageError: one of them is not; the message says which file.
    """
    for place in (folder,) if base is None else (folder, base):
        if place != folder or base is None:
            config = needed_json(place / "config.json")
            if "model_type" not in config:
                raise UsageError(f"{place / 'config.json'} does not say a model_type: this is no Hugging Face model")
        check_finite(place)
    if base is None and _text_config(needed_json(folder / "config.json")).get("tie_word_embeddings") is False:
        names = shapes(folder)
        if "model.embed_tokens.weight" in names and "lm_head.weight" not in names:
            raise UsageError(
                f"{folder} says that its embeddings are not tied and has no lm_head.weight: export it again"
            )
    chat_template(speaks(folder, base))
    _tokenizer(speaks(folder, base))


def check_like(child: Path, base: Path | None, parent: Path, parents_base: Path | None) -> None:
    """A checkpoint has the architecture, the tokenizer and the chat template of its parent.

    Raises:
        UsageError: what differs, with both files.
    """
    ours, theirs = base or child, parents_base or parent
    mine, its = (_text_config(needed_json(place / "config.json")) for place in (ours, theirs))
    differ = [key for key in _SAME if mine.get(key) != its.get(key)]
    differ += [key for key in _SAME_IF_SAID if mine.get(key) and its.get(key) and mine[key] != its[key]]
    said = ", ".join(f"{key} {mine.get(key)} instead of {its.get(key)}" for key in differ)
    if not said and _rotary(mine) != _rotary(its):
        said = f"rotary embedding {_rotary(mine)} instead of {_rotary(its)}"
    if said:
        raise UsageError(f"{ours / 'config.json'} is of another architecture than its parent {theirs}: {said}")
    have, want = shapes(ours), shapes(theirs)
    odd = sorted(
        name for name in have.keys() | want.keys() if have.get(name) != want.get(name) and "lm_head" not in name
    )
    if odd:
        raise UsageError(
            f"the weights of {ours} are not those of its parent's architecture: {odd[0]} is {have.get(odd[0], 'missing')}, "
            f"in {theirs} {want.get(odd[0], 'missing')} ({len(odd)} tensors differ)"
        )
    _check_limits(ours, theirs)
    ours, theirs = speaks(child, base), speaks(parent, parents_base)
    if chat_template(ours) != chat_template(theirs):
        raise UsageError(
            f"the chat template of {ours} is not that of its parent ({theirs}): the runs were recorded with the parent's, and another "
            "one would train and serve another language; copy the parent's"
        )
    if _tokenizer(ours) != _tokenizer(theirs):
        raise UsageError(
            f"the tokenizer of {ours} ({', '.join(_differing(ours, theirs))}) is not that of its parent ({theirs}): the same "
            "text would be other tokens; copy the parent's"
        )


def _check_limits(ours: Path, theirs: Path) -> None:
    """Neither longest conversation nor ends of a turn are others: what a probe's short answers do not show. Raises: UsageError."""
    longest = [
        _text_config(needed_json(place / "config.json")).get("max_position_embeddings") for place in (ours, theirs)
    ]
    if longest[1] and not (isinstance(longest[0], int) and longest[0] >= longest[1]):
        raise UsageError(
            f"{ours / 'config.json'} takes conversations of {longest[0]} tokens (max_position_embeddings), its parent {theirs} of "
            f"{longest[1]}: agents that live would be cut off; export it again"
        )
    if _ends(ours) != _ends(theirs):
        raise UsageError(
            f"the answers of {ours} end at the tokens {_ends(ours)} (eos_token_id), those of its parent {theirs} at {_ends(theirs)}: "
            "they would be cut off or go on; copy the parent's generation_config.json"
        )


def form_of(folder: Path, base: Path | None = None) -> Form:
    """How worlds talk to it: in the compact form if its chat template is the shipped policies', which speak no other.

    Args:
        base: of an adapter; `folder` is then a PEFT folder.

    Raises:
        UsageError: it has no chat template.
    """
    return "compact" if chat_template(speaks(folder, base)) == chat_template(folder_of(POLICIES[0])) else "natural"


def chat_template(folder: Path) -> str:
    """The text of a folder's chat template.

    Raises:
        UsageError: it has none.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} cannot be read as text: {error}") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        said = (_json(folder / name) or {}).get("chat_template")
        if isinstance(said, list):  # named ones; `default` is what chat uses
            said = {str(one.get("name")): one.get("template") for one in said}.get("default")
        if said:
            return str(said)
    raise UsageError(f"{folder} has no chat template: take the chat (instruct) variant, or add chat_template.jinja")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by name.

    Raises:
        UsageError: a file is damaged or missing.
    """
    return {name: tuple(entry["shape"]) for file in weight_files(folder) for name, entry in _header(file)[0].items()}


def tensor_names(file: Path) -> set[str]:
    """The tensors in a file. Raises: UsageError: it is damaged."""
    return set(_header(file)[0])


def stored_as(folder: Path) -> set[str]:
    """What the weights are stored in, in safetensors' words: F32, BF16, ... Raises: UsageError."""
    return {entry["dtype"] for file in weight_files(folder) for entry in _header(file)[0].values()}


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, in order; complete against the index where there are several.

    Raises:
        UsageError: there are none, or not all.
    """
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"no *.safetensors in {folder}: give the folder of a Hugging Face model or adapter")
    index = _json(folder / "model.safetensors.index.json")
    if index is None:
        names = [name for file in found for name in _header(file)[0]]
        if len(names) != len(set(names)):  # which of them is loaded depends on who loads
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(
                f"{twice} is in several files of {folder}, and no index says which counts: remove what is too much"
            )
        return found
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UsageError(f"{folder / 'model.safetensors.index.json'} has no weight_map: fetch or export it again")
    if missing := sorted({str(file) for file in where.values()} - {file.name for file in found}):
        raise UsageError(f"{folder} lacks {', '.join(missing)}, which its index names: fetch or export it again")
    held = {name: file.name for file in found for name in _header(file)[0]}
    if odd := sorted(name for name in where.keys() | held.keys() if where.get(name) != held.get(name)):
        raise UsageError(f"{folder}: the tensor {odd[0]} is not where the index says: fetch or export it again")
    return found


def check_finite(folder: Path) -> None:
    """Every weight is a finite number.

    Raises:
        UsageError: one is not, or a file is damaged.
    """
    for file in weight_files(folder):
        header, start = _header(file)
        for name, entry in header.items():
            stored = _EXPONENTS.get(entry["dtype"])
            if stored is None:  # whole numbers, and small floats whose NaN is a single pattern
                continue
            kind, mask = np.dtype(stored[0]), stored[1]
            begin, end = entry["data_offsets"]
            with file.open("rb") as raw:
                raw.seek(start + begin)
                for at in range(begin, end, _CHUNK):
                    bits = np.frombuffer(raw.read(min(_CHUNK, end - at)), kind)
                    if ((bits & kind.type(mask)) == mask).any():
                        raise UsageError(
                            f"{name} in {file} holds a weight that is no finite number: the checkpoint is damaged"
                        )


def needed_json(path: Path) -> dict[str, Any]:
    """Raises: UsageError."""
    said = _json(path)
    if said is None:
        raise UsageError(f"no {path.name} in {path.parent}: give the folder of a Hugging Face model")
    return said


def _header(file: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    """A safetensors file's tensors by name, and where their bytes begin. Raises: UsageError."""
    size = file.stat().st_size
    try:
        with file.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            if length > size - 8:
                raise ValueError
            header = json.loads(raw.read(length))
        header.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
        sound = all(_fits(entry) for entry in header.values())
        if not header or not sound or max(ends) != size - 8 - length:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError):
        raise UsageError(f"{file} is damaged or cut off: fetch or export it again") from None
    return header, 8 + length


def _fits(entry: Mapping[str, Any]) -> bool:
    """Whether a tensor's bytes are as many as its shape says, where its type's size is known."""
    begin, end = entry["data_offsets"]
    count, size = math.prod(entry["shape"]), _BYTES.get(entry["dtype"])
    return bool(entry["dtype"]) and 0 <= begin <= end and count >= 0 and (size is None or end - begin == count * size)


def _tokenizer(folder: Path) -> str:
    """A hash of what turns text into tokens, however it was written down. Raises: UsageError: there is none."""
    named = _json(folder / "tokenizer_config.json") or {}
    ends = {key: _content(named.get(key)) for key in ("bos_token", "eos_token")}
    fast = _json(folder / "tokenizer.json")
    if fast is not None:
        model = dict(fast.get("model") or {})
        model["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or []]
        # Padding and truncation are of the last use, not of the tokenizer.
        kept = {key: value for key, value in fast.items() if key not in ("padding", "truncation", "version")}
        return value_hash([{**kept, "model": model}, ends])
    slow = [folder / name for name in ("tokenizer.model", "vocab.json", "merges.txt", "tekken.json")]
    if not any(path.is_file() for path in slow):
        raise UsageError(f"{folder} has no tokenizer (tokenizer.json): copy it from the model it was trained from")
    return value_hash([[_sha256(path) for path in slow if path.is_file()], ends])


def _differing(ours: Path, theirs: Path) -> list[str]:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt")
    mine, its = ({name: (place / name) for name in names} for place in (ours, theirs))
    return [name for name in names if _bytes(mine[name]) != _bytes(its[name])] or ["tokenizer.json"]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return {"model_type": config.get("model_type"), **inner} if isinstance(inner, dict) else config


def _rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Base and scaling of the rotary embedding, in whichever version's words."""
    said = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind, theta = said.pop("type", "default"), said.pop("rope_theta", None) or config.get("rope_theta")
    kind = said.pop("rope_type", kind)
    return {"rope_theta": float(theta) if theta else None, "rope_type": kind, **said}


def _ends(folder: Path) -> list[int]:
    """The tokens at which answers end, as servers read them."""
    config = needed_json(folder / "config.json")
    own = config.get("eos_token_id", _text_config(config).get("eos_token_id"))
    said = (_json(folder / "generation_config.json") or {}).get("eos_token_id", own)
    return sorted(said) if isinstance(said, list) else [said] if said is not None else []


def _json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file. Raises: UsageError: it is no JSON object."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(read, dict):
        raise UsageError(f"{path} is no JSON object")
    return read


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
