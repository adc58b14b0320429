"""The checkpoints that a run database names are those of the registry, with the digest that answered."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from cod_agent import CoDAgent  # noqa: E402
from cod_agent.environments import FrozenLake  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402
from cod_train.cli.checkpoint import app  # noqa: E402


def checked(db: Path, registry: Path) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["verify", str(db), "--registry", str(registry), "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_each_checkpoint_that_answered_is_known_and_unchanged(tmp_path: Path) -> None:
    registry, db, folder = tmp_path / "registry.db", tmp_path / "lives.db", tmp_path / "policy"
    shutil.copytree(folder_of("embedded"), folder)
    lake = FrozenLake("tiny", seed=1, form="compact")
    with CoDAgent("lake", model="embedded", memory=db) as agent:
        list(agent.run_sync(lake.pack(2)))
    with Registry(registry, create=True) as opened:
        pass
    code, said = checked(db, registry)
    assert (code, said["checkpoints"], len(said["elsewhere"])) == (
        0,
        [],
        1,
    )  # its file's fingerprint, nobody's checkpoint yet
    with Registry(registry) as opened:
        opened.add(folder, name="lake")
        named = opened.get("lake").weights
    assert checked(db, registry) == (0, {"ok": True, "checkpoints": ["lake"], "elsewhere": [], "faults": []})
    with sqlite3.connect(db) as conn:
        conn.execute("UPDATE calls SET weights = ? WHERE id = 2", (f"{named}/vllm",))
        conn.execute("UPDATE calls SET weights = 'lake@0123456789ab' WHERE id = 3")
    code, said = checked(db, registry)
    assert (code, said["checkpoints"]) == (1, ["lake"])
    assert said["faults"] == [f"row 3 of calls names lake@0123456789ab, which {registry} does not know"]
    (folder / "generation_config.json").write_text("{}")
    code, said = checked(db, registry)
    assert "checkpoint lake is not what answered: generation_config.json" in said["faults"]
