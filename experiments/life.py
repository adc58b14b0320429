"""A long life: 2,000 tasks in one run, and whether anything grows with the tasks behind it.

The lives and the readings are benchmarks/long_life.py's; here they become data, a figure and tables.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from sqlite3 import sqlite_version
from typing import Annotated

import figures
import lab
import typer

sys.path.insert(0, str(lab.HOME / "benchmarks"))
import long_life

NAME = "life"
ROWS = {
    "steps": "steps of SQLite's machine a task",
    "bytes": "bytes the file grows by a task",
    "context": "characters of the context",
    "rss_mb": "memory, MB",
    "wal_mb": "write-ahead log, MB",
    "commit_p50_ms": "a commit, half are quicker, ms",
    "commit_p95_ms": "a commit, 95 % are quicker, ms",
    "cpu_ms": "CPU a task, ms",
    "ms": "wall time a task, ms",
}
AFTER = {
    "open_and_solve": "open the file and solve one task more",
    "resume": "open it and read the outcome of every task",
    "context_log": "what `cod context log` reads",
    "verify": "`cod verify`",
    "integrity_check": "of that, SQLite's own integrity check",
}


def main(
    tasks: Annotated[int, typer.Option(help="In one run; twenty readings.")] = 2000,
) -> None:
    """Example: python experiments/life.py"""
    started, every = time.time(), tasks // 20
    with tempfile.TemporaryDirectory() as folder:
        lives = {kind: long_life.whole(Path(folder), kind, tasks, every) for kind in long_life.LIVES}
        (Path(folder) / "done").write_text(str(time.time() - started))
        lab.save(NAME, {"tasks": tasks, "every": every, "sqlite": sqlite_version, "lives": lives}, Path(folder))
    draw(lab.load(NAME), lab.IMAGES / f"results-{NAME}.png")


def tables(found: lab.Found) -> dict[str, str]:
    """`slopes` of what a task costs, and what the whole of a run takes `afterwards`."""
    lives = found["lives"]
    head = ["", *(f"{kind}: {what}" for kind in lives for what in ("mean", "in 1,000 tasks more"))]
    slopes = [
        [words, *(cell for one in lives.values() for cell in _level(one["slopes"][name]))]
        for name, words in ROWS.items()
    ]
    after = [
        [words, *(f"{one['seconds'][name]:.2f}" if name in one["seconds"] else "" for one in lives.values())]
        for name, words in AFTER.items()
    ]
    after.append(["the file, MB", *(f"{one['file_mb']:.1f}" for one in lives.values())])
    about = found["about"]
    made = (
        f"`{about['command']}`, {about['date']}, {about['machine']}, CPython {about['python']}, SQLite {found['sqlite']}; it took "
        f"{about['minutes']:.0f} minutes."
    )
    return {"made": made, "slopes": lab.table(head, slopes), "afterwards": lab.table(["seconds", *lives], after)}


def _level(said: dict[str, float]) -> list[str]:
    low, high = said["per_1000"] - said["plus_minus"], said["per_1000"] + said["plus_minus"]
    return [_plain(said["mean"]), f"{_plain(said['per_1000'])} [{_plain(low)}, {_plain(high)}]"]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def draw(found: lab.Found, path: Path) -> None:
    """Each figure over the tasks behind, as a share of its mean: level lines."""
    made, panels = figures.figure(len(found["lives"]))
    for axes, (kind, one) in zip(panels, found["lives"].items(), strict=True):
        x = [found["every"] * (at + 1) for at in range(len(one["readings"]))]
        for color, name in zip(
            figures.COLORS, ("steps", "bytes", "rss_mb", "wal_mb", "commit_p50_ms", "cpu_ms"), strict=False
        ):
            y = [reading[name] / one["slopes"][name]["mean"] for reading in one["readings"]]
            timed = name.endswith("_ms")
            axes.plot(x, y, "--" if timed else "-", color=color, linewidth=1.2 if timed else 2, label=ROWS[name])
        figures.finish(axes, kind, "tasks behind", "share of the mean", limits=(0, 2.2))
    figures.keep(made, path)


if __name__ == "__main__":
    typer.run(main)
