"""Following the registry: switches, and everything that can go wrong with one. Agents never get an error.

Servers that fail are scripted, in this process; the registry, the probes, the front and the requests are real. The slow tests
are all real: `cod serve` as a process, with the embedded engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("openai")
pytest.importorskip("safetensors")

from servers import Answer, Fault, ScriptedServer, completion

from cod_agent import CoDAgent, Task, __version__
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.errors import CodError
from cod_agent.journal.http import http_module
from cod_agent.memory import history
from cod_agent.memory.content import read_tokens
from cod_agent.memory.readonly import look
from cod_agent.models.openai import EXACT, OpenAIModel
from cod_agent.policies import folder_of
from cod_train.checkpoint_files import contents
from cod_train.checkpoints import Checkpoint, Registry
from cod_train.probe import Item, Probe, load_exactly
from cod_train.sequences import Call
from cod_train.serving import Engine, ServerFailed
from cod_train.serving import switch as switch_module
from cod_train.serving.events import Events
from cod_train.serving.front import Front
from cod_train.serving.switch import Serving, tolerance

QUESTIONS = ["Hello", "And now?", "Why?", *(f"What is {n} + {n}?" for n in range(9))]
BLUE, GREEN, THIRD = "embedded-base", "embedded", "novice"


class Scripted:
    """A model server that is in this process: it says its checkpoint's name, to everything."""

    trouble: dict[str, Any] = {}
    """By checkpoint: `never` gets ready, `fails`, or how it replies."""
    started: list[Scripted] = []

    def __init__(self, checkpoint: Checkpoint, log: Path) -> None:
        self.weights, self.log, self.serves = checkpoint.weights, log, {checkpoint.weights}
        self.ended: int | None = None
        trouble = self.trouble.get(checkpoint.name)
        self.http = ScriptedServer(trouble if callable(trouble) else saying(checkpoint.name))
        self.base_url, self.key = self.http.url, ""

    @classmethod
    async def start(cls, checkpoint: Checkpoint, engine: Engine, log_folder: Path, *, ready_timeout: float) -> Scripted:
        if cls.trouble.get(checkpoint.name) == "never":
            await asyncio.sleep(ready_timeout)
        if cls.trouble.get(checkpoint.name) in ("never", "fails"):
            raise ServerFailed("it did not start")
        cls.started.append(cls(checkpoint, log_folder / checkpoint.name))
        return cls.started[-1]

    def die(self) -> None:
        self.ended = 1
        self.http.close()

    async def stop(self, grace: float) -> None:
        if self.ended is None:
            self.die()

    async def load_adapter(self, checkpoint: Checkpoint) -> None:
        names = self.serves = {*self.serves, checkpoint.weights}

        def reply(request: dict[str, Any], n: int) -> str | Fault:
            return request["model"].partition("@")[0] if request["model"] in names else Fault(404)

        self.http.reply = reply

    async def unload_adapter(self, weights: str) -> None:
        self.serves -= {weights}


def saying(name: str, after: float = 0.0) -> Callable[[dict[str, Any], int], Answer]:
    return lambda request, n: Answer(name, delay=after if "slowly" in str(request["messages"]) else 0)


def probe_of(folder: Path, says: str) -> None:
    """A probe for a server that says this."""
    items = []
    for question in QUESTIONS:
        request = {"messages": [{"role": "user", "content": question}], **EXACT}
        body = completion(request, b"", Answer(says))
        choice = body["choices"][0]
        said = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        items.append(Item(request["messages"], body["prompt_token_ids"], choice["token_ids"], said))
    Probe(items, contents(folder).digest).save(folder)


def adapter_of(folder: Path, base: Path, seed: int) -> Path:
    """A PEFT folder."""
    from safetensors.numpy import save_file

    folder.mkdir()
    said = {
        "base_model_name_or_path": str(base),
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    rng = np.random.default_rng(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (1, 64), "B": (64, 1)}
    save_file(
        {name.format(side): rng.normal(size=shape).astype(np.float32) for side, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints whose servers are scripted; the first is promoted."""
    folder = tmp_path_factory.mktemp("kept")
    with Registry(folder / "registry.db", create=True) as made:
        for name in (BLUE, GREEN, THIRD):
            shutil.copytree(folder_of(name), folder / name)
            probe_of(folder / name, name)
            made.add(folder / name, name=name)
        made.promote(BLUE, "first")
    return folder


@pytest.fixture
def registry(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A copy of them, in the test's own folder."""
    monkeypatch.setattr(switch_module, "ModelServer", Scripted)
    monkeypatch.setattr(switch_module, "LOOK", 0.01)
    monkeypatch.setattr(switch_module, "POLL", 0.02)
    monkeypatch.setattr(Scripted, "trouble", {})
    monkeypatch.setattr(Scripted, "started", [])
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    with Registry(tmp_path / "registry.db") as found:
        yield found


class Running:
    """A serving under way, and what it has told."""

    def __init__(self, serving: Serving, front: Front, task: asyncio.Task[None], events: Path) -> None:
        self.serving, self.front, self.task, self._events = serving, front, task, events

    def events(self, *names: str) -> list[dict[str, Any]]:
        told = [json.loads(line) for line in self._events.read_text().splitlines()]
        return [one for one in told if not names or one["event"] in names]

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(0.01)

    async def happens(self, name: str, times: int = 1) -> dict[str, Any]:
        await self.until(lambda: len(self.events(name)) >= times)
        return self.events(name)[times - 1]

    async def ask(self, text: str = "Hello", model: str = "policy") -> dict[str, Any]:
        async with http_module().AsyncClient(timeout=10, trust_env=False) as client:
            body = {"model": model, "messages": [{"role": "user", "content": text}]}
            response = await client.post(f"{self.front.base_url}/chat/completions", json=body)
        return dict(response.json())

    async def says(self) -> str:
        return str((await self.ask())["choices"][0]["message"]["content"])


@asynccontextmanager
async def serving(
    source: Any, folder: Path, *, engine: Engine | None = None, drain: float = 5
) -> AsyncIterator[Running]:
    front = Front(port=0)
    await front.start()
    events = Events(folder / "log", lambda line: None)
    found = Serving(
        source, engine or Engine("embedded"), front, events, log_folder=folder / "log", ready_timeout=1, drain=drain
    )
    running = Running(found, front, asyncio.create_task(found.run()), events.path)
    try:
        await running.until(found.ready.is_set)
        yield running
    finally:
        found.stop()
        await asyncio.gather(running.task, return_exceptions=True)
        assert not [one for one in Scripted.started if one.ended is None], "a server was left behind"


def weights(registry: Registry, name: str) -> str:
    return registry.get(name).weights


async def test_a_promotion_is_served_and_what_was_under_way_ends_on_the_old_weights(
    registry: Registry, tmp_path: Path
) -> None:
    Scripted.trouble[BLUE] = saying(BLUE, after=0.5)
    async with serving(registry, tmp_path) as running:
        assert await running.says() == BLUE
        slow = [asyncio.create_task(running.ask("slowly")) for _ in range(3)]
        await running.until(lambda: running.front.under_way(weights(registry, BLUE)) == 3)
        registry.promote(GREEN, "better")
        await running.until(lambda: running.front.serving == weights(registry, GREEN))
        assert await running.says() == GREEN
        assert Scripted.started[0].ended is None, "its answers are not out"
        assert [(await one)["model"] for one in slow] == [weights(registry, BLUE)] * 3
        await running.happens("stopped")
        assert Scripted.started[0].ended is not None
        assert (await running.ask(model=weights(registry, BLUE)))["error"]["code"] == "model_not_found"
    told = [(one["event"], one["weights"]) for one in running.events()][5:-1]
    green, blue = weights(registry, GREEN), weights(registry, BLUE)
    compared = [("compared", green), ("switched", green), ("compared", "policy")]
    assert told == [("starting", green), ("ready", green), *compared, ("drained", blue), ("stopped", blue)]
    assert registry.promoted() == registry.get(GREEN)


def off(says: str, right: int = 0) -> Callable[[dict[str, Any], int], Any]:
    """After so many right answers: the right words, but not as likely as they should be."""

    def reply(request: dict[str, Any], n: int) -> Answer | Fault:
        if n < right:
            return Answer(says)
        body = completion(request, b"", Answer(says))
        for entry in body["choices"][0].get("logprobs", {"content": []})["content"]:
            entry["logprob"] -= 0.03
        return Fault(garbage=json.dumps(body).encode())

    return reply


def dies_after(right: int) -> Callable[[dict[str, Any], int], Any]:
    return lambda request, n: Answer(GREEN) if n < right else Fault()


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("fails", "it did not start"),
        (off(GREEN), "log-probabilities are off by 0.03"),
        (lambda request, n: Fault(500), "answered 500"),
        (dies_after(len(QUESTIONS)), "the model server was lost"),  # right on its own port, gone behind the front
        (off(GREEN, right=len(QUESTIONS)), "log-probabilities are off by 0.03"),
    ],
)
async def test_a_green_that_is_not_right_never_stays(
    registry: Registry, tmp_path: Path, trouble: Any, why: str
) -> None:
    Scripted.trouble[GREEN] = trouble
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "said to be better")
        rejected = await running.happens("rejected")
        await running.until(lambda: registry.promoted() == registry.get(BLUE))
        assert why in rejected["why"] and why in registry.history(GREEN)[-1].why
        assert registry.get(GREEN).state == "rejected"
        await asyncio.sleep(0.1)
        assert running.front.serving == weights(registry, BLUE) and await running.says() == BLUE
        assert len([one for one in Scripted.started if one.ended is None]) == 1
        assert why in running.front.status()["trouble"]
        registry.promote(THIRD, "the next one")
        await running.until(lambda: running.front.serving == weights(registry, THIRD))


async def test_a_probe_of_other_weights_rolls_back(registry: Registry, tmp_path: Path) -> None:
    kept = Probe.load(tmp_path / GREEN)
    others = [replace(item, logprobs=[value - 1 for value in item.logprobs]) for item in kept.items]
    Probe(others, kept.digest).save(tmp_path / GREEN)
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "better")
        assert "log-probabilities are off by 1 nats" in (await running.happens("rejected"))["why"]
        assert running.front.switches == 1, "it never was in front of an agent"


async def test_files_that_changed_since_they_were_added_are_not_served(registry: Registry, tmp_path: Path) -> None:
    shutil.copy(tmp_path / THIRD / "model.safetensors", tmp_path / GREEN / "model.safetensors")
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "better")
        assert "have changed" in (await running.happens("rejected"))["why"]
        assert len(Scripted.started) == 1 and await running.says() == BLUE


async def test_a_rollback_while_green_starts_abandons_it(registry: Registry, tmp_path: Path) -> None:
    Scripted.trouble[GREEN] = "never"
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "better")
        await running.happens("starting", 2)
        registry.rollback("changed my mind")
        assert (await running.happens("abandoned"))["weights"] == weights(registry, GREEN)
        assert await running.says() == BLUE and registry.get(GREEN).state == "retired"


async def test_a_promotion_during_a_switch_is_taken_after_it(registry: Registry, tmp_path: Path) -> None:
    Scripted.trouble[BLUE] = saying(BLUE, after=0.5)
    async with serving(registry, tmp_path) as running:
        slow = asyncio.create_task(running.ask("slowly"))
        await running.until(lambda: running.front.under_way(weights(registry, BLUE)) == 1)
        registry.promote(GREEN, "better")
        await running.happens("starting", 2)
        registry.promote(THIRD, "better still")
        await running.until(lambda: running.front.serving == weights(registry, THIRD))
        assert (await slow)["model"] == weights(registry, BLUE)
    switched = [one["weights"] for one in running.events("switched")]
    assert switched == [weights(registry, name) for name in (BLUE, GREEN, THIRD)]


async def test_a_server_that_dies_comes_back_and_agents_do_not_notice(registry: Registry, tmp_path: Path) -> None:
    async with serving(registry, tmp_path) as running:
        model = OpenAIModel("policy", base_url=running.front.base_url, api_key="x", exact=True)
        async with CoDAgent("one", model=model, memory=tmp_path / "one.db") as agent:
            Scripted.started[0].die()
            outcome = await agent.solve(Task(id="1", prompt="Say who you are."))
        await model.aclose()
        await running.happens("restarted")
        assert outcome.answer == BLUE and len(Scripted.started) == 2
        assert running.events("died")[0]["code"] == 1 and running.front.status()["restarts"] == 1
        assert registry.get(BLUE).state == "promoted"


async def test_a_server_that_does_not_stay_up_ends_the_command(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switch_module, "RESTARTS", 2)
    monkeypatch.setattr(switch_module, "LONGEST_PAUSE", 0.05)
    async with serving(registry, tmp_path) as running:
        Scripted.started[0].die()
        await running.happens("restarted")
        Scripted.trouble[BLUE] = "fails"
        Scripted.started[1].die()
        with pytest.raises(ServerFailed, match="3 times in a row; it did not start"):
            await asyncio.wait_for(running.task, 10)
    assert registry.get(BLUE).state == "promoted", "nothing else is there to go back to"


async def test_a_green_that_dies_while_blue_drains_comes_back_at_once(registry: Registry, tmp_path: Path) -> None:
    Scripted.trouble[BLUE] = saying(BLUE, after=3)
    async with serving(registry, tmp_path) as running:
        slow = asyncio.create_task(running.ask("slowly"))
        await running.until(lambda: running.front.under_way(weights(registry, BLUE)) == 1)
        registry.promote(GREEN, "better")
        await running.until(lambda: running.front.status()["draining"])
        Scripted.started[1].die()
        await running.happens("restarted")
        assert await running.says() == GREEN
        assert not slow.done() and Scripted.started[0].ended is None, "blue's answer is not out"
        assert (await slow)["model"] == weights(registry, BLUE)
        await running.happens("stopped")
        assert await running.says() == GREEN


async def test_a_promotion_may_come_back_to_what_was_refused_and_is_taken_back_again(
    registry: Registry, tmp_path: Path
) -> None:
    Scripted.trouble[GREEN] = "never"
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "better")
        await running.happens("starting", 2)
        registry.promote(THIRD, "better still")
        await running.happens("rejected")
        await running.until(lambda: running.front.serving == weights(registry, THIRD))
        assert registry.rollback("it is not").name == GREEN
        await running.until(lambda: registry.promoted() == registry.get(BLUE))
        assert registry.get(GREEN).state == "rejected" and "it did not start" in registry.history(GREEN)[-1].why
        await running.until(lambda: running.front.serving == weights(registry, BLUE))


async def test_no_error_of_a_candidates_files_ends_what_serves(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Probe:
        raise RuntimeError("sizes do not match")

    (tmp_path / GREEN / "probe.json").unlink()
    async with serving(registry, tmp_path) as running:
        monkeypatch.setattr(switch_module, "make_probe", broken)
        registry.promote(GREEN, "better")
        assert (await running.happens("rejected"))["why"] == "RuntimeError: sizes do not match"
        assert await running.says() == BLUE
        await running.until(lambda: registry.promoted() == registry.get(BLUE))


async def test_a_locked_registry_is_told_later_and_the_trouble_once(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted.trouble[GREEN] = "fails"
    rollback = Registry.rollback

    def locked(*_: Any, **__: Any) -> Any:
        raise CodError("the registry is locked")

    async with serving(registry, tmp_path) as running:
        monkeypatch.setattr(Registry, "rollback", locked)
        registry.promote(GREEN, "better")
        await running.happens("trouble")
        await asyncio.sleep(0.2)
        assert len(running.events("trouble")) == 1 and await running.says() == BLUE
        monkeypatch.setattr(Registry, "rollback", rollback)
        await running.until(lambda: registry.promoted() == registry.get(BLUE))
        assert registry.get(GREEN).state == "rejected"


async def test_a_server_that_dies_comes_back_while_the_registry_is_locked(registry: Registry, tmp_path: Path) -> None:
    async with serving(registry, tmp_path) as running:
        with sqlite3.connect(registry.path, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            await asyncio.sleep(0.1)  # it is being read
            Scripted.started[0].die()
            await running.happens("restarted")
            assert await running.says() == BLUE
            other.execute("ROLLBACK")
        other.close()
        registry.promote(GREEN, "better")
        await running.until(lambda: running.front.serving == weights(registry, GREEN))


async def test_blue_may_die_while_green_starts(registry: Registry, tmp_path: Path) -> None:
    async with serving(registry, tmp_path) as running:
        Scripted.trouble[GREEN] = "never"
        registry.promote(GREEN, "better")
        await running.happens("starting", 2)
        Scripted.started[0].die()
        await running.happens("died")
        assert (await running.ask())["error"]["code"] == "not_ready"
        await running.happens("rejected")  # it was not ready in time
        await running.happens("restarted")
        assert await running.says() == BLUE


@pytest.mark.parametrize("trouble", ["fails", off(BLUE)])
async def test_what_never_served_ends_the_command_and_leaves_the_registry_alone(
    registry: Registry, tmp_path: Path, trouble: Any
) -> None:
    Scripted.trouble[BLUE] = trouble
    with pytest.raises(CodError):
        async with serving(registry, tmp_path):
            pass
    assert registry.get(BLUE).state == "promoted"


async def test_one_checkpoint_is_served_without_a_registry(registry: Registry, tmp_path: Path) -> None:
    async with serving(registry.get(BLUE), tmp_path) as running:
        registry.promote(GREEN, "of no interest here")
        await asyncio.sleep(0.1)
        assert await running.says() == BLUE
        Scripted.started[0].die()
        await running.happens("restarted")


async def test_a_registry_that_cannot_be_read_leaves_in_place_what_serves(registry: Registry, tmp_path: Path) -> None:
    async with serving(registry, tmp_path) as running:
        kept = registry.path.read_bytes()
        registry.path.write_bytes(b"nonsense" * 1000)
        await running.happens("trouble")
        assert await running.says() == BLUE
        registry.path.write_bytes(kept)
        registry.promote(GREEN, "better")
        await running.until(lambda: running.front.serving == weights(registry, GREEN))


async def test_adapters_change_in_the_running_server(registry: Registry, tmp_path: Path) -> None:
    for seed, name in enumerate(("v1", "v2")):
        probe_of(adapter_of(tmp_path / name, tmp_path / BLUE, seed), name)
        registry.add(tmp_path / name, name=name)
    async with serving(registry, tmp_path, engine=Engine("vllm", dtype="float32", lora=True)) as running:
        for name in ("v1", "v2", BLUE):
            if name == BLUE:
                registry.rollback("back")
                registry.rollback("and back to the base")
            else:
                registry.promote(name, "better")
            await running.until(lambda: running.front.serving == weights(registry, name))  # noqa: B023
            assert await running.says() == name
        await running.happens("drained", 3)
    assert len(Scripted.started) == 1
    assert Scripted.started[0].serves == {weights(registry, BLUE)}, "old adapters are unloaded"


async def test_asked_to_stop_during_a_switch_it_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    Scripted.trouble[GREEN] = "never"
    Scripted.trouble[BLUE] = saying(BLUE, after=0.4)
    async with serving(registry, tmp_path) as running:
        registry.promote(GREEN, "better")
        await running.happens("starting", 2)
        slow = asyncio.create_task(running.ask("slowly"))
        await running.until(lambda: running.front.under_way(weights(registry, BLUE)) == 1)
        running.serving.stop()
        assert (await slow)["model"] == weights(registry, BLUE)
        await asyncio.wait_for(running.task, 5)
    assert registry.get(GREEN).state == "promoted", "nothing was found out about it"


async def test_asked_twice_to_stop_it_does_not_wait_for_answers(registry: Registry, tmp_path: Path) -> None:
    Scripted.trouble[BLUE] = saying(BLUE, after=3)
    async with serving(registry, tmp_path, drain=60) as running:
        slow = asyncio.create_task(running.ask("slowly"))
        await running.until(lambda: running.front.under_way(weights(registry, BLUE)) == 1)
        running.serving.stop()
        await asyncio.sleep(0.2)
        assert not running.task.done()
        running.serving.stop()
        slow.cancel()
        await asyncio.wait_for(running.task, 5)


def test_sixteen_bits_are_judged_by_another_tolerance() -> None:
    assert tolerance(Engine("embedded")) == tolerance(Engine("vllm", dtype="float32")) == 0.02
    assert tolerance(Engine("vllm", dtype="bfloat16")) == 0.2


# ---- all real ----


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with real probes."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("real")
    with Registry(folder / "registry.db", create=True) as kept:
        for name in (BLUE, GREEN):
            kept.add(folder_of(name), name=name)
        kept.promote(BLUE, "first")
    return folder


class Command:
    """`cod serve` in a process of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [sys.executable, "-m", "cod_agent.cli", "serve", "--registry", str(folder / "registry.db"), "--json"]
        self.log = folder / "serving"
        self.told = (folder / "serve.err").open("w+")
        self.process = subprocess.Popen(
            [*command, "--engine", "embedded", "--port", "0", "--log", str(self.log), *words],
            stdout=subprocess.PIPE,
            stderr=self.told,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    async def says(self) -> dict[str, Any]:
        """What it prints when it serves."""
        said = b""
        while not said.endswith(b"}\n"):
            line = await asyncio.to_thread(self.process.stdout.readline)  # type: ignore[union-attr]
            assert line, (self.told.seek(0), self.told.read())[1]
            said += line
        return dict(json.loads(said))

    async def happens(self, name: str, times: int = 1) -> None:
        async with asyncio.timeout(120):
            while not self.log.is_dir() or (self.log / "serve.jsonl").read_text().count(f'"event": "{name}"') < times:
                assert self.process.poll() is None, (self.told.seek(0), self.told.read())[1]
                await asyncio.sleep(0.05)

    def servers(self) -> list[int]:
        """Processes that serve for it."""
        found = subprocess.run(
            ["pgrep", "-f", f"cod_train.serving.embedded {self.log.parent}"], capture_output=True, text=True
        )
        return [*map(int, found.stdout.split())]

    async def gone(self) -> None:
        async with asyncio.timeout(20):
            while self.servers():
                await asyncio.sleep(0.1)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.told.close()


@pytest.mark.slow
async def test_lives_go_through_a_switch_and_name_both_weights(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "kept")
    command, memory = Command(folder), tmp_path / "lives.db"
    try:
        said = await command.says()
        model = OpenAIModel(said["model"], base_url=said["base_url"], exact=True, form=said["form"])
        tasks = await asyncio.gather(*(lived(number, model, memory, folder) for number in range(4)))
        await model.aclose()
        await command.happens("drained")
        command.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(command.process.wait, 30) == 0
        await command.gone()
    finally:
        command.close()
    with Registry(folder / "registry.db") as kept:
        both = {f"{kept.get(name).weights}/cod-embedded-{__version__}": kept.get(name).folder for name in (BLUE, GREEN)}
    with look(memory) as conn:
        rows = conn.execute("SELECT id, weights FROM calls ORDER BY id").fetchall()
        calls = [Call(*(read_tokens(conn, number) or ([], [], [])), weights) for number, weights in rows]
    assert {call.weights for call in calls} == set(both) and len(calls) > sum(tasks)
    for weights, at in both.items():
        assert off_by(at, [call for call in calls if call.weights == weights]) < 0.02
    assert off_by(made / "checkpoints" / GREEN, [call for call in calls if BLUE in call.weights]) > 0.02
    with look(memory) as conn:
        for run in history.find(conn):
            wrote = [step.weights.partition("@")[0] for step in history.steps(conn, run)]
            assert wrote[0] == BLUE and wrote[-1] == GREEN, "the history of a context names who wrote each version"
        failed = [row[0] for row in conn.execute("SELECT detail FROM attempts")]
    assert not failed


async def lived(number: int, model: OpenAIModel, memory: Path, folder: Path) -> int:
    """A life that has `embedded` promoted and ends when that has written a context; its tasks."""
    lake, tasks = FrozenLake("small", seed=number, form="compact"), 0
    async with CoDAgent(f"agent-{number}", model=model, memory=memory) as agent:
        async for _ in agent.run(lake.pack(300)):
            tasks += 1
            if number == 0 and tasks == 3:
                with Registry(folder / "registry.db") as kept:
                    kept.promote(GREEN, "better")
            with look(memory) as conn:
                (run,) = history.find(conn, f"agent-{number}")
                if history.steps(conn, run)[-1].weights.startswith(f"{GREEN}@"):
                    break
    return tasks


def off_by(folder: Path, calls: list[Call]) -> float:
    """Nats that some token's recorded log-probability is off from what these weights say."""
    import torch

    model, _ = load_exactly(folder)
    out = 0.0
    with torch.inference_mode():
        for call in calls:
            logits = model(torch.tensor([call.prompt + call.sampled])).logits[0, len(call.prompt) - 1 : -1].double()
            said = logits.log_softmax(-1).gather(1, torch.tensor(call.sampled)[:, None])[:, 0]
            out = max(out, float((said - torch.tensor(call.logprobs).double()).abs().max()))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "term", "interrupt"])
async def test_however_the_command_ends_during_a_switch_no_process_is_left(
    made: Path, tmp_path: Path, end: str
) -> None:
    folder = shutil.copytree(made, tmp_path / "kept")
    command = Command(folder)
    try:
        await command.says()
        with Registry(folder / "registry.db") as kept:
            kept.promote(GREEN, "better")
        await command.happens("starting", 2)
        async with asyncio.timeout(60):
            while len(command.servers()) < 4:  # two servers, each with its keeper
                await asyncio.sleep(0.05)
        command.process.send_signal({"kill": 9, "term": signal.SIGTERM, "interrupt": signal.SIGINT}[end])
        code = await asyncio.to_thread(command.process.wait, 60)
        assert code == {"kill": -9, "term": 0, "interrupt": 130}[end]
        await command.gone()
        with Registry(folder / "registry.db") as kept:
            assert kept.get(GREEN).state == "promoted", "the next serve begins with it"
    finally:
        command.close()


@pytest.mark.slow
async def test_a_port_in_use_ends_the_command_before_anything_starts(made: Path) -> None:
    async with serving_nobody() as port:
        command = [sys.executable, "-m", "cod_agent.cli", "serve", "--engine", "embedded", "--port", str(port)]
        done = await asyncio.to_thread(
            subprocess.run,
            [*command, "--registry", str(made / "registry.db")],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1 and f"port {port}" in done.stderr and "another --port" in done.stderr
    assert "starting" not in done.stderr


def test_a_log_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["serve", GREEN, "--engine", "embedded", "--port", "0", "--log", str(tmp_path / "file" / "log")]
    done = subprocess.run(
        [sys.executable, "-m", "cod_agent.cli", *words], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 1 and "choose another --log" in done.stderr and "Traceback" not in done.stderr


@asynccontextmanager
async def serving_nobody() -> AsyncIterator[int]:
    front = Front(port=0)
    await front.start()
    yield front.port
    await front.aclose()
