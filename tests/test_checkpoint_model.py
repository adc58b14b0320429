"""Kinds of models of other packages, and the one that comes with the trainer: `checkpoint:NAME`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra train")
pytest.importorskip("xllamacpp", reason="needs the extra local")

from cod_agent import CoDAgent, models  # noqa: E402
from cod_agent.environments import make_world  # noqa: E402
from cod_agent.errors import CodError, UnknownName, UsageError  # noqa: E402
from cod_agent.memory.readonly import look  # noqa: E402
from cod_agent.models.base import Sampling  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402

LAKE = make_world("frozen-lake:small", seed=3, form="compact")


@pytest.fixture(autouse=True)
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages that name kinds of models, as installed ones do."""
    site = tmp_path / "site"
    written = site / "kinds-1.0.dist-info"
    written.mkdir(parents=True)
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: kinds\nVersion: 1.0\n")
    (written / "entry_points.txt").write_text(
        "[cod.models]\ncheckpoint = cod_train.checkpoint_model:resolve\nbroken = kinds_of_mine:gone\necho = kinds_of_mine:echo\n"
    )
    (site / "kinds_of_mine.py").write_text("def echo(rest, **given):\n    return rest, given\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    models._others.cache_clear()
    yield
    models._others.cache_clear()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of `weak`, with its GGUF file, and `bare`, without."""
    folder = tmp_path_factory.mktemp("shelf")
    with Registry(folder / "registry.db", create=True) as made:
        weak = made.add(folder_of("embedded-base"), name="weak")
        bare = folder / "bare"
        shutil.copytree(weak.folder, bare)
        (bare / "model.gguf").unlink()
        made.add(bare, name="bare", parent="weak")
    return folder


def lived(name: str, path: Path) -> set[str]:
    """Live a pack with a model; the weights that its calls have on record, all of them exact."""
    model = models.resolve(name, world=LAKE, sampling=Sampling(seed=1))
    assert (model.name, model.form) == (name, "compact")
    try:
        with CoDAgent("agent", model=model, memory=path) as agent:
            assert len(list(agent.run_sync(LAKE.pack(2)))) == 2
    finally:
        model.close()
    with look(path) as conn:
        calls = conn.execute("SELECT weights, inexact, sampled_tokens FROM calls").fetchall()
    assert calls and not any(inexact for _, inexact, _ in calls) and max(count for _, _, count in calls) <= 40
    return {weights for weights, _, _ in calls}


def test_a_checkpoint_is_played_by_its_gguf_file(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (weights,) = lived(f"checkpoint:{shelf}/registry.db:weak", tmp_path / "runs.db")
    with Registry(shelf / "registry.db") as registry:
        assert registry.of_weights(weights) == registry.get("weak")
    monkeypatch.setenv("COD_REGISTRY", str(shelf / "registry.db"))
    assert lived("checkpoint:weak", tmp_path / "again.db") == {weights}


def test_without_one_our_own_engine_computes_the_folder(shelf: Path, tmp_path: Path) -> None:
    (weights,) = lived(f"checkpoint:{shelf}/registry.db:bare", tmp_path / "runs.db")
    with Registry(shelf / "registry.db") as registry:
        assert registry.of_weights(weights) == registry.get("bare")
    (unregistered,) = lived(f"checkpoint:{shelf / 'bare'}", tmp_path / "folder.db")
    assert unregistered == weights


def test_files_that_changed_since_are_refused(shelf: Path, tmp_path: Path) -> None:
    with Registry(tmp_path / "registry.db", create=True) as made:
        shutil.copytree(shelf / "bare", tmp_path / "copy")
        made.add(tmp_path / "copy", name="mine")
    (tmp_path / "copy" / "generation_config.json").write_text("{}")
    with pytest.raises(CodError, match="changed after mine was registered"):
        models.resolve("checkpoint:mine")
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(CodError, match="is gone"):
        models.resolve("checkpoint:mine")


def test_what_is_not_there_is_said(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no registry registry\.db"):
        models.resolve("checkpoint:weak")
    with pytest.raises(UnknownName, match="did you mean weak"):
        models.resolve(f"checkpoint:{shelf}/registry.db:wek")
    with pytest.raises(UsageError, match="lacks its second half: checkpoint:NAME"):
        models.resolve("checkpoint:")


def test_a_kind_of_another_package_gets_everything_that_was_asked_for() -> None:
    said = Sampling(temperature=0.5)
    rest, given = models.resolve("echo:one:two", world=LAKE, sampling=said, base_url="http://x", exact=True)
    assert rest == "one:two" and given["world"] is LAKE and given["sampling"] is said
    assert given["base_url"] == "http://x" and given["exact"] and given["concurrency"] is None


def test_a_kind_that_cannot_be_loaded_says_whose_it_is() -> None:
    with pytest.raises(UsageError, match=r"models of kind 'broken' of package kinds cannot"):
        models.resolve("broken:one")
    with pytest.raises(UnknownName, match="did you mean echo:"):
        models.resolve("ecco:one")
