"""Any causal language model of transformers as a `SlotModel`, as long as its attention keeps every token it has read.

The keys and values of a slot lie from its position 0 on; a step hands transformers those of its rows and a mask that shows each
token what came before it in its own slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from cod_agent.errors import UsageError
from cod_agent.models.batching import Floats, Ints

_GROW = 64
"""Tokens by which the room for keys and values grows."""


class HuggingFaceModel:
    """The model in a Hugging Face folder, computed in 32-bit floats on the CPU.

    Args:
        length: longest conversation, in tokens.
        threads: of torch, in this whole process.

    Raises:
        UsageError: transformers cannot load it, or its layers keep something else than every token's key and value.
    """

    def __init__(self, folder: Path, slots: int, length: int, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except (OSError, ValueError) as error:
            raise UsageError(f"transformers cannot load the model in {folder}: {error}") from None
        _check(self._model.config, length)
        self.vocabulary = int(self._model.config.vocab_size)
        self._kept = _Kept(slots, length)

    def load(self, weights: Mapping[str, Floats]) -> None:
        """As `SlotModel.load` says."""
        own = self._model.state_dict()
        tied = set(self._model._tied_weights_keys or ()) if self._model.config.tie_word_embeddings else set()
        other = (own.keys() - tied) ^ (weights.keys() - tied)
        other |= {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
        if other:
            raise UsageError(
                f"the weights are of another model: {', '.join(sorted(other)[:4])} are missing, unknown or of another shape"
            )
        tensors = {name: torch.tensor(np.asarray(weight, np.float32)) for name, weight in weights.items()}
        self._model.load_state_dict(tensors, strict=False)
        self._model.tie_weights()
        self._kept.forget()

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        """As `SlotModel.step` says."""
        position = torch.from_numpy(start_B[:, None] + np.arange(tokens_B_N.shape[1])).clamp(max=self._kept.length - 1)
        columns, at = np.unique(last_B, return_inverse=True)
        with torch.inference_mode():
            seen = self._kept.turn_to(torch.from_numpy(slots_B), position)
            logits = self._model(
                input_ids=torch.from_numpy(tokens_B_N),
                position_ids=position,
                attention_mask=seen,
                past_key_values=self._kept,
                use_cache=True,
                logits_to_keep=torch.from_numpy(columns),
            ).logits
        out: Floats = logits[torch.arange(len(at)), torch.from_numpy(at)].float().numpy()
        return out


def _check(config: Any, length: int) -> None:
    for kind in getattr(config, "layer_types", None) or ():
        window = getattr(config, "sliding_window", None)
        if kind == "full_attention" or (kind == "sliding_attention" and window and window >= length):
            continue
        raise UsageError(
            f"layers of kind {kind!r} do not keep all they read: draw with vLLM, or shorten the conversations"
        )


class _Kept(Cache):
    """The keys and values of all slots, of which transformers sees the rows of one step."""

    def __init__(self, slots: int, length: int) -> None:
        super().__init__(layers=[])
        self.slots, self.length = slots, length
        self.forget()

    def forget(self) -> None:
        """Drop all of it: what damaged weights leave behind would show through a mask."""
        self._held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def turn_to(self, slots_B: torch.Tensor, position_B_N: torch.Tensor) -> torch.Tensor:
        """Begin a step; its mask [B, 1, N, longest], 0 where a token may look and very low where not."""
        self._slots, self._position = slots_B, position_B_N
        self._longest = int(position_B_N.max()) + 1
        hidden = torch.arange(self._longest) > position_B_N[:, None, :, None]
        return torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep what the step's tokens add [B, heads, N, size]; all that their slots hold [B, heads, longest, size]."""
        kept = self._held.get(layer_idx)
        if kept is None or kept[0].shape[2] < self._longest:
            kept = self._held[layer_idx] = (self._roomier(kept, 0, key_states), self._roomier(kept, 1, value_states))
        out = []
        for held, fresh in zip(kept, (key_states, value_states), strict=True):
            held[self._slots[:, None], :, self._position] = fresh.transpose(1, 2)
            out.append(held[self._slots, :, : self._longest])
        return out[0], out[1]

    def _roomier(self, kept: tuple[torch.Tensor, torch.Tensor] | None, which: int, like: torch.Tensor) -> torch.Tensor:
        room = min(self.length, -(-self._longest // _GROW) * _GROW)
        out = torch.zeros(self.slots, like.shape[1], room, like.shape[3])
        if kept is not None:
            out[:, :, : kept[which].shape[2]] = kept[which]
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What transformers asks where it was told no position; it always is."""
        return 0
