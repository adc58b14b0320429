"""Real trainings for the tests: small ones, in processes of their own, as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cod_train.progress import Step, steps

ROOT = Path(__file__).parent.parent

SMALL = ("--packs", "2", "--group", "4", "--eval-packs", "0", "data.pack_size=3", "cod.mini_batches=1")
"""Two packs of three tasks, four rollouts of each, one optimizer step: the gradient norm is that of one batch."""


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "cod_agent.cli", "train", *map(str, words)]


def trained(*words: Any, ok: bool = True, seconds: float = 420) -> subprocess.CompletedProcess[str]:
    """`cod train WORDS`, to its end."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        command(*words), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def only_step(folder: Path) -> Step:
    (step,) = steps(folder)
    return step


def gradient(folder: Path) -> float:
    """Norm of the gradient of the only step of a training."""
    return float(only_step(folder).metrics["actor/grad_norm"])
