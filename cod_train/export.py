"""From whatever a training left to a folder that can be served, and proof that it says the same.

    exported(Path("trained/global_step_30/actor/huggingface"), Path("better"), name="better")

The source is a checkpoint of `cod train`, any Hugging Face folder, or a PEFT adapter, which is merged into its base. The copy says
truthfully in which type its weights are, samples the model's own distribution unless it is told otherwise, and brings tokenizer and
chat template byte for byte. It can be untied (vLLM's `reload_weights` serves wrong weights where input and output embeddings are one
tensor), and gets a GGUF file for the embedded engine where its architecture allows.

It is made in a folder beside, compared with the source on the probe's conversations, and renamed when it agrees: a full disk, a kill or
a mismatch leaves no half checkpoint behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cod_agent.errors import CodError, StoreFull, UsageError
from cod_train.checkpoint_files import (
    base_of,
    chat_template,
    check_finite,
    contents,
    needed_json,
    speaks,
    stored_as,
    tensor_names,
    weight_files,
)
from cod_train.exact_model import load_exactly, quietly
from cod_train.gguf_file import why_not, write_gguf
from cod_train.probe import Answered, Comparison, Probe, compare, compare_file, make_probe

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_BROUGHT = ("*.jinja", "tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.py")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Exported:
    """A folder that can be served."""

    folder: Path
    gguf: Path | None
    compared: Comparison
    """With the source, by transformers in 32 bits."""
    compared_gguf: Comparison | None
    """With the source, by the embedded engine."""


def exported(
    source: Path,
    out: Path,
    *,
    name: str,
    untied: bool = False,
    gguf: bool | None = None,
    base: Path | None = None,
    replace: bool = False,
) -> Exported:
    """Write the checkpoint in `source` to the folder `out`, in Hugging Face form.

    Args:
        name: of the model, for its GGUF file.
        untied: write the output embedding as a tensor of its own.
        gguf: write `model.gguf`, too; None where that is possible.
        base: of an adapter, where its `adapter_config.json` does not say.
        replace: an export that is there already gives way.

    Raises:
        UsageError: the source is no checkpoint, cannot have the form that was asked for, or `out` is taken.
        CodError: what was written does not say what the source says; the message has the figure.
        StoreFull: the disk is full, or the folder may not be written. In all cases `out` is as it was.
        MissingExtra: torch, transformers or gguf is not installed.
    """
    source = source.resolve()
    base = base or base_of(source)
    _clear(out.absolute())
    if (
        out.exists()
        and not (out.is_dir() and not any(out.iterdir()))
        and not (replace and (out / "config.json").is_file())
    ):
        raise UsageError(f"{out} is there already: choose another folder")
    needed_json((base or source) / "config.json")
    if gguf is None:
        gguf = not why_not(base or source)
    original = make_probe(source, base)
    with _beside(out) as part:
        if base is None:
            _copied(source, part)
        else:
            _merged(source, base, part)
        if untied:
            _untie(part)
        _describe(base or source, part, untied)
        check_finite(part)
        compared = _verified(original, part, f"the export of {source}")
        compared_gguf = None
        if gguf:
            write_gguf(part, part / "model.gguf", name)
            compared_gguf = compare_file(original, part / "model.gguf")
            if compared_gguf.trouble:
                raise CodError(f"the GGUF form of {source} does not say what its source says: {compared_gguf.trouble}")
    return Exported(out, out / "model.gguf" if gguf else None, compared, compared_gguf)


def _verified(original: Probe, part: Path, what: str) -> Comparison:
    """Raises: CodError: it does not say what the source says."""
    probe = make_probe(part, digest=contents(part).digest)
    found = compare(original, [Answered(item.prompt_ids, item.answer_ids, item.logprobs) for item in probe.items])
    if found.trouble:
        raise CodError(f"{what} does not say what its source says: {found.trouble}")
    probe.save(part)
    return found


def _copied(source: Path, part: Path) -> None:
    for file in weight_files(source):
        shutil.copyfile(file, part / file.name)
    if (source / _INDEX).is_file():
        shutil.copyfile(source / _INDEX, part / _INDEX)
    _bring(source, part)


def _merged(adapter: Path, base: Path, part: Path) -> None:
    """In 32 bits: the sum of a 16-bit weight and an adapter's is no 16-bit number."""
    model: Any = load_exactly(adapter, base)[0]
    with quietly():
        model.merge_and_unload().cpu().save_pretrained(part)
    for name in ("config.json", "generation_config.json"):
        (part / name).unlink(missing_ok=True)  # the base's are written
    for file in part.glob("*.safetensors"):
        file.chmod(0o644)  # their writer makes them private
    _bring(speaks(adapter, base), part)


def _bring(source: Path, part: Path) -> None:
    """Tokenizer and chat template, byte for byte."""
    for pattern in _BROUGHT:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, part / file.name)
    if (source / "chat_template.json").is_file():
        shutil.copyfile(source / "chat_template.json", part / "chat_template.json")
    chat_template(part)


def _untie(part: Path) -> None:
    """Write the output embedding as a tensor of its own, into the file of the input's.

    Raises:
        UsageError: the model has no embedding of a known name.
    """
    from safetensors.torch import load_file, save_file

    embedding, output = "model.embed_tokens.weight", "lm_head.weight"
    held = {name: file for file in weight_files(part) for name in tensor_names(file)}
    if output in held:
        return
    if embedding not in held:
        raise UsageError(
            f"the model has no {embedding} to make an output embedding of: only Llama's naming can be untied"
        )
    file = held[embedding]
    tensors = load_file(file)
    tensors[output] = tensors[embedding].clone()
    save_file(tensors, file.with_suffix(".new"), {"format": "pt"})
    file.with_suffix(".new").replace(file)
    file.chmod(0o644)
    if (part / _INDEX).is_file():
        index = needed_json(part / _INDEX)
        index["weight_map"][output] = file.name
        index.pop("metadata", None)  # its total is another one now
        _write_json(part / _INDEX, index)


def _describe(source: Path, part: Path, untied: bool) -> None:
    """config.json and generation_config.json, from the source's (or its base's)."""
    config = needed_json(source / "config.json")
    # A training may write 32 bits and say 16: whoever believed that would round the weights.
    held = stored_as(part)
    kind = _TYPES.get(next(iter(held)) if len(held) == 1 else "F32", "float32")
    for told in (config, config.get("text_config")):
        if isinstance(told, dict):
            told.pop("torch_dtype", None)
            if told is config or "dtype" in told:
                told["dtype"] = kind
            if untied:
                told["tie_word_embeddings"] = False
    _write_json(part / "config.json", config)
    said = needed_json(source / "generation_config.json") if (source / "generation_config.json").is_file() else {}
    ids = {key: said.get(key, config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # What servers sample with when nobody says otherwise: the model's own distribution, untruncated.
    own = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    _write_json(
        part / "generation_config.json", {**own, **{key: value for key, value in ids.items() if value is not None}}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if all goes well, and is gone otherwise.

    Raises:
        StoreFull: it could not be written.
    """
    out = out.absolute()
    part = out.parent / f".{out.name}.part-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        for file in part.iterdir():
            with file.open("rb") as held:
                os.fsync(held.fileno())
        old = part / "old"
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(out / "old", ignore_errors=True)
    except OSError as error:
        raise StoreFull(
            f"{out} cannot be written ({error}): free space or mend its permissions; nothing is left there"
        ) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # what its writer makes of a full disk
            raise StoreFull(f"{out} cannot be written ({error}): free space; nothing is left there") from error
        raise
    finally:
        _put_back(part / "old", out)
        shutil.rmtree(part, ignore_errors=True)


def _clear(out: Path) -> None:
    """Remove what exports to `out` left that were killed."""
    for left in out.parent.glob(f".{out.name}.part-*"):
        if not _alive(left.name.rpartition("-")[2]):
            _put_back(left / "old", out)
            shutil.rmtree(left, ignore_errors=True)


def _put_back(old: Path, out: Path) -> None:
    """What was there before, if nothing took its place."""
    if old.exists() and not out.exists():
        old.rename(out)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        pass
    return True
