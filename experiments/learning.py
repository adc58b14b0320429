"""From a base to the best tiny policy: `python experiments/learning.py [--fast]`.

Each base is trained with several seeds, and base and trained policies are measured on the same held-out packs, with and without
context, beside the scripted players. The best of all, on packs of its own, is what `embedded` ships.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import typer

NAME = "learning"


@dataclass(frozen=True, slots=True)
class Way:
    """How one base is trained."""

    steps: int
    rate: float


WAYS = {
    "embedded-base": Way(60, 7e-4),
    "novice": Way(40, 7e-4),
    "naive-base": Way(30, 2e-4),
    "cloned": Way(40, 3e-4),
}
PLAYER = "scripted:perfect"
CHOICE_SEED = 3
"""The best is chosen on packs of its own, so that those of the tables do not choose what they measure."""


def main(
    out: Annotated[Path, typer.Option(help="Where trainings and evaluations go.")] = Path("runs/learning"),
    world: Annotated[str, typer.Option()] = "frozen-lake:small",
    bases: Annotated[str, typer.Option(help="Commas between.")] = ",".join(WAYS),
    seeds: Annotated[int, typer.Option()] = 3,
    packs: Annotated[int, typer.Option(help="Held-out packs.")] = 1024,
    fast: Annotated[bool, typer.Option("--fast", help="One base, one seed, 20 steps, 128 packs.")] = False,
) -> None:
    """Example: python experiments/learning.py --seeds 3 --packs 1024"""
    name, names = NAME, bases.split(",")
    ways = dict(WAYS)
    if fast:
        name, out, seeds, packs, names = f"{NAME}{lab.FAST}", out.with_name("learning-fast"), 1, 128, ["embedded-base"]
        ways["embedded-base"] = Way(20, 7e-4)
    models: dict[str, str | Path] = {base: base for base in names}

    def run(base: str, seed: int) -> lab.Found:
        folder, way = out / f"{base}-{seed}", ways[base]
        words = ("--env", world, "--base", models[base], "--steps", way.steps, "--rate", way.rate, "--seed", seed)
        more = ("--save-every", 20, "cod.keep_rollouts=false", "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine")
        trained = lab.train(folder, *words, *more)
        return {
            "base": base,
            "seed": seed,
            "curve": trained.json(),
            "measured": measured(f"{base}-{seed}", trained.model),
        }

    def measured(what: str, model: str | Path) -> lab.Found:
        control = "memoryless" if model == PLAYER else "no-context"
        folder = out / f"eval-{what.replace(':', '-')}"
        return lab.evaluate(folder, model, "--packs", packs, "--controls", control, world=world)

    def chosen(what: str, model: str | Path) -> float:
        words = ("--packs", packs // 4, "--seed", CHOICE_SEED, "--controls", "none")
        found = lab.evaluate(out / f"choice-{what}", model, *words, world=world)
        return round(lab.mean_reward(found["outcomes"]["with context"]), 4)

    runs = lab.at_once([partial(run, base, seed) for seed in range(seeds) for base in names])
    candidates = {f"{run['base']}-{run['seed']}": out / f"{run['base']}-{run['seed']}" / "model" for run in runs}
    choice = lab.at_once([partial(chosen, what, model) for what, model in {**models, **candidates}.items()])
    starts = lab.at_once([partial(measured, what, model) for what, model in {**models, PLAYER: PLAYER}.items()])
    found = {
        "world": world,
        "seeds": seeds,
        "packs": packs,
        "ways": {base: {"steps": ways[base].steps, "rate": ways[base].rate} for base in names},
        "starts": dict(zip([*models, PLAYER], starts, strict=True)),
        "runs": runs,
        "choice": dict(zip([*models, *candidates], choice, strict=True)),
    }
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def tables(found: lab.Found) -> dict[str, str]:
    """`positions` and `no-context`: reward by position of every base and trained policy; `seeds`: before and after, over seeds;
    `choice`: which was best where the best was chosen."""
    head = ["", *(f"task {at + 1}" for at in range(4)), "all"]
    rows = []
    for start, one in found["starts"].items():
        if start == PLAYER:
            continue
        rows.append([f"**`{start}`**", *lab.cells(one["outcomes"]["with context"])])
        for run in (run for run in found["runs"] if run["base"] == start):
            rows.append([f"trained, seed {run['seed']}", *lab.cells(run["measured"]["outcomes"]["with context"])])
    player = found["starts"][PLAYER]["outcomes"]
    rows += [
        ["player `perfect`", *lab.cells(player["with context"])],
        ["player `memoryless`", *lab.cells(player["memoryless"])],
    ]
    bare = [
        [f"`{start}`", *lab.cells(one["outcomes"]["no-context"])]
        for start, one in found["starts"].items()
        if start != PLAYER
    ]
    bare += [
        [f"`{run['base']}`, trained, seed {run['seed']}", *lab.cells(run["measured"]["outcomes"]["no-context"])]
        for run in found["runs"]
    ]
    summed = [_summed(found, base) for base in found["ways"]]
    over = ["base", "steps", "before", "after, over seeds", "last task, over seeds", "the same without context"]
    ranked = sorted(found["choice"].items(), key=lambda item: -item[1])
    best = [[f"`{what}`" if what in found["starts"] else what, f"{mean:.3f}"] for what, mean in ranked]
    return {
        "positions": lab.table(head, rows),
        "no-context": lab.table(head, bare),
        "seeds": lab.table(over, summed),
        "choice": lab.table(["", "mean reward, packs of the choice"], best),
    }


def _summed(found: lab.Found, base: str) -> list[str]:
    runs = [run["measured"]["outcomes"] for run in found["runs"] if run["base"] == base]
    means = [lab.mean_reward(one["with context"]) for one in runs]
    lasts, bares = (
        [float(np.nanmean(lab.rewards(one[lane])[:, -1])) for one in runs] for lane in ("with context", "no-context")
    )
    before = lab.cells(found["starts"][base]["outcomes"]["with context"])[-1]
    over = [lab.spelt_over_seeds(values) for values in (means, lasts, bares)]
    return [f"`{base}`", str(found["ways"][base]["steps"]), before, *over]


def draw(found: lab.Found, path: Path) -> None:
    """Left: training reward by step. Right: reward by position of the bases and their first trained policies."""
    from figures import COLORS, band, figure, finish, keep, points, smooth

    made, (left, right) = figure(2)
    for color, base in zip(COLORS, found["ways"], strict=False):
        runs = [run for run in found["runs"] if run["base"] == base]
        curves = np.array([run["curve"]["reward"] for run in runs])
        band(left, smooth(curves, 5), base, start=5, color=color)
        points(right, found["starts"][base]["outcomes"]["with context"], f"{base}, before", color=color, style=":o")
        together = " ".join(run["measured"]["outcomes"]["with context"] for run in runs)
        points(right, together, f"{base}, trained", color=color)
    finish(left, "Training", "step", "mean reward of the last 5 steps")
    finish(right, "Held-out packs", "task", "mean reward")
    right.set_xticks(range(1, 5))
    keep(made, path)


if __name__ == "__main__":
    typer.run(main)
