"""`checkpoint:NAME`: a checkpoint as a model in this process, for `cod run` and `cod eval` without a server.

    checkpoint:NAME                  of the registry (COD_REGISTRY, or registry.db in the current folder)
    checkpoint:PATH/registry.db:NAME of another one
    checkpoint:FOLDER                a Hugging Face folder that nobody registered

Its GGUF file is played by the runtime, as the promotion gate does it; without one the engine that draws the trainer's answers on a CPU
computes the folder itself. Every call names the checkpoint's weights, and the files are those that were registered.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import UsageError
from cod_agent.models.base import Model, Sampling
from cod_agent.policies import POLICIES, folder_of
from cod_train.checkpoint_files import contents, form_of
from cod_train.checkpoint_records import weights_of
from cod_train.gate_lives import check_files, longest_answer
from cod_train.lineage import default_name
from cod_train.model import Drawn, TokenModel

if TYPE_CHECKING:
    from cod_train.engines import Engine

REGISTRY = "registry.db"


@dataclass(frozen=True, slots=True)
class _Weights:
    """What is played."""

    name: str
    """As calls have it on record."""
    folder: Path
    base: Path | None
    gguf: Path | None


def resolve(rest: str, *, sampling: Sampling, concurrency: int | None = None, **_: Any) -> Model:
    """What the entry point `checkpoint` of the group `cod.models` gives.

    Args:
        rest: what stands behind `checkpoint:`.
        sampling: how answers are drawn; the longest answer is the policies' own where nothing is said.
        concurrency: most answers drawn at once.

    Raises:
        UsageError: there is no such folder or registry, or it is an adapter.
        UnknownName: the registry knows no such checkpoint.
        CodError: its files are gone, or not those that were registered.
        MissingExtra: a package to play it is not installed.
    """
    found = _found(rest)
    form, parallel = form_of(found.folder, found.base), concurrency or 32
    if sampling.max_tokens is None:
        sampling = replace(sampling, max_tokens=longest_answer(form))
    if found.gguf is not None:
        from cod_agent.models.embedded import GgufModel

        return GgufModel(found.gguf, name=f"checkpoint:{rest}", form=form, sampling=sampling, parallel=parallel)
    if found.base is not None:
        raise UsageError(
            f"{found.name} is an adapter, which this process cannot play: merge it into its base with `cod checkpoint export`, or "
            "serve it with `cod serve` and ask openai:NAME"
        )
    from cod_train.engines import engine_for
    from cod_train.serving.embedded import tokenizer_of

    tokenizer = tokenizer_of(found.folder)
    return _InProcess(rest, found, engine_for(found.folder, slots=parallel), tokenizer, sampling)


class _InProcess(TokenModel):
    """A Hugging Face folder, computed by our own engine."""

    def __init__(self, rest: str, found: _Weights, engine: Engine, tokenizer: Any, sampling: Sampling) -> None:
        from cod_train.serving.embedded import FINGERPRINT, answers_of

        self._engine, ask = engine, answers_of(engine)

        async def generate(request: str, prompt: list[int], wanted: dict[str, Any]) -> Drawn:
            return replace(await ask(request, prompt, wanted), weights=f"{found.name}/{FINGERPRINT}")

        super().__init__(
            f"checkpoint:{rest}",
            tokenizer,
            generate,
            sampling=sampling,
            form=form_of(found.folder),
            context_length=engine.context_length,
        )

    def close(self) -> None:
        """Answer what was asked and free the thread."""
        self._engine.close()


def _found(rest: str) -> _Weights:
    path, _, name = rest.rpartition(":")
    if not path and (Path(rest).is_dir() or rest in POLICIES):
        folder = Path(rest) if Path(rest).is_dir() else folder_of(rest)
        held = contents(folder)
        return _Weights(weights_of(default_name(folder), held.digest), held.folder, held.base, held.gguf)
    registry = Path(path or os.environ.get("COD_REGISTRY") or REGISTRY)
    if not registry.is_file():
        raise UsageError(
            f"{rest} is no folder of a model, and there is no registry {registry} that could know a checkpoint of that name"
        )
    from cod_train.checkpoints import Registry

    with Registry(registry) as opened:
        known = opened.get(name)
    check_files(known)
    return _Weights(known.weights, known.folder, known.base, known.gguf)
