"""Real trainings for the tests: small ones, in processes of their own, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from cod_agent.cli import app
from cod_train.progress import Step, steps

ROOT = Path(__file__).parent.parent

SMALL = ("--packs", "2", "--group", "4", "--eval-packs", "0", "data.pack_size=3", "cod.mini_batches=1")
"""Two packs of three tasks, four rollouts of each, one optimizer step: the gradient norm is that of one batch."""


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "cod_agent.cli", "train", *map(str, words)]


def trained(*words: Any, ok: bool = True, seconds: float = 420) -> Result:
    """`cod train WORDS`, to its end. The command runs in this process, which has loaded torch already; what trains in its own."""
    # As a supervisor ends it; the command takes its training with it.
    late = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    late.start()
    try:
        with contextlib.chdir(ROOT):
            path = f"{ROOT}:{ROOT / 'tests'}"
            done = CliRunner().invoke(app, ["train", *map(str, words)], prog_name="cod", env={"PYTHONPATH": path})
    finally:
        late.cancel()
    assert not ok or done.exit_code == 0, done.stdout + done.stderr + repr(done.exception)
    return done


def only_step(folder: Path) -> Step:
    (step,) = steps(folder)
    return step


def gradient(folder: Path) -> float:
    """Norm of the gradient of the only step of a training."""
    return float(only_step(folder).metrics["actor/grad_norm"])
