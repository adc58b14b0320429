"""A few packs lived before any model is there: how many calls a rollout takes, how long its prompts get, what there is to train on.

The world is asked as always and the agent is the runtime's own, so prompts, updates, merging and rows are the real ones. Only who
answers is not: in the compact form the world's own player does; in the natural form somebody who thinks aloud for as many words
as is reckoned with, and then says what the rules give as the example of an answer. Without the tokenizer, tokens are the
words, numbers and marks that the tokenizers of large models cut text into before anything else, which is about as many as they have.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from cod_agent.completions import Completion, OnDelta, Tokens
from cod_agent.context import CLOSE, OPEN, Message
from cod_agent.environments import make_world
from cod_agent.environments.base import Form
from cod_agent.environments.players import Player
from cod_agent.errors import UsageError
from cod_agent.journal import record_completion
from cod_train.batch import rows_of
from cod_train.live import Recorder
from cod_train.rollouts import Rollout
from cod_train.settings import Settings

PACKS = 8
"""Lived once each."""
ANSWERS = 0.25
"""Of the longest answer allowed: how long one is reckoned to be."""

_WORD = re.compile(r" ?[^\W\d_]+|\d| ?[^\w\s]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|_")
_EXAMPLE = re.compile(r"<answer>.*?</answer>", re.DOTALL)
_END = 1

Spelling = tuple[Callable[[Sequence[Message]], list[int]], Callable[[str], list[int]]]
"""messages -> prompt ids, answer -> sampled ids."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What rollouts were like, per rollout unless said otherwise."""

    calls: float
    rows: float
    """Rows to train on, merged where prompts go on from one another."""
    tokens: float
    """Of these rows, all of which the update reads."""
    apart: float
    """Tokens of one row for each call: what it is where a chat template changes earlier turns."""
    sampled: float
    longest_prompt: int
    """Of all calls of all rollouts, in tokens."""
    longest_answer: int
    longest: int
    """Prompt and answer."""


def rehearse(settings: Settings, tokenizer: Any = None, *, packs: int = PACKS) -> Rehearsal:
    """Live the first packs of the worlds, and measure.

    Args:
        tokenizer: a Hugging Face one with a chat template, or None.

    Raises:
        UsageError: a world nobody can play before there is a model.
        UnknownName: no such world.
    """
    spelling = _words() if tokenizer is None else _tokens(tokenizer, settings.template)
    with tempfile.TemporaryDirectory() as folder:
        lived = asyncio.run(_lived(settings, spelling, packs, Path(folder) / "rehearsal.db"))
    calls = [call for rollout in lived for segment in rollout.segments for call in segment.calls]
    rows = [row.tokens for rollout in lived for row in rows_of(rollout, merge=settings.merge)]
    if not rows:
        raise UsageError(f"nothing of {', '.join(settings.worlds)} can be tried before there is a model")
    lengths = [len(call.prompt) + len(call.sampled) for call in calls]
    return Rehearsal(
        calls=len(calls) / packs,
        rows=len(rows) / packs,
        tokens=sum(len(row.prompt) + len(row.response) for row in rows) / packs,
        apart=sum(lengths) / packs,
        sampled=sum(len(call.sampled) for call in calls) / packs,
        longest_prompt=max(len(call.prompt) for call in calls),
        longest_answer=max(len(call.sampled) for call in calls),
        longest=max(lengths),
    )


async def _lived(settings: Settings, spelling: Spelling, packs: int, file: Path) -> list[Rollout]:
    words = max(1, int(settings.max_tokens * ANSWERS))
    worlds = {name: make_world(name, seed=settings.seed, split="train", form=settings.form) for name in settings.worlds}
    aloud = _aloud(words) if settings.form == "natural" else None
    made = iter(range(packs))
    name_of = [settings.worlds[at % len(settings.worlds)] for at in range(packs)]

    def model(_: str) -> _Rehearser:
        at = next(made)
        return _Rehearser(aloud or _player(worlds[name_of[at]], at), settings.form, spelling)

    recorder = Recorder(file, model, max_context=settings.max_context)
    try:
        places = [
            {
                "world": name_of[at],
                "form": settings.form,
                "split": "train",
                "seed": settings.seed,
                "pack": at // len(settings.worlds),
                "size": settings.pack_size,
            }
            for at in range(packs)
        ]
        return [await recorder.live(place, "0") for place in places]
    finally:
        recorder.close()


def _player(world: Any, seed: int) -> Player:
    """The best player a world has of its own."""
    players = getattr(world, "players", None) or {}
    if "perfect" not in players:
        raise UsageError(
            f"{world.name} has no player of its own to rehearse the compact form with: set data.form=natural"
        )
    return players["perfect"](Random(seed))


class _Rehearser:
    """A player whose answers have tokens."""

    name = "rehearsal"

    def __init__(self, player: Player, form: Form, spelling: Spelling) -> None:
        self._player, self.form, (self._prompt, self._said) = player, form, spelling

    async def complete(self, messages: Sequence[Message], *, on_delta: OnDelta | None = None) -> Completion:
        return await record_completion(self.name, messages, {"temperature": 1.0}, self._answer)

    async def _answer(self, messages: Sequence[Message]) -> Completion:
        text = self._player(messages)
        prompt = self._prompt(messages)
        sampled = self._said(text)
        return Completion(text, tokens=Tokens(prompt, sampled, [0.0] * len(sampled)))


def _aloud(words: int) -> Player:
    """Thinks for so many words."""

    def play(messages: Sequence[Message]) -> str:
        asked = messages[0].content
        example = _EXAMPLE.search(asked)
        if OPEN in messages[-1].content and not example:
            # A note of a quarter of the words, after the reasoning.
            return f"{'so ' * (words * 3 // 4)}\n{OPEN}\n{'so ' * (words // 4)}.\n{CLOSE}"
        return f"{'so ' * words}{example[0] if example else ''}"

    return play


def _words() -> Spelling:
    def cut(text: str) -> list[int]:
        return [2 + (zlib.crc32(word.encode()) >> 1) for word in _WORD.findall(text)]

    def prompt(messages: Sequence[Message]) -> list[int]:
        ids = [part for said in messages for part in (0, *cut(f"{said.role}\n"), *cut(said.content), _END)]
        return [*ids, 0, *cut("assistant\n")]

    return prompt, lambda answer: [*cut(answer), _END]


def _tokens(tokenizer: Any, template: dict[str, Any]) -> Spelling:
    from cod_train.prompts import PromptIds

    prompts = PromptIds(tokenizer)
    asked: list[list[int]] = []

    def prompt(messages: Sequence[Message]) -> list[int]:
        asked.append(prompts.ids([said.wire() for said in messages], **template))
        return asked[-1]

    def said(answer: str) -> list[int]:
        sampled = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        prompts.answered(asked[-1], sampled)
        return sampled

    return prompt, said
