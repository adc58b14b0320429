"""Model servers are processes: ready when they answer exactly, told apart by their names, and never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from faulty_server import FAULTS
from model_servers import alive, checkpoint, end_within, pids_in, started, trains_from

pytest.importorskip("transformers")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

from cod_agent.errors import ModelRefused, UsageError
from cod_agent.journal.http import http_module
from cod_agent.models.base import Sampling
from cod_agent.models.openai import OpenAIModel
from cod_agent.policies import folder_of
from cod_train.serving import Engine, ModelServer, ServerFailed
from cod_train.serving.embedded import FINGERPRINT, main
from cod_train.serving.server import telling_lines

TESTS = Path(__file__).parent
POLICY = folder_of("embedded-base")
USER: list[Any] = [{"role": "user", "content": "What is 40 + 2?"}]


# ---- the embedded engine ----


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelServer]:
    logs = tmp_path_factory.mktemp("logs")
    server = asyncio.run(ModelServer.start(checkpoint(POLICY), Engine("embedded"), logs))
    yield server
    asyncio.run(server.stop())
    assert server.ended == 0 and "Error" not in server.log.read_text()


async def test_what_agents_live_through_it_is_on_record_under_its_weights_and_trains(
    embedded: ModelServer, tmp_path: Path
) -> None:
    assert embedded.weights == "tiny@aaaaaaaaaaaa" and embedded.ended is None
    assert await trains_from(embedded, tmp_path / "a.db") == {f"{embedded.weights}/{FINGERPRINT}"}


async def test_it_says_what_transformers_says_of_its_checkpoint(embedded: ModelServer) -> None:
    from cod_train.probe import compare_served, make_probe

    found = await compare_served(make_probe(POLICY), embedded.base_url, embedded.weights)
    assert found.trouble == "" and found.largest < 1e-4 and found.tokens > 16


async def test_it_answers_to_no_other_name_and_refuses_to_truncate(embedded: ModelServer) -> None:
    async def refused(model: OpenAIModel) -> str:
        with pytest.raises(ModelRefused) as error:
            await model.exchange(USER)
        await model.aclose()
        return str(error.value)

    other = OpenAIModel("tiny@bbbbbbbbbbbb", base_url=embedded.base_url, exact=True)
    assert "answered 404: no model 'tiny@bbbbbbbbbbbb' here: this is 'tiny@aaaaaaaaaaaa'" in await refused(other)
    top = OpenAIModel(embedded.weights, base_url=embedded.base_url, extra={"top_k": 5})
    assert "answered 400: this engine samples from all tokens" in await refused(top)


async def test_temperature_zero_is_the_same_each_time_and_a_seed_is_too(embedded: ModelServer) -> None:
    async def says(sampling: Sampling) -> list[int]:
        model = OpenAIModel(embedded.weights, base_url=embedded.base_url, exact=True, sampling=sampling)
        tokens = (await model.exchange(USER)).completion.tokens
        await model.aclose()
        assert tokens is not None
        return list(tokens.sampled)

    greedy, seeded = Sampling(temperature=0.0, max_tokens=12), Sampling(seed=3, max_tokens=12)
    assert await says(greedy) == await says(greedy) != await says(seeded) == await says(seeded)


def test_what_the_embedded_engine_cannot_serve_is_said_before_it_starts(tmp_path: Path) -> None:
    adapter = checkpoint(tmp_path, kind="adapter", base=POLICY)
    with pytest.raises(UsageError, match="serves no adapters .tiny.: merge it"):
        Engine("embedded").launch(adapter, 1)
    with pytest.raises(UsageError, match="not bfloat16"):
        Engine("embedded", dtype="bfloat16").launch(checkpoint(POLICY), 1)
    launch = Engine("embedded", threads=2, max_model_len=512, extra=("--slots", "8")).launch(checkpoint(POLICY), 1)
    assert launch.env == {"OMP_NUM_THREADS": "2"} and launch.command[-4:] == ["--length", "512", "--slots", "8"]


def test_a_checkpoint_without_words_is_refused_before_it_starts(tmp_path: Path) -> None:
    folder = copytree(POLICY, tmp_path / "model")
    for file, reason in (("chat_template.jinja", "has no chat template"), ("tokenizer.json", "no tokenizer in")):
        kept = (folder / file).read_bytes()
        (folder / file).unlink()
        with pytest.raises(UsageError, match=reason):
            Engine("embedded").launch(checkpoint(folder), 1)
        (folder / file).write_bytes(kept)
    assert Engine("embedded").launch(checkpoint(folder), 1)


def test_the_command_of_the_embedded_engine_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="Error: no tokenizer can be read"):
        main([str(tmp_path), "--name", "x"])
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit, match="in use"):
        main([str(POLICY), "--name", "x", "--port", str(taken.getsockname()[1])])


# ---- servers with faults ----


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_server_that_is_not_right_is_an_error_and_leaves_no_process(tmp_path: Path, fault: str) -> None:
    with pytest.raises(ServerFailed, match=FAULTS[fault]) as failed:
        await started(tmp_path, fault, ready_timeout=3 if fault == "hangs" else 60)
    log = tmp_path / "logs" / "tiny@aaaaaaaaaaaa.log"
    assert f"The whole log is {log}" in str(failed.value) and "the faulty server for tiny@aaaaaaaaaaaa" in str(
        failed.value
    )
    assert end_within(pids_in(log), 5)


async def test_a_server_that_says_it_is_loading_is_waited_for(tmp_path: Path) -> None:
    server = await started(tmp_path, "loading")
    await server.stop()
    assert server.ended is not None


async def test_a_port_that_is_taken_meanwhile_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    server = await started(tmp_path, "taken")
    assert server.ended is None and server.log.read_text().count("\nOSError: [Errno 98]") == 1
    await server.stop()


async def test_one_that_dies_while_serving_is_seen_and_its_children_end(tmp_path: Path) -> None:
    server = await started(tmp_path)
    pids = pids_in(server.log)
    assert server.ended is None and all(map(alive, pids))
    os.kill(pids[0], signal.SIGKILL)
    until = time.monotonic() + 5
    while server.ended is None and time.monotonic() < until:
        await asyncio.sleep(0.02)
    assert server.ended == 128 + signal.SIGKILL and end_within(pids, 5)
    await server.stop()


async def test_stopping_ends_all_of_a_group_that_does_not_listen(tmp_path: Path) -> None:
    server = await started(tmp_path, "stubborn")
    began = time.monotonic()
    await server.stop(grace=0.5)
    assert 0.4 < time.monotonic() - began < 5 and server.ended is not None
    assert end_within(pids_in(server.log), 5)


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    start = asyncio.create_task(started(tmp_path, "hangs"))
    log = tmp_path / "logs" / "tiny@aaaaaaaaaaaa.log"
    while not (log.exists() and "pids" in log.read_text()):
        await asyncio.sleep(0.02)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert end_within(pids_in(log), 5)


def test_kill_9_of_the_program_ends_its_servers_and_their_children(tmp_path: Path) -> None:
    program = (
        "import asyncio, sys, model_servers; from pathlib import Path\n"
        "async def live():\n"
        "    await model_servers.started(Path(sys.argv[1]), 'stubborn'); print('ready', flush=True); await asyncio.sleep(600)\n"
        "asyncio.run(live())"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{TESTS.parent}"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
        pids = pids_in(tmp_path / "logs" / "tiny@aaaaaaaaaaaa.log")
        assert all(map(alive, pids))
        parent.kill()
    assert end_within(pids, 10)


async def test_proxies_of_the_environment_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{nobody.getsockname()[1]}")
        server = await started(tmp_path, ready_timeout=20)
        await server.stop()


async def test_adapters_come_and_go_under_names_of_their_own(tmp_path: Path) -> None:
    server = await started(tmp_path, "adapters")
    lora = checkpoint(tmp_path, "lora", kind="adapter", base=POLICY, digit="b")
    await server.load_adapter(lora)
    assert server.serves == {server.weights, "lora@bbbbbbbbbbbb"}
    await server.unload_adapter(lora.weights)
    assert server.serves == {server.weights}
    with pytest.raises(UsageError, match="is no adapter of"):
        await server.load_adapter(checkpoint(tmp_path, "lora", kind="adapter", base=tmp_path))
    with pytest.raises(ServerFailed, match="did not load the adapter damaged@cccccccccccc .400: damaged."):
        damaged = checkpoint(tmp_path / "damaged", "damaged", kind="adapter", base=POLICY, digit="c")
        await server.load_adapter(damaged)
    assert server.serves == {server.weights}
    await server.stop()


async def test_an_adapter_whose_loading_was_given_up_is_not_left_in_the_server(tmp_path: Path) -> None:
    server = await started(tmp_path, "adapters")
    slow = checkpoint(tmp_path / "slow", "slow", kind="adapter", base=POLICY, digit="d")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(server.load_adapter(slow), 0.5)
    asked = {"model": slow.weights, "messages": [{"role": "user", "content": "Hello"}]}
    async with http_module().AsyncClient(trust_env=False) as client:
        answer = await client.post(f"{server.base_url}/chat/completions", json=asked)
    assert answer.status_code == 404 and server.serves == {server.weights}
    await server.stop()


async def test_a_server_started_without_adapters_says_so(tmp_path: Path) -> None:
    server = await started(tmp_path)
    with pytest.raises(ServerFailed, match="404: nothing here.*; start it with adapters .lora. allowed"):
        await server.load_adapter(checkpoint(tmp_path, "lora", kind="adapter", base=POLICY))
    await server.stop()


def test_a_log_is_told_by_the_errors_in_it() -> None:
    log = (
        "(EngineCore pid=12) ERROR 11-23 01:54:31 [core.py:133] Traceback (most recent call last):\n"
        "(EngineCore pid=12) ERROR 11-23 01:54:31 [core.py:133] ValueError: head size 16 is not supported\n"
        "(EngineCore pid=12) ValueError: head size 16 is not supported\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
        "(APIServer pid=1) INFO:     Application shutdown complete.\n"
    )
    assert telling_lines(log) == "  ValueError: head size 16 is not supported"
    assert telling_lines("one\n\ntwo\n") == "  one\n  two" and telling_lines("") == "  It said nothing."
    assert telling_lines("x" * 999).count("x") == 400
