"""A Ray cluster of two nodes trains as one machine does: examples/ray_cluster/two_nodes.sh, for real, on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl")

ROOT = Path(__file__).parent.parent


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="the example is a bash script")
def test_two_nodes_train_together_and_leave_nothing_behind(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHON": sys.executable, "PORT": str(port), "OUT": str(tmp_path)}
    environment["PYTHONPATH"] = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    environment.pop("RAY_ADDRESS", None)
    words = ["trainer.total_training_steps=1", "trainer.save_freq=-1", "trainer.logger=[file]"]
    words += ["data.train_batch_size=2", "actor_rollout_ref.rollout.n=8"]
    script = str(ROOT / "examples" / "ray_cluster" / "two_nodes.sh")
    # In a session of its own: what runs out of time takes both nodes with it.
    pipe, said = subprocess.PIPE, ""
    ran = subprocess.Popen(
        [script, *words],
        cwd=tmp_path,
        env=environment,
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = ran.communicate(timeout=420)
    finally:
        if ran.returncode is None:
            os.killpg(ran.pid, signal.SIGKILL)
            ran.wait()
    assert ran.returncode == 0, said[-6000:]
    (told,) = tmp_path.glob("metrics-*.jsonl")
    metrics = json.loads(told.read_text().splitlines()[-1])["data"]
    # 2 packs x 8 rollouts; rows are dealt to 2 ranks x 2 mini-batches x 4 micro-batches.
    assert metrics["cod/rollouts"] == 16 and metrics["cod/rollouts_lost"] == 0
    assert (metrics["cod/computed_rows"] + metrics["cod/padding_rows"]) % 16 == 0 and metrics["actor/grad_norm"] > 0
    with socket.socket() as asked:
        assert asked.connect_ex(("127.0.0.1", port)) != 0, "the head node is still there"
