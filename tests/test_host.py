"""`cod host`: what clients rely on. Tasks and feedback, exactly once, limits, tokens, events, draining, kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Fault, ScriptedServer
from typer.testing import CliRunner

pytest.importorskip("pydantic_settings")
pytest.importorskip("uvicorn")

import uvicorn

from cod_agent import CoDAgent, Task
from cod_agent.cli import app
from cod_agent.environments import FrozenLake
from cod_agent.errors import ModelRefused, UnknownName, UsageError
from cod_agent.events import Delta
from cod_agent.host.app import make_app
from cod_agent.host.server import _close_silent
from cod_agent.host.service import Service
from cod_agent.host.settings import Settings, load, token_of
from cod_agent.memory.verify import verify
from cod_agent.models.openai import OpenAIModel

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-the-tests"


def reply(request: dict[str, Any], n: int) -> str:
    return "<context>\na note\n</context>" if "Write the new note" in str(request["messages"]) else "an answer"


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(reply) as made:
        yield made


class Host:
    """`cod host` in a process of its own."""

    def __init__(self, folder: Path, model_url: str, *flags: str, **settings: str) -> None:
        command = [sys.executable, "-m", "cod_agent.cli", "host", "--model", "openai:m", "--base-url", model_url]
        command += ["--memory", str(folder / "agents.db"), "--port", "0", "--json", *flags]
        given = {f"COD_HOST_{name.upper()}": value for name, value in {"token": TOKEN, **settings}.items() if value}
        self.errors = open(folder / "errors", "a+")  # noqa: SIM115 (closed by `stop`)
        self.process = subprocess.Popen(
            command, env={**os.environ, **given}, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        text = ""
        assert self.process.stdout is not None
        while not text.endswith("}\n"):
            line = self.process.stdout.readline()
            assert line, f"the host did not start: {self.said()}"
            text += line
        self.started = json.loads(text)
        self.http = httpx.Client(
            base_url=self.started["url"], headers={"authorization": f"Bearer {TOKEN}"}, timeout=30, trust_env=False
        )

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def submit(self, agent: str = "a", status: int = 200, headers: Any = None, **task: Any) -> Any:
        found = self.http.post(f"/v1/agents/{agent}/tasks", json={"id": "t", "prompt": "p", **task}, headers=headers)
        assert found.status_code == status, found.text
        return found.json()

    def place(self, position: int, agent: str = "a", run: str = "life") -> Any:
        return self.http.get(f"/v1/agents/{agent}/runs/{run}/tasks/{position}").json()

    def eventually(self, position: int, *states: str) -> Any:
        deadline = time.monotonic() + 15
        while (found := self.place(position)).get("state") not in states:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self.http.close()
        self.errors.close()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


@contextmanager
def hosting(folder: Path, model_url: str, *flags: str, **settings: str) -> Iterator[Host]:
    host = Host(folder, model_url, *flags, **settings)
    try:
        yield host
    finally:
        if not host.errors.closed:
            host.stop(signal.SIGKILL)


def asked_of(folder: Path, query: str) -> Any:
    with closing(sqlite3.connect(folder / "agents.db")) as conn:
        return conn.execute(query).fetchone()


class Near:
    """A service in this process, without sockets."""

    def __init__(self, service: Service, http: httpx.AsyncClient) -> None:
        self.service, self.http = service, http

    async def submit(self, agent: str = "a", status: int = 200, headers: Any = None, **task: Any) -> Any:
        given = {"id": "t", "prompt": "p", **task}
        found = await self.http.post(f"/v1/agents/{agent}/tasks", json=given, headers=headers)
        assert found.status_code == status, found.text
        return found.json()

    async def place(self, position: int, agent: str = "a", run: str = "life") -> Any:
        return (await self.http.get(f"/v1/agents/{agent}/runs/{run}/tasks/{position}")).json()

    async def eventually(self, position: int, *states: str) -> Any:
        deadline = time.monotonic() + 30
        while (found := await self.place(position)).get("state") not in states:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.02)
        return found


@asynccontextmanager
async def near(folder: Path, model_url: str, token: str | None = TOKEN, **settings: Any) -> AsyncIterator[Near]:
    given = {"model": "openai:m", "base_url": model_url, "api_key": "x", "memory": folder / "agents.db", **settings}
    service = Service(load(given))
    await service.open()
    transport = httpx.ASGITransport(make_app(service, token))
    shown = {"authorization": f"Bearer {TOKEN}"}
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=shown) as http:
            yield Near(service, http)
    finally:
        await service.drain(0)
        await service.aclose()


# ---- tasks, feedback, contexts ----


async def test_a_task_is_solved_judged_and_remembered(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        solved = await host.submit(prompt="What now?")
        assert (solved["position"], solved["answer"], solved["feedback"]) == (0, "an answer", None)
        path = "/v1/agents/a/runs/life/tasks/0/feedback"
        judged = (await host.http.post(path, json={"reward": 0.5, "text": "fair"})).json()
        assert (judged["reward"], judged["context"], judged["version"], judged["update"]) == (
            0.5,
            "a note",
            1,
            "written",
        )
        assert (await host.http.post(path, json={"reward": 0.5, "text": "fair"})).json() == judged, (
            "the same again is harmless"
        )
        other = await host.http.post(path, json={"reward": 0.6})
        assert other.status_code == 409 and other.json()["error"]["type"] == "UsageError"
        assert (await host.http.get("/v1/agents/a/context")).json()["context"] == "a note"
        assert (await host.http.get("/v1/agents/a/context?version=0")).json()["context"] == ""
        assert "no context version 9: it has 0 to " in (await host.http.get("/v1/agents/a/context?version=9")).text
        versions = (await host.http.get("/v1/agents/a/contexts")).json()["versions"]
        assert [(one["version"], one["weights"]) for one in versions] == [(0, ""), (1, "m/w-1")]
        assert (await host.http.get("/v1/agents")).json()["agents"] == [{"agent": "a", "runs": 1, "tasks": 1}]
        assert (await host.http.get("/v1/agents/a/runs")).json()["runs"][0]["mean_reward"] == 0.5
        assert (await host.http.get("/v1/agents/b/context")).status_code == 404
    assert server.count == 2
    assert asked_of(tmp_path, "SELECT count(*) FROM leases") == (0,), "leases are given up"
    assert verify(tmp_path / "agents.db").ok


async def test_tasks_of_a_world_are_what_the_world_makes(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: reply(request, n).replace("an answer", "<answer>1</answer>")
    async with near(tmp_path, server.url, environment="frozen-lake:small") as host:
        task = FrozenLake("small", seed=7).pack(1)[0]
        done = await host.submit(id=task.id, prompt=task.prompt, data=task.data)
        assert done["reward"] in (0.0, 1.0) and done["update"] == "written"
        await host.submit(id="no lake", data={"preset": "huge"}, status=422)
        assert (await host.place(1)).get("error", {}).get("type") == "UnknownName", "what was refused stands nowhere"


async def test_asking_again_gives_the_same_outcome(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        first = await host.submit(prompt="one", position=0)
        assert await host.submit(prompt="one", position=0) == first
        assert (await host.submit(prompt="another", position=0, status=409))["error"]["type"] == "TaskMismatch"
        assert (await host.submit(position=5, status=409))["error"]["type"] == "UsageError"
        key = {"idempotency-key": "order-17"}
        second = await host.submit(prompt="two", headers=key)
        assert second["position"] == 1 and await host.submit(prompt="two", headers=key) == second
        await host.submit(prompt="three", headers=key, status=409)
        await host.submit(prompt="two", position=0, headers=key, status=409)
        assert (await host.submit(prompt="two"))["position"] == 2, "without either it is a new task"
    assert server.count == 3


async def test_a_run_is_lived_in_order_and_agents_side_by_side(tmp_path: Path, server: ScriptedServer) -> None:
    def slow(request: dict[str, Any], n: int) -> str:
        time.sleep(0.15)
        return "an answer"

    server.reply = slow
    async with near(tmp_path, server.url) as host:
        for agent in ("a", "b", "c"):
            for n in range(3):
                accepted = await host.submit(agent, 202, id=f"t{n}", wait=False)
                assert accepted["url"] == f"/v1/agents/{agent}/runs/life/tasks/{n}"
        assert (await host.place(2))["state"] == "queued"
        assert [(await host.eventually(n, "solved"))["task"]["id"] for n in range(3)] == ["t0", "t1", "t2"]
    assert server.most_at_once == 3


# ---- limits ----


async def test_a_full_queue_says_when_to_come_back(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: time.sleep(1) or "late"  # type: ignore[func-returns-value]
    async with near(tmp_path, server.url, queue=2, max_agents=1) as host:
        await host.submit(status=202, wait=False)
        await host.submit(status=202, wait=False)
        full = await host.http.post("/v1/agents/a/tasks", json={"id": "t", "wait": False})
        assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
        assert full.json()["error"]["type"] == "Busy"
        await host.submit("b", 429, wait=False)
        await host.eventually(1, "solved")
        assert (await host.submit("b"))["answer"] == "late", "an agent with nothing to do makes room"


async def test_a_request_that_waits_too_long_is_told_so(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: time.sleep(1) or "late"  # type: ignore[func-returns-value]
    async with near(tmp_path, server.url, patience=0.2) as host:
        assert (await host.submit(status=504))["error"]["type"] == "StillUnderWay"
        assert (await host.eventually(0, "solved"))["outcome"]["answer"] == "late"


BODIES = {
    b"": 400,
    b"{": 400,
    b"nonsense": 400,
    b'{"id": "a", "data": {"x": NaN}}': 400,
    b'{"id": "a", "data": {"x": 1e999}}': 400,
    b'{"id": "a", "data": {"x": ' + b"9" * 5000 + b"}}": 400,
    b'{"id": "a", "data": {"x": ' + b"[" * 5000 + b"]" * 5000 + b"}}": 400,
    b'{"id": "\\ud800"}': 400,
    b'{"id": "\xff"}': 400,
    b'{"id": "a\\u0000"}': 422,
    b'{"id": "a", "run": "../etc"}': 422,
    b'{"id": "a", "position": -1}': 422,
    b'{"id": "a", "position": 1.5}': 422,
    b'{"id": "a", "position": 99999999999}': 422,
    b'{"id": "a", "wait": "yes"}': 422,
    b'{"id": "a", "more": 1}': 422,
    b'{"id": 1}': 422,
    b"[]": 422,
    b"null": 422,
    b'{"id": "a", "prompt": "' + b"x" * 5000 + b'"}': 413,
}


async def test_bad_requests_are_refused_and_change_nothing(tmp_path: Path, server: ScriptedServer) -> None:
    json_kind = {"content-type": "application/json"}
    async with near(tmp_path, server.url, max_body=4900) as host:
        for body, status in BODIES.items():
            status = 413 if len(body) > 4900 else status
            found = await host.http.post("/v1/agents/a/tasks", content=body, headers=json_kind)
            assert (found.status_code, set(found.json())) == (status, {"error"}), (body[:60], found.text)

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x" * 1000

        assert (await host.http.post("/v1/agents/a/tasks", content=chunks(), headers=json_kind)).status_code == 413
        assert (await host.http.post("/v1/agents/a/tasks", content=b"{}")).status_code == 415
        for name in ("%00", "%2e%2e", "a%2Fb", "%ff", "x" * 200, "-a", "%F0%9F%98%80"):
            status = (await host.http.post(f"/v1/agents/{name}/tasks", json={"id": "t"})).status_code
            assert status in (404, 422), (name, status)
        for path in ("tasks/-1", "tasks/x", f"tasks/{'9' * 40}", "tasks/%D9%A1"):
            assert (await host.http.get(f"/v1/agents/a/runs/life/{path}")).status_code == 422
        for query in ("version=x", "version=99999999999", "limit=0"):
            assert (
                await host.http.get(f"/v1/agents/a/context{'s' if 'limit' in query else ''}?{query}")
            ).status_code == 422
        assert (await host.http.get("/v1/events", headers={"last-event-id": "never"})).status_code == 422
        assert (await host.http.put("/v1/agents")).headers["allow"] in ("GET, HEAD", "HEAD, GET")
        assert (await host.http.get("/v1/agents")).json()["agents"] == []
    assert server.count == 0


# ---- who may ----


async def test_what_changes_anything_needs_the_token(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        for shown in ("", "Bearer wrong", f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN}x"):
            found = await host.http.post("/v1/agents/a/tasks", json={"id": "t"}, headers={"authorization": shown})
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer"
        host.http.headers["authorization"] = ""
        assert (await host.http.get("/v1/agents")).status_code == 200, "on loopback reading is free"
        rebound = await host.http.get("/v1/agents", headers={"host": "agents.example"})
        assert rebound.status_code == 421, "a page that rebinds its name to this machine reads nothing"
        found = await host.http.get("/v1/agents", headers={"origin": "http://x"})
        assert "access-control-allow-origin" not in found.headers


def test_the_address_it_says_is_one_it_answers_at(tmp_path: Path, server: ScriptedServer) -> None:
    with hosting(tmp_path, server.url, "--host", "127.0.0.2") as host:
        assert host.http.get("/ready").status_code == 200
    assert "[0:0::1]" in (load({"model": "openai:m", "host": "0:0::1"}).hosts or ())


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_the_service(
    tmp_path: Path, server: ScriptedServer
) -> None:
    with hosting(tmp_path, server.url) as host:
        port = int(host.started["url"].rpartition(":")[2])
        head = f"POST /v1/agents/a/tasks HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
        with socket.create_connection(("127.0.0.1", port)) as half:
            half.sendall(f'{head}content-type: application/json\r\ncontent-length: 99\r\n\r\n{{"id'.encode())
            time.sleep(0.2)
        host.submit()
        assert "Traceback" not in host.said()


async def test_a_connection_that_does_not_get_to_a_request_is_closed() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None))
    closing, serving = asyncio.create_task(_close_silent(server, 0.1)), asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    request = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    closed = []
    for begun, then in ((b"", b""), (request[:9], b""), (request, b""), (request, request[:9])):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(begun)
        if begun == request:
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200"), "a slow answer is waited for"
        writer.write(then)
        await asyncio.sleep(0.4)
        closed.append(reader.at_eof())
        writer.close()
    assert closed == [True, True, False, True], "between two requests a connection may rest"
    server.should_exit = True
    await serving
    closing.cancel()


async def test_behind_a_proxy_reading_needs_the_token_too(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url, allowed_hosts=("agents.example",)) as host:
        named = {"host": "agents.example:443"}
        assert (await host.http.get("/v1/agents", headers=named)).status_code == 200
        host.http.headers["authorization"] = ""
        assert (await host.http.get("/v1/agents", headers=named)).status_code == 401
        assert (await host.http.get("/ready", headers=named)).status_code == 200


def test_a_token_is_made_on_loopback_and_demanded_elsewhere(tmp_path: Path, server: ScriptedServer) -> None:
    with hosting(tmp_path, server.url, token="") as host:
        made = re.search(r"until the service stops: (\S+)", host.said())
        assert made and len(made[1]) >= 32
        host.http.headers["authorization"] = f"Bearer {made[1]}"
        host.submit()
    refused = CliRunner().invoke(app, ["host", "--model", "openai:m", "--host", "0.0.0.0", "--port", "0"])
    assert refused.exit_code == 1 and "no token" in refused.output


# ---- trouble with the model ----


async def test_a_task_is_tried_until_the_model_answers(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: Fault(status=401)
    async with near(tmp_path, server.url) as host:
        refused = await host.http.post("/v1/agents/a/tasks", json={"id": "t"})
        assert refused.status_code == 502 and refused.json()["error"]["type"] == "ModelRefused"
        assert (await host.http.get("/ready")).status_code == 503
        assert (await host.place(0))["trouble"]["type"] == "ModelRefused"
        server.reply = reply
        assert (await host.submit(prompt="", position=0))["answer"] == "an answer", (
            "asked for again, it is tried at once"
        )
        assert (await host.http.get("/ready")).json()["ready"] is True


async def test_an_update_is_tried_until_the_model_answers(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cod_agent.models.openai.FIRST_WAIT", 0.01)
    async with near(tmp_path, server.url) as host:
        await host.submit()
        server.reply = lambda request, n: Fault(garbage=b"<html>")
        path = "/v1/agents/a/runs/life/tasks/0/feedback"
        assert (await host.http.post(path, json={"reward": 1})).json()["error"]["type"] == "ModelGarbled"
        server.reply = reply
        assert (await host.eventually(0, "updated"))["outcome"]["context"] == "a note"


async def test_what_waits_for_a_decision_is_decided(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url, gate="review") as host:
        await host.submit()
        judged = (await host.http.post("/v1/agents/a/runs/life/tasks/0/feedback", json={"reward": 1.0})).json()
        assert (judged["update"], judged["version"], judged["context"]) == ("held", 0, "")
        (held,) = (await host.http.get("/v1/agents/a/runs/life/held")).json()["held"]
        assert (held["version"], held["position"], held["context"], held["head"]) == (1, 0, "a note", 0)
        path = "/v1/agents/a/runs/life/decide"
        said = await host.http.post(path, json={"version": 1, "decision": "accept", "why": "read it"})
        assert said.json() == {"agent": "a", "run": "life", "version": 2}
        assert (await host.http.get("/v1/agents/a/context")).json()["context"] == "a note"
        again = await host.http.post(path, json={"version": 1, "decision": "refuse"})
        assert again.status_code == 409 and "was adopted" in again.json()["error"]["message"]
        back = await host.http.post(path, json={"version": 0, "decision": "rollback"})
        assert back.json()["version"] == 3
        assert (await host.http.get("/v1/agents/a/runs/life/held")).json()["held"] == []
        assert (
            await host.http.post("/v1/agents/a/runs/none/decide", json={"version": 1, "decision": "accept"})
        ).status_code == 404


async def test_a_task_that_cannot_be_lived_can_be_given_up(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: Fault(status=401)
    async with near(tmp_path, server.url) as host:
        await host.submit(status=502)
        assert (await host.submit(status=202, wait=False))["position"] == 1
        server.reply = reply
        given_up = (await host.http.post("/v1/agents/a/runs/life/abandon")).json()["abandoned"]
        assert given_up in ([0], [])  # the next attempt may have been quicker
        assert (await host.eventually(1, "solved"))["outcome"]["answer"] == "an answer"
        assert (await host.place(0))["state"] == ("closed" if given_up else "solved")


async def test_an_update_that_is_refused_for_good_can_be_given_up(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        server.reply = reply
        await host.submit()
        server.reply = lambda request, n: Fault(status=400)
        judged = await host.http.post("/v1/agents/a/runs/life/tasks/0/feedback", json={"reward": 1.0})
        assert judged.status_code == 502, judged.text
        assert (await host.submit(status=202, wait=False))["position"] == 1
        assert (await host.http.post("/v1/agents/a/runs/life/abandon")).json()["abandoned"] == [0]
        server.reply = reply
        assert (await host.eventually(1, "solved"))["outcome"]["answer"] == "an answer"
        assert (await host.place(0))["outcome"]["update"] == "kept"


# ---- events ----


def pieces(text: str) -> list[tuple[str, str, Any]]:
    """(id, event, data) of each."""
    found = []
    for block in text.split("\n\n"):
        said = dict(line.partition(": ")[::2] for line in block.splitlines() if line and not line.startswith(":"))
        if "data" in said:
            found.append((said.get("id", ""), said["event"], json.loads(said["data"])))
    return found


async def test_recorded_events_can_be_read_from_any_of_them_on(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        await host.submit()
        await host.http.post("/v1/agents/a/runs/life/tasks/0/feedback", json={"text": "well done"})
        await host.submit("b")
    async with near(tmp_path, server.url) as host:
        every = pieces((await host.http.get("/v1/events?after=0&follow=false")).text)
        assert [(event, said["agent"]) for _, event, said in every] == [
            ("solved", "a"), ("judged", "a"), ("context_written", "a"), ("solved", "b"),
        ]  # fmt: skip
        assert every[1][2]["feedback"] == {"reward": None, "text": "well done"}
        later = pieces((await host.http.get("/v1/events?follow=false", headers={"last-event-id": every[1][0]})).text)
        assert [one for one in later if one[0] > every[1][0]] == every[2:]
        own = pieces((await host.http.get("/v1/agents/b/events?after=0&follow=false")).text)
        assert own == every[3:]


async def test_a_listener_that_did_not_read_for_long_gets_all_that_was_recorded(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cod_agent.host.events._PAGE", 2)
    async with near(tmp_path, server.url) as host:
        stream = host.service.hub.stream(host.service.memory, None, None, True)
        await anext(stream)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        for _ in range(5):
            await host.submit("a")
        await host.submit("b")
        text = (await waiting).decode()
        while text.count("event: solved") < 6:
            text += (await asyncio.wait_for(anext(stream), 10)).decode()
        solved = [(said["agent"], said["position"]) for _, event, said in pieces(text) if event == "solved"]
        assert sorted(solved) == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 0)]
        await stream.aclose()


async def test_no_more_listen_than_may_even_all_at_once(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cod_agent.host.events.STREAMS", 2)
    async with near(tmp_path, server.url) as host:
        hub, path = host.service.hub, host.service.memory
        streams = [hub.stream(path, None, None, True) for _ in range(2)]
        assert (await host.http.get("/v1/events?follow=false")).status_code == 429
        streams.clear()
        assert len(hub) == 0, "streams that nobody began to read make room"
        assert (await host.http.get("/v1/events?follow=false")).status_code == 200 and len(hub) == 0


async def test_who_listens_hears_that_a_task_was_given_up(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: Fault(status=401)
    async with near(tmp_path, server.url) as host:
        await host.submit(status=502)
        stream = host.service.hub.stream(host.service.memory, "a", None, True)
        await anext(stream)
        heard = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        assert (await host.http.post("/v1/agents/a/runs/life/abandon")).json()["abandoned"] == [0]
        assert b"event: solved" in await asyncio.wait_for(heard, 10)
        await stream.aclose()


async def test_who_reads_while_the_service_closes_is_not_kept_waiting(tmp_path: Path, server: ScriptedServer) -> None:
    async with near(tmp_path, server.url) as host:
        hub = host.service.hub
        stream = hub.stream(host.service.memory, "a", None, True)
        await anext(stream)
        heard = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.1)
        for text in ("one", "two"):
            hub.tell("a", Delta("life", 0, text))
        assert b"one" in await asyncio.wait_for(heard, 10)
        hub.close()
        assert b"two" in await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(stream), 10)


def test_events_are_told_as_they_happen(tmp_path: Path, server: ScriptedServer) -> None:
    with hosting(tmp_path, server.url) as host, host.http.stream("GET", "/v1/agents/a/events") as stream:
        lines = stream.iter_lines()
        next(lines)
        time.sleep(0.2)
        host.submit("b")
        host.submit()
        seen = []
        for line in lines:
            if line.startswith("event: "):
                seen.append(line.removeprefix("event: "))
            if seen[-1:] == ["task_ended"]:
                break
        assert seen == ["task_begun", "answered", "solved", "task_ended"]
        assert host.stop() == 0, "who listens does not keep it from stopping"


# ---- ending and beginning again ----


def test_sigterm_lets_tasks_under_way_finish(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: time.sleep(1) or "late"  # type: ignore[func-returns-value]
    with hosting(tmp_path, server.url) as host:
        host.submit(status=202, wait=False)
        host.submit(status=202, wait=False)
        host.eventually(0, "open")
        host.process.terminate()
        time.sleep(0.2)
        assert host.http.get("/ready").json()["draining"] is True
        refused = host.http.post("/v1/agents/a/tasks", json={"id": "t"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        assert host.process.wait(10) == 0
    assert server.count == 1
    with hosting(tmp_path, server.url) as host:
        assert host.started["left"] == 1
        assert host.place(0)["state"] == "solved"
        assert host.eventually(1, "solved")["outcome"]["answer"] == "late"


async def test_what_takes_longer_than_the_drain_goes_on_at_the_next_start(
    tmp_path: Path, server: ScriptedServer
) -> None:
    answered = threading.Event()
    server.reply = lambda request, n: str(answered.wait(30))
    async with near(tmp_path, server.url) as host:
        await host.submit(status=202, wait=False)
        await host.eventually(0, "open")
        assert await host.service.drain(0.05) == 1, "it does not wait for the model"
        await host.submit(status=503)
    answered.set()
    server.reply = reply
    async with near(tmp_path, server.url) as host:
        assert (await host.eventually(0, "solved"))["outcome"]["answer"] == "an answer"


def test_kill_9_loses_nothing_that_was_accepted_and_repeats_nothing(tmp_path: Path, server: ScriptedServer) -> None:
    asked: list[str] = []

    def slowly(request: dict[str, Any], n: int) -> str:
        prompt = next(word for word in str(request["messages"]).split() if word.startswith("number-"))
        time.sleep(0.05)
        asked.append(prompt)
        return f"answer {prompt}"

    server.reply = slowly
    with hosting(tmp_path, server.url) as host:
        keys = [{"idempotency-key": f"key-{n}"} for n in range(12)]
        for n in range(12):
            host.submit(status=202, id=f"t{n}", prompt=f"do number-{n} now", wait=False, headers=keys[n])
    with hosting(tmp_path, server.url):
        time.sleep(0.15)
    with hosting(tmp_path, server.url) as host:
        host.eventually(11, "solved")
        outcomes = [host.submit(id=f"t{n}", prompt=f"do number-{n} now", headers=keys[n]) for n in range(12)]
        assert host.stop() == 0
    assert [one["answer"] for one in outcomes] == [f"answer number-{n}" for n in range(12)]
    assert [one["position"] for one in outcomes] == list(range(12))
    assert asked_of(tmp_path, "SELECT count(*) FROM tasks") == asked_of(tmp_path, "SELECT count(*) FROM calls") == (12,)
    assert len(asked) <= 12 + 2, "only what was in flight at a kill is asked again"
    assert verify(tmp_path / "agents.db").ok


def test_an_update_that_a_kill_cut_off_is_written_at_the_next_start(tmp_path: Path, server: ScriptedServer) -> None:
    with hosting(tmp_path, server.url) as host:
        host.submit()
        server.reply = lambda request, n: time.sleep(1) or "never seen"  # type: ignore[func-returns-value]
        with pytest.raises(httpx.HTTPError):
            host.http.post("/v1/agents/a/runs/life/tasks/0/feedback", json={"reward": 1}, timeout=0.4)
    server.reply = reply
    with hosting(tmp_path, server.url) as host:
        assert host.started["left"] == 1
        assert host.eventually(0, "updated")["outcome"]["context"] == "a note"


async def test_runs_of_other_programs_are_left_alone(tmp_path: Path, server: ScriptedServer) -> None:
    server.reply = lambda request, n: Fault(status=401)
    model = OpenAIModel("m", base_url=server.url, api_key="x")
    async with CoDAgent("own", model=model, memory=tmp_path / "agents.db") as agent:
        with pytest.raises(ModelRefused):
            await agent.solve(Task(id="t"))
    await model.aclose()
    server.reply = reply
    async with near(tmp_path, server.url) as host:
        assert not host.service.hub and not (await host.http.get("/ready")).json()["waiting"]
        assert (await host.place(0, "own"))["state"] == "open"
    async with near(tmp_path, server.url, environment="frozen-lake:tiny") as host:
        task = FrozenLake("tiny").pack(1)[0]
        other = await host.submit("own", 409, id=task.id, prompt=task.prompt, data=task.data)
        assert "name another run" in other["error"]["message"]


def test_a_port_in_use_and_a_missing_model_are_said(tmp_path: Path, server: ScriptedServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        refused = CliRunner().invoke(app, ["host", "--model", "openai:m", "--port", port])
        assert refused.exit_code == 1 and f"127.0.0.1:{port}" in refused.output
    assert "name a model" in CliRunner().invoke(app, ["host"]).output
    blind = CliRunner().invoke(app, ["host", "--model", "embedded", "--port", "0", "--memory", str(tmp_path / "x.db")])
    assert blind.exit_code == 1 and "compact form" in blind.output


# ---- settings ----


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "host.toml"
    file.write_text('model = "openai:a"\nport = 1\nqueue = 7\ndrain = 5\n')
    monkeypatch.setenv("COD_HOST_PORT", "2")
    monkeypatch.setenv("COD_HOST_QUEUE", "8")
    found = load({"port": 3, "drain": None}, file)
    assert (found.model, found.port, found.queue, found.drain) == ("openai:a", 3, 8, 5)


def test_unknown_settings_are_named_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "host.toml"
    file.write_text('modle = "openai:a"\n')
    with pytest.raises(UnknownName, match="did you mean model"):
        load({}, file)
    file.write_text("port = 99999\n")
    with pytest.raises(UsageError, match="port"):
        load({"model": "openai:a"}, file)
    monkeypatch.setenv("COD_HOST_TOKN", "a-secret-of-somebody")
    with pytest.raises(UnknownName, match="COD_HOST_TOKEN") as caught:
        load({"model": "openai:a"})
    assert "a-secret-of-somebody" not in str(caught.value)


def test_a_token_file_holds_one_long_word(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert token_of(load({"model": "openai:a", "token_file": file})) == TOKEN
    file.write_text("short")
    with pytest.raises(UsageError, match="16 characters"):
        token_of(load({"model": "openai:a", "token_file": file}))
    assert TOKEN not in repr(load({"model": "openai:a", "token": TOKEN}))


def test_the_docs_table_is_the_settings() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*?) \|$", page, re.MULTILINE))
    assert rows == {name: field.description for name, field in Settings.model_fields.items()}


def test_the_example_settings_load() -> None:
    assert load({}, ROOT / "examples" / "service" / "host.toml").model
