"""Real vLLM as a model server: exact, under its own name, with adapters, and gone with the program that started it.

It is started once, by a program of its own, which the last test kills.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from model_servers import checkpoint, end_within, trains_from

pytest.importorskip("transformers")
pytest.importorskip("uvicorn")

from safetensors.numpy import save_file

from cod_agent.errors import ModelRefused, UsageError
from cod_agent.journal.http import http_module
from cod_agent.models.base import Sampling
from cod_agent.models.openai import OpenAIModel
from cod_agent.policies import folder_of
from cod_train.serving import Engine
from cod_train.serving.vllm import installed, vllm_python

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif("not os.environ.get('COD_VLLM_PYTHON')", reason="COD_VLLM_PYTHON names no python that has vLLM"),
]
TESTS = Path(__file__).parent
POLICY = folder_of("embedded-base")
PYTHON = Path(os.environ.get("COD_VLLM_PYTHON", ""))
USER: list[Any] = [{"role": "user", "content": "What is 40 + 2?"}]
PROGRAM = """
import asyncio, json, sys
from pathlib import Path
from model_servers import checkpoint
from cod_agent.policies import folder_of
from cod_train.serving import Engine, ModelServer

async def live():
    folder, base = Path(sys.argv[1]), folder_of("embedded-base")
    engine = Engine("vllm", lora=True, threads=1, max_model_len=896)
    server = await ModelServer.start(checkpoint(base), engine, folder)
    await server.load_adapter(checkpoint(folder / "adapter", "lora", kind="adapter", base=base, digit="b"))
    said = {"base_url": server.base_url, "weights": server.weights, "pid": server._process.pid, "key": server.key}
    said |= {"serves": sorted(server.serves), "adapter": str(folder / "adapter")}
    print(json.dumps(said), flush=True)
    await asyncio.sleep(3600)

asyncio.run(live())
"""


def write_adapter(folder: Path) -> None:
    """A LoRA of rank 8 on the query projections of `POLICY`, far from nothing."""
    config = json.loads((POLICY / "config.json").read_text())
    width, source = config["hidden_size"], np.random.default_rng(0)
    named = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for half, shape in (("A", (8, width)), ("B", (width, 8))):
            weights[named.format(layer, half)] = source.normal(0, 0.5, shape).astype(np.float32)
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    said |= {"base_model_name_or_path": str(POLICY), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """base_url, weights, serves, the pid of its process group, and the program that started it."""
    folder = tmp_path_factory.mktemp("vllm")
    write_adapter(folder / "adapter")
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)], stdout=subprocess.PIPE, env=environment
    ) as made:
        assert made.stdout is not None
        said = made.stdout.readline()
        assert said, "it did not start: see the error above"
        yield SimpleNamespace(**json.loads(said), program=made)
        made.kill()


async def asked(vllm: Any, name: str, **sampling: Any) -> Any:
    how = Sampling(temperature=0.0, max_tokens=12, **sampling)
    model = OpenAIModel(name, base_url=vllm.base_url, api_key=vllm.key, exact=True, retries=0, sampling=how)
    try:
        return (await model.exchange(USER)).completion
    finally:
        await model.aclose()


async def test_what_agents_live_through_it_is_on_record_under_its_weights_and_trains(vllm: Any, tmp_path: Path) -> None:
    (weights,) = await trains_from(vllm, tmp_path / "a.db")
    assert weights.startswith(f"{vllm.weights}/vllm-{installed(PYTHON).version}")


async def test_it_says_what_transformers_says_of_its_checkpoint(vllm: Any) -> None:
    from cod_train.probe import compare_served, make_probe

    found = await compare_served(make_probe(POLICY), vllm.base_url, vllm.weights, key=vllm.key)
    assert found.trouble == "" and found.largest < 1e-3 and found.tokens > 16


async def test_an_adapter_answers_under_its_own_name_and_as_transformers_has_it(vllm: Any) -> None:
    from cod_train.probe import compare_served, make_probe

    assert vllm.serves == ["lora@bbbbbbbbbbbb", vllm.weights]
    assert (await asked(vllm, "lora@bbbbbbbbbbbb")).weights.startswith("lora@bbbbbbbbbbbb/")
    probe = make_probe(Path(vllm.adapter), POLICY)
    found = await compare_served(probe, vllm.base_url, "lora@bbbbbbbbbbbb", key=vllm.key)
    assert found.trouble == "" and found.largest < 1e-3
    assert (await compare_served(probe, vllm.base_url, vllm.weights, key=vllm.key)).trouble != ""


async def test_who_does_not_know_its_key_loads_no_adapter(vllm: Any) -> None:
    vllm = SimpleNamespace(**{**vars(vllm), "key": "guessed"})
    with pytest.raises(ModelRefused, match="401"):
        await asked(vllm, vllm.weights)
    body = {"lora_name": "mine", "lora_path": vllm.adapter}
    async with http_module().AsyncClient(trust_env=False, timeout=60) as client:
        assert (await client.post(f"{vllm.base_url}/load_lora_adapter", json=body)).status_code == 401


async def test_it_answers_to_no_other_name(vllm: Any) -> None:
    with pytest.raises(ModelRefused, match="404"):
        await asked(vllm, "tiny@bbbbbbbbbbbb")


def test_what_vllm_cannot_serve_is_said_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copytree(POLICY, tmp_path / "model")
    config = json.loads((POLICY / "config.json").read_text())

    def refused(engine: Engine = Engine("vllm"), **other: Any) -> str:  # noqa: B008 (frozen)
        (folder / "config.json").write_text(json.dumps(config | other))
        with pytest.raises(UsageError) as error:
            engine.launch(checkpoint(folder), 1)
        return str(error.value)

    assert "names the architecture LlamaForNobody, which vLLM" in refused(architectures=["LlamaForNobody"])
    assert "the attention heads of" in (said := refused(head_dim=16)) and "have size 16" in said
    assert "conversations of 4096 tokens" in refused(Engine("vllm", max_model_len=4096))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match="no config.json in"):
        Engine("vllm").launch(checkpoint(folder), 1)
    with pytest.raises(UsageError, match="there is no .*nowhere: .*\n.*python3 -m venv"):
        vllm_python(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="No module named 'vllm'.*\n.*python3 -m venv"):
        installed(Path(sys.executable))
    monkeypatch.delenv("COD_VLLM_PYTHON")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))  # beside which there may be one
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        vllm_python()
    python = tmp_path / ".venv-vllm" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert vllm_python() == python


def test_an_adapter_is_started_beside_its_base_under_another_name(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter")
    launch = Engine("vllm").launch(checkpoint(tmp_path / "adapter", kind="adapter", base=POLICY), 1)
    words = dict(zip(launch.command, launch.command[1:], strict=False))
    assert words["--model"] == str(POLICY) and words["--served-model-name"] == "base-of-tiny@aaaaaaaaaaaa"
    assert words["--lora-modules"] == f"tiny@aaaaaaaaaaaa={tmp_path / 'adapter'}" and words["--max-lora-rank"] == "64"


def test_kill_9_of_the_program_ends_vllm_and_its_engine(vllm: Any) -> None:
    table = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in table.splitlines()]
    pids = [int(pid) for pid, group, stat in rows if int(group) == vllm.pid and not stat.startswith("Z")]
    assert len(pids) >= 4  # the keeper, the API server, the engine and its worker
    vllm.program.kill()
    assert end_within(pids, 20)
