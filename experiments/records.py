"""How far recorded lives alone take a policy: `python experiments/records.py [--fast]`.

Agents with the weak base live in packs of the train split, each with a database of its own. Then trainings see nothing but those
files, every rollout once. A training that stops after step n is the one whose staleness limit is n - 1, so one training with
checkpoints says what each limit gives. `rounds` deploys the trained policy again and again. `live` is the trainer's usual way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import typer

NAME = "records"
AGENTS, STEP_PACKS = 8, 8
"""Agents that live each pack, and packs of a step: 64 rollouts, as live."""
ARMS = {
    "group": "records of the base, groups of 8, baseline: the group",
    "leave-one-out": "records of the base, groups of 8, baseline: the others of the group",
    "position": "records of the base, every pack lived once, baseline: the same position in other packs",
    "wide": "records of the base, groups of 8, ratios clipped at a fifth and at five instead of .8 and 1.2",
    "rounds": "four deployments, a quarter of the records each, groups of 8",
    "live": "live",
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What every arm may spend."""

    out: Path
    world: str
    base: str
    packs: int
    """Held-out ones, of each measurement."""
    marks: tuple[int, ...]
    """Steps after which a policy is measured."""

    @property
    def steps(self) -> int:
        return self.marks[-1]


def main(
    out: Annotated[Path, typer.Option(help="Where records, trainings and evaluations go.")] = Path("runs/records"),
    world: Annotated[str, typer.Option()] = "frozen-lake:small",
    base: Annotated[str, typer.Option()] = "embedded-base",
    seeds: Annotated[int, typer.Option()] = 3,
    steps: Annotated[int, typer.Option(help="A multiple of 4: of each arm.")] = 24,
    packs: Annotated[int, typer.Option(help="Held-out packs of each measurement.")] = 256,
    fast: Annotated[bool, typer.Option("--fast", help="One seed, 8 steps, 64 packs.")] = False,
) -> None:
    """Example: python experiments/records.py --seeds 3 --steps 24"""
    name = NAME
    if fast:
        name, out, seeds, steps, packs = f"{NAME}{lab.FAST}", out.with_name("records-fast"), 1, 8, 64
    budget = Budget(out, world, base, packs, (steps // 4, steps // 2, steps))
    arms = {
        "group": _grouped,
        "leave-one-out": _grouped,
        "position": _lone,
        "wide": _wide,
        "rounds": _rounds,
        "live": _live,
    }
    # What several arms train on is recorded before any of them begins.
    lab.at_once([partial(way, budget, seed) for seed in range(seeds) for way in (_shared, _lone_life)])
    runs = lab.at_once([partial(way, budget, arm, seed) for seed in range(seeds) for arm, way in arms.items()])
    start = lab.evaluate(out / "eval-base", base, "--packs", packs, world=world)
    found = {
        "world": world,
        "base": base,
        "seeds": seeds,
        "packs": packs,
        "marks": budget.marks,
        "start": start["outcomes"]["with context"],
        "runs": runs,
    }
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


# ---- the arms ----


def _grouped(budget: Budget, arm: str, seed: int) -> lab.Found:
    """Eight agents live the same packs."""
    return _trained(budget, arm, seed, _shared(budget, seed), (f"cod.credit.baseline={arm}",))


def _wide(budget: Budget, arm: str, seed: int) -> lab.Found:
    """The same records, and a loss that lets the policy move further from them."""
    clip = ("actor_rollout_ref.actor.clip_ratio_low=0.8", "actor_rollout_ref.actor.clip_ratio_high=4.0")
    return _trained(budget, arm, seed, _shared(budget, seed), clip)


def _shared(budget: Budget, seed: int) -> list[Path]:
    return _deployed(budget, f"shared-{seed}", budget.base, seed, budget.steps * STEP_PACKS)


def _lone(budget: Budget, arm: str, seed: int) -> lab.Found:
    """One agent lives as many packs as the eight did together, so that none is lived twice."""
    words = ("--packs", STEP_PACKS * AGENTS, "--group", 1, "cod.credit.baseline=position")
    return _trained(budget, arm, seed, [_lone_life(budget, seed)], words)


def _lone_life(budget: Budget, seed: int) -> Path:
    file, count = budget.out / f"lone-{seed}" / "agent.db", budget.steps * STEP_PACKS * AGENTS
    return lab.live(file, budget.world, budget.base, "--packs", count, "--seed", 1000 + seed)


def _rounds(budget: Budget, arm: str, seed: int) -> lab.Found:
    """Four times: the newest policy is deployed, and trained on what that deployment recorded."""
    quarter, made, before = budget.steps // 4, [], 0
    model: str | Path = budget.base
    rewards: list[lab.Found] = []
    for number in range(4):
        files = _deployed(budget, f"round-{seed}-{number}", model, 100 * (number + 1) + seed, quarter * STEP_PACKS)
        folder = budget.out / f"{arm}-{seed}-{number}"
        trained = lab.train(
            folder, "--from", *files, "--base", model, "--steps", quarter, "--seed", seed, *_common(quarter)
        )
        model, before = trained.model, before + quarter
        made.append(trained.json())
        if before in budget.marks:
            rewards.append(_measured(budget, f"{arm}-{seed}", before, trained.model))
    tokens = [count for curve in made for count in curve["trained_tokens"]]
    return {
        "arm": arm,
        "seed": seed,
        "tokens": tokens,
        "kl": [k for curve in made for k in curve["kl"]],
        "measured": rewards,
    }


def _live(budget: Budget, arm: str, seed: int) -> lab.Found:
    words = ("--env", budget.world, "--base", budget.base, "--steps", budget.steps, "--seed", seed)
    trained = lab.train(budget.out / f"{arm}-{seed}", *words, *_common(budget.marks[0]))
    return _told(budget, arm, seed, trained)


def _deployed(budget: Budget, what: str, model: str | Path, seed: int, packs: int) -> list[Path]:
    """Databases of AGENTS agents that lived the same packs."""
    words = ("--packs", packs, "--seed", 1000 + seed)
    folder = budget.out / what
    return [lab.live(folder / f"{n}.db", budget.world, model, *words, "--agent", f"agent-{n}") for n in range(AGENTS)]


def _trained(budget: Budget, arm: str, seed: int, files: list[Path], words: tuple[object, ...]) -> lab.Found:
    """A training from files and nothing else, as long as they last."""
    more = ("--base", budget.base, "--steps", budget.steps, "--seed", seed, *_common(budget.marks[0]))
    return _told(budget, arm, seed, lab.train(budget.out / f"{arm}-{seed}", "--from", *files, *more, *words))


def _common(every: int) -> tuple[object, ...]:
    return ("--save-every", every, "data.max_staleness=1000", "cod.keep_rollouts=false")


def _told(budget: Budget, arm: str, seed: int, trained: lab.Trained) -> lab.Found:
    curve = trained.json()
    measured = [_measured(budget, f"{arm}-{seed}", mark, trained.at(mark)) for mark in budget.marks]
    return {"arm": arm, "seed": seed, "tokens": curve["trained_tokens"], "kl": curve["kl"], "measured": measured}


def _measured(budget: Budget, what: str, mark: int, model: Path) -> lab.Found:
    found = lab.evaluate(
        budget.out / f"eval-{what}-{mark}", model, "--packs", budget.packs, "--controls", "none", world=budget.world
    )
    return {"step": mark, "outcomes": found["outcomes"]["with context"]}


# ---- what is told ----


def tables(found: lab.Found) -> dict[str, str]:
    """`limits`: mean reward over seeds by arm and staleness limit; `tokens`: what was trained on, and how far weights had moved."""
    before = lab.cells(found["start"])[-1]
    head = ["", *(f"{mark} steps (limit {mark - 1})" for mark in found["marks"])]
    rows, spent = [], []
    for arm, told in ARMS.items():
        runs = [run for run in found["runs"] if run["arm"] == arm]
        if not runs:
            continue
        by_mark = [[_mean(run, mark) for run in runs] for mark in found["marks"]]
        rows.append(
            [told, *(lab.spelt_over_seeds([value for value in values if value is not None]) for values in by_mark)]
        )
        tokens = [sum(run["tokens"]) / 1000 for run in runs]
        drift = [max(abs(value) for value in run["kl"]) for run in runs]
        spent.append([told, lab.spelt_over_seeds(tokens, 0), lab.spelt_over_seeds(drift, 3)])
    limits = lab.table(head, rows) + f"\n\n`{found['base']}` itself: {before}."
    return {"limits": limits, "tokens": lab.table(["", "thousand sampled tokens", "largest drift, nats"], spent)}


def draw(found: lab.Found, path: Path) -> None:
    """Mean reward over the tokens trained on, mean over seeds with its 95 % interval."""
    from figures import COLORS, figure, finish, keep

    made, (axes,) = figure(1)
    base = lab.mean_reward(found["start"])
    for color, arm in zip(COLORS, ARMS, strict=False):
        runs = [run for run in found["runs"] if run["arm"] == arm]
        marks = [mark for mark in found["marks"] if runs and all(_mean(run, mark) is not None for run in runs)]
        tokens = [float(np.mean([sum(run["tokens"][:mark]) for run in runs])) / 1000 for mark in marks]
        made_of = [lab.over_seeds([_mean(run, mark) or 0.0 for run in runs]) for mark in marks]
        means = [base, *(one["mean"] for one in made_of)]
        error = [
            [0.0, *(one["mean"] - one[side] if one[side] is not None else 0.0 for one in made_of)]
            for side in ("low", "high")
        ]
        axes.errorbar(
            [0.0, *tokens], means, yerr=[error[0], [-value for value in error[1]]], color=color, marker="o", label=arm
        )
    finish(axes, "From records, and live", "thousand sampled tokens trained on", "mean reward on held-out packs")
    keep(made, path)


def _mean(run: lab.Found, mark: int) -> float | None:
    for one in run["measured"]:
        if one["step"] == mark:
            return lab.mean_reward(one["outcomes"])
    return None


if __name__ == "__main__":
    typer.run(main)
