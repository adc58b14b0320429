"""What a loop has brought: rounds, verdicts and the curve, as JSON, a table and a figure; read from its rounds' notes.

The curve has the reward by position of what served after each round, on held-out packs. Where a later gate measured those
weights again, as its incumbent, that is taken: what won on some packs was also lucky on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cod_agent.errors import MissingExtra
from cod_agent.evaluation.statistics import reach
from cod_train.loop.rounds import STAGES, Noted, Round, rounds

if TYPE_CHECKING:
    from rich.table import Table

    from cod_agent.evaluation import Curve

FIGURE = "loop.png"


def points(found: Curve) -> Noted:
    """A curve as rounds note it: {positions, overall}."""
    return {"positions": [point.json() for point in found.points], "overall": found.overall.json()}


def told(out: Path) -> dict[str, Any]:
    """The whole of a loop, as `--json` prints it: `rounds`, `curve`, `serves`."""
    done = rounds(out)
    curve = measured(out)
    return {
        "rounds": [{**round.noted, "ended": round.ended} for round in done],
        "curve": curve,
        "serves": curve[-1]["weights"] if curve else None,
    }


def measured(out: Path) -> list[dict[str, Any]]:
    """For what was deployed first (after round 0) and after each round: {after, name, weights, measured, positions, overall}."""
    judged = [round for round in rounds(out) if round.stage("gate") and round.stage("serve")]
    curve = []
    for after, round in enumerate([None, *judged]):
        later = judged[after] if after < len(judged) else None
        if round is None and later is not None:
            name, weights = later.noted["incumbent"], later.noted["weights"]
        elif round is not None:
            name, weights = round.noted["serve"]["name"], round.noted["serve"]["weights"]
        else:
            break
        if later is not None and later.noted["weights"] == weights and later.noted["gate"]["incumbent"]:
            gate, side = later, later.noted["gate"]["incumbent"]
        else:
            gate = round or judged[0]
            side = gate.noted["gate"]["candidate" if name == gate.name else "incumbent"]
        curve.append(
            {"after": after, "name": name, "weights": weights, "measured": f"gate of {gate.name}", **(side or {})}
        )
    return [one for one in curve if "positions" in one]


def sentence(round: Round, stage: str) -> str:
    """What a stage brought, for a person."""
    said = round.noted[stage]
    seconds = f"{said['seconds']:.0f} s"
    if stage == "record":
        return (
            f"round {round.number}: recorded in {seconds}: reward {_spelt(said['overall'])}, by position {_means(said)}"
        )
    if stage == "train":
        reward = " ".join("none" if one is None else f"{one:.2f}" for one in said["reward"])
        return f"round {round.number}: trained {said['steps']} steps in {seconds}: reward {reward}"
    if stage == "export":
        return f"round {round.number}: {said['weights']} is a candidate ({seconds})"
    if stage == "gate":
        return f"round {round.number}: {round.name} {said['why']} ({seconds})"
    return f"round {round.number}: {said['weights']} serves ({seconds})"


def verdict(round: Round) -> str:
    """What became of a round's candidate, in a few words; `why` in its note has the figures."""
    gate, serve = round.noted["gate"], round.stage("serve")
    if serve is not None and serve["taken_back"]:
        return f"taken back: {serve['taken_back']}"
    if gate["promoted"]:
        return "promoted"
    return f"rejected; failed: {', '.join(gate['failed'])}" if gate["failed"] else gate["why"]


def table(out: Path) -> Table:
    """Reward by position of what served after each round, and how it came to serve."""
    from rich import box
    from rich.table import Table

    curve = measured(out)
    made = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption="mean reward [95% interval] on held-out packs",
        caption_justify="left",
    )
    made.add_column("after", justify="right")
    made.add_column("serves")
    for position in range(max((len(one["positions"]) for one in curve), default=0)):
        made.add_column(f"task {position + 1}")
    made.add_column("all")
    made.add_column("verdict", overflow="fold")
    done = rounds(out)
    for one in curve:
        cells = [_spelt(point).replace(" [", "\n[") for point in (*one["positions"], one["overall"])]
        made.add_row(
            str(one["after"]), one["name"], *cells, verdict(done[one["after"] - 1]) if one["after"] else "the base"
        )
    return made


def seconds(out: Path) -> str:
    """Median seconds of a round by stage, as a sentence; of the sitting that ended each stage."""
    from statistics import median

    ended = [round for round in rounds(out) if round.ended]
    if not ended:
        return ""
    by_stage = {stage: median(round.noted[stage]["seconds"] for round in ended) for stage in STAGES}
    parts = ", ".join(f"{stage} {took:.0f} s" for stage, took in by_stage.items())
    return f"A round takes {sum(by_stage.values()):.0f} s: {parts} (medians)."


def draw(out: Path, title: str) -> Path:
    """The curve as OUT/loop.png: a line with its band for each position, a cross where a candidate was rejected.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the figure", "local") from None
    curve = measured(out)
    figure = Figure(figsize=(7.6, 4.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.135, 0.75, 0.7))
    at = [one["after"] for one in curve]
    positions = max((len(one["positions"]) for one in curve), default=0)
    for position in range(positions):
        color = colormaps["viridis"](0.85 - 0.75 * position / max(1, positions - 1))
        found = [one["positions"][position] for one in curve]
        means = [point["mean"] for point in found]
        axes.plot(at, means, color=color, linewidth=2.0, marker="o", markersize=5, label=f"task {position + 1}")
        low, high = [point["low"] for point in found], [point["high"] for point in found]
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
    lost = [round.number for round in rounds(out) if round.ended and round.noted["serve"]["name"] != round.name]
    axes.plot(lost, [0.02] * len(lost), "x", color="#b23b3b")
    if positions:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    ends = [[point["low"], point["high"]] for one in curve for point in one["positions"]]
    least, most = reach(np.array(ends, float))
    axes.set_ylim(least, most + 0.03 * (most - least))
    axes.set_xticks(at)
    axes.set_xlabel("round", size=10)
    axes.set_ylabel("mean reward on held-out packs", size=10)
    axes.grid(axis="y", color="#e6e9ed")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(0.085, 0.925, title, size=13, weight="bold")
    what = "what serves after each round, with 95% intervals; crosses: rounds whose candidate does not serve"
    figure.text(0.085, 0.868, what, size=9, color="#6b7785")
    figure.savefig(out / FIGURE, format="png", metadata={"Software": "connect-the-dots"})
    return out / FIGURE


def _spelt(point: Noted) -> str:
    """`0.41 [0.38, 0.44]`."""
    if point["mean"] is None:
        return "none"
    return f"{point['mean']:.2f} [{point['low']:.2f}, {point['high']:.2f}]"


def _means(said: Noted) -> str:
    return " ".join("none" if point["mean"] is None else f"{point['mean']:.2f}" for point in said["positions"])
