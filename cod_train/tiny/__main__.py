"""`python -m cod_train.tiny`: clone, adopt, evaluate and export the tiny policies."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cod_agent.errors import MissingExtra, UnknownName, UsageError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(stderr=True)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face directory, as `clone` writes it.")]

# Large blocks stay with the process: glibc would hand each activation back to the system and fault it in again.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


@app.command("clone")
def clone_command(
    out: Annotated[Path, typer.Option(help="Folder of the policy; its checkpoint lies here too.")],
    policy: Annotated[
        str, typer.Option(help="cloned, novice, embedded-base, naive-base, mixed-begun, mixed-base or mixed-cloned.")
    ] = "cloned",
    seed: Annotated[int, typer.Option(help="Of the first weights and of the lives.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Start from this policy instead of the shipped one.")] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    packs: Annotated[int, typer.Option(help="Packs of the measurement on the card; 0 skips it.")] = 512,
    threads: Annotated[int, typer.Option(help="Of torch; more than one seldom helps a model this small.")] = 1,
) -> None:
    """Make a policy: train (or go on), export, measure, write the card.

    Example: python -m cod_train.tiny clone --policy cloned --out cloned --seed 0
    """
    from dataclasses import replace

    from cod_agent.policies import folder_of
    from cod_train.tiny import card, clone, tokenizer

    if policy not in clone.RECIPES:
        raise UnknownName.among("policy", policy, list(clone.RECIPES))
    recipe = clone.RECIPES[policy]
    recipe = replace(recipe, steps=steps, stop=None) if steps else recipe
    _prepare(threads)
    out.mkdir(parents=True, exist_ok=True)
    words = tokenizer.build_tokenizer(recipe.vocabulary)
    model = _begun(start or folder_of(recipe.start)) if recipe.start else None
    with _bar("loss", recipe.stop or recipe.steps) as bar:
        model, progress = clone.clone(
            recipe,
            words,
            out / "checkpoint.pt",
            seed=seed,
            model=model,
            report=lambda p: bar.update(
                bar.task_ids[0], completed=p.step, note=f"loss {p.loss:.3f}, {p.tokens / p.seconds:,.0f} tokens/s"
            ),
        )
    _finish(policy, card.cloned(policy, recipe, progress, seed=seed), model, words, out, packs)


@app.command()
def adopt(
    training: Annotated[Path, typer.Argument(metavar="DIR", help="What `cod train --out` wrote, of a tiny policy.")],
    out: Annotated[Path, typer.Option(help="Folder of the policy.")],
    policy: Annotated[str, typer.Option(help="Its name.")] = "embedded",
    packs: Annotated[int, typer.Option(help="Packs of the measurement on the card; 0 skips it.")] = 512,
) -> None:
    """Make a policy of what a training left: export, measure, write the card.

    Example: python -m cod_train.tiny adopt trained --policy embedded --out embedded
    """
    from cod_train.tiny import card, tokenizer

    made = card.trained(training)
    _prepare(1)
    out.mkdir(parents=True, exist_ok=True)
    model, spoken = _load(training / "model")
    words = tokenizer.build_tokenizer(tokenizer.vocabulary_of(spoken))
    _finish(policy, made, model, words, out, packs)


@app.command()
def evaluate(
    folder: Folder,
    world: Annotated[str, typer.Option(help="WORLD:PRESET.")] = "frozen-lake:small",
    packs: Annotated[int, typer.Option(help="Packs of four; the control takes twice as many.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the packs and of sampling.")] = 0,
) -> None:
    """Measure reward by position on the eval split, with notes, without, and with notes at temperature 0.1.

    Example: python -m cod_train.tiny evaluate embedded --packs 512 --seed 0
    """
    from rich.table import Table

    _prepare(1)
    result = _measure(folder, world, packs, seed)
    table = Table("", *(f"pos {p.position}" for p in result.notes), title=f"{folder} on {world}")
    rows = {"with notes": result.notes, "no-context": result.control, "with notes, cold": result.sharp}
    for name, row in rows.items():
        table.add_row(f"{name}, {row[0].n} packs", *(f"{p.mean:.3f} ({p.low:.3f}, {p.high:.3f})" for p in row))
    Console().print(table)


@app.command()
def export(folder: Folder) -> None:
    """Write `model.gguf` from the Hugging Face directory DIR, for llama.cpp.

    Example: python -m cod_train.tiny export embedded
    """
    from cod_train.gguf_file import write_gguf

    _check(folder)
    write_gguf(folder, folder / "model.gguf")
    console.print(f"wrote {folder / 'model.gguf'}")


def _finish(policy: str, made: dict[str, str], model: Any, words: Any, out: Path, packs: int) -> None:
    """Export, measure what ships (the weights as they lie in the folder, rounded to fp16), and write the card."""
    from cod_train.tiny import card, export, tokenizer

    export.save_policy(model, words, out)
    worlds = tokenizer.vocabulary_of(words).worlds
    measured = [_measure(out, world, packs, 0) for world in worlds] if packs else []
    (out / "CARD.md").write_text(card.card(policy, made, model=model, worlds=worlds, measured=measured))
    console.print(f"{policy} lies in {out}; its card is {out / 'CARD.md'}")


def _prepare(threads: int) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # files this small load at once
    torch.set_num_threads(threads)


def _check(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds no policy: give a folder that `python -m cod_train.tiny clone` wrote")


def _load(folder: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer of a Hugging Face directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True), tokenizer


def _begun(folder: Path) -> Any:
    """The model a policy starts from: unrounded, where the checkpoint of its cloning still lies beside it."""
    import torch

    model = _load(folder)[0]
    if (folder / "checkpoint.pt").is_file():
        model.load_state_dict(torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
    return model


def _measure(folder: Path, world: str, packs: int, seed: int) -> Any:
    from cod_train.tiny.card import SHARP, Measured
    from cod_train.tiny.evaluate import by_position, rewards

    model, tokenizer = _load(folder)
    with console.status(f"measuring {folder} on {world}"):
        notes = by_position(rewards(model, tokenizer, world=world, packs=packs, seed=seed))
        control = by_position(rewards(model, tokenizer, world=world, packs=2 * packs, seed=seed, remember=False))
        sharp = by_position(rewards(model, tokenizer, world=world, packs=packs, seed=seed, temperature=SHARP))
    return Measured(world, seed, notes, control, sharp)


def _bar(note: str, total: int) -> Bar:
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    bar = Bar(*columns, console=console)
    bar.add_task("", total=total, note=note)
    return bar


def main() -> None:
    """Run, with errors of use as one sentence."""
    if sys.platform == "linux" and not _MALLOC.keys() & os.environ.keys():
        # glibc reads these when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "cod_train.tiny", *sys.argv[1:]], {**os.environ, **_MALLOC})
    try:
        app()
    except UsageError as error:
        _complain(error)
    except ImportError as error:
        _complain(MissingExtra(f"making policies ({error.name})", "policy"))


def _complain(error: UsageError) -> None:
    console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
