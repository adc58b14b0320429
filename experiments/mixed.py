"""One tiny policy for three worlds, and what two of them do for the third: `python experiments/mixed.py [--fast]`.

`mixed-base` is trained in all three worlds together, and in each two of them, with several seeds. Base and trained policies are measured
in every world, also in the one that their training left out, beside the world's scripted players.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import lab
import numpy as np
import typer

from cod_agent.environments import make_world
from cod_agent.evaluation.players import CEILING, FLOOR, played
from cod_agent.evaluation.statistics import Interval, Rewards, curve
from cod_agent.policies import folder_of

NAME = "mixed"
BASE, CLONED = "mixed-base", "mixed-cloned"
WORLDS = ("frozen-lake:small", "alchemy:tiny", "grid-navigation:tiny")
ALL = "all three"
ARMS = {ALL: WORLDS, **{f"without {left}": tuple(world for world in WORLDS if world != left) for left in WORLDS}}
"""What is trained in which worlds."""
SEED, CHOICE_SEED = 2, 3
"""The best is chosen on packs of its own, so that those of the tables do not choose what they measure."""
WITH, WITHOUT = "with context", "no-context"
PACKS_OF_EACH = 3
"""Of each world in a step: what leaves a world out practises the others as much as what does not."""


def main(
    out: Annotated[Path, typer.Option(help="Where trainings and evaluations go.")] = Path("runs/mixed"),
    seeds: Annotated[int, typer.Option()] = 2,
    steps: Annotated[int, typer.Option()] = 40,
    rate: Annotated[float, typer.Option()] = 7e-4,
    packs: Annotated[int, typer.Option(help="Held-out packs of each world.")] = 512,
    cloned: Annotated[Path | None, typer.Option(help="`mixed-cloned`, if it is to be measured, too.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="One seed, 3 steps, 32 packs.")] = False,
) -> None:
    """Example: python experiments/mixed.py --seeds 2 --steps 40 --packs 512"""
    name = NAME
    if fast:
        name, out, seeds, steps, packs = f"{NAME}{lab.FAST}", out.with_name("mixed-fast"), 1, 3, 32
    jobs = [partial(trained, out, arm, seed, steps, rate) for seed in range(seeds) for arm in ARMS]
    curves = lab.at_once(jobs)
    models: dict[str, str | Path] = {BASE: BASE, **({CLONED: cloned} if cloned else {})}
    models |= {called(arm, seed): out / called(arm, seed) / "model" for seed in range(seeds) for arm in ARMS}
    lived = {what: {world: measured(out, what, models[what], world, packs) for world in WORLDS} for what in models}
    best = {what: models[what] for what in models if what == BASE or what.startswith(called(ALL, ""))}
    choice = {what: chosen(out, what, model, packs // 2) for what, model in best.items()}
    found = {
        "worlds": list(WORLDS),
        "seeds": seeds,
        "steps": steps,
        "rate": rate,
        "packs": packs,
        "players": {world: {player: scripted(world, player, packs) for player in (FLOOR, CEILING)} for world in WORLDS},
        "starts": {what: lived[what] for what in (BASE, CLONED) if what in lived},
        "runs": [
            {
                "arm": arm,
                "seed": seed,
                "curve": curves[seed * len(ARMS) + at],
                "measured": lived[called(arm, seed)],
            }
            for seed in range(seeds)
            for at, arm in enumerate(ARMS)
        ],
        "choice": choice,
    }
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def called(arm: str, seed: int | str) -> str:
    """What a training is called."""
    return f"{arm.replace(' ', '-').partition(':')[0]}-{seed}"


def trained(out: Path, arm: str, seed: int, steps: int, rate: float) -> lab.Found:
    """Train the base in the worlds of an arm; its curve."""
    worlds = ARMS[arm]
    words = ("--config", "cpu_tiny_mixed", "--base", BASE, "--steps", steps, "--rate", rate, "--seed", seed)
    more = ("--packs", PACKS_OF_EACH * len(worlds), "--save-every", 20, f"data.world=[{','.join(worlds)}]")
    kept = ("cod.keep_rollouts=false", "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine")
    return lab.train(out / called(arm, seed), *words, *more, *kept).json()


def measured(
    out: Path,
    what: str,
    model: str | Path,
    world: str,
    packs: int,
    *,
    seed: int = SEED,
    lanes: Sequence[str] = (WITH, WITHOUT),
) -> dict[str, str]:
    """The rewards of a policy in a world, by lane, straight from torch; what was measured is not measured again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cod_train.tiny.evaluate import rewards

    kept = out / f"eval-{seed}" / f"{what}-{world.partition(':')[0]}.json"
    if not kept.is_file():
        folder, began = folder_of(model) if isinstance(model, str) else model, time.monotonic()
        policy = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        made = {
            lane: lab.spelt_rewards(rewards(policy, words, world=world, packs=packs, seed=seed, remember=lane == WITH))
            for lane in lanes
        }
        seconds = time.monotonic() - began
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".done").write_text(f"{seconds:.1f}")
        kept.write_text(json.dumps(made))
        print(f"{seconds:6.0f} s  {kept.stem}", file=sys.stderr, flush=True)
    lived: dict[str, str] = json.loads(kept.read_text())
    return lived


def chosen(out: Path, what: str, model: str | Path, packs: int) -> float:
    """Mean reward over the three worlds, on packs of the choice."""
    lived = [measured(out, what, model, world, packs, seed=CHOICE_SEED, lanes=(WITH,))[WITH] for world in WORLDS]
    return round(float(np.mean([lab.mean_reward(words) for words in lived])), 4)


def scripted(world: str, player: str, packs: int) -> str:
    """The rewards of a world's player on the same packs."""
    return lab.spelt_rewards(played(make_world(world, seed=SEED, form="compact"), player, packs, 4))


def tables(found: lab.Found) -> dict[str, str]:
    """For each world by its name, reward by position of players, base and trained policies; by arm and world, after training: `mean`, over
    all tasks, `change`, what that is above the base on the same packs, `gain`, last minus first task, and `without`, over all tasks without
    context; `choice`: which was best where it was chosen."""
    made = {world.partition(":")[0]: _by_position(found, world) for world in found["worlds"]}
    base = {
        world: {lane: lab.rewards(words) for lane, words in found["starts"][BASE][world].items()} for world in WORLDS
    }
    figures: dict[str, Callable[[Rewards, Rewards], Interval]] = {
        "mean": lambda after, before: curve(after).overall,
        "change": lambda after, before: curve(after - before).overall,
        "gain": lambda after, before: curve(after).gain,
        "without": lambda after, before: curve(after).overall,
    }
    for name, figure in figures.items():
        lane = WITHOUT if name == "without" else WITH
        rows = [[f"`{BASE}`", *(_cell(figure(base[world][lane], base[world][lane])) for world in WORLDS)]]
        for arm, worlds in ARMS.items():
            cells = [_cell(figure(_after(found, arm, world, lane), base[world][lane])) for world in WORLDS]
            seen = [cell if world in worlds else f"**{cell}**" for cell, world in zip(cells, WORLDS, strict=True)]
            rows.append([f"trained: {arm}", *seen])
        made[name] = lab.table(["", *(f"`{world}`" for world in WORLDS)], rows if name != "change" else rows[1:])
    best = sorted(found["choice"].items(), key=lambda item: -item[1])
    rows = [[f"`{what}`" if what == BASE else what, f"{mean:.3f}"] for what, mean in best]
    made["choice"] = lab.table(["", "mean reward over the worlds, packs of the choice"], rows)
    return made


def _by_position(found: lab.Found, world: str) -> str:
    head = ["", *(f"task {at + 1}" for at in range(4)), "all", "last - first", "all, without context"]
    players = found["players"][world]
    rows = [[f"player `{player}`", *_row(players[player]), ""] for player in (FLOOR, CEILING)]
    rows += [
        [f"`{start}`", *_row(lived[world][WITH]), lab.cells(lived[world][WITHOUT])[-1]]
        for start, lived in found["starts"].items()
    ]
    for arm, worlds in ARMS.items():
        for run in (run for run in found["runs"] if run["arm"] == arm):
            lanes, told = run["measured"][world], arm if world in worlds else f"**{arm}**"
            rows.append([f"{told}, seed {run['seed']}", *_row(lanes[WITH]), lab.cells(lanes[WITHOUT])[-1]])
    return lab.table(head, rows)


def _row(words: str) -> list[str]:
    return [*lab.cells(words), _cell(curve(lab.rewards(words)).gain)]


def _after(found: lab.Found, arm: str, world: str, lane: str) -> Rewards:
    """The rewards of an arm's policies in a world, the mean over seeds of each task, [packs, positions]."""
    runs = [run for run in found["runs"] if run["arm"] == arm]
    mean: Rewards = np.mean([lab.rewards(run["measured"][world][lane]) for run in runs], axis=0)
    return mean


def _cell(figure: Interval) -> str:
    return lab.spelt(figure.mean, figure.low, figure.high)


def draw(found: lab.Found, path: Path) -> None:
    """A panel for each world: its players, the base, and what was trained with the world and without it, over all seeds."""
    from figures import COLORS, figure, finish, keep, points

    made, axes = figure(len(found["worlds"]))
    for panel, world in zip(axes, found["worlds"], strict=True):
        for player, style in ((CEILING, "--"), (FLOOR, ":")):
            points(panel, found["players"][world][player], f"player {player}", color=COLORS[4], style=style)
        points(panel, found["starts"][BASE][world][WITH], BASE, color=COLORS[1], style=":o")
        left_out = next(arm for arm, worlds in ARMS.items() if world not in worlds)
        for color, arm, told in (
            (COLORS[0], ALL, "trained in all three"),
            (COLORS[2], left_out, "trained in the other two"),
        ):
            together = " ".join(run["measured"][world][WITH] for run in found["runs"] if run["arm"] == arm)
            points(panel, together, told, color=color)
        finish(panel, world, "task", "mean reward")
        panel.set_xticks(range(1, 5))
    keep(made, path)


if __name__ == "__main__":
    typer.run(main)
