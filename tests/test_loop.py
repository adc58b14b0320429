"""The loop: its settings, its notes, what it shows; and a whole one, killed in every stage, that does nothing twice."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cod_agent.cli import app
from cod_agent.errors import CodError, StoreFull, UnknownName, UsageError
from cod_train.loop import report
from cod_train.loop.children import Child, Server
from cod_train.loop.rounds import STAGES, Round, rounds, write_whole
from cod_train.loop.settings import FREE, SHIPPED, Settings, keep, settled
from cod_train.loop.view import View

pytest.importorskip("verl")
ROOT = Path(__file__).parent.parent

# ---- settings ----


@pytest.mark.parametrize("name", SHIPPED)
def test_the_configs_that_come_with_the_package_hold_together(name: str) -> None:
    settings = Settings.named(name)
    assert settings.step_packs * settings.train.steps == settings.record.packs
    assert settings.gate.packs == 512 and "data.max_staleness=1000" in settings.train.keys


def test_the_trainings_of_the_configs_compose() -> None:
    pytest.importorskip("verl")
    from cod_train.verl_main import composed

    for name in SHIPPED:
        told = Settings.named(name).train
        config = composed([f"--config-name={told.config}", *told.keys])
        assert config.actor_rollout_ref.actor.clip_ratio_high == 4.0 and config.cod.keep_rollouts is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("round = 3", "did you mean rounds"),
        ("[record]\nagent = 3", "did you mean record.agents"),
        ("[gates]\npacks = 9", "did you mean gate"),
        ("[serve]\nengine = 'sglang'", "serve.engine"),
        ("[train]\nsteps = 7", "multiple of train.steps"),
        ("rounds = 0", "greater than or equal to 1"),
        ("rounds = = 1", "no TOML"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_what_to_say(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        Settings.named(file)


def test_a_config_nobody_knows_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean gpu_small"):
        Settings.named("gpu_smal")


def test_a_folder_keeps_its_settings_and_only_the_free_ones_change(tmp_path: Path) -> None:
    first = settled(tmp_path, None, {"rounds": 2, "record.packs": 16})
    keep(tmp_path, first)
    assert settled(tmp_path, None, {}) == first and first.record.packs == 16
    more = settled(tmp_path, None, {"rounds": 5, "serve.engine": "vllm"})
    assert more.rounds == 5 and more.serve.engine == "vllm"
    keep(tmp_path, more)
    with pytest.raises(UsageError, match=r"seed is 0 there and 1 here.*Say the same"):
        settled(tmp_path, None, {"seed": 1})
    with pytest.raises(UsageError, match=r"record\.packs is 16 there and 64 here"):
        settled(tmp_path, "cpu_tiny", {})
    assert settled(tmp_path, None, {}) == more and set(FREE) <= set(Settings.model_fields)


def test_no_two_rounds_or_loops_record_the_same_packs() -> None:
    loops = [Settings.named("cpu_tiny", {"seed": seed}) for seed in range(3)]
    seeds = [loop.pack_seed(round) for loop in loops for round in range(1, 1000)]
    assert len(set(seeds)) == len(seeds)


# ---- notes ----


def test_a_note_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    round = Round(tmp_path, 1)
    round.begin("base", "base@1")
    round.end("record", {"seconds": 1.0})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull, match=r"No space left.*goes on"):
        round.end("train", {"seconds": 2.0})
    again = Round(tmp_path, 1)
    assert again.stage("record") == {"seconds": 1.0} and again.stage("train") is None and not again.ended


def test_a_round_that_goes_on_keeps_the_incumbent_it_began_with(tmp_path: Path) -> None:
    Round(tmp_path, 1).begin("base", "base@1")
    Round(tmp_path, 1).begin("other", "other@2")
    assert [round.noted["incumbent"] for round in rounds(tmp_path)] == ["base"]


def test_a_damaged_note_is_said(tmp_path: Path) -> None:
    Round(tmp_path, 1).begin("base", "base@1")
    (tmp_path / "round-001" / "round.json").write_text("{")
    with pytest.raises(CodError, match=r"round\.json cannot be read"):
        rounds(tmp_path)


# ---- what it shows ----


def side(*means: float) -> dict[str, Any]:
    points = [
        {"position": at, "mean": mean, "low": mean - 0.05, "high": mean + 0.05, "n": 8} for at, mean in enumerate(means)
    ]
    return {"positions": points, "overall": {key: points[-1][key] for key in ("mean", "low", "high")}}


def a_loop(out: Path) -> None:
    """Round 1 promotes, round 2 does not, round 3 is promoted and taken back, of round 4 only the records are there."""
    told = [
        ("base", True, "", "round-001", side(0.2, 0.2), side(0.4, 0.5)),
        ("round-001", False, "", "round-001", side(0.35, 0.45), side(0.3, 0.1)),
        ("round-001", True, "its log-probabilities differ", "round-001", side(0.36, 0.46), side(0.7, 0.8)),
    ]
    for number, (incumbent, promoted, back, serves, theirs, ours) in enumerate(told, 1):
        round = Round(out, number)
        round.begin(incumbent, f"{incumbent}@1")
        notes: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
        notes["gate"] = {
            "promoted": promoted,
            "why": "because",
            "failed": [] if promoted else ["better"],
            "candidate": ours,
            "incumbent": theirs,
            "verdict": number,
        }
        notes["serve"] = {"name": serves, "weights": f"{serves}@1", "taken_back": back}
        for stage in STAGES:
            round.end(stage, {**notes[stage], "seconds": float(number)})
    last = Round(out, 4)
    last.begin("round-001", "round-001@1")
    last.end("record", {**side(0.3, 0.4), "seconds": 9.0})


def test_the_curve_takes_the_newest_measurement_of_what_serves(tmp_path: Path) -> None:
    a_loop(tmp_path)
    curve = report.measured(tmp_path)
    assert [one["after"] for one in curve] == [0, 1, 2, 3]
    assert [one["name"] for one in curve] == ["base", "round-001", "round-001", "round-001"]
    # After round 1 not the candidate's own gate, which it won, but the next one, where it was the incumbent.
    assert [one["positions"][1]["mean"] for one in curve] == [0.2, 0.45, 0.46, 0.46]
    assert [one["measured"] for one in curve] == [f"gate of round-00{number}" for number in (1, 2, 3, 3)]


def test_a_candidate_that_just_won_is_shown_as_its_gate_saw_it(tmp_path: Path) -> None:
    a_loop(tmp_path)
    for number in (2, 3, 4):
        (tmp_path / f"round-00{number}" / "round.json").unlink()
    assert [one["positions"][1]["mean"] for one in report.measured(tmp_path)] == [0.2, 0.5]


def test_table_figure_and_json_tell_rounds_and_verdicts(tmp_path: Path) -> None:
    from rich.console import Console

    assert report.measured(tmp_path) == [] and report.told(tmp_path)["serves"] is None
    a_loop(tmp_path)
    out = io.StringIO()
    Console(file=out, width=120).print(report.table(tmp_path))
    assert "[0.40, 0.50]" in out.getvalue() and "rejected; failed: better" in out.getvalue()
    assert "taken back: its log-probabilities differ" in out.getvalue()
    told = report.told(tmp_path)
    assert [one["ended"] for one in told["rounds"]] == [True, True, True, False] and told["serves"] == "round-001@1"
    assert "gate 2 s" in report.seconds(tmp_path) and json.dumps(told, allow_nan=False)
    pytest.importorskip("matplotlib")
    assert report.draw(tmp_path, "a loop").read_bytes().startswith(b"\x89PNG")


def test_every_event_is_a_line_of_its_own_also_after_a_torn_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "loop.jsonl"
    file.write_text('{"event": "cut o')
    with View(tmp_path, 3) as view:
        view.stage(2, "gate")
        view.event("gate_ended", "round 2: rejected", promoted=False)
    line = json.loads(file.read_text().splitlines()[-1])
    assert (line["event"], line["round"], line["stage"], line["promoted"]) == ("gate_ended", 2, "gate", False)
    assert capsys.readouterr().err == "round 2: rejected\n"


def test_the_live_view_names_round_stage_progress_and_what_serves(tmp_path: Path) -> None:
    from rich.console import Console

    a_loop(tmp_path)
    view, out = View(tmp_path, 5), io.StringIO()
    view.stage(3, "train")
    view.progress(5, 8, "steps, reward 0.41")
    view.serves("round-002@abc", 0.0)
    view.curve(report.table(tmp_path))
    Console(file=out, width=160).print(view._shown())
    for said in ("round 3 of 5, train 5 of 8", "reward 0.41", "serves round-002@abc since", "[0.40, 0.50]"):
        assert said in out.getvalue()


# ---- its commands ----


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    child = Child(["eval", "frozen-lak"], tmp_path / "log")
    deadline = time.monotonic() + 120
    while child.ended is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.ended == 1 and "did you mean frozen-lake" in child.last_words()
    asyncio.run(child.stop())


def test_a_server_that_has_ended_ends_the_waiting_for_it(tmp_path: Path) -> None:
    async def ask() -> None:
        server = Server(["--registry", str(tmp_path / "none.db")], tmp_path / "log")
        server.start()
        try:
            while True:
                assert await server.status() == {}
                await asyncio.sleep(0.1)
        finally:
            await server.stop()

    with pytest.raises(CodError, match=r"`cod serve` ended: .*none\.db"):
        asyncio.run(asyncio.wait_for(ask(), 120))


def test_a_promotion_that_serving_takes_back_is_noted_with_its_reason(tmp_path: Path) -> None:
    from cod_train.loop.stages import Loop

    old, new = (
        SimpleNamespace(name=name, weights=f"{name}@1", state=state)
        for name, state in (("old", "promoted"), ("new", "rejected"))
    )
    # The new weights come, serve, are compared, and `cod serve` takes the promotion back.
    seen = iter([("old@1", "new@1", new), ("new@1", "new@1", new), ("old@1", None, old)])
    now: list[Any] = []
    registry = SimpleNamespace(
        promoted=lambda: now[0][2],
        get=lambda name: {"old": old, "round-001": new}[name],
        history=lambda name: [SimpleNamespace(why="its log-probabilities differ")],
    )
    with View(tmp_path, 1) as view:
        loop = Loop(tmp_path, Settings(), registry, view)  # type: ignore[arg-type]

        async def status() -> dict[str, Any]:
            now[:] = [next(seen)]
            return {"serving": now[0][0], "coming": now[0][1], "since": 1.0}

        loop.server = SimpleNamespace(start=lambda: None, status=status)  # type: ignore[assignment]
        round = Round(tmp_path, 1)
        round.begin("old", "old@1")
        round.end("gate", {"promoted": True, "why": "better", "candidate": None, "incumbent": None, "seconds": 1})
        said = asyncio.run(loop._serve(round))
    assert said == {"name": "old", "weights": "old@1", "taken_back": "its log-probabilities differ"}


def refused(*words: Any) -> Result:
    """`cod loop WORDS`, in this process: nothing starts."""
    done = CliRunner().invoke(app, ["loop", *map(str, words)], prog_name="cod")
    assert done.exit_code == 1, done.output
    return done


def test_two_loops_in_a_folder_are_refused(tmp_path: Path) -> None:
    from cod_train.verl_main import alone_in

    out = tmp_path / "loop"
    with alone_in(out, "loop"):
        done = refused("--out", out, "--config", "cpu_tiny")
    assert f"another loop runs in {out}" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--config", "gpu_tiny"), "did you mean cpu_tiny"),
        (("--base", "embeded-base"), "did you mean embedded-base"),
        (("--base", "no/such/folder"), "no config.json"),
        (("--world", "frozen-lak:small"), "did you mean frozen-lake"),
        (("--serve", "sglang"), "serve.engine"),
    ],
)
def test_wrong_words_are_refused_before_anything_starts(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refused("--out", tmp_path / "loop", *words).stderr
    assert not (tmp_path / "loop").exists()


# ---- whole loops ----

TINY = """
world = "frozen-lake:tiny"
form = "compact"
max_tokens = 40
rounds = 1
pack_size = 2
record = {agents = 2, packs = 4}
gate = {packs = 8}
serve = {engine = "embedded"}
[train]
steps = 1
keys = ["actor_rollout_ref.actor.clip_ratio_high=4.0", "data.max_staleness=1000", "cod.keep_rollouts=false", "cod.mini_batches=1",
  "actor_rollout_ref.rollout.engine_kwargs.cod_cpu.train_threads=1"]
"""


def command(*words: Any) -> list[str]:
    return [sys.executable, "-m", "cod_agent.cli", "loop", *map(str, words)]


def run(*words: Any, ok: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(*words), env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def events(out: Path) -> list[dict[str, Any]]:
    file = out / "loop.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.is_file() else []


def left_behind(out: Path) -> list[tuple[int, str]]:
    """Processes that know the folder, a loop's children and theirs: their ids and commands."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            said = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(out) in said and int(process.name) != os.getpid():
            found.append((int(process.name), said))
    return found


def killed_in(out: Path, stage: str, *words: Any) -> None:
    """Run the loop, kill -9 it in a stage, and wait until nothing of it is left."""
    going = subprocess.Popen(command(*words), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    began, deadline = len(events(out)), time.monotonic() + 300
    while not any(event["event"] == f"{stage}_began" for event in events(out)[began:]):
        assert going.poll() is None and time.monotonic() < deadline, f"never came to {stage}"
        time.sleep(0.02)
    time.sleep({"train": 4.0, "export": 1.0}.get(stage, 0.3))  # somewhere inside
    going.send_signal(signal.SIGKILL)
    going.wait()
    if Path("/proc/self").exists():
        deadline = time.monotonic() + 60
        while left := left_behind(out):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


def rows(file: Path, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(file)) as conn:
        return conn.execute(query).fetchall()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A loop of one round that was killed in every stage, and then went to its end."""
    for package in ("torch", "verl", "transformers", "xllamacpp"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("killed")
    (folder / "tiny.toml").write_text(TINY)
    words = ("--config", folder / "tiny.toml", "--out", folder / "loop")
    for stage in STAGES:
        killed_in(folder / "loop", stage, *words)
    run(*words)
    return folder / "loop"


@pytest.mark.slow
def test_a_loop_killed_in_every_stage_does_nothing_twice(killed: Path) -> None:
    from cod_train.checkpoints import Registry

    (round,) = rounds(killed)
    assert round.ended
    for agent in range(2):
        file = round.database(agent)
        assert rows(file, "SELECT count(*) FROM runs") == [(4,)]
        assert rows(file, "SELECT count(*) FROM tasks WHERE state IN ('updated', 'closed')") == [(8,)]
        # Every call names the weights that were deployed.
        (weights,) = rows(file, "SELECT DISTINCT weights FROM calls")
        assert weights[0].startswith(round.noted["weights"])
    with Registry(killed / "registry.db") as registry:
        assert [one.name for one in registry.all()] == ["embedded-base", "round-001"]
        (verdict,) = registry.verdicts()
        assert (verdict.candidate, verdict.incumbent) == ("round-001", "embedded-base")
        assert registry.fresh_seed() == verdict.said["seed"] + 1  # killed in the gate, it went on with the same packs
        acts = [(change.checkpoint, change.after) for change in registry.history("round-001")]
        assert acts == [("round-001", "candidate"), ("round-001", "promoted" if verdict.promoted else "rejected")]
        assert {run.file for run in registry.training_runs("round-001")} == {
            round.database(agent) for agent in range(2)
        }
        promoted = registry.promoted()
        assert promoted is not None and promoted.weights == round.noted["serve"]["weights"]


@pytest.mark.slow
def test_a_loop_that_has_ended_tells_and_starts_nothing(killed: Path) -> None:
    before = len(events(killed))
    found = json.loads(run("--out", killed, "--json").stdout)
    assert len(events(killed)) == before
    assert [one["ended"] for one in found["rounds"]] == [True] and Path(found["figure"]).is_file()
    assert [one["after"] for one in found["curve"]] == [0, 1] and found["settings"]["rounds"] == 1
    assert len(found["curve"][0]["positions"]) == 2 and found["curve"][0]["positions"][0]["n"] == 8


@pytest.mark.slow
def test_notes_that_are_lost_are_made_again_from_what_was_done(killed: Path) -> None:
    from cod_train.checkpoints import Registry

    (round,) = rounds(killed)
    before = round.noted
    kept = {key: value for key, value in before.items() if key not in ("export", "gate", "serve")}
    write_whole(killed / "round-001" / "round.json", kept)
    run("--out", killed)
    (again,) = rounds(killed)

    def timeless(noted: dict[str, Any]) -> dict[str, Any]:
        return {
            key: {k: v for k, v in value.items() if k != "seconds"}
            for key, value in noted.items()
            if isinstance(value, dict)
        }

    assert timeless(again.noted) == timeless(before)
    with Registry(killed / "registry.db") as registry:
        assert len(registry.verdicts()) == 1 and len(registry.all()) == 2


@pytest.mark.slow
def test_a_training_that_fails_ends_the_loop_with_its_last_words(killed: Path, tmp_path: Path) -> None:
    out = tmp_path / "loop"
    (tmp_path / "wrong.toml").write_text(TINY.replace("cod.mini_batches=1", "cod.mini_batchs=1"))
    done = run("--config", tmp_path / "wrong.toml", "--out", out, ok=False)
    assert done.returncode == 1 and "the training of round 1 failed" in done.stderr and "mini_batchs" in done.stderr
    assert f"Go on with: cod loop --out {out}" in done.stderr
    (round,) = rounds(out)
    assert round.stage("record") is not None and round.stage("train") is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the model server in /proc")
def test_agents_outlive_their_model_server_and_sigterm_ends_the_loop_in_order(killed: Path) -> None:
    going = subprocess.Popen(
        command("--out", killed, "--rounds", 2),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )

    def wait_for(event: str) -> None:
        deadline = time.monotonic() + 300
        while not any(one["event"] == event and one.get("round") == 2 for one in events(killed)):
            assert going.poll() is None and time.monotonic() < deadline, f"never came to {event}"
            time.sleep(0.02)

    wait_for("record_began")
    time.sleep(0.2)
    (server,) = [
        process
        for process, said in left_behind(killed)
        if "-m cod_train.serving.embedded" in said and "_keeper" not in said
    ]
    os.kill(server, signal.SIGKILL)
    wait_for("train_began")
    going.terminate()
    _, said = going.communicate(timeout=120)
    assert going.returncode == 143 and f"Go on with: cod loop --out {killed}" in said
    assert not left_behind(killed)
    assert any(
        json.loads(line)["event"] == "died" for line in (killed / "serve" / "serve.jsonl").read_text().splitlines()
    )
    for agent in range(2):
        assert rows(
            rounds(killed)[1].database(agent), "SELECT count(*) FROM tasks WHERE state IN ('updated', 'closed')"
        ) == [(8,)]
