"""Longer and larger than trained: `python experiments/longer.py [--fast]`.

Base and trained policies, both of which know packs of 4 on maps of 3x3 and 4x4, in packs of 8 and 16, on maps of 5x5 and 6x6, and in a
Ralph loop (one task lived again and again).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import typer

NAME = "longer"
WORLDS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "trained on": ("packs of 4, maps of 4x4", "frozen-lake:small", 4, ()),
    "eight": ("packs of 8", "frozen-lake:small", 8, ()),
    "sixteen": ("packs of 16", "frozen-lake:small", 16, ()),
    "5x5": ("maps of 5x5", "frozen-lake:5x5", 4, ()),
    "6x6": ("maps of 6x6", "frozen-lake:6x6", 4, ()),
    "ralph": ("one task 8 times (Ralph loop)", "frozen-lake:small", 8, ("--packing", "ralph-sample")),
}
PLAYER = "scripted:perfect"


def main(
    out: Annotated[Path, typer.Option(help="Where evaluations go.")] = Path("runs/longer"),
    models: Annotated[
        str, typer.Option(help="Shipped policies or folders, commas between.")
    ] = "embedded-base,embedded",
    tasks: Annotated[
        int, typer.Option(help="Lived by each model in each world: the packs are as many as that makes.")
    ] = 1024,
    fast: Annotated[bool, typer.Option("--fast", help="256 tasks.")] = False,
) -> None:
    """Example: python experiments/longer.py --models embedded-base,embedded"""
    name = NAME
    if fast:
        name, out, tasks = f"{NAME}{lab.FAST}", out.with_name("longer-fast"), 256
    played = {lab.called(model): model if "/" not in model else Path(model) for model in models.split(",")} | {
        PLAYER: PLAYER
    }

    def measured(what: str, model: str | Path, key: str) -> lab.Found:
        _, world, size, more = WORLDS[key]
        words = (
            "--packs",
            tasks // size,
            "--pack-size",
            size,
            "--controls",
            "no-context" if model != PLAYER else "memoryless",
        )
        found = lab.evaluate(out / f"{key}-{what.replace(':', '-')}", model, *words, *more, world=world)
        return {"model": what, "world": key, "outcomes": found["outcomes"], "calls": found["calls"]}

    runs = lab.at_once([partial(measured, what, model, key) for key in WORLDS for what, model in played.items()])
    found = {"models": list(played), "tasks": tasks, "runs": runs}
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def tables(found: lab.Found) -> dict[str, str]:
    """`worlds`: first and last position with and without context; `NAME` of each long world: every position."""
    head = ["", "player", "first task", "last task", "all", "all, without context"]
    rows = []
    for key, (told, *_) in WORLDS.items():
        for run in (run for run in found["runs"] if run["world"] == key):
            words, bare = run["outcomes"]["with context"], _bare(run)
            by_position = lab.cells(words)
            rows.append(
                [told, f"`{run['model']}`", by_position[0], by_position[-2], by_position[-1], lab.cells(bare)[-1]]
            )
            told = ""
    made = {"worlds": lab.table(head, rows)}
    for key in ("eight", "sixteen", "ralph"):
        size = WORLDS[key][2]
        runs = [run for run in found["runs"] if run["world"] == key]
        lines = [[f"`{run['model']}`", *_means(run["outcomes"]["with context"])] for run in runs]
        made[key] = lab.table(["task", *(str(at + 1) for at in range(size))], lines)
    return made


def draw(found: lab.Found, path: Path) -> None:
    """Reward by position in the long worlds."""
    from figures import COLORS, figure, finish, keep, points

    shown = ("eight", "sixteen", "ralph")
    made, axes = figure(len(shown))
    for panel, key in zip(axes, shown, strict=True):
        for color, run in zip(COLORS, (run for run in found["runs"] if run["world"] == key), strict=False):
            points(panel, run["outcomes"]["with context"], run["model"], color=color)
            bare = "scripted:memoryless" if run["model"] == PLAYER else f"{run['model']}, without context"
            points(panel, _bare(run), bare, color=color, style=":")
        finish(panel, WORLDS[key][0], "task", "mean reward")
    keep(made, path)


def _bare(run: lab.Found) -> str:
    """The lane beside it: without context, or the player that takes no notes."""
    return str(next(words for lane, words in run["outcomes"].items() if lane != "with context"))


def _means(words: str) -> list[str]:
    return [lab.spelt(float(mean), None, None) for mean in np.nanmean(lab.rewards(words), axis=0)]


if __name__ == "__main__":
    typer.run(main)
