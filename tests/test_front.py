"""The stable address: what goes through it, where to, and what it answers itself."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("openai")

import openai
from servers import Answer, Fault, Reply, ScriptedServer

from cod_agent import CoDAgent, Task
from cod_agent.errors import UsageError
from cod_agent.journal.http import http_module
from cod_agent.models.openai import OpenAIModel
from cod_train.serving import passing
from cod_train.serving.front import Front

BLUE, GREEN = "first@0f3c5a1e77b2", "second@91be02c4d1aa"
HELLO: dict[str, Any] = {"model": "policy", "messages": [{"role": "user", "content": "Hello"}]}


@asynccontextmanager
async def fronted(*replies: Reply | None) -> AsyncIterator[tuple[Front, Any, list[ScriptedServer]]]:
    """A front before scripted model servers; the first serves, if there is one."""
    servers = [ScriptedServer(reply) for reply in replies]
    front = Front(port=0)
    await front.start()
    try:
        for weights, server in zip((BLUE, GREEN), servers, strict=False):
            front.add(weights, server.url)
        if servers:
            front.switch(BLUE)
        base = front.base_url.removesuffix("/v1")
        async with http_module().AsyncClient(base_url=base, trust_env=False, timeout=10) as client:
            yield front, client, servers
    finally:
        await front.aclose()
        for server in servers:
            server.close()


def slowly(seconds: float, text: str = "ok") -> Reply:
    return lambda request, n: Answer(text, delay=seconds)


async def until(holds: Any) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.01)


def refused(response: Any) -> str:
    """An error's code; its body has the shape that OpenAI's clients read."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "code", "param"} and error["message"]
    return str(error["code"])


async def test_the_alias_becomes_the_name_of_concrete_weights_and_nothing_else_changes() -> None:
    body = b'{ "n":1.0, "messages" : [{"role":"user","content":"say \\"model\\": \\"policy\\" \xc3\xa9"}], "model" :\t"policy"}'
    async with fronted(None) as (_, client, (server,)):
        told = {"authorization": "Bearer k", "connection": "x-mine", "x-mine": "1", "te": "trailers", "x-kept": "2"}
        response = await client.post("/v1/chat/completions", content=body, headers=told)
        direct = await client.post(f"{server.url}/chat/completions", content=server.bodies[0])
        await client.post("/tokenize", json={"model": "policy", "prompt": "policy"})
    assert server.bodies[0] == body.replace(b'\t"policy"', f'\t"{BLUE}"'.encode())
    assert response.status_code == 200 and response.content == direct.content and response.json()["model"] == BLUE
    assert response.headers["server"] == direct.headers["server"] and response.headers["content-length"]
    assert server.headers[0]["authorization"] == "Bearer k" and server.headers[0]["x-kept"] == "2"
    assert "x-mine" not in server.headers[0] and "te" not in server.headers[0]
    assert server.paths == ["/v1/chat/completions", "/v1/chat/completions", "/tokenize"]
    assert server.requests[2] == {"model": BLUE, "prompt": "policy"}


async def test_a_server_that_asks_for_a_key_is_shown_its_own_and_not_the_clients() -> None:
    async with fronted(None) as (front, client, (server,)):
        front.add(GREEN, server.url, "its key")
        for model in (GREEN, "policy"):
            await client.post("/v1/completions", json={"model": model}, headers={"authorization": "Bearer mine"})
    assert [sent["authorization"] for sent in server.headers] == ["Bearer its key", "Bearer mine"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"policy","metadata":{"model":"policy"}}',
        b'{"model":"x","messages":[],"model":"policy"}',
        b'{"mo\\u0064el":"policy"}',
        b'{"model":"policy","metadata":{"a\\"model":"policy"}}',
    ],
)
async def test_a_model_named_in_an_odd_way_is_replaced_where_it_counts(body: bytes) -> None:
    async with fronted(None) as (_, client, (server,)):
        assert (await client.post("/v1/completions", content=body)).status_code == 200
    said, expected = server.requests[0], json.loads(body)
    assert said == {**expected, "model": BLUE}


async def test_concrete_weights_answer_by_their_own_name_while_they_are_held() -> None:
    async with fronted(None, None) as (front, client, (blue, green)):
        assert (await client.post("/v1/chat/completions", json={**HELLO, "model": GREEN})).json()["model"] == GREEN
        assert (blue.count, green.count) == (0, 1)
        named = [one["id"] for one in (await client.get("/v1/models")).json()["data"]]
        assert named == ["policy", BLUE, GREEN]
        front.remove(GREEN)
        response = await client.post("/v1/chat/completions", json={**HELLO, "model": GREEN})
        assert response.status_code == 404 and refused(response) == "model_not_found"
        assert f"policy, {BLUE}" in response.json()["error"]["message"]
        assert [one["id"] for one in (await client.get("/v1/models")).json()["data"]] == ["policy", BLUE]


async def test_a_stream_passes_chunk_by_chunk_and_byte_for_byte() -> None:
    async with fronted(slowly(0.05, "a stream of some length")) as (_, client, (server,)):
        body = {**HELLO, "stream": True}
        arrived, pieces = [], []
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream"
            async for piece in response.aiter_raw():
                arrived.append(time.monotonic())
                pieces.append(piece)
        direct = await client.post(f"{server.url}/chat/completions", content=server.bodies[0])
    assert b"".join(pieces) == direct.content and direct.content.endswith(b"data: [DONE]\n\n")
    assert len(pieces) > 5 and arrived[-1] - arrived[0] > 0.2


async def test_a_switch_sends_new_requests_on_and_lets_those_under_way_finish() -> None:
    async with fronted(slowly(0.3, "blue"), lambda request, n: "green") as (front, client, (blue, _)):
        asked = [asyncio.create_task(client.post("/v1/chat/completions", json=HELLO)) for _ in range(4)]
        await until(lambda: blue.count == 4)
        front.switch(GREEN)
        front.remove(BLUE)
        assert front.under_way(BLUE) == 4 and not await front.drained(BLUE, 0.01)
        assert (await client.get("/status")).json()["under_way"] == {BLUE: 4, GREEN: 0}
        after = await client.post("/v1/chat/completions", json=HELLO)
        assert after.json()["model"] == GREEN
        assert await front.drained(BLUE, 5) and front.under_way(BLUE) == 0
        assert [(await one).json()["model"] for one in asked] == [BLUE] * 4
        status = (await client.get("/status")).json()
    assert status["serving"] == GREEN and status["switches"] == 2 and status["answered"] == 5
    assert status["under_way"] == {GREEN: 0} and status["since"] <= time.time()


async def test_a_client_that_leaves_takes_its_request_with_it() -> None:
    closed = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with_body = await reader.read(10_000)
        assert with_body
        if b"stream" in with_body:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata: \r\n")
        await reader.read()  # until the other side closes
        writer.close()
        closed.set()

    upstream = await asyncio.start_server(endless, "127.0.0.1", 0)
    async with fronted() as (front, client, _), upstream:
        front.add(BLUE, f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}/v1")
        front.switch(BLUE)
        for stream in (False, True):
            closed.clear()
            asking = asyncio.create_task(client.post("/v1/chat/completions", json={**HELLO, "stream": stream}))
            await until(lambda: front.under_way(BLUE) == 1)
            await asyncio.sleep(0.05)
            asking.cancel()
            async with asyncio.timeout(5):
                await closed.wait()
            await until(lambda: front.under_way(BLUE) == 0)


async def test_a_connection_lost_before_the_answer_began_is_tried_once_more() -> None:
    async with fronted(lambda request, n: Fault() if n == 0 else "ok") as (_, client, (server,)):
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
        assert server.count == 2
    async with fronted(lambda request, n: Fault(cut_after=0)) as (_, client, (server,)):
        # A stream whose headers came, but no word of it: nobody has seen anything.
        response = await client.post("/v1/chat/completions", json={**HELLO, "stream": True})
        assert response.status_code == 503 and refused(response) == "not_ready" and server.count == 2
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_breaks_off_is_never_given_a_forged_end(stream: bool) -> None:
    async with fronted(lambda request, n: Fault(cut_after=3)) as (front, client, (server,)):
        with pytest.raises(http_module().RemoteProtocolError):
            await client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
        assert server.count == 1, "a part of it was seen: asking again would be another answer"
        await until(lambda: front.under_way(BLUE) == 0)
        assert "broke an answer off" in (await client.get("/status")).json()["trouble"]


async def test_errors_of_the_model_server_pass_as_they_are() -> None:
    async with fronted(lambda request, n: Fault(429, retry_after=7)) as (_, client, (server,)):
        response = await client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 429 and response.headers["retry-after"] == "7" and server.count == 1
    assert response.json()["error"]["message"] == "scripted 429"


async def test_without_a_server_it_asks_clients_to_come_again() -> None:
    async with fronted() as (front, client, _):
        assert (await client.get("/health")).status_code == 503
        response = await client.post("/v1/chat/completions", json=HELLO)
        assert response.status_code == 503 and response.headers["retry-after"] == "1" and refused(response)
        with ScriptedServer() as server:
            front.add(BLUE, server.url)
            front.switch(BLUE)
            assert (await client.get("/health")).status_code == 200
            front.remove(BLUE)
            front.trouble = "it died"
            response = await client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 503 and "it died" in response.json()["error"]["message"]


async def test_an_agent_lives_through_the_time_when_nothing_serves(tmp_path: Path) -> None:
    async with fronted(None) as (front, _, (server,)):
        front.remove(BLUE)
        model = OpenAIModel("policy", base_url=front.base_url, api_key="x", exact=True)
        async with CoDAgent("one", model=model, memory=tmp_path / "one.db") as agent:
            solving = asyncio.create_task(agent.solve(Task(id="1", prompt="Say ok.")))
            await asyncio.sleep(0.1)
            front.add(BLUE, server.url)
            front.switch(BLUE)
            outcome = await solving
        await model.aclose()
    assert outcome.answer == "ok" and server.requests[0]["model"] == BLUE


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"", 400),
        ("/v1/chat/completions", b'{"model": "policy"', 400),
        ("/v1/chat/completions", b"\xff\xfe", 400),
        ("/v1/chat/completions", b"[" * 100_000, 400),
        ("/v1/chat/completions", b'["policy"]', 400),
        ("/v1/chat/completions", b'{"messages": []}', 400),
        ("/v1/chat/completions", b'{"model": 7}', 400),
        ("/v1/chat/completions", b'{"model": "gpt-5"}', 404),
        ("/v1/chat/completions", b'{"model": "\\ud800"}', 404),
        ("/v1/load_lora_adapter", b'{"model": "policy"}', 404),
        ("/v1/./load_lora_adapter", b'{"model": "policy"}', 404),
        ("/v1//load_lora_adapter", b'{"model": "policy"}', 404),
        ("/v1/%6coad_lora_adapter", b'{"model": "policy"}', 404),
        ("/sleep", b'{"model": "policy"}', 404),
        ("/health", b"{}", 405),
    ],
)
async def test_what_is_no_request_is_refused_in_the_shape_of_openai(path: str, body: bytes, status: int) -> None:
    async with fronted(None) as (_, client, (server,)):
        response = await client.post(path, content=body)
        assert response.status_code == status and refused(response)
        assert server.count == 0
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_request_that_is_too_large_is_not_read_to_its_end(monkeypatch: Any, chunked: bool) -> None:
    monkeypatch.setattr(passing, "LARGEST", 1000)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield b"x" * 400

    async with fronted(None) as (_, client, (server,)):
        response = await client.post("/v1/chat/completions", content=body() if chunked else b"x" * 1001)
        assert response.status_code == 413 and refused(response) == "request_too_large" and server.count == 0


async def test_closing_takes_nothing_new_and_lets_what_is_under_way_finish() -> None:
    async with fronted(slowly(0.4)) as (front, client, (server,)):
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
        await until(lambda: server.count == 1)
        await front.aclose(drain=5)
        assert (await asked).json()["model"] == BLUE
        with pytest.raises(http_module().ConnectError):
            await client.get("/health")


async def test_closing_does_not_wait_for_ever() -> None:
    async with fronted(slowly(5)) as (front, client, (server,)):
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=HELLO))
        await until(lambda: server.count == 1)
        before = time.monotonic()
        await front.aclose(drain=0.2)
        assert time.monotonic() - before < 2
        await until(lambda: front.under_way(BLUE) == 0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


async def test_a_port_in_use_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port}.*another --port"):
            await Front(port=port).start()
    with pytest.raises(UsageError, match="another --port or --host"):
        await Front(host="192.0.2.1", port=0).start()


async def test_openai_clients_read_its_errors() -> None:
    async with (
        fronted() as (front, _, __),
        openai.AsyncOpenAI(base_url=front.base_url, api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(openai.NotFoundError, match="no model called 'nobody'"):
            await client.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "?"}])
        with pytest.raises(openai.InternalServerError, match="nothing serves"):
            await client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "?"}])
