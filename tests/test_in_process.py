"""Training in one process, from lives and from records: real weights, real verl, real run databases."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

for package in ("torch", "verl", "transformers", "xllamacpp"):
    pytest.importorskip(package)

from trainings import ROOT, SMALL, command, gradient, only_step, trained  # noqa: E402

from cod_train.progress import evaluations, newest_checkpoint, steps  # noqa: E402
from cod_train.verl_main import alone_in  # noqa: E402

pytestmark = pytest.mark.slow

TINY = ("--env", "frozen-lake:tiny", "--in-process", *SMALL)
COSINE = ("--rate", 7e-4, "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine")


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of two steps, its learning rate falling along a cosine, with an evaluation before and after."""
    out = tmp_path_factory.mktemp("lived") / "run"
    trained(*TINY, *COSINE, "--out", out, "--steps", 2, "--eval-packs", 4)
    return out


def record(lived: Path, step: int = 1) -> Path:
    (file,) = (lived / "rollouts").glob(f"train-{step:06d}*.db")
    return file


def test_a_training_leaves_checkpoint_model_figure_metrics_and_records(lived: Path) -> None:
    assert [step.number for step in steps(lived)] == [1, 2]
    for step in steps(lived):
        assert step.metrics["cod/rollouts"] == 8 and step.metrics["cod/rollouts_lost"] == 0
        assert step.metrics["actor/grad_norm"] > 0 and len(step.rewards) == 3
    assert sorted(evaluations(lived)) == [0, 2]
    assert [point.n for point in evaluations(lived)[0].points] == [4, 4, 4]
    checkpoint = newest_checkpoint(lived)
    assert checkpoint is not None and checkpoint.parent.parent.name == "global_step_2"
    assert (lived / "train.png").stat().st_size > 10_000
    assert list((lived / "tensorboard").iterdir())


def test_the_first_update_is_on_policy(lived: Path) -> None:
    # What the sampler said of its tokens is what the trainer says: the ratios are 1 before anything moved.
    metrics = steps(lived)[0].metrics
    assert abs(metrics["actor/rec_ratio"] - 1) < 1e-4 and abs(metrics["actor/rec_kl"]) < 1e-4
    assert metrics["actor/rec_clipped"] == 0


def test_the_learning_rate_falls_to_zero_with_the_last_step(lived: Path) -> None:
    # A schedule that does not know how many steps there are swings between the whole rate and none.
    assert [step.metrics["actor/lr"] for step in steps(lived)] == pytest.approx([3.5e-4, 0.0])


def test_the_trained_weights_play_in_the_runtime(lived: Path) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "cod_agent.cli", "eval", "frozen-lake:tiny", "--json"]
        + ["--model", f"gguf:{lived / 'model' / 'model.gguf'}", "--packs", "4", "--out", str(lived / "eval")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    assert [point["n"] for point in json.loads(out.stdout)["positions"]] == [4, 4, 4, 4]


def test_a_replay_of_the_record_has_the_gradient_of_the_live_step(lived: Path, tmp_path: Path) -> None:
    trained("--from", record(lived), "--in-process", *SMALL, "--out", tmp_path / "replay", "--steps", 1)
    live = steps(lived)[0].metrics["actor/grad_norm"]
    assert gradient(tmp_path / "replay") == pytest.approx(live, rel=1e-6)
    assert only_step(tmp_path / "replay").rewards == steps(lived)[0].rewards


def test_merged_sequences_have_the_gradient_of_separate_calls(lived: Path, tmp_path: Path) -> None:
    trained(
        "--from", record(lived), "--in-process", *SMALL, "--out", tmp_path / "apart", "cod.merge=false", "--steps", 1
    )
    apart, merged = only_step(tmp_path / "apart").metrics, steps(lived)[0].metrics
    assert apart["actor/grad_norm"] == pytest.approx(merged["actor/grad_norm"], rel=1e-5)
    assert apart["cod/trained_tokens"] == merged["cod/trained_tokens"]
    assert apart["cod/tokens"] > 1.5 * merged["cod/tokens"]


def test_new_and_recorded_packs_mix(lived: Path, tmp_path: Path) -> None:
    trained(*TINY, "--from", record(lived), "--out", tmp_path / "mixed", "--steps", 1)
    (live,) = (tmp_path / "mixed" / "rollouts").glob("train-*.db")
    with sqlite3.connect(live) as conn:
        (runs,) = conn.execute("SELECT count(*) FROM runs").fetchone()
    assert runs == 4 and only_step(tmp_path / "mixed").metrics["cod/rollouts"] == 8


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    words = (*TINY, "--out", out, "--save-every", 1, "--packs", 1, "--group", 2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    going = subprocess.Popen(
        command(*words, "--steps", 50), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and newest_checkpoint(out) is None:
        time.sleep(0.2)
    os.killpg(going.pid, signal.SIGKILL)
    going.wait()
    before = int((out / "latest_checkpointed_iteration.txt").read_text())
    trained(*words, "--steps", before + 2)
    assert [step.number for step in steps(out)] == list(range(1, before + 3))
    assert (out / "metrics-002.jsonl").is_file()
    # What was recorded for the step it died in is still there, beside what was lived in its stead.
    assert len(list((out / "rollouts").glob("train-*.db"))) >= before + 2


def test_who_ends_the_command_ends_the_training(tmp_path: Path) -> None:
    out = tmp_path / "ended"
    words = (*TINY, "--out", out, "--packs", 1, "--group", 2, "--steps", 500)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "said").open("w+") as said:
        going = subprocess.Popen(command(*words), cwd=ROOT, env=environment, stdout=said, stderr=said)
        try:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not steps(out):
                time.sleep(0.2)
            going.send_signal(signal.SIGTERM)  # to the command alone, as a supervisor does
            assert going.wait(timeout=60) == 143
        finally:
            going.kill()
        said.seek(0)
        assert "Stopped. The same command goes on" in said.read()
    assert 0 < len(steps(out)) < 500
    with alone_in(out):
        pass  # nobody trains there any more


def test_a_folder_belongs_to_one_training(lived: Path) -> None:
    refused = trained(*TINY, *COSINE, "--out", lived, "--steps", 2, "--seed", 5, ok=False)
    assert refused.exit_code == 1 and "data.seed=5" in refused.stderr and "Choose another --out" in refused.stderr


def test_a_mistake_does_not_make_a_folder_its_own(tmp_path: Path) -> None:
    out = tmp_path / "typo"
    refused = trained(*TINY, "--out", out, "--steps", 1, "cod.creditt=x", ok=False)
    assert refused.exit_code == 1 and "cod.creditt" in refused.stderr and not (out / "train.json").exists()
    cool = trained(*TINY, "--out", out, "actor_rollout_ref.rollout.temperature=0.7", ok=False)
    assert cool.exit_code == 1 and "none of them trains" in cool.stderr


def test_one_training_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        refused = trained(*TINY, "--out", tmp_path, "--steps", 1, ok=False)
    assert refused.exit_code == 1 and f"process {os.getpid()}" in refused.stderr


def test_what_was_recorded_at_another_temperature_is_refused_with_the_reason(tmp_path: Path) -> None:
    db = tmp_path / "cool.db"
    run = [sys.executable, "-m", "cod_agent.cli", "run", "frozen-lake:tiny", "--model", "embedded", "--db", str(db)]
    subprocess.run([*run, "--packs", "2", "--temperature", "0.7"], check=True, capture_output=True, cwd=ROOT)
    refused = trained("--from", db, "--in-process", *SMALL, "--out", tmp_path / "no", "--steps", 1, ok=False)
    assert refused.exit_code == 1
    assert "14 cannot" in refused.stderr and "log-probabilities are not those of the distribution" in refused.stderr


def test_a_player_without_tokens_cannot_be_trained_on(tmp_path: Path) -> None:
    db = tmp_path / "player.db"
    run = [sys.executable, "-m", "cod_agent.cli", "run", "frozen-lake:tiny", "--model", "scripted:perfect"]
    subprocess.run([*run, "--db", str(db), "--packs", "1"], check=True, capture_output=True, cwd=ROOT)
    refused = trained("--from", db, "--in-process", *SMALL, "--out", tmp_path / "no", "--steps", 1, ok=False)
    assert refused.exit_code == 1 and "nothing recorded there can train" in refused.stderr
