"""Exports say what their source says, or are not there; probes tell one checkpoint from another."""

from __future__ import annotations

import asyncio
import json
import math
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra train")
pytest.importorskip("transformers", reason="needs the extra train")

from safetensors.numpy import load_file, save_file  # noqa: E402

from cod_agent.errors import CodError, StoreFull, UsageError  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train import export  # noqa: E402
from cod_train.checkpoints import Registry  # noqa: E402
from cod_train.export import exported  # noqa: E402
from cod_train.gguf_file import why_not, write_gguf  # noqa: E402
from cod_train.probe import (  # noqa: E402
    TOLERANCE,
    TOLERANCE_16BIT,
    Answered,
    Probe,
    compare,
    compare_file,
    compare_served,
    make_probe,
    separation,
)

EMBEDDED = folder_of("embedded")
BROUGHT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def probe() -> Probe:
    return make_probe(EMBEDDED)


@pytest.fixture(scope="module")
def base_probe() -> Probe:
    return make_probe(folder_of("embedded-base"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter on the embedded policy that says something else."""
    peft = pytest.importorskip("peft", reason="needs the extra train")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    peft.get_peft_model(model, config).save_pretrained(folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "base_model_name_or_path": str(EMBEDDED)}))
    return folder


def said(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def answers(probe: Probe) -> list[Answered]:
    return [Answered(item.prompt_ids, item.answer_ids, item.logprobs) for item in probe.items]


# ---- exports ----


def test_a_checkpoint_of_verl_says_its_true_type_and_brings_its_words(tmp_path: Path):
    source = tmp_path / "source"  # as verl leaves it: 32 bits, called 16
    shutil.copytree(EMBEDDED, source)
    whole = {name: tensor.astype(np.float32) for name, tensor in load_file(EMBEDDED / "model.safetensors").items()}
    save_file(whole, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text(json.dumps({**said(source), "dtype": "bfloat16"}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 3}))
    done = exported(source, tmp_path / "out", name="x")
    assert said(done.folder)["dtype"] == "float32"
    sampling = json.loads((done.folder / "generation_config.json").read_text())
    assert (sampling["temperature"], sampling["top_p"], sampling["top_k"], sampling["eos_token_id"]) == (1.0, 1.0, 0, 3)
    assert all((done.folder / name).read_bytes() == (source / name).read_bytes() for name in BROUGHT)
    assert done.compared.trouble == "" and done.compared_gguf is not None and done.compared_gguf.largest < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_untied_export_has_its_own_output_and_says_the_same(tmp_path: Path, probe: Probe):
    done = exported(EMBEDDED, tmp_path / "out", name="x", untied=True)
    tensors = load_file(done.folder / "model.safetensors")
    assert said(done.folder)["tie_word_embeddings"] is False
    assert np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert done.gguf is not None and compare_file(probe, done.gguf).largest < 1e-4


def test_an_adapter_is_merged_and_says_what_it_said_beside_its_base(tmp_path: Path, adapter: Path, probe: Probe):
    done = exported(adapter, tmp_path / "out", name="x", base=EMBEDDED)
    own = make_probe(adapter, EMBEDDED)
    assert separation(own, Probe.load(done.folder)) < 1e-3 < separation(own, probe)
    assert all((done.folder / name).read_bytes() == (EMBEDDED / name).read_bytes() for name in BROUGHT)


def test_an_adapter_that_does_not_fit_is_refused(tmp_path: Path, adapter: Path):
    odd = tmp_path / "odd"
    shutil.copytree(adapter, odd)
    tensors = load_file(odd / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first.replace("layers.0", "layers.9")] = tensors.pop(first)
    save_file(tensors, odd / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match="does not fit its base"):
        exported(odd, tmp_path / "out", name="x", base=EMBEDDED)
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_a_checkpoint_with_its_base(tmp_path: Path, adapter: Path):
    with Registry(tmp_path / "registry.db", create=True) as registry:
        registry.add(EMBEDDED)
        found = registry.add(adapter, parent="embedded")
        assert (found.kind, found.base, found.parent) == ("adapter", EMBEDDED.resolve(), "embedded")
        assert Probe.load(found.folder).digest == found.digest


def test_what_does_not_say_the_same_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def spoilt(source: Path, part: Path) -> None:
        copy(source, part)
        tensors = load_file(part / "model.safetensors")
        tensors["model.norm.weight"] *= np.float16(1.1)
        save_file(tensors, part / "model.safetensors", {"format": "pt"})

    copy = export._copied
    monkeypatch.setattr(export, "_copied", spoilt)
    with pytest.raises(CodError, match=r"does not say what its source says: .*nats"):
        exported(EMBEDDED, tmp_path / "out", name="x")
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_leaves_nothing(tmp_path: Path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, before[1]))  # the weights fit, the GGUF file does not
    try:
        with pytest.raises(StoreFull, match="free space"):
            exported(EMBEDDED, tmp_path / "out", name="x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_export_left_is_cleared_and_what_is_there_is_kept(tmp_path: Path):
    left = tmp_path / ".out.part-999999999"
    left.mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    for replaced in (False, True):
        with pytest.raises(UsageError, match="there already"):
            exported(EMBEDDED, tmp_path / "taken", name="x", replace=replaced)
    exported(EMBEDDED, tmp_path / "out", name="x", gguf=False)
    exported(folder_of("cloned"), tmp_path / "out", name="x", gguf=False, replace=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folder_of("cloned") / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "taken"]


def test_an_export_killed_between_its_renames_does_not_cost_what_was_there(tmp_path: Path):
    left = tmp_path / ".out.part-999999999"
    shutil.copytree(EMBEDDED, left / "old")
    with pytest.raises(UsageError, match="there already"):
        exported(folder_of("cloned"), tmp_path / "out", name="x", gguf=False)
    assert (tmp_path / "out" / "config.json").is_file() and not left.exists()


def test_other_architectures_are_sent_to_llama_cpp(tmp_path: Path):
    folder = tmp_path / "other"
    shutil.copytree(EMBEDDED, folder)
    (folder / "config.json").write_text(json.dumps({**said(folder), "attention_bias": True}))
    assert "biases" in why_not(folder)
    with pytest.raises(UsageError, match="convert_hf_to_gguf.py"):
        write_gguf(folder, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists() and why_not(EMBEDDED) == ""


# ---- probes ----


def test_a_probe_survives_its_file(tmp_path: Path, probe: Probe):
    probe.save(tmp_path)
    assert Probe.load(tmp_path) == probe and len(probe.items) >= 10
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(UsageError, match="damaged"):
        Probe.load(tmp_path)


def test_a_file_of_other_weights_is_told_apart(probe: Probe, base_probe: Probe):
    assert compare_file(probe, EMBEDDED / "model.gguf").largest < 1e-4
    found = compare_file(probe, folder_of("embedded-base") / "model.gguf")
    assert "tokens differ" in found.trouble or "log-probabilities are off by" in found.trouble
    assert separation(probe, base_probe) > TOLERANCE_16BIT and separation(probe, probe) == 0


def test_every_trouble_has_its_name(probe: Probe):
    good = answers(probe)
    first = good[0]
    off = [value - 0.05 for value in first.logprobs]
    for changed, trouble in (
        (replace(first, prompt_ids=first.prompt_ids[1:]), "prompt ids differ in conversation 1"),
        (replace(first, answer_ids=[]), "exact answers are needed"),
        (replace(first, logprobs=[math.nan, *first.logprobs[1:]]), "no numbers"),
        (replace(first, answer_ids=first.answer_ids[:-1], logprobs=first.logprobs[:-1]), "tokens differ: the answer"),
        (replace(first, answer_ids=[7, *first.answer_ids[1:]], logprobs=[-3.0, *first.logprobs[1:]]), "tokens differ"),
        (replace(first, logprobs=off), "off by 0.05 nats at most"),
    ):
        assert trouble in compare(probe, [changed, *good[1:]]).trouble
    assert compare(probe, [replace(first, logprobs=off), *good[1:]], TOLERANCE_16BIT).trouble == ""


def test_a_near_tie_is_no_trouble_and_ends_the_conversation(probe: Probe):
    good = answers(probe)
    first = good[0]
    other = [first.answer_ids[0] ^ 1, 5, 6]
    tied = replace(first, answer_ids=other, logprobs=[first.logprobs[0] - TOLERANCE / 2, -9.0, -9.0])
    found = compare(probe, [tied, *good[1:]])
    assert found.trouble == "" and found.tokens == sum(len(item.answer_ids) for item in probe.items[1:]) + 1


def test_sixteen_bits_are_judged_by_the_mean(probe: Probe):
    shifted = [replace(one, logprobs=[value - 0.09 for value in one.logprobs]) for one in answers(probe)]
    assert "on average" in compare(probe, shifted, TOLERANCE_16BIT).trouble  # each within .2, together too much


@pytest.fixture
def endpoint() -> Iterator[str]:
    """A server that answers everything, without token ids."""
    from servers import Fault, ScriptedServer

    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
    with ScriptedServer(lambda request, n: Fault(garbage=json.dumps(body).encode())) as made:
        yield made.url


def test_a_server_without_token_ids_or_without_an_answer_is_trouble(probe: Probe, endpoint: str):
    found = asyncio.run(compare_served(probe, endpoint, "x"))
    assert "no token ids" in found.trouble
    assert "gave no answer" in asyncio.run(compare_served(probe, "http://127.0.0.1:9/v1", "x")).trouble


def test_our_own_server_agrees_with_the_probe(probe: Probe, base_probe: Probe):
    from transformers import AutoTokenizer

    from cod_train.endpoint import Endpoint
    from cod_train.engines import engine_for
    from cod_train.model import Drawn

    engine = engine_for(EMBEDDED, slots=4)

    async def generate(_: str, prompt: list[int], sampling: dict[str, float]) -> Drawn:
        wanted = {key: sampling[key] for key in ("temperature", "top_p", "max_tokens")}
        drawn = await asyncio.wrap_future(engine.ask(prompt, **wanted))
        return Drawn(drawn.ids, drawn.logprobs, drawn.finish, "w")

    async def both() -> tuple[str, float, str]:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
        async with Endpoint("e", tokenizer, generate, context_length=engine.context_length) as served:
            right = await compare_served(probe, served.base_url, "e")
            wrong = await compare_served(base_probe, served.base_url, "e")
            nobody = await compare_served(probe, served.base_url, "f")
            assert "404" in nobody.trouble
            return right.trouble, right.largest, wrong.trouble

    trouble, largest, other = asyncio.run(both())
    engine.close()
    assert trouble == "" and largest < 1e-4
    assert other
