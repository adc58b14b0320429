"""What segment credit is good for: `python experiments/ablation.py [--fast]`.

The same base, world, budget and seeds; one dial is different in each arm. A run is a training of some minutes in one process.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import typer

NAME = "ablation"
LEVEL = 0.75
WIDTH = 5
"""Steps over which a training's reward is averaged: a single step's has a standard error of .04."""

_LOSS = "actor_rollout_ref.actor.policy_loss"
_WEIGHTS = (f"+{_LOSS}.weight=importance", f"{_LOSS}._target_=cod_train.policy_loss.verl_options")
ARMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "segment": ("segment credit, as published", ()),
    "trajectory": ("one advantage for a whole rollout", ("cod.credit.kind=trajectory",)),
    "solve": ("segment credit, updates worth 0", ("cod.credit.kind=solve",)),
    "beside": ("segment credit, an update's own reward beside the mean", ("cod.credit.own=beside",)),
    "red": ("segment credit, adaptive RED", ("cod.credit.reweight=exact",)),
    "weights": ("segment credit, importance weights", _WEIGHTS),
    "weights-red": ("segment credit, importance weights and adaptive RED", (*_WEIGHTS, "cod.credit.reweight=exact")),
}


def main(
    out: Annotated[Path, typer.Option(help="Where trainings and evaluations go.")] = Path("runs/ablation"),
    world: Annotated[str, typer.Option()] = "frozen-lake:tiny",
    base: Annotated[str, typer.Option()] = "embedded-base",
    seeds: Annotated[int, typer.Option()] = 5,
    steps: Annotated[int, typer.Option()] = 40,
    packs: Annotated[int, typer.Option(help="Held-out packs of each final measurement.")] = 256,
    fast: Annotated[bool, typer.Option("--fast", help="Three arms, two seeds, 12 steps, 64 packs.")] = False,
) -> None:
    """Example: python experiments/ablation.py --seeds 5 --steps 40"""
    name, arms = NAME, list(ARMS)
    if fast:
        name, out, seeds, steps, packs, arms = f"{NAME}{lab.FAST}", out.with_name("ablation-fast"), 2, 12, 64, arms[:3]

    def run(arm: str, seed: int) -> lab.Found:
        folder = out / f"{arm}-{seed}"
        words = ("--env", world, "--base", base, "--steps", steps, "--seed", seed, "--save-every", steps)
        trained = lab.train(folder, *words, "cod.keep_rollouts=false", *ARMS[arm][1])
        measured = lab.evaluate(
            out / f"eval-{arm}-{seed}", trained.model, "--packs", packs, "--controls", "none", world=world
        )
        return {"arm": arm, "seed": seed, "curve": trained.json(), "final": measured["outcomes"]["with context"]}

    # Seed by seed, so that what is there after an interruption is balanced.
    runs = lab.at_once([partial(run, arm, seed) for seed in range(seeds) for arm in arms])
    start = lab.evaluate(out / "eval-base", base, "--packs", packs, "--controls", "none", world=world)
    found = {
        "world": world,
        "base": base,
        "steps": steps,
        "seeds": seeds,
        "packs": packs,
        "start": start["outcomes"]["with context"],
        "runs": runs,
    }
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def reached(rewards: list[float], level: float = LEVEL) -> float:
    """The first step at which the mean reward of the last WIDTH steps is `level`; NaN if none."""
    for at in range(WIDTH, len(rewards) + 1):
        if float(np.mean(rewards[at - WIDTH : at])) >= level:
            return float(at)
    return float("nan")


def tables(found: lab.Found) -> dict[str, str]:
    """`arms`: steps to LEVEL, final reward and its difference to segment credit by arm; `stability`: drift and gradients."""
    finals = {arm: _finals(found, arm) for arm in _arms(found)}
    rows, drifts = [], []
    for arm, by_seed in finals.items():
        curves = [run["curve"] for run in found["runs"] if run["arm"] == arm]
        at = [reached(curve["reward"]) for curve in curves]
        known = [step for step in at if np.isfinite(step)]
        needed = (
            lab.spelt_over_seeds(known, 1) if len(known) == len(at) else f"{len(known)} of {len(at)} runs reached it"
        )
        less = [final - finals["segment"][seed] for seed, final in by_seed.items() if seed in finals["segment"]]
        last = [float(np.mean(curve["reward"][-WIDTH:])) for curve in curves]
        rows.append(
            [
                ARMS[arm][0],
                needed,
                lab.spelt_over_seeds(last),
                lab.spelt_over_seeds(list(by_seed.values())),
                "" if arm == "segment" else lab.spelt_over_seeds(less),
            ]
        )
        worst = [max(abs(value) for value in curve["kl"]) for curve in curves]
        gradients = [max(curve["gradient"]) for curve in curves]
        lowest = [min(value for value in curve["advantage"] if value is not None) for curve in curves]
        drifts.append(
            [
                ARMS[arm][0],
                lab.spelt_over_seeds(worst, 3),
                lab.spelt_over_seeds(gradients, 2),
                lab.spelt_over_seeds(lowest, 3),
            ]
        )
    packs, width = found["packs"], WIDTH
    head = [
        "arm",
        f"steps to {LEVEL}",
        f"training reward, last {width} steps",
        f"{packs} held-out packs",
        "less segment",
    ]
    drifted = ["arm", "largest drift, nats", "largest gradient norm", "lowest token-mean advantage"]
    return {"arms": lab.table(head, rows), "stability": lab.table(drifted, drifts)}


def draw(found: lab.Found, path: Path) -> None:
    """Training reward by step, mean over seeds with its 95 % band, credit left and stability right."""
    from figures import band, figure, finish, keep, smooth

    sides = {
        "Credit": ("segment", "trajectory", "solve", "beside"),
        "Stability": ("segment", "red", "weights", "weights-red"),
    }
    made, axes = figure(len(sides))
    for axis, (title, arms) in zip(axes, sides.items(), strict=True):
        for arm in (arm for arm in arms if arm in _arms(found)):
            curves = np.array([run["curve"]["reward"] for run in found["runs"] if run["arm"] == arm])
            band(axis, smooth(curves, WIDTH), ARMS[arm][0].removeprefix("segment credit, "), start=WIDTH)
        finish(axis, title, "step", f"mean reward of the last {WIDTH} steps")
    keep(made, path)


def _arms(found: lab.Found) -> list[str]:
    return [arm for arm in ARMS if any(run["arm"] == arm for run in found["runs"])]


def _finals(found: lab.Found, arm: str) -> dict[int, float]:
    return {run["seed"]: lab.mean_reward(run["final"]) for run in found["runs"] if run["arm"] == arm}


if __name__ == "__main__":
    typer.run(main)
