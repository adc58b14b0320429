"""The registry of checkpoints in the field: a released one opens, and it says which training data is gone since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("safetensors", reason="needs the extra train")

from cod_agent import Memory  # noqa: E402
from cod_agent.memory import lease  # noqa: E402
from cod_agent.memory.prune import prune  # noqa: E402
from cod_agent.memory.tombstones import bury  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402
from cod_train.cli.checkpoint import app  # noqa: E402
from cod_train.cli.promote import _warn  # noqa: E402
from cod_train.lineage import became, taken_out  # noqa: E402

GOLDEN = Path(__file__).with_name("golden")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A released registry, and beside it the run database its checkpoint was trained on."""
    shutil.copy(GOLDEN / "v1.db", tmp_path)
    return Path(shutil.copy(GOLDEN / "registry-v1.db", tmp_path / "registry.db"))


def take_out(folder: Path) -> None:
    """Forget something of one run, and prune what was trained on of all."""
    memory = Memory.open(folder / "v1.db", durable=False)
    with Registry(folder / "registry.db") as registry:
        trained = {run.chain for run in registry.training_runs("better")}

    query = "SELECT min(x.id) FROM effects x JOIN episodes e ON e.id = x.episode_id WHERE e.run_id = 1"
    effects = memory.read_sync(lambda conn: conn.execute(query).fetchone())
    memory.write_sync(lambda conn: bury(conn, 1, "forgot", 0, {"reason": "a test"}, {"effect": effects}))
    prune(memory, 1e12, trained=trained)
    memory.close()


def test_a_released_registry_opens_and_goes_on(file: Path) -> None:
    with Registry(file) as registry:
        assert [(one.name, one.state) for one in registry.all()] == [
            *[("base", "promoted"), ("better", "retired"), ("again", "rejected")]
        ]
        assert [change.act for change in registry.history("better")] == ["add", "promote", "rollback"]
        assert registry.verdicts("better")[0].said["positions"][0]["candidate"]["mean"] == 0.5
        assert [run.check() for run in registry.training_runs("better")] == ["same"] * 7
        registry.promote("better", "after all")
        assert registry.fresh_seed() == 1000002


def test_training_data_that_is_gone_is_told_wherever_the_checkpoint_is(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_out(file.parent)
    with Registry(file) as registry:
        runs = registry.training_runs("better")
        states = became(runs)
        assert states == [run.check() for run in runs]
        assert states[0] == "forgotten" and states.count("pruned") >= 4 and "changed" not in states
        told = taken_out(runs)
        assert told == f"1 forgotten, {states.count('pruned')} pruned"
        _warn(registry, "again")  # trained from it
    assert f"of what better was trained on, runs are gone since ({told})" in capsys.readouterr().err
    invoke = CliRunner().invoke
    shown = invoke(app, ["show", "better", "--registry", str(file)])
    assert shown.exit_code == 0 and f"gone      of its training data since: {told}" in shown.output
    assert "gone since" not in invoke(app, ["show", "base", "--registry", str(file)]).output
    lines = invoke(app, ["lineage", "again", "--registry", str(file)]).output
    assert f"gone since: {told}" in " ".join(lines.split())
    said = json.loads(invoke(app, ["lineage", "again", "--registry", str(file), "--json"]).stdout)
    assert [one["gone"] for one in said["lineage"]] == ["", told, ""]


def test_a_run_that_only_went_on_is_not_gone(file: Path) -> None:
    with Registry(file) as registry:
        runs = registry.training_runs("better")
    memory = Memory.open(file.parent / "v1.db", durable=False)
    memory.write_sync(lambda conn: lease.take(conn, 1, "lake", "x"))
    memory.close()
    assert became(runs) == ["same"] * 7 and taken_out(runs) == ""
