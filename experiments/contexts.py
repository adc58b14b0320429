"""What the contexts say: `python experiments/contexts.py [--fast]`.

Each model lives the same held-out packs. Every context it wrote is read from the record and judged against the hidden mapping,
which only the world knows, and against what the agent could have known by then. Numbers are kept pack by pack, so that all tables
can be made again from what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import stories
import typer

from cod_agent.evaluation.statistics import Interval, Rewards, curve
from cod_agent.policies import POLICIES

NAME = "contexts"
MOVES = 4
TOLD = 2
"""Packs told as stories: the first ones."""

COUNTS = {
    "characters": "length of the context, `null` being 4",
    "facts": "distinct facts in it",
    "right": "those that are right",
    "learnt": "what `perfect` would have noted had it seen the same",
    "held": "how much of that stands in the context",
    "refused": "1 if the update after this task was refused",
    "reward": "of the task itself",
}
"""What is counted in each pack after each task; `reward` has one task more, the last, after which nothing is written."""


def main(
    out: Annotated[Path, typer.Option(help="Where evaluations go.")] = Path("runs/contexts"),
    world: Annotated[str, typer.Option(help="A frozen lake.")] = "frozen-lake:small",
    packs: Annotated[int, typer.Option(help="Held-out packs.")] = 256,
    models: Annotated[
        str, typer.Option(help="Policies, or folders with model.gguf; commas between.")
    ] = "embedded-base,runs/learning/embedded-base-0/model",
    fast: Annotated[bool, typer.Option("--fast", help="64 packs.")] = False,
) -> None:
    """Example: python experiments/contexts.py --models embedded-base,runs/learning/embedded-base-0/model"""
    name = NAME
    if fast:
        name, out, packs, models = f"{NAME}{lab.FAST}", out.with_name("contexts-fast"), 64, "embedded-base,embedded"
    named = {lab.called(model): model for model in models.split(",")}
    if len(named) < len(models.split(",")):
        raise typer.BadParameter("two models of the same name", param_hint="--models")

    def run(called: str, model: str) -> list[stories.Life]:
        folder = out / f"{world}-{called}-{packs}".replace(":", "-")
        which = model if model in POLICIES or ":" in model else Path(model)
        lab.evaluate(folder, which, "--packs", packs, "--controls", "none", world=world)
        return stories.lives(folder / "runs.db")

    jobs = [partial(run, called, model) for called, model in named.items()]
    lived = dict(zip(named, lab.at_once(jobs), strict=True))
    found = {
        "world": world,
        "packs": packs,
        "counted": COUNTS,
        "models": {called: counted(lives) for called, lives in lived.items()},
        "stories": [stories.kept(life, called) for life, called in _first(lived)],
    }
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def _first(lived: dict[str, list[stories.Life]]) -> list[tuple[stories.Life, str]]:
    """The first TOLD packs, each as the first model lived it and as the last one did."""
    ends = dict.fromkeys([next(iter(lived)), list(lived)[-1]])
    return [(lived[called][at], called) for at in range(TOLD) for called in ends if at < len(lived[called])]


# ---- counting ----


def counted(lives: Sequence[stories.Life]) -> dict[str, str]:
    """COUNTS of a model's packs, a word such as 0,1,3 for each pack and a number for each task; - where there is none."""
    words: dict[str, list[str]] = {name: [] for name in COUNTS}
    for life in lives:
        of_pack = _numbers(life)
        for name in COUNTS:
            words[name].append(",".join("-" if value is None else f"{value:g}" for value in of_pack[name]))
    return {name: " ".join(of_packs) for name, of_packs in words.items()}


def _numbers(life: stories.Life) -> dict[str, list[float | None]]:
    hidden = set(life.mapping.items())
    made: dict[str, list[float | None]] = {name: [] for name in COUNTS}
    made["reward"] = [chapter.outcome.reward for chapter in life.chapters]
    for chapter, learnt in zip(life.chapters[:-1], stories.learnt(life.chapters[:-1]), strict=True):
        context = chapter.outcome.context
        facts = stories.facts(context)
        of_context = {
            "characters": len(context),
            "facts": len(facts),
            "right": len(facts & hidden),
            "learnt": len(learnt),
            "held": len(facts & learnt),
            "refused": chapter.outcome.update == "kept",
        }
        for name, value in of_context.items():
            # No update at all: the task was lost to the infrastructure.
            made[name].append(None if chapter.outcome.update == "none" else float(value))
    return made


def numbers(words: str) -> Rewards:
    """What `counted` wrote, as an array [packs, positions]."""
    return np.array([[np.nan if one == "-" else float(one) for one in word.split(",")] for word in words.split()])


# ---- means over packs ----


def amount(values: Rewards) -> Interval:
    """Mean of everything in `values` [packs, any]; the interval is over packs."""
    return curve(values).overall


def share(values: Rewards) -> Interval:
    """The same for values of 0 and 1: where all are alike, the exact interval for that many packs."""
    made = amount(values)
    if made.mean not in (0.0, 1.0):
        return made
    return curve(np.where(np.isfinite(values).any(1, keepdims=True), made.mean, np.nan)).points[0]


def of(part: Rewards, whole: Rewards) -> Rewards:
    """`part` of `whole` things in each pack, as 0 and 1: [packs, most things]."""
    at = np.arange(max(1, int(np.nanmax(whole))))
    return np.where(at < whole[:, None], (at < part[:, None]).astype(float), np.nan)


def next_rewards(counts: dict[str, str], right: int) -> Rewards:
    """Rewards of the tasks that started from a context with so many right facts, NaN for all others.

    A map owes nothing to what was before it, and a solve episode sees nothing else of the past than the context. So what is not alike
    between these groups is in the contexts: the right facts, and the wrong ones beside them.
    """
    return np.where(numbers(counts["right"]) == right, numbers(counts["reward"])[:, 1:], np.nan)


# ---- what is told ----


def tables(found: lab.Found) -> dict[str, str]:
    """`notes`: what stands in the contexts; `learnt`: of what could stand there; `reward`: what it is worth; and the stories."""
    told = {stories.called(story): stories.told(story) for story in found["stories"]}
    return {
        "notes": _notes(found),
        "learnt": _learnt(found),
        "reward": _reward(found),
        "stories": stories.ABOUT,
        **told,
    }


def _notes(found: lab.Found) -> str:
    rows = []
    for called, counts in found["models"].items():
        characters, facts, right = (numbers(counts[name]) for name in ("characters", "facts", "right"))
        for at in range(facts.shape[1]):
            column = slice(at, at + 1)
            cells = [
                _spelt(amount(characters[:, column]), 0),
                _spelt(amount(facts[:, column])),
                _spelt(amount(right[:, column])),
                _spelt(share(of(right[:, at], facts[:, at]))),
                _spelt(share(np.where(np.isfinite(facts[:, column]), facts[:, column] == 0, np.nan))),
            ]
            rows.append([f"`{called}`" if at == 0 else "", f"task {at + 1}", *cells])
    head = [
        "",
        "after",
        "characters",
        "facts",
        "right facts",
        "share of its facts that are right",
        "contexts without a fact",
    ]
    return lab.table(head, rows)


def _learnt(found: lab.Found) -> str:
    rows = []
    for called, counts in found["models"].items():
        learnt, held, refused = (numbers(counts[name]) for name in ("learnt", "held", "refused"))
        guessed = numbers(counts["facts"]) - held
        for at in range(learnt.shape[1]):
            column = slice(at, at + 1)
            cells = [
                _spelt(amount(learnt[:, column])),
                _spelt(amount(held[:, column])),
                _spelt(share(of(held[:, at], learnt[:, at]))),
                _spelt(amount(guessed[:, column])),
                _spelt(share(refused[:, column])),
            ]
            rows.append([f"`{called}`" if at == 0 else "", f"task {at + 1}", *cells])
    head = [
        "",
        "after",
        "facts it could know",
        "of them in the context",
        "share",
        "facts it could not know: wrong or guessed",
        "updates refused",
    ]
    said = (
        "What it could know is what `perfect` would have noted, which writes the fourth fact too once three are known."
    )
    return f"{lab.table(head, rows)}\n\n{said}"


def _reward(found: lab.Found) -> str:
    rows = []
    for called, counts in found["models"].items():
        groups = [next_rewards(counts, right) for right in range(MOVES + 1)]
        cells = [f"{_spelt(share(group))} ({int(np.isfinite(group).sum())})" for group in groups]
        rows.append([f"`{called}`", *cells])
    return lab.table(["reward of the next task (tasks)", *(_plural(right) for right in range(MOVES + 1))], rows)


def _plural(right: int) -> str:
    return f"{right or 'no'} right fact{'' if right == 1 else 's'}"


def _spelt(made: Interval, digits: int = 2) -> str:
    return lab.spelt(made.mean, made.low, made.high, digits)


def draw(found: lab.Found, path: Path) -> None:
    """Left: right facts by position, dotted what could be known. Right: reward of the next task by right facts."""
    from figures import COLORS, figure, finish, keep, points

    made, (left, right) = figure(2)
    for color, (called, counts) in zip(COLORS, found["models"].items(), strict=False):
        points(left, counts["right"].replace(",", ""), called, color=color)
        learnt = np.nanmean(numbers(counts["learnt"]), 0)
        left.plot(np.arange(1, 1 + len(learnt)), learnt, ":", color=color, linewidth=2, label=f"{called}, could know")
        means = [share(next_rewards(counts, number)) for number in range(MOVES + 1)]
        known = [(number, one) for number, one in enumerate(means) if np.isfinite(one.mean)]
        middle = [one.mean for _, one in known]
        error = [[one.mean - one.low for _, one in known], [one.high - one.mean for _, one in known]]
        right.errorbar(
            [number for number, _ in known], middle, yerr=error, color=color, marker="o", capsize=3, label=called
        )
    finish(left, "What the contexts say", "after task", "right facts", limits=(0, MOVES))
    left.set_xticks(
        range(1, 1 + max(len(counts["right"].split()[0].split(",")) for counts in found["models"].values()))
    )
    finish(right, "What that is worth", "right facts in the context", "mean reward of the next task")
    right.set_xticks(range(MOVES + 1))
    keep(made, path)


if __name__ == "__main__":
    typer.run(main)
