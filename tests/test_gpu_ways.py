"""What the GPU configs do otherwise than `cpu_tiny` is run on the CPU: the gradient must be the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parent.parent

SMALL = ["trainer.total_training_steps=1", "trainer.save_freq=-1", "trainer.logger=[file]", "cod.mini_batches=1"]
SMALL += ["data.train_batch_size=2", "actor_rollout_ref.rollout.n=8", "data.pack_size=3"]
AS_ON_GPUS = ["cod.micro_batches=null", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=1024"]
AS_ON_GPUS += [f"actor_rollout_ref.model.{key}=true" for key in ("use_remove_padding", "enable_gradient_checkpointing")]


def gradient(folder: Path, *words: str) -> float:
    command = [sys.executable, "-m", "cod_train.verl_main", "--in-process", f"trainer.default_local_dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, *SMALL, *words], env=environment, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    (told,) = folder.glob("metrics-*.jsonl")
    return float(json.loads(told.read_text().splitlines()[-1])["data"]["actor/grad_norm"])


@pytest.mark.slow
def test_micro_batches_by_tokens_rows_without_padding_and_checkpointing_change_no_gradient(tmp_path: Path) -> None:
    lived = gradient(tmp_path / "cpu")
    (record,) = (tmp_path / "cpu" / "rollouts").glob("*.db")
    words = ["data.source=recorded", f"data.recorded=[{record}]"]
    assert gradient(tmp_path / "gpu", *words, *AS_ON_GPUS) == pytest.approx(lived, rel=1e-5) and lived > 0
