"""Cloning: a Llama of a quarter of a million parameters learns to play and to take notes like a scripted player.

The initial deviation 1/sqrt(fan_in) matters most (with the usual 0.02 a model this narrow never learns to copy from
its note), then early batches of random pairs to look up (`transcripts.induction`), then clean targets. Training is a
function of the recipe and the seed; it can be stopped at any time and goes on from its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cod_agent.environments.draws import randomness
from cod_train.supervised import Batches, Progress, Schedule, bucketed, train
from cod_train.tiny.tokenizer import LAKES as LAKE_WORDS
from cod_train.tiny.tokenizer import MAX_POSITIONS, MIXED, Vocabulary
from cod_train.tiny.transcripts import LAKES, Scribe, Teacher, drills, induction, lives

LAKES_FIRST = ("frozen-lake:small", "alchemy:tiny", "frozen-lake:small", "grid-navigation:tiny")
ALCHEMY_NEXT = ("frozen-lake:small", "alchemy:tiny", "grid-navigation:tiny", "alchemy:tiny")
"""What the mixed policies are taught, packs in turn, and how they go on."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is made."""

    teacher: Teacher = field(default_factory=Teacher)
    start: str | None = None
    """The policy whose weights it starts from, a shipped one or one that is made first; None: random ones."""
    steps: int = 6000
    stop: int | None = None
    """It is stopped after so many, in the middle."""
    packs: int = 8
    """Lives of four tasks in each step."""
    rate: float = 3e-3
    """Peak learning rate; it warms up over 100 steps and falls to a fiftieth along a cosine."""
    induction: int = 400
    """Steps, from the first on, that also practise looking up random pairs."""
    drills: int = 0
    """Tasks in each step whose notes have the answer, of worlds where that is hard to learn."""
    worlds: tuple[str, ...] = LAKES
    """Packs of them in turn."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What its policy has words for."""
        return LAKE_WORDS if self.worlds == LAKES else MIXED


_MIXED = Recipe(start="mixed-begun", steps=1500, packs=4, drills=64, induction=0, worlds=ALCHEMY_NEXT)

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
    "mixed-begun": Recipe(worlds=LAKES_FIRST, stop=1200),
    "mixed-base": replace(_MIXED, stop=1000),
    "mixed-cloned": _MIXED,
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
    model, scribe = model or new_model(tokenizer, seed), Scribe(tokenizer, recipe.teacher)
    end = train(
        model,
        lambda step: _batches(recipe, scribe, tokenizer, seed, step),
        Schedule(recipe.steps, recipe.rate, stop=recipe.stop),
        checkpoint,
        made_by={"recipe": asdict(recipe), "seed": seed},
        report=report,
        every=every,
    )
    return model, end


def _batches(recipe: Recipe, scribe: Scribe, tokenizer: PreTrainedTokenizerFast, seed: int, step: int) -> Batches:
    samples = lives(scribe, seed, step, recipe.packs, recipe.worlds)
    samples += drills(scribe, randomness("drills", seed, step), recipe.drills, recipe.worlds)
    said = sum(weight for s in samples for _, _, weight in s.targets if weight > 0)
    batches = [(group, said) for group in bucketed(samples)]
    if step < recipe.induction:
        dice = randomness("induction", seed, step)
        for _ in range(4):
            pairs = induction(tokenizer, dice, worlds=recipe.worlds)
            batches.append((pairs, 4.0 * sum(len(s.targets) for s in pairs)))
    return batches
