"""Training with verl on a Ray of its own: a real step, its replay, a server that dies, a solver over HTTP, two ranks."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

for package in ("torch", "verl", "ray", "transformers"):
    pytest.importorskip(package)

import psutil  # noqa: E402
from trainings import ROOT, SMALL, command, gradient, only_step, trained  # noqa: E402

from cod_train.progress import evaluations, newest_checkpoint, steps  # noqa: E402

pytestmark = pytest.mark.slow

LIVE = ("--env", "frozen-lake:tiny", *SMALL)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real step with verl, Ray and TransferQueue on CPU, evaluated and saved."""
    out = tmp_path_factory.mktemp("verl") / "run"
    trained(*LIVE, "--out", out, "--steps", 1, "--eval-packs", 2)
    return out


def record(lived: Path) -> Path:
    (file,) = (lived / "rollouts").glob("train-*.db")
    return file


def test_a_real_step_of_verl(lived: Path) -> None:
    step = only_step(lived)
    assert step.metrics["cod/rollouts"] == 8 and step.metrics["cod/rollouts_lost"] == 0
    assert step.metrics["actor/grad_norm"] > 0 and len(step.rewards) == 3
    assert abs(step.metrics["actor/rec_ratio"] - 1) < 1e-4 and step.metrics["actor/rec_clipped"] == 0
    assert step.metrics["cod/trained_tokens"] < step.metrics["cod/tokens"]
    assert sorted(evaluations(lived)) == [0, 1]
    assert newest_checkpoint(lived) is not None and (lived / "model" / "model.gguf").is_file()


def test_validation_by_position_is_logged_by_verl(lived: Path) -> None:
    said = (lived / "metrics-001.jsonl").read_text()
    for position in range(3):
        assert f"val-aux/frozen-lake:tiny/reward_pos{position}/mean@1" in said


def test_the_record_of_the_step_trains_in_one_process_with_the_same_gradient(lived: Path, tmp_path: Path) -> None:
    trained("--from", record(lived), "--in-process", *SMALL, "--out", tmp_path / "alone", "--steps", 1)
    assert gradient(tmp_path / "alone") == pytest.approx(gradient(lived), rel=1e-6)
    assert only_step(tmp_path / "alone").rewards == only_step(lived).rewards


@pytest.mark.cluster
def test_a_training_in_one_process_goes_on_in_verl_and_again_after_its_rollout_server_died(tmp_path: Path) -> None:
    out = tmp_path / "dies"
    # Steps of many rollouts, so that most of their time is that of the server.
    words = (
        "--env",
        "frozen-lake:tiny",
        "--packs",
        4,
        "--group",
        8,
        "--eval-packs",
        0,
        "--save-every",
        1,
        "--out",
        out,
    )
    trained(*words, "--in-process", "--steps", 1)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    going = subprocess.Popen(
        command(*words, "--steps", "200"), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    # The fourth step's record: its rollouts are under way, and the server has its weights.
    while time.monotonic() < deadline and not [*out.glob("rollouts/train-000004*.db")] and going.poll() is None:
        time.sleep(0.05)
    for process in psutil.Process(going.pid).children(recursive=True):
        if process.name().startswith("ray::Server"):
            process.kill()
    _, said = going.communicate(timeout=240)
    assert going.returncode == 1 and "can train" in said and "the rollout server failed" in said
    before = int((out / "latest_checkpointed_iteration.txt").read_text())
    trained(*words, "--steps", before + 1)
    assert [step.number for step in steps(out)] == list(range(1, before + 2))
    (file,) = (out / "rollouts").glob("train-000002*.db")
    with sqlite3.connect(file) as conn:
        packs = {name.split("#")[0].rpartition("/")[2] for (name,) in conn.execute("SELECT name FROM runs")}
    assert packs == {"4", "5", "6", "7"}, "the packs of the second step, though another way of training took it"


@pytest.mark.cluster
def test_a_solver_that_speaks_http_trains_live(tmp_path: Path) -> None:
    out = tmp_path / "http"
    trained(*LIVE, "--out", out, "--steps", 1, "cod.solver=http_solver:make")
    step = only_step(out)
    assert step.metrics["cod/rollouts"] == 8 and step.metrics["cod/rollouts_lost"] == 0
    assert abs(step.metrics["actor/rec_ratio"] - 1) < 1e-4
    with sqlite3.connect(record(out)) as conn:
        kinds = conn.execute(
            "SELECT e.kind, count(*), sum(c.on_policy AND c.inexact = '') FROM calls c JOIN episodes e ON e.id = c.episode_id"
            " GROUP BY e.kind ORDER BY e.kind"
        ).fetchall()
    assert [kind for kind, _, _ in kinds] == ["solve", "update"] and all(calls == exact for _, calls, exact in kinds)


@pytest.mark.cluster
def test_two_ranks_replaying_a_record_have_the_gradient_of_one_process(tmp_path: Path) -> None:
    trained(*LIVE, "--in-process", "--out", tmp_path / "one", "--steps", 1)
    # There are records for one step: it is the last one, whatever was asked for, and it is saved.
    two = "trainer.n_gpus_per_node=2"
    trained("--from", record(tmp_path / "one"), *SMALL, two, "--out", tmp_path / "two", "--steps", 30)
    assert gradient(tmp_path / "two") == pytest.approx(gradient(tmp_path / "one"), rel=1e-5)
    assert newest_checkpoint(tmp_path / "two") is not None
