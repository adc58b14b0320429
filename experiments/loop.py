"""How far the whole loop takes a policy: `python experiments/loop.py [--fast]`.

Agents are deployed, recorded, trained on, and served what a gate let through, round after round (`cod loop`): with several seeds, one of
them served by real vLLM. After the last round a candidate that was spoilt on purpose asks to be promoted.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lab
import numpy as np
import typer

from cod_train.checkpoints import Registry
from cod_train.export import exported
from cod_train.loop import report
from cod_train.loop.rounds import STAGES

NAME = "loop"
NOISE = 0.5
"""Of a tensor's own deviation, added to every weight of the spoilt candidate."""
REJECTED = 3
"""Exit code of `cod promote`."""


def main(
    out: Annotated[Path, typer.Option(help="Where the loops' folders go.")] = Path("runs/loop"),
    seeds: Annotated[int, typer.Option(help="Served with the embedded engine.")] = 2,
    rounds: Annotated[int, typer.Option()] = 6,
    packs: Annotated[int, typer.Option(help="Held-out packs of each verdict on the spoilt candidate.")] = 512,
    vllm_rounds: Annotated[int, typer.Option(help="Of one seed more, served with vLLM; 0: none.")] = 3,
    fast: Annotated[bool, typer.Option("--fast", help="One seed, 2 rounds, the embedded engine.")] = False,
) -> None:
    """Example: python experiments/loop.py --seeds 2 --rounds 6 --vllm-rounds 3"""
    name = NAME
    if fast:
        name, out, seeds, rounds, packs, vllm_rounds = f"{NAME}{lab.FAST}", out.with_name("loop-fast"), 1, 2, 128, 0
    runs = [partial(_loop, out / f"seed-{seed}", seed, rounds, "embedded") for seed in range(seeds)]
    if vllm_rounds:
        runs.append(partial(_loop, out / f"seed-{seeds}", seeds, vllm_rounds, "vllm"))
    found = {"rounds": rounds, "runs": lab.at_once(runs), "spoilt": _spoilt(out / "seed-0", packs)}
    lab.save(name, found, out)
    print(*tables(found).values(), sep="\n\n")


def _loop(folder: Path, seed: int, rounds: int, engine: str) -> lab.Found:
    """One loop; one that has ended is not run again."""
    done = folder / f"rounds-{rounds}.done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        lab.cod(done, "loop", "--out", folder, "--seed", seed, "--rounds", rounds, "--serve", engine, "--json")
    said = report.told(folder)
    seconds = {stage: [one[stage]["seconds"] for one in said["rounds"]] for stage in STAGES}
    verdicts = [{key: one["gate"][key] for key in ("promoted", "why")} for one in said["rounds"]]
    return {"seed": seed, "engine": engine, "curve": said["curve"], "verdicts": verdicts, "seconds": seconds}


def _spoilt(folder: Path, packs: int) -> lab.Found:
    """The weights that serve after the last round, with noise, at the gate: what the gate said."""
    with Registry(folder / "registry.db") as registry:
        promoted = registry.promoted()
        if promoted is None:
            raise RuntimeError(f"nothing is promoted in {folder}")
        _spoil(promoted.folder, folder / "spoilt-source")
        if not (folder / "spoilt").is_dir():
            exported(folder / "spoilt-source", folder / "spoilt", name="spoilt")
        if registry.add(folder / "spoilt", name="spoilt").state == "candidate":
            words = ("--registry", folder / "registry.db", "--packs", packs, "--out", folder / "gates", "--json")
            lab.cod(folder / "spoilt.done", "promote", "spoilt", *words, codes=(REJECTED,))
        verdict = registry.verdicts("spoilt")[-1]
    return {"incumbent": verdict.incumbent, "promoted": verdict.promoted, "said": verdict.said}


def _spoil(source: Path, folder: Path) -> None:
    """A copy whose weights have noise of half their deviation."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.gguf", "probe.json"))
    draws = np.random.default_rng(0)
    for file in folder.glob("*.safetensors"):
        noisy = {
            name: (values + NOISE * values.std() * draws.standard_normal(values.shape)).astype(values.dtype)
            for name, values in load_file(file).items()
        }
        save_file(noisy, file, metadata={"format": "pt"})


# ---- what is told ----


def tables(found: lab.Found) -> dict[str, str]:
    """`rounds`: reward by position after each round, mean over seeds; `seeds`: the last task of each seed, with intervals; `spoilt`;
    `seconds`."""
    return {
        "rounds": _rounds(found),
        "seeds": _seeds(found),
        "spoilt": _gate(found["spoilt"]),
        "seconds": _seconds(found),
    }


def _rounds(found: lab.Found) -> str:
    rows = []
    for after in range(found["rounds"] + 1):
        runs = [run for run in found["runs"] if after < len(run["curve"])]
        ones = [run["curve"][after] for run in runs]
        by_position = zip(*([point["mean"] for point in one["positions"]] for one in ones), strict=True)
        cells = [f"{np.mean(means):.2f}" for means in by_position]
        promoted = sum(run["verdicts"][after - 1]["promoted"] for run in runs) if after else None
        rows.append(
            [
                str(after),
                *cells,
                f"{np.mean([one['overall']['mean'] for one in ones]):.2f}",
                "the base" if promoted is None else f"{promoted} of {len(ones)}",
            ]
        )
    positions = len(found["runs"][0]["curve"][0]["positions"])
    return lab.table(["after round", *(f"task {at + 1}" for at in range(positions)), "all", "promoted"], rows)


def _seeds(found: lab.Found) -> str:
    head = ["seed", "served by", *(str(after) for after in range(found["rounds"] + 1))]
    rows = []
    for run in found["runs"]:
        cells = []
        for one in run["curve"]:
            last = one["positions"][-1]
            said = lab.spelt(last["mean"], last["low"], last["high"])
            kept = one["after"] == 0 or run["verdicts"][one["after"] - 1]["promoted"]
            cells.append(said if kept else f"{said}, rejected")
        rows.append([str(run["seed"]), run["engine"], *cells, *([""] * (found["rounds"] + 1 - len(cells)))])
    return lab.table(head, rows)


def _gate(spoilt: lab.Found) -> str:
    """The gate's own table, and below it the checks that did not hold."""
    said = spoilt["said"]
    head = ["", f"incumbent ({spoilt['incumbent']})", "spoilt", "difference, and its lower end (one-sided, 95 %)"]
    rows = [
        [
            name,
            *(lab.spelt(row[side]["mean"], row[side]["low"], row[side]["high"]) for side in ("incumbent", "candidate")),
        ]
        + [f"{row['difference']['mean']:+.2f}, {row['difference']['low']:+.2f}"]
        for name, row in [
            *((f"task {row['position'] + 1}", row) for row in said["positions"]),
            ("all", said["overall"]),
        ]
    ]
    failed = [f"- failed, {check['name']}: {check['said']}" for check in said["checks"] if not check["holds"]]
    return "\n".join([lab.table(head, rows), "", *failed])


def _seconds(found: lab.Found) -> str:
    rows = []
    for engine in dict.fromkeys(run["engine"] for run in found["runs"]):
        runs = [run["seconds"] for run in found["runs"] if run["engine"] == engine]
        medians = [float(np.median([value for run in runs for value in run[stage]])) for stage in STAGES]
        rows.append([engine, *(f"{value:.0f}" for value in (*medians, sum(medians)))])
    return lab.table(["served by", *STAGES, "a round"], rows)


def draw(found: lab.Found, path: Path) -> None:
    """The first and the last task after each round, a line for each seed with its 95 % intervals over packs."""
    from figures import COLORS, figure, finish, keep

    made, panels = figure(2)
    for axes, position, title in ((panels[0], 0, "The first task"), (panels[1], -1, "The last task")):
        for color, run in zip(COLORS, found["runs"], strict=False):
            points: list[Any] = [one["positions"][position] for one in run["curve"]]
            means = [point["mean"] for point in points]
            error = [
                [point["mean"] - point["low"] for point in points],
                [point["high"] - point["mean"] for point in points],
            ]
            label = f"seed {run['seed']}, {run['engine']}"
            axes.errorbar(range(len(means)), means, yerr=error, color=color, marker="o", capsize=2, label=label)
        axes.set_xticks(range(found["rounds"] + 1))
        finish(axes, title, "round", "mean reward on held-out packs")
    keep(made, path)


if __name__ == "__main__":
    typer.run(main)
