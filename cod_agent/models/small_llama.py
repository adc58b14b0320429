"""A Llama of under a few million 32-bit parameters, computed in numpy: many conversations at once, a token of each in one step.

For so small a model llama.cpp spends most of its time on what it keeps books of for each token. Where both are used they agree
within 1e-4 in every log-probability (tests/test_small_llama.py).

Source: the Llama architecture as transformers has it (the rotary embedding turns pairs half a head apart), no biases. GGUF files
hold the rows of queries and keys in another order, neighbouring pairs, which `hugging_face` undoes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cod_agent.errors import UsageError
from cod_agent.models.batching import BatchEngine, Floats, Ints
from cod_agent.models.gguf import all_f32, read_tensors

LARGEST = 16 << 20
"""Bytes of 32-bit weights up to which numpy is the faster engine on one core."""

_FREED = 24 << 20
"""Bytes, more than any array of a step takes."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def fits(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether this GGUF file can be computed here: a small Llama of 32-bit floats whose heads share nothing and scale nothing."""
    heads = metadata.get("llama.attention.head_count")
    return (
        metadata.get("general.architecture") == "llama"
        and all_f32(metadata)
        and path.stat().st_size <= LARGEST
        and metadata.get("llama.attention.head_count_kv", heads) == heads
        and not any(key.startswith("llama.rope.scaling") for key in metadata)
        and "llama.expert_count" not in metadata
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What the weights do not say of themselves."""

    layers: int
    vocabulary: int
    heads: int
    size: int
    """Of a head."""
    eps: float
    theta: float

    @classmethod
    def of_gguf(cls, metadata: dict[str, Any], embedding: Floats) -> Shape:
        """From the metadata of a GGUF file that `fits`, and its embedding."""
        vocabulary, width = embedding.shape
        heads = int(metadata["llama.attention.head_count"])
        return cls(
            layers=int(metadata["llama.block_count"]),
            vocabulary=vocabulary,
            heads=heads,
            size=int(metadata.get("llama.attention.key_length", width // heads)),
            eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
            theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Shape | None:
        """From a Hugging Face `config.json`; None where the model is not one that can be computed here."""
        heads, width, layers, vocabulary = (
            config.get(key, 0) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
        )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        parameters = layers * width * (4 * width + 3 * config.get("intermediate_size", 0))
        parameters += 2 * width * vocabulary
        if (
            config.get("model_type") != "llama"
            or config.get("hidden_act", "silu") != "silu"
            or config.get("num_key_value_heads", heads) != heads
            or config.get("attention_bias")
            or config.get("mlp_bias")
            or rope.get("rope_type", "default") != "default"
            or 4 * parameters > LARGEST
        ):
            return None
        return cls(
            layers=layers,
            vocabulary=vocabulary,
            heads=heads,
            size=config.get("head_dim") or width // heads,
            eps=config.get("rms_norm_eps", 1e-6),
            theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        )


def hugging_face(tensors: Mapping[str, Floats], heads: int) -> dict[str, Floats]:
    """The tensors of a GGUF file under their Hugging Face names and in that row order."""
    out = {}
    for name, tensor in tensors.items():
        short = name.removesuffix(".weight")
        if short.startswith("blk."):
            _, number, inner = short.split(".", 2)
            if inner in ("attn_q", "attn_k"):
                tensor = tensor.reshape(heads, -1, 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            short = f"model.layers.{number}.{_IN_LAYER.get(inner, inner)}"
        out[f"{_TOP.get(short, short)}.weight"] = tensor
    return out


@dataclass(frozen=True, slots=True)
class _Layer:
    """Matrices [inputs, outputs]. What comes before or after them and is linear, too, is folded in: norms, the scale of scores."""

    attention: Floats
    """[width, 5 x heads x size]: queries and keys, both again with the halves of each head swapped and one negated, values.

    The second pair is what the rotary embedding multiplies with the sine: computing it costs less than shuffling the first.
    """
    out: Floats
    gate_up: Floats
    down: Floats


@dataclass(frozen=True, slots=True)
class _Seats:
    """Where the rows of a step sit: a run of slots that is looked at in place, as long as few of them are empty, or copies."""

    places: slice | Ints
    """The slots to look at."""
    rows: slice | Ints
    """Which of these each row is."""
    count: int

    @classmethod
    def of(cls, slots_B: Ints, most: int) -> _Seats:
        low, high = int(slots_B.min()), int(slots_B.max()) + 1
        if high - low <= most:
            return cls(slice(low, high), slots_B - low, high - low)
        return cls(slots_B, slice(None), len(slots_B))


class SmallLlama:
    """The model and the keys and values of its slots: a `SlotModel`, of no use before `load`.

    Args:
        slots: conversations at once.
        length: longest conversation, in tokens.
    """

    def __init__(self, shape: Shape, slots: int, length: int) -> None:
        self._shape, self._slots, self.vocabulary = shape, slots, shape.vocabulary
        angles = np.outer(np.arange(length), shape.theta ** (-np.arange(0, shape.size, 2) / shape.size))
        angles = np.concatenate([angles, angles], 1)
        # [length, 1, size]
        self._cos, self._sin = (turn(angles).astype(np.float32)[:, None] for turn in (np.cos, np.sin))
        # glibc gives a freed array back to the system and faults its pages in again the next time, unless a larger one was freed.
        np.empty(_FREED, np.uint8)

    @classmethod
    def of_file(cls, path: Path, metadata: dict[str, Any], slots: int, length: int) -> SmallLlama:
        """The model in a GGUF file that `fits`."""
        tensors = read_tensors(path)
        shape = Shape.of_gguf(metadata, tensors["token_embd.weight"])
        model = cls(shape, slots, length)
        model.load(hugging_face(tensors, shape.heads))
        return model

    def load(self, weights: Mapping[str, Floats]) -> None:
        """As `SlotModel.load` says."""
        try:
            layers = [self._layer(weights, number) for number in range(self._shape.layers)]
            embedding = np.array(weights["model.embed_tokens.weight"], np.float32)
            head = np.asarray(weights.get("lm_head.weight", embedding), np.float32).T
            norm = np.asarray(weights["model.norm.weight"], np.float32)[:, None]
        except KeyError as error:
            raise UsageError(f"the weights have no {error}: they are of another model") from None
        except ValueError as error:
            raise UsageError(f"the weights are of another model's shape: {error}") from None
        if len(embedding) != self.vocabulary or head.shape != embedding.T.shape:
            raise UsageError(f"the weights are for {len(embedding)} tokens, the model has {self.vocabulary}")
        self._layers, self._embedding, self._head = layers, embedding, head * norm
        # [layers, slots, heads, length, size]; new ones, as what damaged weights leave behind would show through a mask.
        shape = self._shape
        room = (shape.layers, self._slots, shape.heads, len(self._cos), shape.size)
        self._keys, self._values = np.zeros(room, np.float32), np.zeros(room, np.float32)

    def _layer(self, weights: Mapping[str, Floats], number: int) -> _Layer:
        def of(name: str) -> Floats:
            return np.asarray(weights[f"model.layers.{number}.{name}.weight"], np.float32).T

        q, k, v = (of(f"self_attn.{which}_proj") for which in "qkv")
        q = q * np.float32(self._shape.size**-0.5)
        swapped = [self._swapped(q), self._swapped(k)]
        return _Layer(
            attention=np.concatenate([q, k, *swapped, v], 1) * of("input_layernorm")[:, None],
            out=np.array(of("self_attn.o_proj"), order="C"),
            gate_up=np.concatenate([of("mlp.gate_proj"), of("mlp.up_proj")], 1)
            * of("post_attention_layernorm")[:, None],
            down=np.array(of("mlp.down_proj"), order="C"),
        )

    def _swapped(self, projection: Floats) -> Floats:
        first, second = np.split(projection.reshape(len(projection), self._shape.heads, -1), 2, -1)
        return np.concatenate([-second, first], -1).reshape(projection.shape)

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        """As `SlotModel.step` says."""
        rows, count = tokens_B_N.shape
        # Padding may reach beyond the end; what it writes there is overwritten before it is looked at.
        position = np.minimum(start_B[:, None] + np.arange(count), len(self._cos) - 1)
        cos, sin = self._cos[position], self._sin[position]
        seats = _Seats.of(slots_B, 2 * rows if count == 1 else rows)
        hidden = np.zeros((seats.count, 1, count, int(position[:, -1].max()) + 1), np.float32)
        hidden[seats.rows, 0] = np.where(np.arange(hidden.shape[-1]) > position[:, :, None], -np.inf, 0)
        x = self._embedding[tokens_B_N.reshape(-1)]
        with np.errstate(over="ignore"):  # a gate far below zero is closed
            for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
                mixed = (self._normed(x) @ layer.attention).reshape(rows, count, 5, self._shape.heads, -1)
                turned = mixed[:, :, :2] * cos[:, :, None]
                turned += mixed[:, :, 2:4] * sin[:, :, None]
                keys[slots_B[:, None], :, position] = turned[:, :, 1]
                values[slots_B[:, None], :, position] = mixed[:, :, 4]
                x += _seen(turned[:, :, 0], keys, values, seats, hidden) @ layer.out
                gate, up = np.split(self._normed(x) @ layer.gate_up, 2, -1)
                closed = np.exp(-gate)
                closed += 1
                np.divide(gate, closed, out=closed)
                closed *= up
                x += closed @ layer.down
        logits: Floats = self._normed(x[np.arange(rows) * count + last_B]) @ self._head
        return logits

    def _normed(self, x: Floats) -> Floats:
        scale = np.einsum("tw,tw->t", x, x)
        scale /= x.shape[1]
        scale += np.float32(self._shape.eps)
        np.sqrt(scale, out=scale)
        return x / scale[:, None]


def _seen(queries: Floats, keys: Floats, values: Floats, seats: _Seats, hidden: Floats) -> Floats:
    """What queries [B, N, heads, size] find [B x N, heads x size]."""
    rows, count, heads, size = queries.shape
    asked = np.zeros((seats.count, heads, count, size), np.float32)
    asked[seats.rows] = queries.swapaxes(1, 2)
    longest = hidden.shape[-1]
    scores: Floats = asked @ keys[seats.places, :, :longest].swapaxes(2, 3)
    scores += hidden
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    found: Floats = scores @ values[seats.places, :, :longest]
    found /= scores.sum(-1, keepdims=True)
    return found[seats.rows].swapaxes(1, 2).reshape(rows * count, heads * size)


class SmallEngine(BatchEngine):
    """The engine of a GGUF file that `fits`."""

    def __init__(self, path: Path, metadata: dict[str, Any], slots: int, length: int) -> None:
        end = metadata.get("tokenizer.ggml.eos_token_id")
        model = SmallLlama.of_file(path, metadata, slots, length)
        super().__init__(model, slots, length, frozenset() if end is None else frozenset([int(end)]))
