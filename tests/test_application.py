"""examples/application.py: an agent inside an application lives through a switch of weights, and nothing is lost."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("verl")
pytest.importorskip("xllamacpp")

from cod_agent.memory.readonly import look  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402

PATH = Path(__file__).parent.parent / "examples" / "application.py"


@pytest.mark.slow
def test_the_guide_works_on_while_its_weights_change(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("application", PATH)
    assert spec is not None and spec.loader is not None
    application = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(application)
    monkeypatch.setattr(application, "BEFORE", 3)
    monkeypatch.setattr(application, "AFTER", 4)
    asyncio.run(application.main(tmp_path))

    said = capfd.readouterr().out
    weak, better = (f"{name}@" for name in ("weak", "better"))
    with Registry(tmp_path / "registry.db") as registry:
        assert [one.name for one in registry.all() if one.state == "promoted"] == ["better"]
        known = {one.weights for one in registry.all()}
    with look(tmp_path / "guide.db") as conn:
        calls = [row[0] for row in conn.execute("SELECT weights FROM calls ORDER BY id")]
        versions = [
            row[0] for row in conn.execute("SELECT weights FROM contexts WHERE episode_id IS NOT NULL ORDER BY version")
        ]
        failed = conn.execute("SELECT count(*) FROM attempts").fetchone()[0]
        late = conn.execute("SELECT count(*) FROM tasks WHERE reward IS NOT NULL").fetchone()[0]
    # One life: first the weak weights, then the better ones, and nothing in between or besides.
    assert {name.split("/")[0] for name in calls} == known and failed == 0
    assert [name.split("@")[0] for name in calls] == sorted((name.split("@")[0] for name in calls), reverse=True)
    assert versions[0].startswith(weak) and versions[-1].startswith(better)
    assert late >= 7 and re.findall(r"traveller +(\d+)", said)[:3] == ["0", "2", "1"], (
        "ratings come late, the newer one first"
    )
    assert weak in said and better in said, "cod context log names both"
