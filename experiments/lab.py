"""What the experiments share: trainings, lives and evaluations in processes of their own, and how their results are kept.

Everything goes through the commands a user has (`cod train`, `cod run`, `cod eval`), as many at once as there are cores, and every
result is read from the files they leave. What is done is not done again: an experiment that was stopped goes on.

An experiment is a module with `NAME`, `main` (its command), and two functions of what it found: `tables`, Markdown by name, which
`pages.py` puts into the pages of docs/results, and `draw`, which makes its figures.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from cod_agent.evaluation.statistics import Rewards, curve
from cod_agent.memory.readonly import look
from cod_agent.policies import POLICIES, folder_of
from cod_train.export import exported
from cod_train.progress import Step, checkpoint_of, steps

HOME = Path(__file__).parent.parent
DATA = HOME / "docs" / "results" / "data"
IMAGES = HOME / "docs" / "images"
Found = dict[str, Any]
"""What an experiment found: plain JSON."""

ONE_THREAD = "actor_rollout_ref.rollout.engine_kwargs.cod_cpu.train_threads=1"
"""As many trainings at once as there are cores, so one thread each."""
EXPERIMENTS = ("learning", "ablation", "records", "longer", "contexts", "loop", "mixed", "injection")
FAST = "-fast"
FORM = ("--form", "compact")
"""What the tiny policies speak."""
LEVEL_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for the mean of so many seeds."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A training that has ended."""

    folder: Path
    steps: list[Step]

    @property
    def model(self) -> Path:
        """Folder of the newest weights, with `model.gguf` for the embedded engine."""
        return self.folder / "model"

    def at(self, step: int) -> Path:
        """Folder of the weights after a step that left a checkpoint, as `model`."""
        folder = self.folder / f"model-{step}"
        if not (folder / "model.gguf").is_file():
            exported(checkpoint_of(self.folder, step), folder, name=self.folder.name)
        return folder

    def json(self) -> Found:
        """Its curve: reward, tokens and what tells whether it was stable, by step."""
        kept = {
            "trained_tokens": "cod/trained_tokens",
            "kl": "actor/rec_kl",
            "gradient": "actor/grad_norm",
            "advantage": "actor/rec_advantage",
        }
        by_step = {name: [_short(step.metrics.get(key)) for step in self.steps] for name, key in kept.items()}
        seconds = float(np.median([step.seconds for step in self.steps]))
        return {
            "reward": [round(step.reward, 4) for step in self.steps],
            **by_step,
            "seconds_a_step": round(seconds, 2),
        }


def train(folder: Path, *words: Any) -> Trained:
    """`cod train --in-process WORDS --out FOLDER`; one that has ended is not run again.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    if not (folder / "done").is_file():
        cod(
            folder / "done", "train", "--in-process", "--eval-packs", "0", "--out", folder, ONE_THREAD, *words, "--json"
        )
    return Trained(folder, steps(folder))


def live(file: Path, world: str, model: str | Path, *words: Any) -> Path:
    """`cod run WORLD --split train`: agents that live and are recorded in FILE."""
    done = file.with_suffix(".done")
    if not done.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        cod(
            done,
            "run",
            world,
            "--model",
            named(model),
            "--split",
            "train",
            *FORM,
            "--concurrency",
            128,
            "--db",
            file,
            *words,
            "--json",
        )
    return file


def evaluate(folder: Path, model: str | Path, *words: Any, world: str = "frozen-lake:small") -> Found:
    """`cod eval WORLD --model MODEL WORDS`: what it says, and `outcomes`, the reward of each task.

    The packs are those of seed 2 unless words say otherwise: neither those of validation nor those of a default.
    """
    if not (folder / "eval.done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        seed = () if "--seed" in words else ("--seed", "2")
        cod(
            folder / "eval.done",
            "eval",
            world,
            "--model",
            named(model),
            "--out",
            folder,
            *FORM,
            "--concurrency",
            128,
            *seed,
            *words,
            "--json",
        )
    found: Found = json.loads((folder / "eval.json").read_text())
    lanes = {"with context": "agent", **{control: f"agent/{control}" for control in found["controls"]}}
    found["outcomes"] = {name: outcomes(folder / "runs.db", agent) for name, agent in lanes.items()}
    del found["positions"], found["controls"]  # which the outcomes say again
    found["model"] = model if isinstance(model, str) else model.parent.name
    return found


def outcomes(file: Path, agent: str) -> str:
    """The rewards of an agent's packs, as `spelt_rewards` writes them."""
    query = "SELECT r.name, t.reward FROM tasks t JOIN runs r ON r.id = t.run_id WHERE r.agent = ? ORDER BY r.id, t.position"
    packs: dict[str, list[float]] = {}
    with look(file) as conn:
        for run, reward in conn.execute(query, (agent,)):
            packs.setdefault(run, []).append(np.nan if reward is None else reward)
    return spelt_rewards([packs[run] for run in sorted(packs)])


def spelt_rewards(table: Sequence[Sequence[float]] | Rewards) -> str:
    """A word for each pack, such as 0111: 1 solved, 0 not, - lost. Where rewards lie between, in percent: 83/0/-/100."""
    whole = all(reward in (0, 1) or np.isnan(reward) for pack in table for reward in pack)
    times, between = (1, "") if whole else (100, "/")
    return " ".join(
        between.join("-" if np.isnan(reward) else str(round(times * reward)) for reward in pack) for pack in table
    )


def rewards(words: str) -> Rewards:
    """`spelt_rewards` as an array [packs, positions]."""
    percent = "/" in words
    packs = [word.split("/") if percent else word for word in words.split()]
    return np.array([[np.nan if said == "-" else float(said) for said in pack] for pack in packs]) / (
        100 if percent else 1
    )


def named(model: str | Path) -> str:
    """What `cod` calls a model: a shipped policy, a scripted player, or the folder of a trained one."""
    if isinstance(model, str) and model not in POLICIES:
        return model
    folder = folder_of(model) if isinstance(model, str) else model
    return f"gguf:{folder / 'model.gguf'}"


def called(model: str) -> str:
    """What tables call a model: a shipped policy by its name, a trained one by that of its training's folder."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name


def at_once(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run jobs, as many at once as there are cores; their results in order.

    Raises:
        RuntimeError: the first that failed, after those under way have ended.
    """
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


# ---- intervals ----


def over_seeds(values: Sequence[float]) -> Found:
    """Mean and 95 % interval (Student's t) over seeds: {mean, low, high, n}; no interval of a single one."""
    known = np.array([value for value in values if np.isfinite(value)])
    mean = float(known.mean()) if len(known) else float("nan")
    half = LEVEL_95[len(known)] * float(known.std(ddof=1)) / len(known) ** 0.5 if len(known) > 1 else None
    low, high = (None, None) if half is None else (round(mean - half, 4), round(mean + half, 4))
    return {"mean": round(mean, 4), "low": low, "high": high, "n": len(known)}


def spelt_over_seeds(values: Sequence[float], digits: int = 2) -> str:
    """`over_seeds` as tables have it."""
    made = over_seeds(values)
    return spelt(made["mean"], made["low"], made["high"], digits)


def mean_reward(words: str) -> float:
    """Over all tasks of `outcomes`."""
    return float(np.nanmean(rewards(words)))


def cells(words: str, digits: int = 2) -> list[str]:
    """`.57 [.53, .61]` for each position and for all tasks: intervals over packs (bootstrap)."""
    made = curve(rewards(words))
    return [spelt(point.mean, point.low, point.high, digits) for point in (*made.points, made.overall)]


def spelt(mean: float, low: float | None, high: float | None, digits: int = 2) -> str:
    """A mean with its interval, as tables have it."""
    if not np.isfinite(mean):
        return "none"
    if low is None or high is None:
        return _bare(mean, digits)
    return f"{_bare(mean, digits)} [{_bare(low, digits)}, {_bare(high, digits)}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- keeping ----


def save(name: str, found: Found, out: Path) -> Path:
    """Keep what was found, with how it came about, for the page that tells it.

    What is called NAME-fast is kept in `out` and changes no page.

    Args:
        out: where the experiment's commands ran; the minutes are the sum of theirs, however often it was stopped.
    """
    packages = ("torch", "verl", "numpy")
    seconds = [float(done.read_text() or 0) for done in [*out.rglob("done"), *out.rglob("*.done")]]
    about = {
        "command": " ".join(
            ["python", *(word if index else f"experiments/{Path(word).name}" for index, word in enumerate(sys.argv))]
        ),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "minutes": round(sum(seconds) / 60, 1),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }
    folder = out if name.endswith(FAST) else DATA
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps({"about": about, **found}, indent=1)
    lists = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)  # plain ones on a line each
    path.write_text(lists + "\n")
    return path


def load(name: str) -> Found:
    """What `save` kept."""
    found: Found = json.loads((DATA / f"{name}.json").read_text())
    return found


def cod(done: Path, *words: Any, codes: Sequence[int] = (0,)) -> None:
    """Run a command; `done` says afterwards how many seconds it took.

    Args:
        codes: exit codes with which it has done its work.

    Raises:
        RuntimeError: it failed; the message has its last words.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "cod_agent.cli", *map(str, words)]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    said = " ".join(str(word) for word in words)
    if ended.returncode not in codes:
        raise RuntimeError(f"cod {said}: {ended.stderr[-1500:]}")
    seconds = time.monotonic() - began
    done.write_text(f"{seconds:.1f}")
    print(f"{seconds:6.0f} s  cod {said}", file=sys.stderr, flush=True)


def _short(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.4g}")


def _bare(value: float, digits: int) -> str:
    """.57, -.02, 1.00: no leading zero, as tables have them."""
    text = f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before nothing
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text
