"""The card of a policy: how it was made and what it measures, written by the program that made and measured it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cod_agent.errors import UsageError
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
    "naive-base": """\
Cloned from the scripted player `memoryless`, which explores cleanly within a task but never reads or writes a note: in
its training every note is `null`. It is kept for comparison, as the start that never knew what notes are for.""",
}

SHARP = 0.1
"""The low temperature: close to always the likeliest token."""

_MEANING = """\
Packs of the eval split, whose maps never occur in training, not even turned or mirrored; temperature 1 unless said;
mean success with 95 % Wilson intervals, which cover the luck of the evaluation only, not that of the training. The low
temperature shows what a policy holds but does not live by."""

_NOT = """\
It speaks the compact form of FrozenLake-Obscure on 3x3 and 4x4 maps and nothing else: no English, no other world, no
larger maps. It shows that the machinery works with a real model; it says nothing about how large models behave."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Reward by position on one preset: with notes, in the control without, and with notes at a low temperature."""

    preset: str
    seed: int
    notes: list[Position]
    control: list[Position]
    sharp: list[Position]


def cloned(policy: str, recipe: Recipe, progress: Progress, *, seed: int) -> dict[str, str]:
    """How a clone was made, by what it is called on its card."""
    teacher = recipe.teacher
    return {
        "made by": f"`python -m cod_train.tiny clone --policy {policy} --out DIR --seed {seed}`",
        "started from": f"`{recipe.start}`" if recipe.start else f"random weights, seed {seed}",
        "steps": f"{progress.step:,} of {recipe.packs} lives of 4 tasks, "
        "frozen-lake:small (3 of 4) and :tiny, train split",
        "tokens": f"{progress.tokens / 1e6:.1f} million, padding included",
        "time": f"{progress.seconds / 60:.1f} minutes with torch on {torch.get_num_threads()} CPU thread(s)",
        "optimiser": f"AdamW, peak rate {recipe.rate:g}, cosine, clip 1; "
        f"random pairs to look up in the first {recipe.induction} steps",
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


def card(policy: str, made: Mapping[str, str], *, parameters: int, measured: list[Measured]) -> str:
    """The text of `CARD.md`.

    Args:
        made: how, as `cloned` or `trained` say.
    """
    shape = f"{parameters:,} (Llama: width 64, 4 layers, 2 heads of 32, MLP 192, tied, 1,024 positions)"
    lines = [f"# {policy}", "", _ABOUT.get(policy, ""), "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in {"parameters": shape, **made}.items()]
    lines += ["", "## Reward by position", "", _MEANING, ""]
    for result in measured:
        lines += [f"`frozen-lake:{result.preset}`, seed {result.seed}:", "", *_table(result), ""]
    lines += [f"Measured by `python -m cod_train.tiny evaluate DIR --seed {measured[0].seed}`.", ""] if measured else []
    lines += ["## What it is not", "", _NOT, ""]
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
