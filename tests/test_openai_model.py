"""`OpenAIModel` over real HTTP on loopback: what is sent, what is stored, what goes wrong and what is said about it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Answer, Fault, ScriptedServer, logprob

from cod_agent import CoDAgent, Completion, Sampling, Task
from cod_agent.context import message
from cod_agent.errors import (
    ModelError,
    ModelGarbled,
    ModelOverloaded,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
    UsageError,
)
from cod_agent.journal.episode import Episode
from cod_agent.memory import Memory, runs
from cod_agent.memory.content import read_tokens, rebuild_request
from cod_agent.models.openai import OpenAIModel

HELLO = [message("system", ("framework", "Be é brief.")), message("user", ("application", 'Say "hello"\n\u2028'))]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as made:
        yield made


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    made = Memory.open(tmp_path / "a.db")

    def begin(conn: sqlite3.Connection) -> None:
        run = runs.open_run(conn, "a", "r", environment=None, pack=None, length=None, model="m", settings={})
        runs.begin_task(conn, run, 0, Task(id="t"))

    made.write_sync(begin)
    yield made
    made.close()


async def asked(
    model: OpenAIModel, memory: Memory, messages: Any = HELLO, *, redact: Any = None, **options: Any
) -> Completion:
    """One call in an episode that has just been opened (again)."""
    episode = Episode(memory, 1, 1, redact)
    await episode.load()
    with episode:
        try:
            return await model.complete(messages, **options)
        finally:
            await model.aclose()


def rows(memory: Memory, query: str) -> list[Any]:
    return memory.read_sync(lambda conn: [tuple(row) if len(row) > 1 else row[0] for row in conn.execute(query)])


def everything(path: Path) -> bytes:
    """All that is in a database and beside it, compressed columns unpacked too."""
    said = b"".join(file.read_bytes() for file in path.parent.iterdir())
    with sqlite3.connect(path) as conn:
        for (table,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in conn.execute(f"SELECT * FROM {table}"):
                for value in row:
                    raw = value if isinstance(value, bytes) else str(value).encode()
                    said += raw
                    try:
                        said += zlib.decompress(raw)
                    except zlib.error:
                        continue
    return said


# ---- what is sent and stored ----


@pytest.mark.parametrize("stream", [False, True])
async def test_the_bytes_the_server_saw_are_rebuilt_from_the_database(
    server: ScriptedServer, memory: Memory, stream: bool
) -> None:
    model = OpenAIModel(
        "m",
        base_url=server.url,
        stream=stream,
        exact=True,
        sampling=Sampling(max_tokens=9, seed=3),
        extra={"user": "é"},
    )
    said = HELLO
    with Episode(memory, 1, 1):
        for turn in range(3):
            server.reply = lambda request, n, turn=turn: f"answer {turn} é"
            assert (await model.complete(said)).text == f"answer {turn} é"
            said = [
                *said,
                message("assistant", ("model", f"answer {turn} é")),
                message("user", ("environment", f"go on {turn}")),
            ]
    await model.aclose()
    rebuilt = memory.read_sync(
        lambda conn: [
            rebuild_request(conn, row[0]) for row in conn.execute("SELECT id FROM calls ORDER BY id").fetchall()
        ]
    )
    assert rebuilt == server.bodies and server.count == 3
    sent = json.loads(server.bodies[0])
    assert sent["messages"] == [m.wire() for m in HELLO] and (sent["seed"], sent["max_tokens"], sent["user"]) == (
        3,
        9,
        "é",
    )
    assert bool(sent.get("stream")) is stream
    assert set(server.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize("stream", [False, True])
async def test_exact_tokens_are_the_servers_own_and_a_replay_is_the_same(
    server: ScriptedServer, memory: Memory, stream: bool
) -> None:
    server.reply = lambda request, n: "an answer"
    model = OpenAIModel("m", base_url=server.url, stream=stream, exact=True)
    live = await asked(model, memory)
    assert live.tokens is not None and live.inexact == "" and live.usage == (len(live.tokens.prompt), 10)
    assert list(live.tokens.sampled) == [*map(ord, "an answer"), 2]
    assert list(live.tokens.logprobs) == [logprob(i) for i in range(10)]
    assert memory.read_sync(lambda conn: read_tokens(conn, 1)) == (
        list(live.tokens.prompt),
        list(live.tokens.sampled),
        list(live.tokens.logprobs),
    )
    assert await asked(model, memory) == live
    assert server.count == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda body: body["usage"].update(completion_tokens=99), "10 sampled ids but the server counts 99"),
        (lambda body: body["choices"][0]["token_ids"].pop(), "9 sampled ids but 10 log-probabilities"),
        (lambda body: body["choices"][0].pop("token_ids"), "the server gave no sampled ids"),
        (lambda body: body.pop("prompt_token_ids"), "the server gave no prompt ids"),
        (lambda body: body["choices"][0].pop("logprobs"), "the server gave no log-probabilities"),
        (
            lambda body: body["choices"][0]["logprobs"]["content"][0].update(logprob=float("nan")),
            "a log-probability is not finite",
        ),
        (lambda body: body["prompt_token_ids"].append(2**40), "the server's token fields are malformed"),
    ],
)
async def test_token_fields_that_disagree_make_a_call_inexact(
    server: ScriptedServer, memory: Memory, monkeypatch: pytest.MonkeyPatch, change: Any, reason: str
) -> None:
    import servers

    def spoiled(*given: Any) -> Any:
        body = whole(*given)
        change(body)
        return body

    whole = servers.completion
    monkeypatch.setattr(servers, "completion", spoiled)
    server.reply = lambda request, n: "an answer"
    answer = await asked(OpenAIModel("m", base_url=server.url, exact=True), memory)
    assert (answer.text, answer.tokens, answer.inexact) == ("an answer", None, reason)
    assert rows(memory, "SELECT inexact, sampled_ids, on_policy FROM calls") == [(reason, None, 0)]
    assert await asked(OpenAIModel("m", base_url=server.url, exact=True), memory) == answer


@pytest.mark.parametrize(
    ("options", "on_policy"),
    [
        ({"exact": True}, 1),
        ({"exact": True, "sampling": Sampling(temperature=0.7)}, 0),
        ({"exact": True, "sampling": Sampling(top_p=0.9)}, 0),
        ({"exact": True, "extra": {"top_k": 20}}, 0),
        ({"exact": True, "extra": {"presence_penalty": 1.0}}, 0),
        ({"exact": True, "extra": {"logit_bias": {"5": 1}}}, 0),
        ({}, 0),
    ],
)
async def test_it_is_on_record_whether_log_probabilities_are_those_of_sampling(
    server: ScriptedServer, memory: Memory, options: dict[str, Any], on_policy: int
) -> None:
    await asked(OpenAIModel("m", base_url=server.url, **options), memory)
    assert rows(memory, "SELECT on_policy FROM calls") == [on_policy]


async def test_the_weights_that_answered_are_on_record(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Answer("x", weights="step-12")
    assert (await asked(OpenAIModel("m", base_url=server.url), memory)).weights == "m/step-12"
    assert rows(memory, "SELECT weights FROM calls") == ["m/step-12"]


async def test_an_answer_cut_by_length_says_so(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Answer("half an ans", finish_reason="length")
    answer = await asked(OpenAIModel("m", base_url=server.url), memory)
    assert (answer.text, answer.finish_reason) == ("half an ans", "length")
    assert rows(memory, "SELECT finish_reason FROM calls") == ["length"]


# ---- what goes wrong ----

HTML = b"<html><body>It works!</body></html>"
FAULTS: list[tuple[Any, type[ModelError], str, str]] = [
    (Fault(status=401), ModelRefused, r"answered 401: scripted 401; set OPENAI_API_KEY", "HTTP 401"),
    (Fault(status=403), ModelRefused, r"answered 403: scripted 403; .*OPENAI_API_KEY", "HTTP 403"),
    (
        Fault(status=404),
        ModelRefused,
        r"answered 404: scripted 404; check the model's name and the base URL",
        "HTTP 404",
    ),
    (Fault(status=400), ModelRefused, r"answered 400: scripted 400", "HTTP 400"),
    (
        Fault(status=429, retry_after=0.01),
        ModelOverloaded,
        r"answered 429.*asked 2 times.*resume later",
        "HTTP 429; retry-after 0.01",
    ),
    (Fault(status=500), ModelOverloaded, r"answered 500.*asked 2 times.*resume later", "HTTP 500"),
    (Fault(status=503, garbage=HTML), ModelOverloaded, r"answered 503.*It works", "HTTP 503"),
    (Fault(), ModelUnreachable, r"cannot reach http://127.0.0.1.*check the address", "RemoteProtocolError"),
    (Fault(garbage=b"{]"), ModelGarbled, r"not JSON: '{\]'.*is it an OpenAI-compatible endpoint", "not JSON"),
    (Fault(garbage=HTML), ModelGarbled, r"not JSON.*It works", "It works"),
    (Fault(garbage=b""), ModelGarbled, r"not JSON: an empty body", "an empty body"),
    (
        Fault(garbage=b'{"object": "list", "data": []}'),
        ModelGarbled,
        r"no chat completion \(no choices\)",
        "no choices",
    ),
    (Fault(garbage=b'{"choices": [7]}'), ModelGarbled, r"no chat completion", "no message"),
    (Fault(cut_after=3), ModelUnreachable, r"cannot reach", "RemoteProtocolError"),
    (
        Fault(delay=1.0),
        ModelTimeout,
        r"did not answer within 0.3 s.*Raise the time-?out, or resume later",
        "stopped waiting",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "kind", "sentence", "attempt"), FAULTS, ids=[repr(case[0])[5:45] for case in FAULTS])
async def test_a_failure_is_one_clear_sentence_and_on_record_and_resumed_when_the_server_is_back(
    server: ScriptedServer,
    memory: Memory,
    fault: Fault,
    kind: type[ModelError],
    sentence: str,
    attempt: str,
    stream: bool,
) -> None:
    server.reply = lambda request, n: fault
    model = OpenAIModel("m", base_url=server.url, stream=stream, timeout=0.3 if fault.delay else 20.0, retries=1)
    if stream and fault.cut_after is not None:
        attempt = "cut off"
    with pytest.raises(ModelError, match=sentence) as failed:
        await asked(model, memory)
    assert type(failed.value) is kind
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 500
    tries = 1 if kind is ModelRefused else 2
    assert server.count == tries
    attempts = rows(memory, "SELECT state, detail FROM attempts")
    assert len(attempts) == tries and all(state == "failed" and attempt in detail for state, detail in attempts)
    assert rows(memory, "SELECT count(*) FROM calls") == rows(memory, "SELECT count(*) FROM messages") == [0]
    server.reply = lambda request, n: "back"
    assert (await asked(OpenAIModel("m", base_url=server.url, stream=stream), memory)).text == "back"
    assert rows(memory, "SELECT occurrence FROM calls") == [0]


async def test_a_failure_that_passes_is_retried_and_on_record(server: ScriptedServer, memory: Memory) -> None:
    faults = [Fault(status=429, retry_after=0.4), Fault(status=500, retry_after=0.0), Fault(garbage=b"no")]
    server.reply = lambda request, n: faults[n] if n < 3 else "at last"
    answer = await asked(OpenAIModel("m", base_url=server.url, retries=3), memory)
    assert answer.text == "at last" and server.count == 4
    assert server.times[1] - server.times[0] >= 0.4, "Retry-After was not honoured"
    assert [detail[:8] for detail in rows(memory, "SELECT detail FROM attempts ORDER BY id")][:2] == [
        "HTTP 429",
        "HTTP 500",
    ]
    assert len(set(server.bodies)) == 1
    assert rows(
        memory, "SELECT count(DISTINCT request) FROM (SELECT request FROM calls UNION ALL SELECT request FROM attempts)"
    ) == [1]


async def test_a_retry_after_of_minutes_ends_the_wait(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Fault(status=429, retry_after=3600)
    with pytest.raises(ModelOverloaded, match="429"):
        await asyncio.wait_for(asked(OpenAIModel("m", base_url=server.url), memory), 5)
    assert server.count == 1


async def test_a_server_that_is_down_is_unreachable_and_resumed(memory: Memory) -> None:
    with ScriptedServer() as gone:
        url, port = gone.url, gone.port
    with pytest.raises(ModelUnreachable, match=rf"cannot reach {url}.*check the address and that the server runs"):
        await asked(OpenAIModel("m", base_url=url, retries=0), memory)
    with ScriptedServer(port=port) as back:
        assert (await asked(OpenAIModel("m", base_url=back.url), memory)).text == "ok"


async def test_an_answer_with_a_wrong_content_type_is_read_all_the_same(server: ScriptedServer, memory: Memory) -> None:
    stream = (
        b'data: {"choices": [{"index": 0, "delta": {"content": "said"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    )
    server.reply = lambda request, n: Fault(garbage=stream)
    assert (await asked(OpenAIModel("m", base_url=server.url, stream=True), memory)).text == "said"


@pytest.mark.parametrize("base", ["not a url", "ftp://x/v1", "http://", "127.0.0.1:8000/v1"])
async def test_a_base_url_that_is_none_is_a_usage_error(memory: Memory, base: str) -> None:
    with pytest.raises(UsageError, match="base URL"):
        await asked(OpenAIModel("m", base_url=base), memory)


async def test_no_endpoint_at_all_is_a_usage_error(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(UsageError, match="set OPENAI_API_KEY"):
        await asked(OpenAIModel("m"), memory)


async def test_the_concurrency_limit_holds(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Answer("x", delay=0.05)
    model, episode = OpenAIModel("m", base_url=server.url, concurrency=3), Episode(memory, 1, 1)
    with episode:
        await asyncio.gather(*(model.complete([message("user", ("application", f"{n}"))]) for n in range(12)))
    await model.aclose()
    assert server.most_at_once == 3 and rows(memory, "SELECT count(*) FROM calls") == [12]


async def test_equal_calls_at_once_are_told_apart(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Answer(f"{n}", delay=0.02)
    model = OpenAIModel("m", base_url=server.url)
    for _ in range(2):
        episode = Episode(memory, 1, 1)
        await episode.load()
        with episode:
            said = await asyncio.gather(*(model.complete(HELLO) for _ in range(4)))
        assert sorted(answer.text for answer in said) == ["0", "1", "2", "3"]
    await model.aclose()
    assert server.count == 4 and rows(memory, "SELECT occurrence FROM calls ORDER BY occurrence") == [0, 1, 2, 3]


# ---- recorded before visible ----


async def test_a_streams_end_is_not_visible_before_it_is_durable(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: "a longer answer in pieces"
    go, pieces, stored = threading.Event(), [], threading.Event()
    write = memory.write

    async def slow(job: Any) -> Any:
        stored.set()
        while not go.is_set():
            await asyncio.sleep(0.01)
        return await write(job)

    memory.write = slow  # type: ignore[method-assign]
    asking = asyncio.ensure_future(
        asked(OpenAIModel("m", base_url=server.url, stream=True), memory, on_delta=pieces.append)
    )
    while not stored.is_set():
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    assert not asking.done() and rows(memory, "SELECT count(*) FROM calls") == [0]
    assert "".join(pieces) == "a longer answer in pieces", "deltas are provisional: they need not wait"
    go.set()
    assert (await asking).text == "a longer answer in pieces"
    assert rows(memory, "SELECT count(*) FROM calls") == [1]


async def test_a_cancelled_call_leaves_no_call_and_can_be_made_again(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Answer("x", delay=0.5 if n == 0 else 0)
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(asked(OpenAIModel("m", base_url=server.url), memory), 0.15)
    assert rows(memory, "SELECT count(*) FROM calls") == [0]
    assert rows(memory, "SELECT substr(detail, 1, 14) FROM attempts") == ["no answer: the"]
    assert (await asked(OpenAIModel("m", base_url=server.url), memory)).text == "x"
    assert rows(memory, "SELECT occurrence FROM calls") == [0]


# ---- secrets ----


async def test_the_key_is_sent_and_nowhere_in_the_file(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Fault(status=500, retry_after=0) if n == 0 else "ok"
    await asked(OpenAIModel("m", base_url=server.url, api_key="sk-very-secret", retries=1), memory)
    assert server.headers[0]["authorization"] == "Bearer sk-very-secret"
    memory.close()
    said = everything(Path(memory.path)).lower()
    assert b"very-secret" not in said and b"authorization" not in said and b"bearer" not in said
    memory._uses = 0


async def test_a_key_the_server_repeats_in_its_error_is_not_stored(server: ScriptedServer, memory: Memory) -> None:
    server.reply = lambda request, n: Fault(
        status=401, garbage=b'{"error": {"message": "Incorrect API key provided: sk-very-secret"}}'
    )
    with pytest.raises(ModelRefused) as refused:
        await asked(OpenAIModel("m", base_url=server.url, api_key="sk-very-secret"), memory)
    assert "very-secret" not in str(refused.value)
    assert not any("very-secret" in detail for detail in rows(memory, "SELECT detail FROM attempts"))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_redaction_is_applied_before_sending_and_storing(
    server: ScriptedServer, tmp_path: Path, stream: bool
) -> None:
    """Wherever a secret comes from, server, solver and file have the placeholder."""

    def reply(request: dict[str, Any], n: int) -> Any:
        if "Write the new note" in request["messages"][-1]["content"]:
            return "<context>\nthe password is hunter2\n</context>"
        return Answer("hunter2 it is", message={"reasoning_content": "hunter2, then"})

    server.reply = reply
    seen, deltas = [], []

    def tool(password: str) -> str:
        return f"{password} hunter2"

    async def solver(task: Task, context: str, tools: Any) -> str:
        answer = await tools.ask([message("user", ("application", f"{task.prompt} {context} hunter2"))])
        seen.extend([task.prompt, str(task.data), context, answer.text, await tools[0]("hunter2")])
        return f"{answer.text} hunter2"

    task = Task(id="hunter2", prompt="hunter2?", data={"hunter2": ["hunter2"]})
    model = OpenAIModel("m", base_url=server.url, exact=True, stream=stream, extra={"user": "hunter2"})
    for _ in range(2):
        agent = CoDAgent(
            "a",
            model=model,
            memory=tmp_path / "s.db",
            solver=solver,
            tools=[tool],
            redact=lambda text: text.replace("hunter2", "[SECRET]"),
        )
        async with agent:
            async for event in agent.stream([task, task]):
                deltas.append(repr(event))
            for position in range(2):
                outcome = await agent.feedback(position, 1.0, "well done, hunter2")
            assert outcome.context == "the password is [SECRET]" and outcome.answer == "[SECRET] it is [SECRET]"
    await model.aclose()
    assert seen and not [text for text in [*seen, *deltas] if "hunter2" in text]
    assert not [body for body in server.bodies if b"hunter2" in body] and server.count == 4
    assert b"hunter2" not in everything(tmp_path / "s.db")
    with sqlite3.connect(tmp_path / "s.db") as conn:
        assert {row[0] for row in conn.execute("SELECT inexact FROM calls")} == {"redacted"}


# ---- a whole run ----


async def test_a_run_goes_on_when_the_server_is_back(server: ScriptedServer, tmp_path: Path) -> None:
    tasks = [Task(id=f"{n}", prompt=f"question {n}") for n in range(3)]
    down = True
    server.reply = lambda request, n: (
        Fault(status=500, retry_after=0) if down and n >= 2 else f"<context>\nnote {n}\n</context>"
    )

    async def live() -> list[str]:
        model = OpenAIModel("m", base_url=server.url, retries=1)
        async with CoDAgent("a", model=model, memory=tmp_path / "a.db") as agent:
            outcomes = [outcome.answer async for outcome in agent.run(tasks)]
        await model.aclose()
        return outcomes

    with pytest.raises(ModelOverloaded, match="resume later"):
        await live()
    before = server.count
    down = False
    assert len(await live()) == 3
    assert server.count == before + 1, "what was recorded was asked again"


def test_the_sync_twins_open_and_close_their_connections(server: ScriptedServer, tmp_path: Path) -> None:
    server.reply = lambda request, n: "<context>\na note\n</context>"
    with CoDAgent("a", model=OpenAIModel("m", base_url=server.url), memory=tmp_path / "a.db") as agent:
        for number in range(3):
            outcome = agent.solve_sync(Task(id="t", prompt=f"{number}"))
            assert agent.feedback_sync(outcome, 1.0).version == number + 1
    assert server.count == 6
