"""What a step of training costs a GPU: memory and time, from the shape of the model and the numbers of a config.

Arithmetic on a decoder with grouped-query attention and a gated feed-forward part (Llama, Qwen, Mistral and their kin), trained by
FSDP with AdamW, sampled by vLLM on the same GPUs. docs/training.md derives the formulas. They are good for a decision, within a
quarter or so, and not for the last gigabyte.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cod_agent.errors import UsageError

GIB = 2**30

LOGIT_BYTES = 6
"""A token and word of the vocabulary: logits in 16 bits, their log-softmax, their gradient."""
RESERVE = 2 * GIB
"""CUDA contexts of two processes, buffers of NCCL, fragments."""
ASLEEP = 1 * GIB
"""What a vLLM that sleeps keeps: graphs and its context."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, as one gets it from a program like this and not from its data sheet. By default a third of an H100's arithmetic in 16
    bits, and 60% of its bandwidth."""

    memory_gib: float = 80.0
    tflops: float = 330.0
    gb_per_s: float = 2000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's shape, by the names of its config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> Shape:
        """As a Hugging Face folder's config.json says.

        Raises:
            UsageError: there is none, or it is of a model of another kind.
        """
        try:
            told = json.loads((folder / "config.json").read_text())
            heads = told["num_attention_heads"]
            return cls(
                num_hidden_layers=told["num_hidden_layers"],
                hidden_size=told["hidden_size"],
                intermediate_size=told["intermediate_size"],
                num_attention_heads=heads,
                num_key_value_heads=told.get("num_key_value_heads") or heads,
                head_dim=told.get("head_dim") or told["hidden_size"] // heads,
                vocab_size=told["vocab_size"],
                tie_word_embeddings=bool(told.get("tie_word_embeddings", False)),
                max_position_embeddings=told.get("max_position_embeddings"),
            )
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(
                f"{folder}/config.json does not say the model's shape ({type(error).__name__}: {error}): give cod.model_shape"
            ) from None

    @property
    def layer(self) -> int:
        """Parameters of a layer; norms are too few to count."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head as well where they are not tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        return self.num_hidden_layers * self.layer + self.table * (1 if self.tie_word_embeddings else 2)

    @property
    def cache(self) -> int:
        """Bytes of keys and values for a token, in 16 bits."""
        return 4 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim

    def activations(self, tokens: int, *, checkpointing: bool) -> int:
        """Bytes that the forward pass of `tokens` tokens keeps for the backward pass, in 16 bits, with flash attention.

        With checkpointing a layer keeps its input, and one layer at a time has everything.
        """
        heads = self.num_attention_heads + 2 * self.num_key_value_heads
        whole = 2 * (6 * self.hidden_size + 2 * heads * self.head_dim + 4 * self.intermediate_size)
        kept = (
            self.num_hidden_layers * 2 * self.hidden_size + whole if checkpointing else self.num_hidden_layers * whole
        )
        return tokens * kept


@dataclass(frozen=True, slots=True)
class Layout:
    """Who has what, out of a config."""

    ranks: int
    """GPUs of the trainer, all of them."""
    tensor_parallel: int
    """GPUs of a rollout replica."""
    sequence_parallel: int
    micro_tokens: int
    """Tokens of a micro-batch on one GPU."""
    checkpointing: bool
    weight_bytes: int
    """Of a trained parameter: 4 or 2."""
    weights_offloaded: bool
    adam_offloaded: bool
    rollout_share: float
    """Of a GPU's memory, vLLM's."""
    sleeps: bool
    """vLLM gives its memory back while the weights are trained."""
    most_at_once: int
    """Sequences a replica samples at once."""

    @property
    def replicas(self) -> int:
        return self.ranks // self.tensor_parallel


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    adam: float
    gathered: float
    """What is whole for a moment: two layers, the embedding and the head, and the gradients of the larger of them."""
    activations: float
    logits: float
    training: float
    """All of the above, what sleeps, and the reserve."""
    rollout: float
    """While packs are lived: vLLM's share, what the trainer keeps there, the reserve."""
    cache_tokens: float
    """Tokens whose keys and values a replica has room for."""


def memory_of(shape: Shape, layout: Layout, gpu: Gpu) -> Memory:
    """What one GPU must hold."""
    own = shape.parameters / layout.ranks
    weights, gradients, adam = layout.weight_bytes * own, layout.weight_bytes * own, 2 * layout.weight_bytes * own
    tables = shape.table * (1 if shape.tie_word_embeddings else 2)
    gathered = 2.0 * (2 * shape.layer + tables) + 4.0 * max(shape.layer, shape.table)
    activations = float(shape.activations(layout.micro_tokens, checkpointing=layout.checkpointing))
    logits = float(LOGIT_BYTES * layout.micro_tokens * shape.vocab_size)
    share = layout.rollout_share * gpu.memory_gib * GIB
    stays = (0.0 if layout.weights_offloaded else weights) + (0.0 if layout.adam_offloaded else adam)
    # vLLM's own work space is about a tenth of its share.
    cache = (0.9 * share - 2 * shape.parameters / layout.tensor_parallel) * layout.tensor_parallel / shape.cache
    return Memory(
        weights=weights,
        gradients=gradients,
        adam=adam,
        gathered=gathered,
        activations=activations,
        logits=logits,
        training=weights
        + gradients
        + adam
        + gathered
        + activations
        + logits
        + (ASLEEP if layout.sleeps else share)
        + RESERVE,
        rollout=share + stays + RESERVE,
        cache_tokens=max(0.0, cache),
    )


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of a step, without starting, moving weights, validation and saving."""

    sampling: float
    training: float


def seconds_of(
    shape: Shape,
    layout: Layout,
    gpu: Gpu,
    *,
    rollouts: int,
    sampled: float,
    tokens: float,
    longest: int,
    cache_tokens: float,
) -> Seconds:
    """How long a step takes.

    Args:
        rollouts: of a step.
        sampled: tokens that a rollout samples, one after the other.
        tokens: of a step's rows.
        longest: longest conversation, in tokens.
        cache_tokens: as `memory_of` has it.
    """
    at_once = max(1.0, min(rollouts / layout.replicas, layout.most_at_once, cache_tokens / max(1, longest)))
    waves = max(1.0, rollouts / layout.replicas / at_once)
    # A decoding step reads all weights and the keys and values of all conversations, half-grown on average.
    read = (2 * shape.parameters + at_once * longest / 2 * shape.cache) / layout.tensor_parallel
    decoding = waves * sampled * read / (gpu.gb_per_s * 1e9)
    reading = 2.0 * shape.parameters * tokens / (layout.ranks * gpu.tflops * 1e12)
    # Forward, twice that backward, and forward again where activations are made anew.
    work = (8.0 if layout.checkpointing else 6.0) * shape.parameters * tokens
    return Seconds(decoding + reading, work / (layout.ranks * gpu.tflops * 1e12))
