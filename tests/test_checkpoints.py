"""The registry: what may become a checkpoint, which states there are, and that nothing said is lost."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra train")
pytest.importorskip("transformers", reason="needs the extra train")

from safetensors.numpy import load_file, save_file  # noqa: E402

from cod_agent import CoDAgent  # noqa: E402
from cod_agent.environments import FrozenLake  # noqa: E402
from cod_agent.errors import CodError, NotADatabase, SchemaTooNew, StoreError, UnknownName, UsageError  # noqa: E402
from cod_agent.memory import Memory  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402
from cod_train.cli.checkpoint import app  # noqa: E402


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry(tmp_path / "registry.db", create=True) as made:
        yield made


@pytest.fixture(scope="module", autouse=True)
def shelf(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Copies of the shipped policies with their probes, which are made once for all tests."""
    with Registry(tmp_path_factory.mktemp("shelf") / "registry.db", create=True) as made:
        for policy in ("embedded-base", "embedded", "cloned"):
            SHELF[policy] = made.add(folder_of(policy)).folder


SHELF: dict[str, Path] = {}


def copied(policy: str, to: Path) -> Path:
    shutil.copytree(SHELF[policy], to)
    return to


def three(registry: Registry) -> Registry:
    """a, b and c: three promotions."""
    for name, policy in (("a", "embedded-base"), ("b", "embedded"), ("c", "cloned")):
        registry.add(SHELF[policy], name=name)
        registry.promote(name, f"{name} won")
    return registry


def states(registry: Registry) -> dict[str, str]:
    return {one.name: one.state for one in registry.all()}


# ---- states ----


def test_a_promotion_retires_what_was_promoted_and_rollback_goes_back_step_by_step(registry: Registry):
    three(registry)
    assert states(registry) == {"a": "retired", "b": "retired", "c": "promoted"}
    assert registry.rollback("c is rude", to="rejected").name == "b"
    assert registry.rollback("b too").name == "a"
    assert states(registry) == {"a": "promoted", "b": "retired", "c": "rejected"}
    with pytest.raises(UsageError, match="nothing was promoted before a"):
        registry.rollback("and a")
    registry.promote("b", "after all")
    assert registry.rollback("no").name == "a"
    told = [(change.checkpoint, change.after) for change in registry.history()][-4:]
    assert told == [("a", "retired"), ("b", "promoted"), ("b", "retired"), ("a", "promoted")]


def test_a_rollback_meant_for_one_checkpoint_spares_another(registry: Registry):
    three(registry)
    assert registry.rollback("b does not start", to="rejected", only="b").name == "c"
    assert states(registry)["b"] == "retired" and len(registry.history()) == 8


def test_what_is_rejected_stays_rejected(registry: Registry):
    registry.add(SHELF["embedded"], name="a")
    registry.reject("a", "worse")
    with pytest.raises(UsageError, match="a is rejected and cannot become promoted"):
        registry.promote("a", "please")
    with pytest.raises(UsageError, match="cannot become rejected"):
        registry.reject("a", "again")
    assert [change.why for change in registry.history("a")] == ["added", "worse"]


def test_a_late_rejection_does_not_leave_nothing_promoted(registry: Registry):
    """Two gates judged the same candidate, and the first promoted it."""
    three(registry)
    with pytest.raises(UsageError, match="c is promoted: `cod rollback`"):
        registry.decide("c", "b", False, {}, "unlucky packs")
    assert states(registry)["c"] == "promoted" and not registry.verdicts()


def test_the_tables_themselves_forbid_edits(registry: Registry):
    three(registry)
    conn = sqlite3.connect(registry.path, isolation_level=None)
    for forbidden in (
        "UPDATE checkpoints SET digest = 'x' WHERE name = 'a'",
        "UPDATE checkpoints SET state = 'promoted' WHERE name = 'a'",  # a second one
        "UPDATE checkpoints SET state = 'candidate' WHERE name = 'a'",
        "DELETE FROM checkpoints",
        "UPDATE history SET why = 'x'",
        "DELETE FROM history",
    ):
        with pytest.raises(sqlite3.IntegrityError):
            conn.execute(forbidden)
    conn.close()


def test_a_verdict_promotes_only_over_the_incumbent_it_was_about(registry: Registry):
    three(registry)
    registry.add(SHELF["embedded"], name="d")
    old = registry.keep_verdict("d", "b", True, {"why": "better than b"})
    with pytest.raises(UsageError, match="compared with b, but c is promoted now"):
        registry.promote("d", "won", old)
    with pytest.raises(UsageError, match="compared with b"):
        registry.decide("d", "b", True, {}, "won")
    assert [verdict.id for verdict in registry.verdicts("d")] == [old]
    with pytest.raises(UsageError, match="does not promote"):
        registry.promote("d", "won", registry.keep_verdict("d", "c", False, {}))
    number = registry.decide("d", "c", True, {"positions": []}, "won")
    assert states(registry)["d"] == "promoted" and registry.history("d")[-1].verdict == number


def test_no_seed_is_given_twice(registry: Registry):
    with Registry(registry.path) as other:
        seeds = [one.fresh_seed() for one in (registry, other) * 4]
    assert len(set(seeds)) == 8


# ---- what may become one ----


def test_adding_again_gives_the_same_one_and_another_of_that_name_is_refused(registry: Registry, tmp_path: Path):
    first = registry.add(SHELF["embedded"], name="a")
    assert registry.add(SHELF["embedded"], name="a") == first and len(registry.all()) == 1
    with pytest.raises(UsageError, match="another checkpoint|holds other weights"):
        registry.add(SHELF["cloned"], name="a")
    with pytest.raises(UsageError, match="is no name"):
        registry.add(SHELF["cloned"], name="a/b")
    with pytest.raises(UnknownName, match="did you mean a"):
        registry.add(SHELF["cloned"], name="b", parent="aa")


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def no_number(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config(**said: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **said}))

    return change


def another_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|user|>", "<|user|>\n"))


def swapped_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    said = json.loads(file.read_text())
    vocabulary = said["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(said))


def a_layer_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.3." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def header(name: str, **said: object) -> Callable[[Path], None]:
    """A tensor's entry in the weights' header, changed."""

    def change(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        entries = json.loads(raw[8 : 8 + length])
        entries[name] |= said
        new = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return change


def weights_twice(folder: Path) -> None:
    shutil.copy(folder_of("naive-base") / "model.safetensors", folder / "more.safetensors")


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    raw = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(raw) and None


BAD = {
    "a shape that does not fit": (header("model.norm.weight", dtype="I32"), "damaged or cut off"),
    "a type nobody knows": (header("model.norm.weight", dtype="X9"), "cannot load"),
    "a header without end": (written("model.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000), "damaged"),
    "the same tensor twice": (weights_twice, "is in several files"),
    "a link to nothing": (lambda folder: (folder / "x.json").symlink_to(folder / "gone"), "a link to nothing"),
    "a config without end": (written("config.json", "[" * 200_000), "cannot be read as JSON"),
    "a config of nonsense": (config(tie_word_embeddings="?"), "cannot load"),
    "a template that is no text": (written("chat_template.jinja", b"\xff\xfe"), "cannot be read as text"),
    "shorter conversations": (config(max_position_embeddings=160), "takes conversations of 160 tokens"),
    "other ends": (written("generation_config.json", '{"eos_token_id": [3, 503]}'), r"\[3, 503\] .* parent .* \[3\]"),
    "another rotary base": (config(rope_parameters={"rope_theta": 9.0}), "rotary embedding"),
    "a rotary embedding that is scaled": (
        config(rope_scaling={"rope_type": "dynamic", "factor": 4.0}),
        "rotary embedding",
    ),
    "no config": (without("config.json"), "no config.json"),
    "no weights": (without("model.safetensors"), r"no \*.safetensors"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer"),
    "no template": (without("chat_template.jinja"), "has no chat template"),
    "weights cut off": (cut, "damaged or cut off"),
    "a weight that is no number": (no_number, r"model.layers.1.mlp.up_proj.weight .* no finite number"),
    "another template": (another_template, "chat template of .* is not that of its parent"),
    "another tokenizer": (swapped_tokens, r"tokenizer of .* \(tokenizer.json\) is not that of its parent"),
    "another architecture": (config(num_hidden_layers=3), "another architecture .* num_hidden_layers 3 instead of 4"),
    "missing tensors": (a_layer_less, "not those of its parent's architecture"),
    "untied without an output": (config(tie_word_embeddings=False), "no lm_head.weight"),
    "config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{") and None,
        "cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_could_not_serve_is_refused_with_the_reason(what: str, registry: Registry, tmp_path: Path):
    registry.add(SHELF["embedded-base"])
    spoil, reason = BAD[what]
    folder = copied("embedded", tmp_path / "model-x")
    spoil(folder)
    with pytest.raises(UsageError, match=reason):
        registry.add(folder, parent="embedded-base")
    assert [one.name for one in registry.all()] == ["embedded-base"]


def test_shards_must_be_all_there(registry: Registry, tmp_path: Path):
    folder = copied("embedded", tmp_path / "sharded")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    where = {}
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert registry.add(folder, name="whole").weights.startswith("whole@")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks model-00002-of-00002"):
        registry.add(folder, name="half")


# ---- names, lineage, places ----


def test_recorded_weights_lead_back_to_their_checkpoint(registry: Registry, tmp_path: Path):
    folder = copied("embedded", tmp_path / "lake" / "global_step_30" / "actor" / "huggingface")
    found = registry.add(folder)
    assert (found.name, found.config) == ("lake-30", {"training": "lake", "step": 30})
    for weights in (found.weights, f"{found.weights}/vllm-0.32", found.gguf_weights, "lake/step-30"):
        assert registry.of_weights(weights) == found
    for weights in ("lake/step-3", "lake-30", "gpt-5", "", f"{found.weights}0"):
        assert registry.of_weights(weights) is None
    assert registry.get(found.weights) == registry.get("lake-30") == found


def test_lineage_tells_whether_the_data_are_still_there(registry: Registry, tmp_path: Path):
    lake, memory = FrozenLake("small", seed=1, form="compact"), Memory.open(tmp_path / "lives.db")
    list(CoDAgent("one", model="scripted:perfect", memory=memory, environment=lake).run_sync(lake.pack(2)))
    registry.add(SHELF["embedded-base"])
    found = registry.add(SHELF["embedded"], parent="embedded-base", data=[tmp_path / "lives.db"])
    (run,) = registry.training_runs("embedded")
    assert (run.agent, run.tasks, len(run.chain), run.check()) == ("one", 2, 64, "same")
    assert [one.name for one in registry.lineage("embedded")] == [found.name, "embedded-base"]
    list(CoDAgent("two", model="scripted:perfect", memory=memory, environment=lake).run_sync(lake.pack(2)))
    memory.close()
    assert run.check() == "same"  # another agent's life is none of this run's
    conn = sqlite3.connect(tmp_path / "lives.db")
    conn.execute("UPDATE commits SET chain = 'x' WHERE run_id = 1")
    conn.commit()
    conn.close()
    assert run.check() == "changed"
    (tmp_path / "lives.db").unlink()
    assert run.check() == "gone"


def test_a_folder_that_is_moved_keeps_working(tmp_path: Path):
    with Registry(tmp_path / "here" / "registry.db", create=True) as registry:
        registry.add(copied("cloned", tmp_path / "here" / "model-1"))
    shutil.move(tmp_path / "here", tmp_path / "there")
    with Registry(tmp_path / "there" / "registry.db") as registry:
        (found,) = registry.all()
        assert found.folder == tmp_path / "there" / "model-1" and (found.folder / "probe.json").is_file()
        assert found.gguf is not None and found.gguf.is_file()


def test_a_shipped_policy_is_copied_and_not_written_to(registry: Registry):
    found = registry.add(folder_of("novice"))
    assert found.folder == registry.path.parent / "checkpoints" / "novice"
    assert not (folder_of("novice") / "probe.json").exists()


# ---- the file ----


def test_other_files_are_no_registry(tmp_path: Path):
    Memory.open(tmp_path / "runs.db").close()
    with pytest.raises(NotADatabase, match="is a run database, not a registry"):
        Registry(tmp_path / "runs.db", create=True)
    (tmp_path / "text").write_text("not a database at all, but long enough to be read as one" * 20)
    with pytest.raises(NotADatabase, match="no registry of checkpoints"):
        Registry(tmp_path / "text")
    with pytest.raises(UsageError, match="cod checkpoint add"):
        Registry(tmp_path / "missing.db")
    assert not (tmp_path / "missing.db").exists()
    Registry(tmp_path / "registry.db", create=True).close()
    with pytest.raises(NotADatabase, match="another program"):
        Memory.open(tmp_path / "registry.db")
    conn = sqlite3.connect(tmp_path / "registry.db")
    conn.execute("PRAGMA user_version = 99")
    conn.close()
    with pytest.raises(SchemaTooNew, match="schema 99"):
        Registry(tmp_path / "registry.db")


def _races(path: Path, out: Path) -> None:
    with Registry(path, create=True) as registry:
        seeds = [registry.fresh_seed() for _ in range(20)]
        name = out.stem
        with contextlib.suppress(CodError):  # it is promoted already
            registry.promote("a" if name[-1] in "02" else "b", name)
    out.write_text(json.dumps(seeds))


def test_processes_may_begin_and_use_one_file_at_once(tmp_path: Path):
    with Registry(tmp_path / "registry.db", create=True) as registry:
        registry.add(SHELF["embedded"], name="a")
        registry.add(SHELF["cloned"], name="b", parent="a")
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / f"{number}.json" for number in range(4)]
    processes = [context.Process(target=_races, args=(tmp_path / "registry.db", out)) for out in outs]
    [process.start() for process in processes]
    [process.join() for process in processes]
    seeds = [seed for out in outs for seed in json.loads(out.read_text())]
    assert len(set(seeds)) == 80
    with Registry(tmp_path / "registry.db") as registry:
        assert sorted(states(registry).values()) in (["promoted", "retired"],)


def test_what_was_said_survives_kill_9(tmp_path: Path):
    program = """
import sys
from pathlib import Path
from cod_train.checkpoints import Registry
registry = Registry(Path(sys.argv[1]), create=True)
while True:
    print(registry.fresh_seed(), flush=True)
"""
    file = tmp_path / "registry.db"
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        said += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait()
        with Registry(file) as registry:
            assert registry.fresh_seed() > max(said)
    conn = sqlite3.connect(file)
    assert conn.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    conn.close()


def test_a_closed_registry_says_so(registry: Registry):
    registry.close()
    with pytest.raises(StoreError):
        registry.all()


# ---- the command ----


def invoke(*words: object) -> str:
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_adds_and_shows(tmp_path: Path):
    at = ("--registry", tmp_path / "registry.db")
    assert "embedded-base@" in invoke("add", "embedded-base", *at)
    added = json.loads(invoke("add", "embedded", "--name", "better", "--parent", "embedded-base", *at, "--json"))
    assert added["parent"] == "embedded-base" and added["weights"] == f"better@{added['digest'][:12]}"
    with Registry(tmp_path / "registry.db") as registry:
        registry.decide("embedded-base", None, True, {}, "the first")
        rows = [{"candidate": {"mean": 0.5}}, {"candidate": {"mean": 0.75}}]
        registry.decide("better", "embedded-base", True, {"positions": rows}, "won")
    assert [one["state"] for one in json.loads(invoke("list", *at, "--json"))["checkpoints"]] == ["retired", "promoted"]
    assert "promoted at 0.50 0.75 over embedded-base" in invoke("lineage", "better", *at)
    shown = json.loads(invoke("show", "better", "--check", *at, "--json"))
    assert shown["changed_files"] == [] and [change["after"] for change in shown["history"]] == [
        "candidate",
        "promoted",
    ]


def test_a_file_that_was_changed_since_is_found(tmp_path: Path):
    from typer.testing import CliRunner

    at = ["--registry", str(tmp_path / "registry.db")]
    invoke("add", copied("embedded", tmp_path / "one"), *at)
    (tmp_path / "one" / "generation_config.json").write_text("{}")
    probe = tmp_path / "one" / "probe.json"
    probe.write_text(probe.read_text().replace("Hello", "Hullo"))
    shutil.copy(folder_of("naive-base") / "model.gguf", tmp_path / "one" / "model.gguf")
    result = CliRunner().invoke(app, ["show", "one", "--check", *at])
    assert result.exit_code == 1 and "changed files: generation_config.json, model.gguf, probe.json" in result.stdout
