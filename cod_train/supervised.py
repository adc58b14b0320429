"""Supervised training: samples with weighted targets, grouped by length, AdamW with warm-up and cosine, resumable.

What is taught is not its business: cloning (`cod_train.tiny.clone`) makes soft targets as it goes, a warm start
(`cod_train.warm_start`) reads transcripts. A run is a function of what it is given and can be stopped at any time: the same call
goes on from its checkpoint, to the same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from cod_agent.errors import UsageError

BUDGET = 4096
"""Padded tokens in one forward pass: larger ones leave the cache of a CPU."""


@dataclass(slots=True)
class Sample:
    """A token sequence and what is to be learnt from it."""

    ids: list[int]
    targets: list[tuple[int, int, float]]
    """(i, token, weight): what the model should say after reading ids[: i + 1]."""


Batches = list[tuple[list[Sample], float]]
"""The groups of one step, each with the number its summed loss is divided by."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long and how fast."""

    steps: int
    rate: float
    """Peak learning rate; from there it falls to a fiftieth along a cosine."""
    warm_up: int = 100
    """Steps it takes to get there."""
    stop: int | None = None
    """Ends after so many steps, in the middle of its cosine."""

    @property
    def last(self) -> int:
        """The step it ends with."""
        return self.steps if self.stop is None else self.stop

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * fall


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    step: int
    steps: int
    loss: float
    """Mean weighted cross-entropy of this step in nats a target."""
    tokens: int
    """Padded tokens trained on so far."""
    seconds: float
    """Spent training so far, over all sittings."""


def bucketed(samples: Sequence[Sample], budget: int = BUDGET) -> list[list[Sample]]:
    """Samples of similar length together, no group over `budget` padded tokens unless one sample is."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        length = len(sample.ids)
        group = groups[-1] if groups else None
        if group and length <= 1.4 * len(group[0].ids) + 8 and (len(group) + 1) * length <= budget:
            group.append(sample)
        else:
            groups.append([sample])
    return groups


def summed_loss(model: PreTrainedModel, group: Sequence[Sample]) -> tuple[torch.Tensor, int]:
    """Weighted cross-entropy in nats, summed over the targets of `group`, and the padded tokens it took."""
    ids_B_T = torch.zeros(len(group), max(len(s.ids) for s in group), dtype=torch.long)
    for row, sample in enumerate(group):
        ids_B_T[row, : len(sample.ids)] = torch.tensor(sample.ids)
    rows, places, tokens, weights = zip(
        *((row, *target) for row, sample in enumerate(group) for target in sample.targets), strict=True
    )
    # Several targets may share a place (soft ones): logits once a place, not once a target.
    flat = torch.tensor(rows) * ids_B_T.shape[1] + torch.tensor(places)
    unique, inverse = torch.unique_consecutive(flat, return_inverse=True)
    logits_P_V = _logits_at(model, ids_B_T.to(model.device), unique.to(model.device))
    surprise = -functional.log_softmax(logits_P_V.float(), dim=-1)[inverse, torch.tensor(tokens)]
    return (surprise * torch.tensor(weights, device=model.device)).sum(), ids_B_T.numel()


def _logits_at(model: PreTrainedModel, ids_B_T: torch.Tensor, flat_P: torch.Tensor) -> torch.Tensor:
    """Logits [P, V] at places counted through the rows. Rows are padded on the right, where no earlier token looks."""
    if isinstance(model, LlamaForCausalLM):
        hidden_B_T_D = model.model(ids_B_T, use_cache=False).last_hidden_state
        return model.lm_head(hidden_B_T_D.flatten(0, 1)[flat_P])
    # Some architectures scale or cap their logits: they make them themselves, for the columns that any row wants.
    length = ids_B_T.shape[1]
    columns, at = torch.unique(flat_P % length, return_inverse=True)
    logits_B_C_V = model(ids_B_T, use_cache=False, logits_to_keep=columns).logits
    return logits_B_C_V[flat_P // length, at]


def train(
    model: PreTrainedModel,
    batches: Callable[[int], Batches],
    schedule: Schedule,
    checkpoint: Path,
    *,
    made_by: Mapping[str, Any],
    report: Callable[[Progress], None] = lambda progress: None,
    every: int = 200,
) -> Progress:
    """Train `model` (in place), going on where `checkpoint` left off.

    Args:
        batches: what to learn at a step; a function of its number alone, so that training resumes exactly.
        checkpoint: a file, written every `every` steps and at the end.
        made_by: everything the outcome depends on; a checkpoint made by something else is refused.
        report: called after each step, and once on going on.

    Returns:
        Where the run ended.

    Raises:
        UsageError: the checkpoint is of another recipe or seed.
    """
    model.train()
    optimizer = _optimizer(model)
    done = Progress(0, schedule.last, math.nan, 0, 0.0)
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if saved["made_by"] != made_by:
            raise UsageError(f"{checkpoint} is of another recipe or seed: choose another folder, or remove it")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = Progress(**saved["progress"])
        report(done)
    began = time.perf_counter() - done.seconds
    for step in range(done.step, schedule.last):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(step)  # of dropout, where a model has any
            loss, tokens = _one_step(model, optimizer, batches(step))
        done = Progress(step + 1, schedule.last, loss, done.tokens + tokens, time.perf_counter() - began)
        report(done)
        if done.step % every == 0 or done.step == schedule.last:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(done)}
            torch.save({**state, "made_by": made_by}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    model.eval()
    return done


def _optimizer(model: PreTrainedModel) -> torch.optim.Optimizer:
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )


def _one_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batches: Batches) -> tuple[float, int]:
    optimizer.zero_grad()
    total, tokens = 0.0, 0
    for group, norm in batches:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
            loss, used = summed_loss(model, group)
        (loss / norm).backward()
        total, tokens = total + loss.item() / norm, tokens + used
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total, tokens
