"""Cloning: a Llama of a quarter of a million parameters learns to play and to take notes like a scripted player.

The initial deviation 1/sqrt(fan_in) matters most (with the usual 0.02 a model this narrow never learns to copy from
its note), then early batches of random pairs to look up (`transcripts.induction`), then clean targets. Training is a
function of the recipe and the seed; it can be stopped at any time and goes on from its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cod_agent.environments.draws import randomness
from cod_train.supervised import Batches, Progress, Schedule, bucketed, train
from cod_train.tiny.tokenizer import LAKES as LAKE_WORDS
from cod_train.tiny.tokenizer import MAX_POSITIONS, MIXED, Vocabulary
from cod_train.tiny.transcripts import LAKES, Scribe, Teacher, induction, lives

HEAD = 32
"""Width of a head: vLLM serves none narrower."""
THREE_WORLDS = ("frozen-lake:small", "alchemy:tiny", "frozen-lake:small", "grid-navigation:tiny")
"""What the mixed policies are taught, packs in turn: the lakes take the most practice."""


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
    worlds: tuple[str, ...] = LAKES
    """Packs of them in turn."""
    width: int = 64
    """Of the model."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What its policy has words for."""
        return LAKE_WORDS if self.worlds == LAKES else MIXED


RECIPES: dict[str, Recipe] = {
    "cloned": Recipe(),
    "novice": Recipe(steps=500),
    "embedded-base": Recipe(
        Teacher(off_path=0.0, noise=0.5, forget=0.5, garble=0.1, world_weight=0.0),
        start="cloned",
        steps=200,
        rate=1e-3,
        induction=0,
    ),
    "naive-base": Recipe(Teacher(remember=False), steps=5000),
    "mixed-cloned": Recipe(worlds=THREE_WORLDS),
    "mixed-base": Recipe(worlds=THREE_WORLDS, steps=1000),
}


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int, width: int = 64) -> LlamaForCausalLM:
    """A Llama with random weights, `width` a multiple of `HEAD`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=width // HEAD,
        num_key_value_heads=width // HEAD,
        head_dim=HEAD,
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
    model, scribe = model or new_model(tokenizer, seed, recipe.width), Scribe(tokenizer, recipe.teacher)
    end = train(
        model,
        lambda step: _batches(recipe, scribe, tokenizer, seed, step),
        Schedule(recipe.steps, recipe.rate),
        checkpoint,
        made_by={"recipe": asdict(recipe), "seed": seed},
        report=report,
        every=every,
    )
    return model, end


def _batches(recipe: Recipe, scribe: Scribe, tokenizer: PreTrainedTokenizerFast, seed: int, step: int) -> Batches:
    samples = lives(scribe, seed, step, recipe.packs, recipe.worlds)
    said = sum(weight for s in samples for _, _, weight in s.targets if weight > 0)
    batches = [(group, said) for group in bucketed(samples)]
    if step < recipe.induction:
        dice = randomness("induction", seed, step)
        for _ in range(4):
            pairs = induction(tokenizer, dice, worlds=recipe.worlds)
            batches.append((pairs, 4.0 * sum(len(s.targets) for s in pairs)))
    return batches
