"""What is stored once and given back exactly: token ids and log-probabilities, messages, requests byte for byte, and how
many bytes it takes."""

from __future__ import annotations

import json
import math
import runpy
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cod_agent.completions import Completion, Tokens
from cod_agent.context import message
from cod_agent.errors import ModelGarbled
from cod_agent.journal.answers import as_stream, read_answer
from cod_agent.journal.episode import Episode
from cod_agent.journal.requests import read_request
from cod_agent.memory import Memory
from cod_agent.memory.content import (
    STYLES,
    pack_floats,
    pack_ids,
    read_tokens,
    rebuild_request,
    shared_prefix,
    store_head,
    store_nodes,
    unpack_floats,
    unpack_ids,
    write_request,
)

ids = st.lists(st.integers(0, 2**31 - 1), max_size=30)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


@pytest.fixture
def memory(tmp_path: Any) -> Any:
    made = Memory.open(tmp_path / "a.db", durable=False)
    made.write_sync(an_episode)
    yield made
    made.close()


def an_episode(conn: sqlite3.Connection) -> None:
    from cod_agent.memory import runs
    from cod_agent.tasks import Task

    run = runs.open_run(conn, "a", "r", environment=None, pack=None, length=None, model="m", settings={})
    runs.begin_task(conn, run, 0, Task(id="t"))


# ---- tokens ----


@given(ids)
def test_ids_survive(values: list[int]) -> None:
    assert unpack_ids(pack_ids(values)) == values


@given(st.lists(st.floats(-1e4, 0, width=32)))
def test_log_probabilities_survive_as_float32(values: list[float]) -> None:
    assert unpack_floats(pack_floats(values)) == values


@given(ids, ids, ids)
def test_the_shared_prefix_is_the_longest(common: list[int], one: list[int], other: list[int]) -> None:
    before, after = common + one, common + other
    length = shared_prefix(before, after)
    assert before[:length] == after[:length]
    assert length == min(len(before), len(after)) or before[length] != after[length]


calls = st.lists(
    st.tuples(st.integers(0, 60), ids, st.lists(st.integers(0, 99), min_size=1, max_size=8)), min_size=1, max_size=8
)


@QUICK
@given(calls)
async def test_the_tokens_of_a_conversation_are_given_back_exactly(
    memory: Memory, calls: list[tuple[int, list[int], list[int]]]
) -> None:
    episode = Episode(memory, 1, 1)
    before: list[int] = []
    for keep, fresh, sampled in calls:
        tokens = Tokens(before[:keep] + fresh, sampled, [-0.1 * (i + 1) for i in sampled])
        request = episode.request("m", [message("user", ("application", "x"))], {})
        request.occurrence = await memory.read(lambda conn: conn.execute("SELECT count(*) FROM calls").fetchone()[0])
        answer = read_answer("", json.dumps({"choices": [{"message": {"content": "y"}}]}).encode())
        answer = type(answer)(answer.body, Completion("y", "stop", tokens))
        answer.body["choices"][0]["logprobs"] = {"content": []}
        await episode.record(request, answer, 0.0, on_policy=True, lean=True)
        row = await memory.read(lambda conn: conn.execute("SELECT max(id) FROM calls").fetchone()[0])
        given_back = await memory.read(lambda conn, row=row: read_tokens(conn, row))
        assert given_back == (list(tokens.prompt), list(tokens.sampled), [float32(p) for p in tokens.logprobs])
        before = [*tokens.prompt, *tokens.sampled]


async def test_a_prompt_that_extends_the_last_one_is_stored_by_its_end(memory: Memory) -> None:
    episode, prompt = Episode(memory, 1, 1), list(range(5000))
    for number in range(3):
        tokens = Tokens(prompt, [7, 8, number], [-1.0, -2.0, -3.0])
        request = episode.request("m", [message("user", ("application", f"{number}"))], {})
        answer = read_answer("", b'{"choices": [{"message": {"content": "y"}, "logprobs": {"content": []}}]}')
        await episode.record(
            request, type(answer)(answer.body, Completion("y", "stop", tokens)), 0.0, on_policy=True, lean=True
        )
        prompt = [*prompt, *tokens.sampled, 1, 2]
    sizes = await memory.read(
        lambda conn: [tuple(r) for r in conn.execute("SELECT prompt_shared, length(prompt_ids) FROM calls ORDER BY id")]
    )
    assert sizes[0][0] == 0 and [shared for shared, _ in sizes[1:]] == [5003, 5008]
    assert all(size < 20 for _, size in sizes[1:])


# ---- messages and requests ----

texts = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "é", "\u2028", '"messages":null', "\\u00e9", "a\\b", "</s>", "😀"])
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
bodies = st.builds(
    lambda before, messages, after: {**before, "messages": messages, **after},
    st.dictionaries(texts, json_values, max_size=3),
    st.lists(
        st.one_of(
            json_values,
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": texts}),
        ),
        max_size=4,
    ),
    st.dictionaries(texts, json_values, max_size=3),
)


def rebuilt(memory: Memory, raw: bytes) -> bytes:
    """A request taken apart, stored, and put together again from the file."""
    request = read_request(raw)

    def store(conn: sqlite3.Connection) -> bytes:
        head, prompt = (
            store_head(conn, memory.cache, request.head_hash, request.head),
            store_nodes(conn, memory.cache, request.nodes),
        )
        known = conn.execute(
            "INSERT INTO calls (episode_id, request, occurrence, head_id, prompt_id, style, finish_reason, model, weights, on_policy,"
            " inexact, hash, started, seconds, envelope_crc) SELECT 1, ?, count(*), ?, ?, ?, '', '', '', 0, '', x'', 0, 0, 0 FROM calls",
            (request.key, head, prompt, request.style),
        )
        memory.cache.clear()
        return rebuild_request(conn, int(known.lastrowid or 0))

    return memory.write_sync(store)


@QUICK
@given(bodies, st.sampled_from(sorted(STYLES)))
@example({"messages": [{"role": "user", "content": "\ud800"}]}, "ascii")
@example({"messages": [float("inf")], "x": 1e400}, "plain")
@example({"model": "a", "messages": "not a list"}, "compact")
@example({"messages": None}, "compact")
def test_a_request_is_rebuilt_byte_for_byte_in_every_style(memory: Memory, body: dict[str, Any], style: str) -> None:
    raw = STYLES[style](body).encode()
    assert rebuilt(memory, raw) == raw


@QUICK
@given(bodies, st.sampled_from(["indented", "sorted late", "utf-16", "trailing", "exponent"]))
def test_a_request_in_no_known_style_is_kept_whole(memory: Memory, body: dict[str, Any], how: str) -> None:
    raw = {
        "indented": json.dumps(body, indent=1).encode(),
        "sorted late": json.dumps(body, separators=(" , ", ":")).encode(),
        "utf-16": json.dumps(body).encode("utf-16"),
        "trailing": json.dumps(body).encode() + b"\n",
        "exponent": b'{"messages":[],"x":1E5,"x":1.50}',
    }[how]
    assert rebuilt(memory, raw) == raw


@QUICK
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"[]")
@example(b"null")
def test_a_request_that_is_no_json_is_kept_whole(memory: Memory, raw: bytes) -> None:
    assert rebuilt(memory, raw) == raw


def test_what_stands_beside_the_messages_is_known_in_any_style() -> None:
    for raw in (
        b'{"model": "m",\n "stream": true, "messages": []}',
        b'{"model":"m","stream":true,"messages":[{"content":"\\ud800"}]}',
    ):
        assert read_request(raw).params == {"model": "m", "stream": True}


@QUICK
@given(
    st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=20).filter(lambda t: t.isprintable())),
        max_size=6,
    )
)
async def test_our_own_requests_are_what_compact_json_says(memory: Memory, said: list[tuple[Any, str]]) -> None:
    episode = Episode(memory, 1, 1)
    messages = [message(role, ("model", text)) for role, text in said]
    request = episode.request('a "messages":null model', messages, {"n": 1, "extra": {"messages": None}})
    assert json.loads(request.body) == {
        "model": 'a "messages":null model', "messages": [m.wire() for m in messages], "n": 1, "extra": {"messages": None},
    }  # fmt: skip
    assert request.body == write_request(request.head, [node.body for node in request.nodes], "own")


def test_messages_are_stored_once(memory: Memory) -> None:
    said = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"message {i}"} for i in range(40)]
    for end in range(1, 41, 2):
        raw = json.dumps({"model": "m", "messages": said[:end]}).encode()
        assert rebuilt(memory, raw) == raw
    other = json.dumps({"model": "m", "messages": [*said[:20], {"role": "user", "content": "another branch"}]}).encode()
    assert rebuilt(memory, other) == other
    assert memory.read_sync(
        lambda conn: conn.execute("SELECT count(*), count(DISTINCT hash) FROM messages").fetchone()
    ) == (40, 40)
    assert memory.read_sync(lambda conn: conn.execute("SELECT count(*) FROM heads").fetchone()) == (1,)


# ---- answers ----

fields = st.sampled_from(
    [
        "choices",
        "message",
        "delta",
        "content",
        "usage",
        "logprobs",
        "token_ids",
        "tool_calls",
        "index",
        "function",
        "logprob",
    ]
)
anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 2**40), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(fields, inner, max_size=4)),
    max_leaves=12,
)
answers = st.fixed_dictionaries(
    {"choices": st.lists(st.fixed_dictionaries({"message": anything | st.fixed_dictionaries({"content": anything})}, optional={
        "delta": anything, "token_ids": anything, 
        "logprobs": anything | st.fixed_dictionaries({"content": anything}), "finish_reason": anything, "index": anything,
    }), min_size=1, max_size=2)},
    optional={"prompt_token_ids": anything, "usage": anything, "model": anything},
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(answers | anything, st.booleans())
def test_an_answer_of_any_shape_is_read_or_called_garbled(body: Any, stream: bool) -> None:
    raw = json.dumps(body).encode()
    try:
        answer = read_answer("text/event-stream" if stream else "", b"data: " + raw + b"\n\n" if stream else raw)
    except ModelGarbled:
        return
    tokens = answer.completion.tokens
    assert (tokens is None) == bool(answer.completion.inexact)
    if tokens is not None:
        assert len(tokens.sampled) == len(tokens.logprobs) and all(map(math.isfinite, pack_unpack(tokens)))


def pack_unpack(tokens: Tokens) -> list[float]:
    assert unpack_ids(pack_ids(tokens.prompt)) == list(tokens.prompt) and unpack_ids(pack_ids(tokens.sampled)) == list(
        tokens.sampled
    )
    return unpack_floats(pack_floats(tokens.logprobs))


def test_an_answer_made_a_stream_reads_the_same() -> None:
    body = {
        "id": "1", "model": "m", "prompt_token_ids": [1, 2], "usage": {"prompt_tokens": 2, "completion_tokens": 2},
        "choices": [{"index": 0, "finish_reason": "tool_calls", "token_ids": [3, 4], "message": {
            "role": "assistant", "content": "é",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        }, "logprobs": {"content": [{"token": "a", "logprob": -1.0}, {"token": "b", "logprob": -2.0}]}}],
    }  # fmt: skip
    whole = read_answer("application/json", json.dumps(body).encode())
    streamed = read_answer("text/event-stream", as_stream(body))
    assert streamed.completion == whole.completion and streamed.message == whole.message


# ---- how many bytes ----


def test_a_conversation_of_200_turns_takes_at_most_one_and_a_half_times_its_content(tmp_path: Any) -> None:
    measured = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "storage.py"))["measure"](tmp_path, 200)
    assert measured["unique_bytes"] > 500_000, "this is no conversation of realistic size"
    assert measured["ratio"] <= 1.5


async def test_a_step_that_takes_the_models_answer_refers_to_it_and_reads_the_same(memory: Memory) -> None:
    episode = Episode(memory, 1, 1)

    async def do(_: int) -> tuple[Any, Any]:
        return ["seen", "", False, None], None

    for answer in ('go "north" é\u2028', "go\0south"):
        request = episode.request("m", [message("user", ("application", answer))], {})
        body = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        await episode.record(request, read_answer("", json.dumps(body).encode()), 0.0, on_policy=False, lean=True)
        await episode.effect("act", "", answer, do)
    await episode.effect("act", "", "something else", do)
    stored = await memory.read(
        lambda conn: conn.execute("SELECT arguments IS NULL FROM effects ORDER BY id").fetchall()
    )
    told = await memory.read(lambda conn: conn.execute("SELECT arguments FROM steps ORDER BY id").fetchall())
    assert [row[0] for row in stored] == [1, 0, 0]
    assert [json.loads(row[0]) for row in told] == ['go "north" é\u2028', "go\0south", "something else"]
