"""Many answers of one model at once: one thread that reads whatever has arrived and takes every answer under way a token further.

Each answer sits in a slot of the model, which keeps the keys and values of what it has read. A slot that is given back remembers
its conversation, so that the next turn of it starts where this one ended. What a model must be able to do is `SlotModel`; how one
token follows the others is its business alone.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cod_agent.errors import ModelError, ModelRefused
from cod_agent.models.base import Sampling

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

AT_ONCE = 1024
"""Tokens of prompts, padding included, that are read in one step at most: what scores between tokens take grows with it."""


class SlotModel(Protocol):
    """A language model with room for the keys and values of several conversations."""

    vocabulary: int
    """Token ids are below it."""

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        """Append tokens to slots from position `start_B` on; logits [B, vocabulary] of what follows index `last_B` of each row.

        Rows are padded on the right: what stands behind `last_B` is never looked at, and is overwritten later.
        """
        ...

    def load(self, weights: Mapping[str, Floats]) -> None:
        """Take other weights, under their Hugging Face names, and drop all keys and values.

        Raises:
            UsageError: they do not fit; the model stays as it was.
        """
        ...


class Drawn(NamedTuple):
    """An answer. Log-probabilities are natural, of the model's own distribution (temperature 1, untruncated)."""

    ids: list[int]
    logprobs: list[float]
    finish: str
    """`stop` where the last id ends the turn, else `length`."""


@dataclass(slots=True)
class _Answer:
    """One answer under way."""

    prompt: list[int]
    limit: int
    """Most tokens to sample."""
    sampling: Sampling
    random: np.random.Generator
    stop: Callable[[], bool]
    done: Future[Drawn] = field(default_factory=Future)
    sampled: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    slot: int = -1
    held: int = 0
    """Tokens of the prompt that its slot held already, from the conversation's last turn."""

    @property
    def unread(self) -> int:
        return len(self.prompt) - self.held


@dataclass(slots=True)
class _Load:
    """Other weights, to be taken when all that was asked before is answered."""

    weights: Mapping[str, Floats]
    done: Future[None] = field(default_factory=Future)


class BatchEngine:
    """Draws many answers at once on a thread of its own.

    Args:
        slots: answers under way at once; more wait.
        length: longest conversation in tokens, its answer included.
        end: the ids that end a turn.
        seed: of the draws of answers that have no seed of their own; None takes another one each time.
    """

    def __init__(
        self, model: SlotModel, slots: int, length: int, end: frozenset[int], *, seed: int | None = None
    ) -> None:
        self.model, self.context_length, self.end, self._slots = model, length, end, slots
        self._forget()
        self._random = np.random.default_rng(seed)
        self._asked: queue.SimpleQueue[_Answer | _Load | None] = queue.SimpleQueue()
        self._closed, self._asking = False, threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="batch-engine", daemon=True)
        self._thread.start()

    def ask(self, prompt: Sequence[int], sampling: Sampling, stop: Callable[[], bool] = lambda: False) -> Future[Drawn]:
        """An answer to come. `stop` is asked after every token whether nobody waits any more; the answer then ends there.

        Raises:
            ModelRefused: the prompt is empty, leaves no room for an answer or holds ids that are no tokens; or no token is asked for.
            ModelError: the engine is closed. Set on the future: it failed, or the model's logits are no numbers.
        """
        limit = self.context_length - len(prompt)
        if not prompt or limit < 1:
            raise ModelRefused(
                f"the prompt is {len(prompt)} tokens long: this engine takes 1 to {self.context_length - 1}"
            )
        if min(prompt) < 0 or max(prompt) >= self.model.vocabulary:
            raise ModelRefused(
                f"the prompt holds ids outside 0 to {self.model.vocabulary - 1}: it is another tokenizer's"
            )
        if sampling.max_tokens is not None:
            if sampling.max_tokens < 1:
                raise ModelRefused(f"max_tokens is {sampling.max_tokens}: ask for at least one")
            limit = min(limit, sampling.max_tokens)
        random = self._random if sampling.seed is None else np.random.default_rng(sampling.seed & 0xFFFFFFFF)
        answer = _Answer(list(prompt), limit, sampling, random, stop)
        self._put(answer)
        return answer.done

    def load(self, weights: Mapping[str, Floats]) -> None:
        """Take other weights when all that was asked before is answered, and forget every kept key and value.

        Raises:
            UsageError: they do not fit the model.
            ModelError: the engine is closed.
        """
        load = _Load(weights)
        self._put(load)
        load.done.result()

    def close(self) -> None:
        """Finish what is under way, unless it says `stop`, and end the thread."""
        with self._asking:
            self._closed = True
            self._asked.put(None)
        self._thread.join()

    def _put(self, asked: _Answer | _Load) -> None:
        with self._asking:
            if self._closed:
                raise ModelError("the engine is closed")
            self._asked.put(asked)

    def _forget(self) -> None:
        # Free slots, the one that waits longest first, each with the tokens whose keys and values it still holds.
        self._free: list[tuple[int, list[int]]] = [(slot, []) for slot in range(self._slots)]

    def _serve(self) -> None:
        under_way: list[_Answer] = []
        waiting: deque[_Answer | _Load] = deque()
        ending = False
        while not ending or under_way or waiting:
            while not ending and (not (under_way or waiting) or not self._asked.empty()):
                asked = self._asked.get()
                if asked is None:
                    ending = True
                else:
                    waiting.append(asked)
            fresh = self._admitted(waiting, bool(under_way))
            try:
                for group in self._seated(fresh):
                    under_way += self._advanced(group, self._read(group))
                if under_way:
                    under_way = self._advanced(under_way, self._decode(under_way))
            except Exception as error:  # the thread must outlive whatever one answer does to it
                self._fail([*under_way, *fresh], error)
                under_way = []

    def _admitted(self, waiting: deque[_Answer | _Load], busy: bool) -> list[_Answer]:
        """Those that may begin now, in their order; weights are taken between answers."""
        fresh: list[_Answer] = []
        while waiting and len(fresh) < len(self._free):
            first = waiting[0]
            if isinstance(first, _Answer):
                if first.done.set_running_or_notify_cancel():
                    fresh.append(first)
            elif busy or fresh:
                break
            else:
                self._load(first)
            waiting.popleft()
        return fresh

    def _load(self, load: _Load) -> None:
        self._forget()
        try:
            self.model.load(load.weights)
        except Exception as error:
            load.done.set_exception(error)
        else:
            load.done.set_result(None)

    def _fail(self, answers: list[_Answer], error: Exception) -> None:
        for answer in answers:
            if not answer.done.done():
                answer.done.set_exception(ModelError(f"the engine failed: {type(error).__name__}: {error}"))
            if answer.slot >= 0:
                self._free.append((answer.slot, []))  # nobody knows what it holds
                answer.slot = -1

    def _seated(self, fresh: list[_Answer]) -> list[list[_Answer]]:
        """The answers with their slots, in groups of about as many tokens to read: padding is computed, too."""
        for answer in fresh:
            self._seat(answer)
            while answer.unread > AT_ONCE:
                self._read([answer])
                answer.held += AT_ONCE
        groups: list[list[_Answer]] = []
        for answer in sorted(fresh, key=lambda answer: answer.unread):
            last = groups[-1] if groups else []
            if last and answer.unread <= min(1.5 * last[0].unread + 4, AT_ONCE / (len(last) + 1)):
                last.append(answer)
            else:
                groups.append([answer])
        return groups

    def _seat(self, answer: _Answer) -> None:
        """Give an answer a free slot: the one that holds most of its prompt, or else the one that waits longest."""
        best, answer.held = 0, 0
        for at, (_, kept) in enumerate(self._free):
            if answer.held < len(kept) < len(answer.prompt) and answer.prompt[: len(kept)] == kept:
                best, answer.held = at, len(kept)
        answer.slot, _ = self._free.pop(best)

    def _read(self, group: list[_Answer]) -> Floats:
        counts = np.array([min(answer.unread, AT_ONCE) for answer in group])
        tokens = np.zeros((len(group), counts.max()), np.int64)
        for row, answer in enumerate(group):
            tokens[row, : counts[row]] = answer.prompt[answer.held : answer.held + counts[row]]
        start = np.array([answer.held for answer in group])
        return self.model.step(tokens, start, _slots(group), counts - 1)

    def _decode(self, under_way: list[_Answer]) -> Floats:
        tokens = np.array([[answer.sampled[-1]] for answer in under_way])
        start = np.array([len(answer.prompt) + len(answer.sampled) - 1 for answer in under_way])
        return self.model.step(tokens, start, _slots(under_way), np.zeros(len(under_way), np.int64))

    def _advanced(self, answers: list[_Answer], logits: Floats) -> list[_Answer]:
        """Draw a token for each; those that go on."""
        ids, logprobs = draw(logits, [answer.sampling for answer in answers], [answer.random for answer in answers])
        going: list[_Answer] = []
        for answer, token, logprob in zip(answers, ids.tolist(), logprobs.tolist(), strict=True):
            answer.sampled.append(token)
            answer.logprobs.append(logprob)
            ended = token in self.end
            if not ended and len(answer.sampled) < answer.limit and not answer.stop():
                going.append(answer)
                continue
            # The last token drawn was never computed with.
            self._free.append((answer.slot, [*answer.prompt, *answer.sampled[:-1]]))
            answer.slot = -1
            answer.done.set_result(Drawn(answer.sampled, answer.logprobs, "stop" if ended else "length"))
        return going


def _slots(answers: list[_Answer]) -> Ints:
    return np.array([answer.slot for answer in answers])


def draw(
    logits_B_V: Floats, sampling: Sequence[Sampling], randoms: Sequence[np.random.Generator]
) -> tuple[Ints, NDArray[np.float64]]:
    """A token for each row, by the inverse of its cumulative distribution, and its log-probability before temperature and truncation.

    Raises:
        FloatingPointError: a row's logits are no numbers.
    """
    shifted = logits_B_V - logits_B_V.max(-1, keepdims=True)
    weights = np.exp(shifted)
    own = np.log(weights.sum(-1, dtype=np.float64))
    if not np.isfinite(own).all():
        raise FloatingPointError("the model's logits are not numbers: its weights are damaged")
    for row, how in enumerate(sampling):
        if not how.untouched:
            weights[row] = _touched(shifted[row], how)
    total = weights.cumsum(-1, dtype=np.float64)
    uniform = np.array([random.random() for random in randoms])
    ids = (total > (uniform * total[:, -1])[:, None]).argmax(-1)
    return ids, shifted[np.arange(len(ids)), ids] - own


def _touched(shifted: Floats, how: Sampling) -> Floats:
    """The weights of a row under temperature and truncation. At temperature 0 all weight is on the likeliest."""
    if how.temperature <= 0:
        return np.asarray(np.arange(len(shifted)) == shifted.argmax(), np.float32)
    weights: Floats = np.exp(shifted / np.float32(how.temperature))
    if how.top_p < 1:
        order = np.argsort(-weights)
        share = weights[order].cumsum(dtype=np.float64) / weights.sum(dtype=np.float64)
        weights[order[1 + np.searchsorted(share, how.top_p) :]] = 0
    return weights
