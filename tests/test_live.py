"""Live rollouts: the runtime's agent over a token-in, token-out engine, recorded and read back."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("transformers", "jinja2"):
    pytest.importorskip(package)

from cod_agent.models.base import Sampling  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.batch import rows_of  # noqa: E402
from cod_train.engines import Engine, engine_for  # noqa: E402
from cod_train.live import Recorder, made_solver  # noqa: E402
from cod_train.model import Drawn, TokenModel  # noqa: E402
from cod_train.rollouts import Rollout  # noqa: E402

PLACE = {"world": "frozen-lake:tiny", "split": "train", "seed": 0, "pack": 3, "size": 3, "form": "compact"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    made = engine_for(folder_of("embedded"), slots=8, seed=0)
    yield made
    made.close()


def lived(
    engine: Engine,
    file: Path,
    *,
    context_length: int | None = None,
    fail: int | None = None,
    gate: str = "open",
) -> Rollout:
    """One rollout; the `fail`-th call finds the server dead."""
    from transformers import AutoTokenizer

    tokenizer, calls = AutoTokenizer.from_pretrained(folder_of("embedded")), 0

    async def generate(request: str, prompt: list[int], params: dict[str, Any]) -> Drawn:
        nonlocal calls
        calls += 1
        if calls == fail:
            raise ConnectionError("gone")
        drawn = await asyncio.wrap_future(engine.ask(prompt, **params))
        return Drawn(drawn.ids, drawn.logprobs, drawn.finish, "test/step-0")

    def model(request: str) -> TokenModel:
        sampling = Sampling(max_tokens=40)
        return TokenModel("test", tokenizer, generate, sampling=sampling, form="compact", context_length=context_length)

    recorder = Recorder(file, model, gate=gate)
    try:
        return asyncio.run(recorder.live(PLACE, "0"))
    finally:
        recorder.close()


def test_a_live_rollout_is_exact_and_of_the_weights_that_drew_it(engine: Engine, tmp_path: Path) -> None:
    rollout = lived(engine, tmp_path / "live.db")
    assert rollout.weights == {"test/step-0"} and len(rollout.rewards) == 3
    assert [part.refused for part in rollout.segments] == [""] * 5
    assert all(sum(row.tokens.mask) for row in rows_of(rollout))


def test_a_policy_that_fills_the_conversation_fails_its_task_and_the_life_goes_on(
    engine: Engine, tmp_path: Path
) -> None:
    full = lived(engine, tmp_path / "full.db", context_length=45)
    with sqlite3.connect(tmp_path / "full.db") as conn:
        (unanswered,) = conn.execute("SELECT count(*) FROM calls WHERE sampled_tokens = 0").fetchone()
    assert unanswered and len(full.segments) == 5
    assert 0.0 in full.rewards and not any(math.isnan(reward) for reward in full.rewards)
    assert {part.refused for part in full.segments} <= {"", "the answer has no tokens"}
    # What it said while there was room is still credited.
    assert any(part.calls for part in full.segments)
    assert all(len(call.prompt) < 45 and call.sampled for part in full.segments for call in part.calls)


def test_an_update_without_room_is_refused_and_costs_its_penalty(engine: Engine, tmp_path: Path) -> None:
    rollout = lived(engine, tmp_path / "none.db", context_length=2)
    assert rollout.rewards == (0.0, 0.0, 0.0) and rollout.update_rewards == (-0.1, -0.1)
    assert list(rows_of(rollout)) == []


def test_an_update_that_the_write_gate_holds_back_neither_trains_nor_is_inherited(
    engine: Engine, tmp_path: Path
) -> None:
    rollout = lived(engine, tmp_path / "gated.db", gate="review")
    refused = {(part.kind, part.position): part.refused for part in rollout.segments if part.refused}
    assert list(refused) == [("update", 0), ("update", 1)] and "held back" in refused["update", 0]
    assert rollout.heirs == (3, 3, 3) and all(map(math.isnan, rollout.update_rewards))
    assert [row.label["kind"] for row in rows_of(rollout)] == ["solve"] * 3


def test_a_server_that_fails_ends_the_rollout_with_its_reason(engine: Engine, tmp_path: Path) -> None:
    from cod_agent.errors import ModelError

    with pytest.raises(ModelError, match="the rollout server failed: ConnectionError: gone"):
        lived(engine, tmp_path / "dead.db", fail=3)


def test_solvers_are_made_by_name() -> None:
    from cod_agent.errors import UsageError

    assert made_solver(None, "http://here", "m") is None
    assert made_solver("http_solver:make", "http://127.0.0.1:1/v1", "m") is not None
    for wrong in ("nowhere:make", "http_solver:nothing", "http_solver"):
        with pytest.raises(UsageError, match="solver"):
            made_solver(wrong, "http://here", "m")


@pytest.mark.parametrize("out", ["trl", "vllm/first"])
def test_no_training_goes_into_a_folder_that_verl_would_import(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from cod_agent.errors import UsageError
    from cod_train.cli.train import _check_folder, app

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="choose another --out"):
        CliRunner().invoke(app, ["--env", "frozen-lake:tiny", "--out", out], catch_exceptions=False)
    assert not Path(out).exists()
    for fine in (Path("runs/trl"), tmp_path.parent / "trl"):
        _check_folder(fine)


@pytest.mark.parametrize(("unknown", "told"), [("nowhere", ""), ("harder", ": that is a suite of cod eval")])
def test_each_of_several_worlds_is_looked_up_before_anything_starts(tmp_path: Path, unknown: str, told: str) -> None:
    from typer.testing import CliRunner

    from cod_agent.errors import UnknownName
    from cod_train.cli.train import app

    words = ["--env", f"frozen-lake:tiny,{unknown}", "--out", str(tmp_path / "out")]
    with pytest.raises(UnknownName, match=f"no world called '{unknown}'{told}"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
