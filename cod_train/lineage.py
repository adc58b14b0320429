"""Where a checkpoint comes from: the recorded runs it was trained on, by hash, the training it is of, and the code that was in force."""

from __future__ import annotations

import re
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cod_agent
from cod_agent.errors import CodError
from cod_agent.memory.readonly import look

_RUNS = """
SELECT r.agent, r.name, (SELECT chain FROM commits c WHERE c.run_id = r.id ORDER BY seq DESC LIMIT 1) AS chain,
  (SELECT count(*) FROM tasks t WHERE t.run_id = r.id) AS tasks
FROM runs r ORDER BY r.id
"""
_COMMITS = "SELECT c.what, c.chain FROM commits c JOIN runs r ON r.id = c.run_id WHERE r.agent = ? AND r.name = ? ORDER BY c.seq"
_TAKEN = {"forgot": "forgotten", "pruned": "pruned"}
"""What a run is called that went on with such a commit."""


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A recorded run that was trained on."""

    file: Path
    """Its run database; absolute."""
    agent: str
    run: str
    chain: str
    """Hash of the run's last commit: of all it held, in order (docs/memory.md); "" of a run without one."""
    tasks: int

    def check(self) -> str:
        """What became of it since: `same`, `longer` (it went on), `pruned` or `forgotten` (texts of it were taken out), `gone` (no such
        file or run), or `changed`."""
        return became([self])[0]

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        kept = {key: getattr(self, key) for key in ("agent", "run", "chain", "tasks")}
        return {"file": str(self.file), **kept}


def became(runs: Sequence[TrainingRun]) -> list[str]:
    """`TrainingRun.check` of each, each file opened once."""
    states: dict[TrainingRun, str] = {}
    for file in dict.fromkeys(run.file for run in runs):
        of_file = [run for run in runs if run.file == file]
        if not file.is_file():
            states |= dict.fromkeys(of_file, "gone")
            continue
        try:
            with look(file) as conn:
                states |= {run: _became(conn, run) for run in of_file}
        except CodError:
            states |= dict.fromkeys(of_file, "changed")
    return [states[run] for run in runs]


def _became(conn: sqlite3.Connection, run: TrainingRun) -> str:
    commits = conn.execute(_COMMITS, (run.agent, run.run)).fetchall()
    known = next((at for at, (_, chain) in enumerate(commits) if chain == run.chain), None)
    if not commits:
        return "gone"
    if known is None:
        return "changed"
    since = {what for what, _ in commits[known + 1 :]}
    taken = [word for what, word in _TAKEN.items() if what in since]
    return taken[0] if taken else "longer" if since else "same"


def taken_out(runs: Sequence[TrainingRun]) -> str:
    """Of how many of these runs texts are gone now, in words; "" if of none. The weights still know what those taught."""
    counts = Counter(became(runs))
    return ", ".join(f"{counts[word]} {word}" for word in _TAKEN.values() if counts[word])


def read_runs(databases: Sequence[Path]) -> list[TrainingRun]:
    """The runs of run databases as they are now.

    Raises:
        UsageError, StoreError: a file is missing or is no run database.
    """
    out = []
    for path in databases:
        with look(path) as conn:
            rows = conn.execute(_RUNS).fetchall()
        out += [TrainingRun(path.resolve(), agent, run, chain or "", tasks) for agent, run, chain, tasks in rows]
    return out


def trained_where(folder: Path) -> dict[str, Any]:
    """`training` and `step` of a checkpoint that lies where a training left it (NAME/global_step_N/...), as calls of its rollouts
    have them on record; nothing for any other folder."""
    for place in (folder, *folder.parents):
        if found := re.fullmatch(r"global_step_(\d+)", place.name):
            return {"training": place.parent.name, "step": int(found[1])}
    return {}


def default_name(folder: Path) -> str:
    """A name for the checkpoint in a folder: the folder's, or the training's where that says nothing."""
    folder = folder.resolve()
    if where := trained_where(folder):
        return f"{where['training']}-{where['step']}"
    return folder.parent.name if folder.name == "model" else folder.name


def code_version() -> str:
    """This package's version; where it lies in a git checkout that tracks it and git is installed, with the commit (`+g...`) and whether
    files were changed since (`.dirty`)."""
    here = Path(cod_agent.__file__).resolve().parent
    commit = _git(here, "rev-parse", "--short=12", "HEAD") if _git(here, "ls-files", "__init__.py") else ""
    if not commit:
        return cod_agent.__version__
    dirty = ".dirty" if _git(here, "status", "--porcelain", "--untracked-files=no", "--", str(here.parent)) else ""
    return f"{cod_agent.__version__}+g{commit}{dirty}"


def _git(folder: Path, *words: str) -> str:
    """What git says; "" where it says nothing or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
