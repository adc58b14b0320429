"""What a training folder says of itself: metrics by step, reward by position before and after, the newest checkpoint, a figure.

Everything is read from files that the training wrote (`metrics-NNN.jsonl`, `rollouts/*.db`, `global_step_N`), so that a run that was
killed, or runs elsewhere, tells as much as one that is watched.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cod_agent.errors import MissingExtra
from cod_agent.evaluation.statistics import Curve, curve, reach
from cod_agent.memory.readonly import look

Metrics = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Step:
    """One step of training, as its metrics have it."""

    number: int
    metrics: Metrics

    @property
    def rewards(self) -> list[float]:
        """Mean reward of the step's rollouts by position."""
        at = [key for key in self.metrics if re.fullmatch(r"cod/reward_pos\d+", key)]
        return [self.metrics[key] for key in sorted(at, key=lambda key: int(key.rpartition("pos")[2]))]

    @property
    def reward(self) -> float:
        return float(np.mean(self.rewards)) if self.rewards else math.nan

    @property
    def seconds(self) -> float:
        return float(self.metrics.get("timing_s/step", math.nan))


def steps(folder: Path) -> list[Step]:
    """The steps so far; of one that was done again after a kill, the newer."""
    found: dict[int, Metrics] = {}
    for file in sorted(folder.glob("metrics-*.jsonl")):
        for line in file.read_bytes().splitlines():
            try:
                said = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            if "actor/grad_norm" in said["data"]:
                found[int(said["step"])] = said["data"]
    return [Step(number, found[number]) for number in sorted(found)]


def evaluations(folder: Path) -> dict[int, Curve]:
    """Reward by position on the eval packs, by step, from the run databases the validation left."""
    tables: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for file in sorted((folder / "rollouts").glob("eval-*.db")):
        step = int(file.stem.split("-")[1])
        with look(file) as conn:
            rows = conn.execute(
                "SELECT r.name, r.length, t.position, t.reward FROM tasks t JOIN runs r ON r.id = t.run_id"
            )
            for name, length, position, reward in rows.fetchall():
                row = tables[step].setdefault(name, [math.nan] * length)
                row[position] = math.nan if reward is None else reward
    out = {}
    for step, lives in sorted(tables.items()):
        longest = max(map(len, lives.values()))
        out[step] = curve(np.array([row + [math.nan] * (longest - len(row)) for _, row in sorted(lives.items())]))
    return out


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in Hugging Face form."""
    latest = folder / "latest_checkpointed_iteration.txt"
    found = checkpoint_of(folder, int(latest.read_text())) if latest.is_file() else None
    return found if found is not None and found.is_dir() else None


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step is, in Hugging Face form, if there is one."""
    return folder / f"global_step_{step}" / "actor" / "huggingface"


def draw(folder: Path, title: str, path: Path) -> Path:
    """Reward by position over the steps, as a PNG file.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("the figure", "local") from None
    done, measured = steps(folder), evaluations(folder)
    figure = Figure(figsize=(7.6, 4.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.085, 0.135, 0.72, 0.7))
    positions = max((len(step.rewards) for step in done), default=0)
    for position in range(positions):
        color = colormaps["viridis"](0.85 - 0.75 * position / max(1, positions - 1))
        at = [step.number for step in done if len(step.rewards) > position]
        values = [step.rewards[position] for step in done if len(step.rewards) > position]
        axes.plot(at, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(at, _smoothed(values), color=color, linewidth=2.0)
        if values:
            axes.annotate(
                f"task {position + 1}  {_smoothed(values)[-1]:.2f}",
                (at[-1], _smoothed(values)[-1]),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                size=9,
                color=color,
            )
        for step, found in measured.items():
            if position < len(found.points):
                point = found.points[position]
                spread = [[max(0.0, point.mean - point.low)], [max(0.0, point.high - point.mean)]]
                axes.errorbar([step], [point.mean], yerr=spread, fmt="o", color=color, markersize=5, capsize=2)
    ends = [[point.low, point.high] for found in measured.values() for point in found.points]
    low, high = reach(np.array([reward for step in done for reward in step.rewards]), np.array(ends))
    axes.set_ylim(low, high + 0.03 * (high - low))
    axes.set_xlabel("step", size=10)
    axes.set_ylabel("mean reward", size=10)
    axes.grid(axis="y", color="#e6e9ed")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.text(0.085, 0.925, title, size=13, weight="bold")
    what = "lines: rollouts of each step, smoothed over 5; dots: eval packs with 95% intervals"
    figure.text(0.085, 0.868, what, size=9, color="#6b7785")
    figure.savefig(path, format="png", metadata={"Software": "connect-the-dots"})
    return path


def _smoothed(values: list[float], width: int = 5) -> list[float]:
    return [float(np.mean(values[max(0, at - width + 1) : at + 1])) for at in range(len(values))]
