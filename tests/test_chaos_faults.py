"""One fault at a time: what an endpoint's answer is taken for, and what nobody can tell."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from chaos import Chaos, expected, honest
from servers import Answer, Fault, ScriptedServer

from cod_agent import Memory, Task
from cod_agent.context import message
from cod_agent.errors import ModelError, ModelGarbled, ModelOverloaded, ModelRefused, ModelUnreachable
from cod_agent.journal.episode import Episode
from cod_agent.journal.http import recording_client
from cod_agent.memory import runs
from cod_agent.models.openai import OpenAIModel


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_agent.models.openai.FIRST_WAIT", 0.001)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory.open(tmp_path / "a.db")

    def begin(conn: sqlite3.Connection) -> None:
        run = runs.open_run(conn, "a", "r", environment=None, pack=None, length=None, model="m", settings={})
        runs.begin_task(conn, run, 0, Task(id="t"))

    memory.write_sync(begin)
    yield memory
    memory.close()


def count(memory: Memory, table: str) -> int:
    return memory.read_sync(lambda conn: int(conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0]))


def question(n: int = 0) -> list[Any]:
    return [message("user", ("application", f"question {n}"))]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_second_response_to_a_request_is_not_taken_for_the_next_ones(journal: Memory, stream: bool) -> None:
    with ScriptedServer(honest) as server, Chaos(server.port, share=1.0, row=99, faults=("said-twice",)) as chaos:
        model = OpenAIModel("m", base_url=chaos.url, stream=stream)
        with Episode(journal, 1, 1):
            said = [(await model.complete(question(n))).text for n in range(6)]
        await model.aclose()
        assert said == [expected(body) for body in server.bodies]
    assert (count(journal, "calls"), count(journal, "attempts")) == (6, 0)


GARBLED, REFUSED, OVERLOADED, UNREACHABLE = ModelGarbled, ModelRefused, ModelOverloaded, ModelUnreachable


@pytest.mark.parametrize(
    ("fault", "stream", "kind", "says"),
    [
        ("busy", False, OVERLOADED, "chaos 429"),
        ("broken-server", False, OVERLOADED, "chaos"),
        ("reset-before-the-answer", False, UNREACHABLE, "cannot reach"),
        ("reset-in-the-body", False, UNREACHABLE, "cannot reach"),
        ("closed-in-the-body", True, UNREACHABLE, "peer closed connection"),
        ("closed-without-an-answer", False, UNREACHABLE, "disconnected without"),
        ("cut-stream", True, GARBLED, "cut off|no choices"),
        ("cut-stream", False, GARBLED, "not JSON"),
        ("garbage", False, GARBLED, "endpoint"),
        ("wrong-length", False, GARBLED, "not JSON"),
        ("flood-of-headers", False, UNREACHABLE, "too long"),
        ("more-choices", False, GARBLED, "to another request: 2 choices"),
        ("more-choices", True, GARBLED, "to another request: 2 choices"),
        ("pieces-twice", True, GARBLED, "pieces missing or twice"),
        ("disorder", True, GARBLED, "goes on after the answer's end"),
        ("parts-of-two", True, GARBLED, "parts of two answers"),
    ],
)
async def test_a_fault_has_a_kind_and_a_sentence_and_each_attempt_is_on_record(
    journal: Memory, fault: str, stream: bool, kind: type[ModelError], says: str
) -> None:
    with ScriptedServer(honest) as server, Chaos(server.port, share=1.0, row=99, faults=(fault,)) as chaos:
        model = OpenAIModel("m", base_url=chaos.url, stream=stream, exact=stream, retries=1)
        with Episode(journal, 1, 1), pytest.raises(kind, match=says):
            await model.complete(question())
        await model.aclose()
        assert chaos.count == 2 == count(journal, "attempts") and count(journal, "calls") == 0


@pytest.mark.parametrize("fault", ["slow", "packed", "early", "wrong-type", "absurd-counts", "comments"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_odd_and_no_fault_is_read(journal: Memory, fault: str, stream: bool) -> None:
    with ScriptedServer(honest) as server, Chaos(server.port, share=1.0, row=99, faults=(fault,)) as chaos:
        model = OpenAIModel("m", base_url=chaos.url, stream=stream)
        client = openai.AsyncOpenAI(base_url=chaos.url, api_key="k", http_client=recording_client(), max_retries=0)
        with Episode(journal, 1, 1):
            for n in range(3):
                assert (await model.complete(question(n))).text == expected(server.bodies[-1])
                asked: Any = [{"role": "user", "content": f"sdk {n}"}]
                got: Any = await client.chat.completions.create(model="m", messages=asked, stream=stream)
                pieces = [c.choices[0].delta.content or "" async for c in got if c.choices] if stream else []
                assert ("".join(pieces) if stream else got.choices[0].message.content) == expected(server.bodies[-1])
        await model.aclose()
        await client.close()
    assert (count(journal, "calls"), count(journal, "attempts")) == (6, 0)


async def test_a_body_without_end_is_given_up(journal: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cod_agent.journal.bodies.LARGEST", 1 << 20)
    with ScriptedServer(lambda request, n: Fault(garbage=b" " * (2 << 20))) as server:
        model = OpenAIModel("m", base_url=server.url, retries=0)
        with Episode(journal, 1, 1), pytest.raises(ModelGarbled, match="longer than 1 MB"):
            await model.complete(question())
        await model.aclose()
    assert count(journal, "attempts") == 1


async def test_a_refusal_whose_body_is_not_packed_as_it_says_is_on_record(journal: Memory) -> None:
    with ScriptedServer(honest) as server:
        chaos = Chaos(server.port, seed=2, share=1.0, row=99, faults=("not-packed-as-it-says",))
        with chaos:
            model = OpenAIModel("m", base_url=chaos.url, retries=5)
            with Episode(journal, 1, 1), pytest.raises(ModelError):
                await model.complete(question())
            await model.aclose()
            assert count(journal, "attempts") == chaos.count == 6


async def test_a_redirect_says_where_to_and_is_not_followed_with_a_get(journal: Memory) -> None:
    def reply(request: dict[str, Any], n: int) -> Any:
        return Fault(status=302, garbage=b"moved")

    with ScriptedServer(reply) as server:
        model = OpenAIModel("m", base_url=server.url)
        with Episode(journal, 1, 1), pytest.raises(ModelRefused, match="redirects to"):
            await model.complete(question())
        await model.aclose()


async def test_an_answer_that_is_named_after_another_request_is_none(journal: Memory) -> None:
    """As vLLM names them. Where a server does not, an answer to another request looks like one to this."""
    faults = ("another-answer",)
    with ScriptedServer(honest) as server, Chaos(server.port, seed=3, share=0.7, row=2, faults=faults) as chaos:
        model = OpenAIModel("m", base_url=chaos.url)
        with Episode(journal, 1, 1):
            for n in range(12):
                said = (await model.complete(question(n))).text
                assert said == expected(server.bodies[-1])
        await model.aclose()
        details = journal.read_sync(lambda conn: [row[0] for row in conn.execute("SELECT detail FROM attempts")])
        assert len(details) == chaos.count - 12 > 0
        assert all("is to another request" in detail for detail in details)


async def test_who_gives_up_while_an_answer_is_stored_finds_it_when_asking_again(journal: Memory) -> None:
    """However the moment falls, nothing is stored twice, and no attempt is invented."""
    with ScriptedServer(honest) as server:
        client = openai.AsyncOpenAI(base_url=server.url, api_key="k", http_client=recording_client(), max_retries=0)
        with Episode(journal, 1, 1) as episode:
            for n in range(40):
                asked: Any = [{"role": "user", "content": f"patience {n}"}]
                for patience in (n / 1000, 30):
                    try:
                        async with asyncio.timeout(patience):
                            await client.chat.completions.create(model="m", messages=asked)
                            break
                    except TimeoutError:
                        pass
            assert episode.stopped is None
        await client.close()
        stored = count(journal, "calls")
    assert stored == 40
    assert server.count <= 40 + count(journal, "attempts")


async def test_an_answer_with_a_lone_surrogate_is_garbled(journal: Memory) -> None:
    garbage = b'{"choices":[{"message":{"role":"assistant","content":"\\ud800"},"finish_reason":"stop"}]}'
    with ScriptedServer(lambda request, n: Fault(garbage=garbage) if n == 0 else Answer("fine")) as server:
        model = OpenAIModel("m", base_url=server.url)
        with Episode(journal, 1, 1):
            assert (await model.complete(question())).text == "fine"
        await model.aclose()
    assert count(journal, "attempts") == 1


async def test_what_cannot_be_told_is_taken_as_it_comes(journal: Memory) -> None:
    """A piece of a stream that came twice, where the server gives no token ids to count: docs/models.md says so."""
    faults = ("twice-untold",)
    from chaos import FAULTS

    async def twice(line: Any, got: Any) -> None:
        await line.stream([*got.events[:2], got.events[1], *got.events[2:]])

    FAULTS[faults[0]] = twice
    try:
        with ScriptedServer(honest) as server, Chaos(server.port, share=1.0, row=99, faults=faults) as chaos:
            model = OpenAIModel("m", base_url=chaos.url, stream=True)
            with Episode(journal, 1, 1):
                text = (await model.complete(question())).text
            await model.aclose()
            right = expected(server.bodies[0])
            assert text == right[:4] + right
    finally:
        del FAULTS[faults[0]]


async def test_failed_attempts_of_other_calls_are_on_record_too(journal: Memory) -> None:
    def reply(request: dict[str, Any], n: int) -> Any:
        return Fault(status=503) if n < 2 else Fault(garbage=b'{"data": []}')

    with ScriptedServer(reply) as server:
        async with recording_client() as client:
            with Episode(journal, 1, 1):
                url = f"{server.url}/embeddings"
                said = [(await client.post(url, json={"input": "x"})).status_code for _ in range(3)]
    assert said == [503, 503, 200]
    assert (count(journal, "effects"), count(journal, "attempts")) == (1, 2)
