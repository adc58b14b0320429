"""Reward by position of a tiny policy, many packs at once, straight from torch.

The runtime's `cod eval` measures the same through the embedded engine, call by call; this is what training uses between
stages, and what shows that engine and weights agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from cod_agent.context import COMPACT, Message, Trajectory, Turn, UpdateRefused, message, parse_update
from cod_agent.environments import make_world
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation, Task

ANSWER_TOKENS, NOTE_TOKENS = 8, 40
_NOTE_LIMIT = 4000


@dataclass(frozen=True, slots=True)
class Position:
    """Mean reward at one position, with a Wilson interval (too wide where rewards are not just 0 or 1)."""

    position: int
    mean: float
    low: float
    high: float
    n: int


def interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval of a proportion."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate, spread = successes / n, z * z / n
    middle = (rate + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(rate * (1 - rate) / n + spread / (4 * n))
    return middle - half, middle + half


class Speaker:
    """Answers many conversations at once."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, temperature: float = 1.0
    ) -> None:
        self._model, self._tokenizer, self._temperature = model.eval(), tokenizer, temperature
        self._dice = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def answers(self, conversations: list[list[Message]], limit: int) -> list[str]:
        """One sampled answer each, of at most `limit` tokens."""
        prompts = [
            self._tokenizer.apply_chat_template([m.wire() for m in said], add_generation_prompt=True, tokenize=False)
            for said in conversations
        ]
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        mask_B_T, feed_B_T, cache = batch["attention_mask"], batch["input_ids"], None
        places_B_T = (mask_B_T.cumsum(1) - 1).clamp(min=0)
        running_B, out = torch.ones(len(prompts), 1, dtype=torch.long), []
        for _ in range(limit):
            result = self._model(
                input_ids=feed_B_T,
                attention_mask=mask_B_T,
                position_ids=places_B_T,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = result.past_key_values
            feed_B_T = torch.multinomial(
                (result.logits[:, -1] / self._temperature).softmax(-1), 1, generator=self._dice
            )
            feed_B_T = torch.where(running_B == 1, feed_B_T, self._tokenizer.pad_token_id)
            running_B = running_B * (feed_B_T != self._tokenizer.eos_token_id)
            out.append(feed_B_T)
            if not running_B.any():
                break
            mask_B_T = torch.cat((mask_B_T, torch.ones_like(running_B)), 1)
            places_B_T = places_B_T[:, -1:] + 1
        return self._tokenizer.batch_decode(torch.cat(out, 1), skip_special_tokens=True)


def rewards(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    world: str = "frozen-lake:small",
    packs: int = 512,
    size: int = 4,
    seed: int = 0,
    remember: bool = True,
    temperature: float = 1.0,
    batch: int = 256,
) -> list[list[float]]:
    """The reward of each task of each pack of the eval split.

    Args:
        remember: False is the control: every task is solved with the null context, nothing is updated.
    """
    made = make_world(world, seed=seed, split="eval", form="compact")
    if getattr(made, "remembers", False):
        raise UsageError(f"{world} remembers from task to task, which only agents live: measure it with cod eval")
    speaker, all_packs = Speaker(model, tokenizer, seed, temperature), list(made.packs(packs, size))
    out: list[list[float]] = []
    for first in range(0, packs, batch):
        chosen = all_packs[first : first + batch]
        notes = [""] * len(chosen)
        scores: list[list[float]] = [[] for _ in chosen]
        for position in range(size):
            tasks = [pack[position] for pack in chosen]
            lived = _solve(speaker, made, tasks, notes)
            for score, (_, feedback) in zip(scores, lived, strict=True):
                score.append(feedback.reward or 0.0)
            if remember and position < size - 1:
                notes = _update(speaker, tasks, notes, lived)
        out += scores
    return out


def _solve(speaker: Speaker, world: Any, tasks: list[Task], notes: list[str]) -> list[tuple[Trajectory, Feedback]]:
    sessions = [world.start(task) for task in tasks]
    last: list[Observation] = [session.reset() for session in sessions]
    first = list(last)
    turns: list[list[Turn]] = [[] for _ in tasks]
    said = [COMPACT.solve(task, note, seen) for task, note, seen in zip(tasks, notes, first, strict=True)]
    while walking := [i for i, seen in enumerate(last) if not seen.done]:
        for i, answer in zip(walking, speaker.answers([said[i] for i in walking], ANSWER_TOKENS), strict=True):
            last[i] = sessions[i].step(answer)
            turns[i].append(Turn(answer, last[i]))
            said[i] += [message("assistant", ("model", answer)), message("user", ("environment", last[i].text))]
    return [(Trajectory(first[i], tuple(turns[i])), last[i].feedback or Feedback()) for i in range(len(tasks))]


def _update(
    speaker: Speaker, tasks: list[Task], notes: list[str], lived: list[tuple[Trajectory, Feedback]]
) -> list[str]:
    prompts = [COMPACT.update(task, note, *life) for task, note, life in zip(tasks, notes, lived, strict=True)]
    out = []
    for note, answer in zip(notes, speaker.answers(prompts, NOTE_TOKENS), strict=True):
        try:
            out.append(parse_update(answer, _NOTE_LIMIT))
        except UpdateRefused:
            out.append(note)
    return out


def by_position(table: list[list[float]]) -> list[Position]:
    """Mean and 95 % interval of each column of `rewards`."""
    columns = list(zip(*table, strict=True))
    return [
        Position(k, sum(column) / len(column), *interval(sum(column), len(column)), len(column))
        for k, column in enumerate(columns)
    ]
