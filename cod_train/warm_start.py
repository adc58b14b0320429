"""Warm start: a student learns to say what a teacher said, before it learns by itself what pays.

    python -m cod_train.warm_start teacher.db --base DIR --out DIR --min-reward 1

The teacher is whoever lived in the run databases: a strong model behind an API, a scripted player, the student itself on its good
days (rejection sampling). The student is any causal language model in Hugging Face form with a chat template. What comes out
is such a directory again, a base for reinforcement learning; if the base has the form of the shipped policies, with its GGUF file.
Needs the extra `policy`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from cod_agent.errors import CodError, MissingExtra, UsageError

if TYPE_CHECKING:
    from cod_train.supervised import Batches, Progress, Sample
    from cod_train.transcripts import Kind

REPORT = "warm-start.json"
"""What was learnt from what, beside the weights."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """How a student is taught.

    Raises:
        UsageError: it asks for nothing, or for less than nothing.
    """

    epochs: float = 1.0
    """How often each sequence is seen."""
    batch: int = 32
    """Sequences in each step."""
    rate: float = 1e-5
    """Peak learning rate; it warms up over the first tenth of the steps and falls to a fiftieth along a cosine."""
    budget: int = 4096
    """Padded tokens in one forward pass: what bounds memory."""
    seed: int = 0
    """Of the order of the sequences."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "rate", "budget"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}: give more than 0")


@dataclass(frozen=True, slots=True)
class Taught:
    """What came of a warm start."""

    sequences: int
    targets: int
    """Tokens of answers in them."""
    left_out: dict[str, int]
    """Episodes, calls and sequences that were not learnt from, by reason."""
    steps: int
    loss: float
    """Mean cross-entropy of the last step, in nats a target."""


def warm_start(
    base: str | Path,
    databases: Sequence[str | Path],
    out: Path,
    *,
    lesson: Lesson | None = None,
    kinds: Sequence[Kind] = ("solve", "update"),
    min_reward: float | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Taught:
    """Teach `base` what the recorded answers say and write the result to `out`.

    Stopped at any time, the same call goes on from `out`/checkpoint.pt, to the same weights.

    Args:
        base: a shipped policy's name or a Hugging Face directory.
        databases: run databases; see `cod_train.transcripts.read_transcripts` for `kinds` and `min_reward`.
        report: called after each step, and once on going on.

    Raises:
        UsageError: no such base, nothing to learn from, or `out` holds the base or another run's checkpoint.
        StoreError: a file is no run database.
    """
    from cod_train.supervised import Schedule, train
    from cod_train.transcripts import Chat, read_transcripts

    lesson, folder = lesson or Lesson(), _folder(base)
    if out.resolve() == folder.resolve():
        raise UsageError(f"{out} is the base itself: choose another folder for the result")
    model, tokenizer = _load(folder)
    chat = Chat(tokenizer, _ends(model, tokenizer))
    transcripts, left_out = read_transcripts(databases, kinds=kinds, min_reward=min_reward)
    samples = _fitting([s for t in transcripts for s in chat.samples(t, left_out)], model, left_out)
    if not samples:
        raise UsageError(f"nothing to learn from in {', '.join(map(str, databases))}: {_listed(left_out)}")
    steps = max(1, round(lesson.epochs * len(samples) / lesson.batch))
    out.mkdir(parents=True, exist_ok=True)
    end = train(
        model,
        lambda step: _batches(samples, lesson, step),
        Schedule(steps, lesson.rate, max(1, steps // 10)),
        out / "checkpoint.pt",
        made_by={"base": str(base), "samples": _digest(samples), **asdict(lesson)},
        report=report,
        every=max(1, steps // 20),
    )
    _save(model, tokenizer, folder, out)
    taught = Taught(len(samples), sum(len(s.targets) for s in samples), dict(left_out), steps, end.loss)
    chosen = {"databases": [str(path) for path in databases], "kinds": list(kinds), "min_reward": min_reward}
    said = {"base": str(base), **chosen, **asdict(lesson), **asdict(taught)}
    (out / REPORT).write_text(json.dumps(said, indent=2) + "\n")
    return taught


# ---- the student ----


def _folder(base: str | Path) -> Path:
    from cod_agent.policies import POLICIES, folder_of

    folder = folder_of(str(base)) if str(base) in POLICIES else Path(base)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{base} is no base: give a Hugging Face directory (with config.json) or one of {', '.join(POLICIES)}"
        )
    return folder


def _load(folder: Path) -> tuple[Any, Any]:
    """Model in float32, on the GPU if there is one, and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer. The tokenizer's is not always among those that a chat model says: its turns may end otherwise."""
    declared = model.generation_config.eos_token_id
    said = declared if isinstance(declared, list) else [declared]
    return {token for token in (*said, tokenizer.eos_token_id) if token is not None}


def _save(model: Any, tokenizer: Any, base: Path, out: Path) -> None:
    """As the base was: in its precision, and with a GGUF file if it speaks like the shipped policies."""
    from transformers import AutoConfig

    from cod_train.tiny.export import save_policy
    from cod_train.tiny.tokenizer import build_tokenizer, vocabulary_of

    words = build_tokenizer(vocabulary_of(tokenizer))
    if model.config.model_type == "llama" and tokenizer.get_vocab() == words.get_vocab():
        save_policy(model.cpu(), tokenizer, out)
        return
    model.to(AutoConfig.from_pretrained(base, local_files_only=True).dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)


# ---- the lessons ----


def _fitting(samples: list[Sample], model: Any, left_out: Counter[str]) -> list[Sample]:
    """Those the model has positions for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    fitting = [sample for sample in samples if len(sample.ids) <= longest]
    if len(fitting) < len(samples):
        left_out[f"sequences over the base's {longest} tokens"] += len(samples) - len(fitting)
    return fitting


def _batches(samples: Sequence[Sample], lesson: Lesson, step: int) -> Batches:
    """The sequences of a step: one epoch in random order after another, `batch` at a time."""
    from cod_train.supervised import bucketed

    first = step * lesson.batch
    where = (divmod(i, len(samples)) for i in range(first, first + lesson.batch))
    picked = [samples[_order(lesson.seed, epoch, len(samples))[at]] for epoch, at in where]
    said = float(sum(len(sample.targets) for sample in picked))
    return [(group, said) for group in bucketed(picked, lesson.budget)]


@lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return order


def _digest(samples: Sequence[Sample]) -> str:
    """Names what is learnt, so that a checkpoint is not gone on with on something else."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(json.dumps((sample.ids, sample.targets)).encode())
    return hashed.hexdigest()


def _listed(left_out: Counter[str] | dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "no episodes"


# ---- the command ----

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    databases: Annotated[list[Path], typer.Argument(metavar="DB...", help="Run databases a teacher lived in.")],
    out: Annotated[Path, typer.Option(help="Folder of the result; its checkpoint lies here too.")],
    base: Annotated[str, typer.Option(help="A shipped policy's name, or a Hugging Face directory.")],
    min_reward: Annotated[float | None, typer.Option(help="Learn only from what earned this much.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only one kind of episode: solve or update.")] = None,
    epochs: Annotated[float, typer.Option(help="How often each sequence is seen.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Sequences in each step.")] = 32,
    rate: Annotated[float, typer.Option(help="Peak learning rate; the shipped policies learn well at 1e-3.")] = 1e-5,
    budget: Annotated[int, typer.Option(help="Padded tokens in one forward pass: bounds the memory.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
) -> None:
    """Teach a base what the answers recorded in run databases say. Stopped, it goes on where it was.

    Example: python -m cod_train.warm_start teacher.db --base naive-base --out started --min-reward 1 --rate 1e-3
    """
    from cod_agent.cli.output import Progress as Bar

    if kind not in (None, "solve", "update"):
        raise UsageError(f"--kind is {kind!r}: give solve or update, or leave it out for both")
    kinds: tuple[Any, ...] = (kind,) if kind else ("solve", "update")
    lesson = Lesson(epochs, batch, rate, budget, seed)
    with contextlib.ExitStack() as stack:
        bar: Bar | None = None
        done = 0

        def shown(progress: Progress) -> None:
            nonlocal bar, done
            bar = bar or stack.enter_context(Bar(progress.steps, "steps"))
            for _ in range(progress.step - done):
                bar.step(f"loss {progress.loss:.3f}")
            done = progress.step

        taught = warm_start(base, databases, out, lesson=lesson, kinds=kinds, min_reward=min_reward, report=shown)
    typer.echo(f"{taught.sequences} sequences with {taught.targets} target tokens, {taught.steps} steps.")
    typer.echo(f"Left out: {_listed(taught.left_out) if taught.left_out else 'nothing'}.")
    typer.echo(
        f"Loss at the end {taught.loss:.3f} nats a token. The model lies in {out}; {out / REPORT} says how it was made."
    )


def main() -> None:
    """Run, with errors as one sentence."""
    try:
        app(prog_name="python -m cod_train.warm_start")
    except CodError as error:
        _fail(error)
    except ImportError as error:
        _fail(MissingExtra(f"a warm start ({error.name})", "policy"))


def _fail(error: CodError) -> None:
    typer.echo(f"Error: {error}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
