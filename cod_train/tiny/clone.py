"""Cloning: a Llama of a quarter of a million parameters learns to play and to take notes like a scripted player.

The initial deviation 1/sqrt(fan_in) matters most (with the usual 0.02 a model this narrow never learns to copy from
its note), then early batches of random pairs to look up (`transcripts.induction`), then clean targets. Training is a
function of the recipe and the seed; it can be stopped at any time and goes on from its checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cod_agent.environments.frozen_lake.maps import randomness
from cod_agent.errors import UsageError
from cod_train.tiny.tokenizer import MAX_POSITIONS
from cod_train.tiny.transcripts import Sample, Scribe, Teacher, induction, lives

BUDGET = 4096
"""Padded tokens in one forward pass: larger ones leave the cache of a CPU."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is made."""

    teacher: Teacher = field(default_factory=Teacher)
    start: str | None = None
    """The policy whose weights it starts from; None: random ones."""
    steps: int = 6000
    packs: int = 8
    """Lives of four tasks in each step."""
    rate: float = 3e-3
    """Peak learning rate; it warms up over 100 steps and falls to a fiftieth along a cosine."""
    induction: int = 400
    """Steps, from the first on, that also practise looking up random pairs."""


RECIPES: dict[str, Recipe] = {
    "embedded": Recipe(),
    "embedded-base": Recipe(
        Teacher(off_path=0.0, noise=0.5, forget=0.5, garble=0.1, world_weight=0.0),
        start="embedded",
        steps=200,
        rate=1e-3,
        induction=0,
    ),
    "naive-base": Recipe(Teacher(remember=False), steps=5000),
}


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of width 64 with random weights; two heads of 32, since vLLM serves none narrower."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                gain = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(0.0, gain / math.sqrt(weight.shape[1]), generator=generator)
    return model


def bucketed(samples: list[Sample]) -> list[list[Sample]]:
    """Samples of similar length together, no group over `BUDGET` padded tokens."""
    groups: list[list[Sample]] = []
    for sample in sorted(samples, key=lambda s: len(s.ids)):
        length = len(sample.ids)
        group = groups[-1] if groups else None
        if group and length <= 1.4 * len(group[0].ids) + 8 and (len(group) + 1) * length <= BUDGET:
            group.append(sample)
        else:
            groups.append([sample])
    return groups


def summed_loss(model: LlamaForCausalLM, group: list[Sample]) -> tuple[torch.Tensor, int]:
    """Weighted cross-entropy in nats, summed over the targets of `group`, and the padded tokens it took."""
    ids_B_T = torch.zeros(len(group), max(len(s.ids) for s in group), dtype=torch.long)
    for row, sample in enumerate(group):
        ids_B_T[row, : len(sample.ids)] = torch.tensor(sample.ids)
    rows, places, tokens, weights = zip(
        *((row, *target) for row, sample in enumerate(group) for target in sample.targets), strict=True
    )
    hidden_B_T_D = model.model(ids_B_T, use_cache=False).last_hidden_state
    # Several targets may share a place (soft ones): logits once a place, not once a target.
    flat = torch.tensor(rows) * ids_B_T.shape[1] + torch.tensor(places)
    unique, inverse = torch.unique_consecutive(flat, return_inverse=True)
    logits_P_V = model.lm_head(hidden_B_T_D.flatten(0, 1)[unique])
    surprise = -functional.log_softmax(logits_P_V, dim=-1)[inverse, torch.tensor(tokens)]
    return (surprise * torch.tensor(weights)).sum(), ids_B_T.numel()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a cloning run is."""

    step: int
    steps: int
    loss: float
    """Mean weighted cross-entropy of this step in nats a target."""
    tokens: int
    """Padded tokens trained on so far."""
    seconds: float
    """Spent training so far, over all sittings."""


def rate_at(recipe: Recipe, step: int) -> float:
    """The learning rate of a step."""
    fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.rate * min(1.0, (step + 1) / 100) * fall


def clone(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    checkpoint: Path,
    *,
    seed: int = 0,
    model: LlamaForCausalLM | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    every: int = 200,
) -> tuple[LlamaForCausalLM, Progress]:
    """Train by `recipe`, from `model` or random weights, going on where `checkpoint` left off.

    Args:
        checkpoint: a file, written every `every` steps and at the end.
        report: called after each step, and once on going on.

    Returns:
        The trained model in float32 and where the run ended.

    Raises:
        UsageError: the checkpoint is of another recipe or seed.
    """
    model = model or new_model(tokenizer, seed)
    model.train()
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    made_by = {"recipe": asdict(recipe), "seed": seed}
    done = Progress(0, recipe.steps, math.nan, 0, 0.0)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["made_by"] != made_by:
            raise UsageError(f"{checkpoint} is of another recipe or seed: choose another folder, or remove it")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = Progress(**saved["progress"])
        report(done)
    scribe, began = Scribe(tokenizer, recipe.teacher), time.perf_counter() - done.seconds
    for step in range(done.step, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step)
        loss, tokens = _one_step(model, optimizer, _batches(recipe, scribe, tokenizer, seed, step))
        done = Progress(step + 1, recipe.steps, loss, done.tokens + tokens, time.perf_counter() - began)
        report(done)
        if done.step % every == 0 or done.step == recipe.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(done)}
            torch.save({**state, "made_by": made_by}, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
    return model.eval(), done


def _batches(
    recipe: Recipe, scribe: Scribe, tokenizer: PreTrainedTokenizerFast, seed: int, step: int
) -> list[tuple[list[Sample], float]]:
    """The groups of a step, each with the number its summed loss is divided by."""
    samples = lives(scribe, seed, step, recipe.packs)
    said = sum(weight for s in samples for _, _, weight in s.targets if weight > 0)
    batches = [(group, said) for group in bucketed(samples)]
    if step < recipe.induction:
        dice = randomness("induction", seed, step)
        for _ in range(4):
            pairs = induction(tokenizer, dice)
            batches.append((pairs, 4.0 * sum(len(s.targets) for s in pairs)))
    return batches


def _one_step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batches: list[tuple[list[Sample], float]]
) -> tuple[float, int]:
    optimizer.zero_grad()
    total, tokens = 0.0, 0
    for group, norm in batches:
        loss, used = summed_loss(model, group)
        (loss / norm).backward()
        total, tokens = total + loss.item() / norm, tokens + used
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total, tokens
