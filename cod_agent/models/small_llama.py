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
from numpy.typing import NDArray

from cod_agent.errors import UsageError
from cod_agent.models.batching import BatchEngine, Floats, Ints
from cod_agent.models.gguf import all_f32, read_tensors

LARGEST = 16 << 20
"""Bytes of 32-bit weights up to which numpy is the faster engine on one core."""

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
    heads: int
    size: int
    """Of a head."""
    eps: float
    theta: float

    @classmethod
    def of_gguf(cls, metadata: dict[str, Any]) -> Shape:
        """From the metadata of a GGUF file that `fits`."""
        heads = int(metadata["llama.attention.head_count"])
        return cls(
            layers=int(metadata["llama.block_count"]),
            heads=heads,
            size=int(metadata.get("llama.attention.key_length", int(metadata["llama.embedding_length"]) // heads)),
            eps=float(metadata["llama.attention.layer_norm_rms_epsilon"]),
            theta=float(metadata.get("llama.rope.freq_base", 10000.0)),
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Shape | None:
        """From a Hugging Face `config.json`; None where the model is not one that can be computed here."""
        heads, width, layers = (
            config.get(key, 0) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers")
        )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        parameters = layers * width * (4 * width + 3 * config.get("intermediate_size", 0))
        parameters += 2 * width * config.get("vocab_size", 0)
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
        theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
        return cls(layers, heads, config.get("head_dim") or width // heads, config.get("rms_norm_eps", 1e-6), theta)


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


@dataclass(slots=True)
class _Layer:
    qkv: Floats
    """[width, 3 x width], the norm's weights folded in; so for `gate_up`."""
    out: Floats
    gate_up: Floats
    down: Floats


class SmallLlama:
    """The model and the keys and values of its slots; of no use before `load`.

    Args:
        slots: conversations at once.
        length: longest conversation, in tokens.
    """

    def __init__(self, shape: Shape, slots: int, length: int) -> None:
        self._shape = shape
        angles = np.outer(np.arange(length), shape.theta ** (-np.arange(0, shape.size, 2) / shape.size))
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._eps, self._scale = np.float32(shape.eps), np.float32(shape.size**-0.5)
        # [layers, slots, heads, length, head size]
        self._keys = np.zeros((shape.layers, slots, shape.heads, length, shape.size), np.float32)
        self._values = np.zeros_like(self._keys)

    @classmethod
    def of_file(cls, path: Path, metadata: dict[str, Any], slots: int, length: int) -> SmallLlama:
        """The model in a GGUF file that `fits`."""
        shape = Shape.of_gguf(metadata)
        model = cls(shape, slots, length)
        model.load(hugging_face(read_tensors(path), shape.heads))
        return model

    def load(self, weights: Mapping[str, Floats]) -> None:
        """Take weights, under their Hugging Face names.

        Raises:
            UsageError: one is missing.
        """
        try:
            layers = [self._layer(weights, number) for number in range(self._shape.layers)]
            embedding = np.array(weights["model.embed_tokens.weight"], np.float32)
            head = np.asarray(weights.get("lm_head.weight", embedding), np.float32).T
            norm = np.asarray(weights["model.norm.weight"], np.float32)[:, None]
        except KeyError as error:
            raise UsageError(f"the weights have no {error}: they are of another model") from None
        self._layers, self._embedding, self._head = layers, embedding, head * norm

    def _layer(self, weights: Mapping[str, Floats], number: int) -> _Layer:
        def of(name: str) -> Floats:
            return np.asarray(weights[f"model.layers.{number}.{name}.weight"], np.float32)

        attention, mlp = of("input_layernorm")[:, None], of("post_attention_layernorm")[:, None]
        return _Layer(
            qkv=np.concatenate([of(f"self_attn.{which}_proj").T for which in "qkv"], 1) * attention,
            out=np.array(of("self_attn.o_proj").T, order="C"),
            gate_up=np.concatenate([of(f"mlp.{which}_proj").T for which in ("gate", "up")], 1) * mlp,
            down=np.array(of("mlp.down_proj").T, order="C"),
        )

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        """As `SlotModel.step` says."""
        rows, count = tokens_B_N.shape
        heads = self._shape.heads
        # Padding may reach beyond the end; what it writes there is overwritten before it is looked at.
        position = np.minimum(start_B[:, None] + np.arange(count), len(self._cos) - 1)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        longest = int(position[:, -1].max()) + 1
        hidden = np.arange(longest)[None, None, None, :] > position[:, None, :, None]
        x: NDArray[Any] = self._embedding[tokens_B_N]
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            q, k, v = np.moveaxis((self._normed(x) @ layer.qkv).reshape(rows, count, 3, heads, -1), 2, 0)
            keys[slots_B[:, None], :, position] = _turned(k.swapaxes(1, 2), cos, sin).swapaxes(1, 2)
            values[slots_B[:, None], :, position] = v
            scores = _turned(q.swapaxes(1, 2), cos, sin) @ keys[slots_B, :, :longest].swapaxes(2, 3)
            scores *= self._scale
            scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            seen = (scores @ values[slots_B, :, :longest]).swapaxes(1, 2).reshape(rows, count, -1)
            x = x + seen @ layer.out
            gate, up = np.split(self._normed(x) @ layer.gate_up, 2, -1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down
        logits: Floats = self._normed(x[np.arange(rows), last_B]) @ self._head
        return logits

    def _normed(self, x: Floats) -> Floats:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._eps)


def _turned(x: Floats, cos: Floats, sin: Floats) -> Floats:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


class SmallEngine(BatchEngine):
    """The engine of a GGUF file that `fits`."""

    def __init__(self, path: Path, metadata: dict[str, Any], slots: int, length: int) -> None:
        end = metadata.get("tokenizer.ggml.eos_token_id")
        model = SmallLlama.of_file(path, metadata, slots, length)
        super().__init__(model, slots, length, frozenset() if end is None else frozenset([int(end)]))
