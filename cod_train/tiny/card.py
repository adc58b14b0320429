"""The card of a policy: how it was made and what it measures, written by the program that made and measured it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from cod_agent.errors import UsageError
from cod_agent.policies import POLICIES
from cod_train.progress import steps
from cod_train.supervised import Progress
from cod_train.tiny.clone import Recipe
from cod_train.tiny.evaluate import Position

_ABOUT = {
    "embedded": """\
The best policy that this project's own training made: `cod train`, reinforcement learning with segment credit. It is what
`cod demo` runs: a real language model, small enough for any machine, that uses what it wrote down after the tasks before. How it was
chosen, and what training did to it, is told in docs/results/learning.md.""",
    "cloned": """\
Cloned from the scripted player `perfect`, which explores cleanly and takes notes: imitation, and no reinforcement
learning yet.""",
    "novice": """\
Cloned like `cloned` and stopped after a twelfth of the lessons: it plays weakly, begins to write notes and makes little
of them, and **has never done better**, which its low temperature shows. A start for reinforcement learning that has to
improve what it was taught, and not to bring it back.""",
    "embedded-base": """\
`cloned`, made weak on purpose: a short second stage imitates a player that often answers at random and loses or
garbles lines of its notes. It is a start for reinforcement learning. **It has once known how to do better, and still
holds much of it**: see what it does at a low temperature. What training recovers from it must be told apart from what
training discovers: say how this base was made beside every figure.""",
    "mixed": """\
One policy for three worlds, FrozenLake-Obscure, Alchemy-Random and Grid Navigation: the best that `cod train` made of
`mixed-base` on packs of all three. What training did to it, and what it does to a world that it leaves out, is told in
docs/results/mixed.md.""",
    "mixed-begun": """\
The first lessons of the policies that know three worlds, cloned from their scripted players, the lakes more than the others.""",
    "mixed-base": """\
Cloned from the scripted players of three worlds and stopped early: it walks on lakes and crosses fields, and begins to look up in
its note what makes what; it **has never done better**. A start for reinforcement learning that has to improve what it was
taught, and not to bring it back.""",
    "mixed-cloned": """\
Cloned like `mixed-base`, all lessons: what imitation alone gives in three worlds.""",
}

SHARP = 0.1
"""The low temperature: close to always the likeliest token."""

_MEANING = """\
Packs of the eval split: no map of its lakes, and no hidden property of its other worlds, occurs in training, not even
turned, mirrored or renamed. Temperature 1 unless said; mean reward with 95 % Wilson intervals, which cover the luck of the
evaluation only, not that of the training. The low temperature shows what a policy holds but does not live by."""

_NOT = """\
It speaks the compact form of {worlds} and nothing else: no English, no other world, nothing larger. It shows that the
machinery works with a real model; it says nothing about how large models behave."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Reward by position in one world: with notes, in the control without, and with notes at a low temperature."""

    world: str
    """WORLD:PRESET."""
    seed: int
    notes: list[Position]
    control: list[Position]
    sharp: list[Position]


def cloned(policy: str, recipe: Recipe, progress: Progress, *, seed: int) -> dict[str, str]:
    """How a clone was made, by what it is called on its card."""
    teacher = recipe.teacher
    first = f" --start {recipe.start}" if recipe.start and recipe.start not in POLICIES else ""
    stopped = f" (stopped; the rate fell as for {recipe.steps:,})" if recipe.stop else ""
    return {
        "made by": f"`python -m cod_train.tiny clone --policy {policy}{first} --out DIR --seed {seed}`",
        "started from": f"`{recipe.start}`" if recipe.start else f"random weights, seed {seed}",
        "steps": f"{progress.step:,}{stopped} of {recipe.packs} lives of 4 tasks, {_shares(recipe.worlds)}, train split",
        "tokens": f"{progress.tokens / 1e6:.1f} million, padding included",
        "time": f"{progress.seconds / 60:.1f} minutes with torch on {torch.get_num_threads()} CPU thread(s)",
        "optimiser": f"AdamW, peak rate {recipe.rate:g}, cosine, clip 1; "
        f"random pairs to look up in the first {recipe.induction} steps; {recipe.drills} look-ups in notes a step",
        "teacher": f"off path {teacher.off_path:g}, head start {teacher.head_start:g}, noise {teacher.noise:g}, "
        f"forget {teacher.forget:g}, garble {teacher.garble:g}, weight of observations {teacher.world_weight:g}",
    }


_OF_THE_RUN = re.compile(
    r"trainer\.(default_local_dir|experiment_name|logger|save_freq)|data\.recorded=\[\]|cod\.keep_rollouts"
)
"""Words of a training's config that do not change what comes out."""


def trained(folder: Path) -> dict[str, str]:
    """How the policy of a training folder was made.

    Raises:
        UsageError: `cod train` did not write it.
    """
    note, done = folder / "train.json", steps(folder)
    if not note.is_file() or not done:
        raise UsageError(f"{folder} is no folder of a training: give what `cod train --out` wrote")
    words = [word.replace('"', "") for word in json.loads(note.read_text())["config"] if not _OF_THE_RUN.match(word)]
    start = next(word.partition("=")[2] for word in words if word.startswith("actor_rollout_ref.model.path="))
    rollouts = {int(step.metrics["cod/rollouts"]) for step in done}
    tokens = sum(step.metrics["cod/trained_tokens"] for step in done)
    return {
        "made by": f"`python -m cod_train.verl_main {' '.join(words)} trainer.default_local_dir=DIR`",
        "started from": f"`{start}`",
        "steps": f"{len(done)} of {', '.join(map(str, sorted(rollouts)))} rollouts, train split",
        "tokens": f"{tokens / 1e6:.2f} million, sampled",
        "time": f"{sum(step.seconds for step in done) / 60:.1f} minutes on a CPU",
    }


def _shares(worlds: Sequence[str]) -> str:
    counts = Counter(worlds)
    return ", ".join(f"{world} ({count} of {len(worlds)})" for world, count in counts.items())


def card(
    policy: str, made: Mapping[str, str], *, model: LlamaForCausalLM, worlds: Sequence[str], measured: list[Measured]
) -> str:
    """The text of `CARD.md`.

    Args:
        made: how, as `cloned` or `trained` say.
        worlds: that it has words for.
    """
    config, parameters = model.config, sum(weight.numel() for weight in model.parameters())
    shape = (
        f"{parameters:,} (Llama: width {config.hidden_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads "
        f"of {config.head_dim}, MLP {config.intermediate_size}, tied, {config.max_position_embeddings:,} positions)"
    )
    lines = [f"# {policy}", "", _ABOUT.get(policy, ""), "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in {"parameters": shape, **made}.items()]
    lines += ["", "## Reward by position", "", _MEANING, ""]
    for result in measured:
        lines += [f"`{result.world}`, seed {result.seed}:", "", *_table(result), ""]
    lines += [f"Measured by `python -m cod_train.tiny evaluate DIR --seed {measured[0].seed}`.", ""] if measured else []
    spoken = ", ".join(f"`{world}`" for world in worlds)
    lines += ["## What it is not", "", _NOT.format(worlds=spoken), ""]
    return "\n".join(lines)


def _table(result: Measured) -> list[str]:
    heads = [f"pos {p.position}" for p in result.notes]
    rows = {
        f"with notes, {result.notes[0].n:,} packs": result.notes,
        f"`no-context`, {result.control[0].n:,} packs": result.control,
        f"with notes, temperature {SHARP:g}, {result.sharp[0].n:,} packs": result.sharp,
    }
    return [
        f"| | {' | '.join(heads)} | mean |",
        f"|{' --- |' * (len(heads) + 2)}",
        *(
            f"| {name} | {' | '.join(f'{p.mean:.3f} ({p.low:.3f} to {p.high:.3f})' for p in row)} "
            f"| {sum(p.mean for p in row) / len(row):.3f} |"
            for name, row in rows.items()
        ),
    ]
