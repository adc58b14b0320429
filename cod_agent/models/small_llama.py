"""A Llama of under a few million 32-bit parameters, computed in numpy: many answers at once, a token of each in one step.

For so small a model llama.cpp spends most of its time on what it keeps books of for each token; here one thread prefills whatever
has arrived and takes every answer under way one token further. Where both are used they agree within 1e-4 in every
log-probability (tests/test_small_llama.py).

Source: the Llama architecture as GGUF files hold it (query and key rows permuted, so that the rotary embedding turns neighbouring
pairs), tied embeddings, no biases.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cod_agent.errors import ModelError
from cod_agent.models.base import Sampling
from cod_agent.models.gguf import all_f32, read_tensors

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

LARGEST = 16 << 20
"""Bytes of a model file up to which numpy is the faster engine on one core."""


def fits(path: Path, metadata: dict[str, Any]) -> bool:
    """Whether this file can be computed here: a small Llama of 32-bit floats whose heads share nothing and scale nothing."""
    heads = metadata.get("llama.attention.head_count")
    return (
        metadata.get("general.architecture") == "llama"
        and all_f32(metadata)
        and path.stat().st_size <= LARGEST
        and metadata.get("llama.attention.head_count_kv", heads) == heads
        and not any(key.startswith("llama.rope.scaling") for key in metadata)
        and "llama.expert_count" not in metadata
    )


@dataclass(slots=True)
class _Layer:
    qkv: Floats
    """[width, 3 x width], the norm's weights folded in; so for `gate_up`."""
    out: Floats
    gate_up: Floats
    down: Floats
    keys: Floats
    """[slots, heads, length, head size], and so the values."""
    values: Floats


class SmallLlama:
    """The model and the keys and values of its slots.

    Args:
        slots: answers under way at once.
        length: longest conversation, in tokens.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], slots: int, length: int) -> None:
        tensors = read_tensors(path)
        self._heads = int(metadata["llama.attention.head_count"])
        self._eps = np.float32(metadata["llama.attention.layer_norm_rms_epsilon"])
        self._embedding = tensors["token_embd.weight"]
        width = self._embedding.shape[1]
        size = int(metadata.get("llama.attention.key_length", width // self._heads))
        self._last_norm = tensors["output_norm.weight"]
        self._head = np.ascontiguousarray(tensors.get("output.weight", self._embedding).T)
        angles = np.outer(
            np.arange(length), float(metadata.get("llama.rope.freq_base", 10000.0)) ** (-np.arange(0, size, 2) / size)
        )
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        self._scale = np.float32(size**-0.5)
        self._layers = [
            self._layer(tensors, number, (slots, self._heads, length, size))
            for number in range(int(metadata["llama.block_count"]))
        ]

    def _layer(self, tensors: dict[str, Floats], number: int, cache: tuple[int, int, int, int]) -> _Layer:
        def of(name: str) -> Floats:
            return tensors[f"blk.{number}.{name}.weight"]

        attention, mlp = of("attn_norm")[:, None], of("ffn_norm")[:, None]
        return _Layer(
            qkv=np.concatenate([of(f"attn_{which}").T for which in "qkv"], 1) * attention,
            out=np.ascontiguousarray(of("attn_output").T),
            gate_up=np.concatenate([of("ffn_gate").T, of("ffn_up").T], 1) * mlp,
            down=np.ascontiguousarray(of("ffn_down").T),
            keys=np.zeros(cache, np.float32),
            values=np.zeros(cache, np.float32),
        )

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        """Append tokens to slots; log-probabilities [B, vocabulary] of what follows each row's token at index `last_B`.

        Rows are padded on the right: what stands behind `last_B` is computed, never looked at, and overwritten later.
        """
        rows, count = tokens_B_N.shape
        # Padding may reach beyond the end; what it writes there is overwritten before it is looked at.
        position = np.minimum(start_B[:, None] + np.arange(count), len(self._cos) - 1)
        cos, sin = self._cos[position][:, None], self._sin[position][:, None]
        longest = int(position[:, -1].max()) + 1
        hidden = np.arange(longest)[None, None, None, :] > position[:, None, :, None]
        x: NDArray[Any] = self._embedding[tokens_B_N]
        for layer in self._layers:
            q, k, v = np.moveaxis((self._normed(x) @ layer.qkv).reshape(rows, count, 3, self._heads, -1), 2, 0)
            layer.keys[slots_B[:, None], :, position] = _turned(k.swapaxes(1, 2), cos, sin).swapaxes(1, 2)
            layer.values[slots_B[:, None], :, position] = v
            scores = _turned(q.swapaxes(1, 2), cos, sin) @ layer.keys[slots_B, :, :longest].swapaxes(2, 3)
            scores *= self._scale
            scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
            scores -= scores.max(-1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(-1, keepdims=True)
            seen = (scores @ layer.values[slots_B, :, :longest]).swapaxes(1, 2).reshape(rows, count, -1)
            x = x + seen @ layer.out
            gate, up = np.split(self._normed(x) @ layer.gate_up, 2, -1)
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.down
        logits = (self._normed(x[np.arange(rows), last_B]) * self._last_norm) @ self._head
        logits -= logits.max(-1, keepdims=True)
        scored: Floats = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return scored

    def _normed(self, x: Floats) -> Floats:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self._eps)


def _turned(x: Floats, cos: Floats, sin: Floats) -> Floats:
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


@dataclass(slots=True)
class _Answer:
    """One answer under way."""

    prompt: list[int]
    limit: int
    """Most tokens to sample."""
    sampling: Sampling
    random: np.random.Generator
    done: Future[tuple[list[int], list[float], str]]
    stop: Callable[[], bool]
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    held: int = 0
    """Tokens of the prompt that its slot held already, from the conversation's last turn."""


class SmallEngine:
    """Draws many answers at once on a thread of its own."""

    def __init__(self, path: Path, metadata: dict[str, Any], slots: int, length: int) -> None:
        self._model = SmallLlama(path, metadata, slots, length)
        self._length = length
        self._end = metadata.get("tokenizer.ggml.eos_token_id")
        # Free slots, the one that waits longest first, each with the tokens whose keys and values it still holds.
        self._free: list[tuple[int, list[int]]] = [(slot, []) for slot in range(slots)]
        self._random = np.random.default_rng()
        self._asked: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="small-llama", daemon=True)
        self._thread.start()

    def ask(
        self, prompt: list[int], sampling: Sampling, stop: Callable[[], bool]
    ) -> Future[tuple[list[int], list[float], str]]:
        """(sampled ids, their log-probabilities, finish reason). `stop` is asked now and then whether nobody waits any more."""
        limit = self._length - len(prompt)
        if sampling.max_tokens is not None:
            limit = min(limit, sampling.max_tokens)
        random = self._random if sampling.seed is None else np.random.default_rng(sampling.seed & 0xFFFFFFFF)
        done: Future[tuple[list[int], list[float], str]] = Future()
        self._asked.put(_Answer(prompt, limit, sampling, random, done, stop))
        return done

    def close(self) -> None:
        """Finish what is under way, unless it says `stop`, and end the thread."""
        self._asked.put(None)
        self._thread.join()

    def _serve(self) -> None:
        under_way: list[_Answer] = []
        waiting: list[_Answer] = []
        ending = False
        while not (ending and not under_way and not waiting):
            while not ending and (not (under_way or waiting) or not self._asked.empty()):
                asked = self._asked.get()
                ending = asked is None
                if asked is not None:
                    waiting.append(asked)
            try:
                fresh = [waiting.pop(0) for _ in range(min(len(waiting), len(self._free)))]
                for group in self._seated(fresh):
                    under_way += self._sampled(group, self._prefill(group))
                if under_way:
                    under_way = self._sampled(under_way, self._decode(under_way))
            except Exception as error:  # the thread must outlive whatever one answer does to it
                for answer in [*under_way, *fresh]:
                    if not answer.done.done():
                        answer.done.set_exception(ModelError(f"the engine failed: {type(error).__name__}: {error}"))
                    self._give_back(answer)
                under_way = []

    def _seated(self, fresh: list[_Answer]) -> list[list[_Answer]]:
        """The answers with their slots, in groups of about as many tokens to read: padding is computed, too."""
        for answer in fresh:
            self._seat(answer)
        groups: list[list[_Answer]] = []
        for answer in sorted(fresh, key=_unread):
            if groups and _unread(answer) <= 1.5 * _unread(groups[-1][0]) + 4:
                groups[-1].append(answer)
            else:
                groups.append([answer])
        return groups

    def _prefill(self, group: list[_Answer]) -> Floats:
        counts = np.array([_unread(answer) for answer in group])
        tokens = np.zeros((len(group), counts.max()), np.int64)
        for row, answer in enumerate(group):
            tokens[row, : counts[row]] = answer.prompt[answer.held :]
        start = np.array([answer.held for answer in group])
        return self._model.step(tokens, start, self._slots(group), counts - 1)

    def _seat(self, answer: _Answer) -> None:
        """Give an answer a free slot: the one that holds most of its prompt, or else the one that waits longest."""
        best, answer.held = 0, 0
        for at, (_, kept) in enumerate(self._free):
            if answer.held < len(kept) < len(answer.prompt) and answer.prompt[: len(kept)] == kept:
                best, answer.held = at, len(kept)
        answer.slot, _ = self._free.pop(best)

    def _decode(self, under_way: list[_Answer]) -> Floats:
        tokens = np.array([[answer.sampled[-1]] for answer in under_way])
        start = np.array([len(answer.prompt) + len(answer.sampled) - 1 for answer in under_way])
        return self._model.step(tokens, start, self._slots(under_way), np.zeros(len(under_way), np.int64))

    def _slots(self, answers: list[_Answer]) -> Ints:
        return np.array([answer.slot for answer in answers])

    def _sampled(self, answers: list[_Answer], logprobs: Floats) -> list[_Answer]:
        """Draw a token for each; those that go on."""
        going: list[_Answer] = []
        for answer, row in zip(answers, logprobs, strict=True):
            if answer.limit > len(answer.sampled):
                token = draw(row, answer.sampling, answer.random)
                answer.sampled.append(token)
                answer.logprobs.append(float(row[token]))
            ended = bool(answer.sampled) and answer.sampled[-1] == self._end
            if not ended and len(answer.sampled) < answer.limit and not answer.stop():
                going.append(answer)
                continue
            self._give_back(answer)
            answer.done.set_result((answer.sampled, answer.logprobs, "stop" if ended else "length"))
        return going

    def _give_back(self, answer: _Answer) -> None:
        if answer.slot >= 0:
            # The last token drawn was never computed with.
            self._free.append((answer.slot, [*answer.prompt, *answer.sampled[:-1]]))
            answer.slot = -1


def _unread(answer: _Answer) -> int:
    return len(answer.prompt) - answer.held


def draw(logprobs: Floats, sampling: Sampling, random: np.random.Generator) -> int:
    """A token id from one row of log-probabilities."""
    if sampling.temperature <= 0:
        return int(logprobs.argmax())
    scaled = logprobs.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    if sampling.top_p < 1:
        order = np.argsort(-weights)
        share = weights[order].cumsum() / weights.sum()
        weights[order[1 + np.searchsorted(share, sampling.top_p) :]] = 0
    total = weights.cumsum()
    return int(np.searchsorted(total, random.random() * total[-1], side="right"))
