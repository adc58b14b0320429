"""What draws the trainer's answers on a machine without a GPU: one model in this process whose weights change at every step.

`engine_for` takes the numpy engine for models small and plain enough for it, and transformers for every other one. Both sit behind
the same batching (`cod_agent.models.batching`), so that a turn of a conversation starts where the last one ended.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cod_agent.errors import MissingExtra, UsageError
from cod_agent.models.base import Sampling
from cod_agent.models.batching import BatchEngine, Drawn, SlotModel
from cod_agent.models.small_llama import Shape, SmallLlama

LONGEST = 8192
"""Tokens of a conversation where nobody says how long one may be and the model would take more."""


class Engine(Protocol):
    """A model that answers token ids with token ids."""

    vocabulary: int
    end: frozenset[int]
    """Ids that end a turn."""
    context_length: int
    """Longest conversation in tokens, its answer included."""

    def load(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Take other weights, under their Hugging Face names, when all that was asked before is answered.

        Raises:
            UsageError: they do not fit the model.
            ModelError: the engine is closed.
        """
        ...

    def ask(
        self,
        prompt: Sequence[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Future[Drawn]:
        """An answer to come. With a seed it is a function of the prompt and the weights.

        Raises:
            ModelRefused: the prompt is empty, leaves no room for an answer or holds ids that are no tokens.
            ModelError: the engine is closed. Set on the future: it failed, or the model's logits are no numbers.
        """
        ...

    def close(self) -> None:
        """Answer what was asked and free the thread."""
        ...


def engine_for(
    folder: Path, *, slots: int = 64, length: int | None = None, threads: int = 1, seed: int | None = None
) -> Engine:
    """The engine of the Hugging Face model in `folder`, with the weights that lie there.

    Args:
        slots: answers drawn at once; more wait.
        length: longest conversation in tokens; what the model takes, at most 8,192, if not given.
        threads: of the computation, where torch does it; numpy's are set by OMP_NUM_THREADS before it is imported.
        seed: of the draws of answers without a seed of their own.

    Raises:
        UsageError: no such folder, no weights in it, conversations longer than the model takes, or a model that does not keep
            all it has read.
        MissingExtra: torch, transformers or safetensors is not installed.
    """
    config = _read(folder / "config.json", needed=True)
    window = min(LONGEST, int(config.get("max_position_embeddings", LONGEST)))
    if length is not None and length > config.get("max_position_embeddings", length):
        raise UsageError(f"conversations of {length} tokens: this model takes {config['max_position_embeddings']}")
    length, shape = length or window, Shape.of_config(config)
    model: SlotModel
    if shape is not None:
        model = SmallLlama(shape, slots, length)
        model.load(_weights(folder))
    else:
        try:
            from cod_train.engines.hugging_face import HuggingFaceModel
        except ImportError:
            raise MissingExtra(f"a model of type {config.get('model_type')!r}", "train") from None
        model = HuggingFaceModel(folder, slots, length, threads)
    ends = _read(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    end = frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)
    return _Asked(BatchEngine(model, slots, length, end, seed=seed))


class _Asked:
    """`BatchEngine` as the trainer asks it."""

    def __init__(self, engine: BatchEngine) -> None:
        self._engine, self.vocabulary, self.end = engine, engine.model.vocabulary, engine.end
        self.context_length, self.load, self.close = engine.context_length, engine.load, engine.close

    def ask(
        self,
        prompt: Sequence[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> Future[Drawn]:
        return self._engine.ask(prompt, Sampling(temperature, top_p, max_tokens, seed))


def _read(path: Path, *, needed: bool = False) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        if needed:
            raise UsageError(f"no {path.name} in {path.parent}: give the folder of a Hugging Face model") from None
        return {}
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    return read


def _weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    try:
        from safetensors.numpy import load_file
    except ImportError:
        raise MissingExtra("reading weights", "train") from None
    out: dict[str, NDArray[np.float32]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= {name: tensor.astype(np.float32) for name, tensor in load_file(file).items()}
    if not out:
        raise UsageError(f"no *.safetensors in {folder}: give the folder of a Hugging Face model")
    return out
