"""The rollout endpoint: agents that speak HTTP, against a scripted sampler of real tokens, are recorded exactly."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
from transformers import AutoTokenizer

from cod_agent import CoDAgent, Sampling, Task
from cod_agent.errors import ModelOverloaded, ModelRefused, UnknownName, UsageError
from cod_agent.journal.http import recording_client
from cod_agent.models.openai import OpenAIModel
from cod_agent.policies import folder_of
from cod_train.dialect import Refused, read_request
from cod_train.endpoint import Drawn, Endpoint
from cod_train.rollouts import read_rollouts
from cod_train.sequences import sequences
from cod_train.tool_calls import ToolCall, hermes_calls, parser_called

HERMES = (
    "{% if tools %}{{ '<|user|>Tools: ' + tools | tojson + '\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|assistant|>' if m.role == 'assistant' else '<|user|>' }}"
    "{% if m.role == 'tool' %}{{ '<tool_response>' + m.content + '</tool_response>' }}{% else %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "{% if m.content or not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson + '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>\\n' if m.role == 'assistant' else '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENIZER = AutoTokenizer.from_pretrained(folder_of("embedded"))
TOKENIZER.chat_template = HERMES
END = TOKENIZER.eos_token_id
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 40, "b": 2}}\n</tool_call>'
TOOLS: list[Any] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
USER: list[Any] = [{"role": "user", "content": "What is 40 + 2?"}]


def spelt(text: str) -> list[int]:
    """A token a byte: what sampling may give, and tokenising never does."""
    return [token for character in text for token in TOKENIZER.encode(character, add_special_tokens=False)]


class Sampler:
    """Plays the trainer's server: `script` sees the prompt's text and says the answer, or raises."""

    def __init__(self, script: Callable[[str], str]) -> None:
        self.script = script
        self.asked: list[tuple[str, list[int], dict[str, Any]]] = []
        self.drawn: list[Drawn] = []
        self.under_way = self.most_at_once = 0
        self.seconds = 0.0

    async def __call__(self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Drawn:
        self.asked.append((request_id, list(prompt_ids), sampling_params))
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        await asyncio.sleep(self.seconds)
        self.under_way -= 1
        ids = [*spelt(self.script(TOKENIZER.decode(prompt_ids))), END]
        limit = sampling_params["max_tokens"]
        ids, finish = (ids, "stop") if len(ids) <= limit else (ids[:limit], "length")
        self.drawn.append(Drawn(ids, [-0.125 * (i % 7 + 1) for i in range(len(ids))], finish, "step-3"))
        return self.drawn[-1]


def adds(prompt: str) -> str:
    return "It is 42." if "<tool_response>42" in prompt else f"Let me see.\n{ADD}"


@asynccontextmanager
async def serving(
    script: Callable[[str], str] = lambda prompt: "goal", **options: Any
) -> AsyncIterator[tuple[Endpoint, Sampler]]:
    sampler = Sampler(script)
    async with Endpoint("policy", TOKENIZER, sampler, **{"context_length": 2048, **options}) as endpoint:
        yield endpoint, sampler


@asynccontextmanager
async def client_of(endpoint: Endpoint) -> AsyncIterator[Any]:
    async with openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="unused", max_retries=0) as client:
        yield client


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def trains_as_one_sequence(memory: Path, sampler: Sampler) -> None:
    """Every call is exact, as it was sampled, and each goes on where the one before it ended."""
    with sqlite3.connect(memory) as conn:
        kept = conn.execute("SELECT inexact, on_policy, finish_reason, weights FROM calls").fetchall()
    assert kept == [("", 1, "tool_calls", "policy/step-3"), ("", 1, "stop", "policy/step-3")]
    (rollout,), account = read_rollouts([memory], spell=TOKENIZER.decode, vocabulary=len(TOKENIZER))
    (segment,) = rollout.segments
    assert not segment.refused and account.usable == 1
    assert [call.prompt for call in segment.calls] == [prompt for _, prompt, _ in sampler.asked]
    assert [call.sampled for call in segment.calls] == [drawn.token_ids for drawn in sampler.drawn]
    assert [call.logprobs for call in segment.calls] == [drawn.log_probs for drawn in sampler.drawn]
    (sequence,) = sequences(segment)
    assert sequence.calls == 2 and sum(sequence.mask) == sum(len(drawn.token_ids) for drawn in sampler.drawn)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agentscope_agent_with_a_tool_is_recorded_exactly(tmp_path: Path, stream: bool) -> None:
    pytest.importorskip("agentscope")
    from cod_agent.solvers import AgentScopeSolver

    async with serving(adds) as (endpoint, sampler):
        solver = AgentScopeSolver(
            "policy",
            base_url=endpoint.base_url,
            exact=True,
            stream=stream,
            retries=0,
            sampling=Sampling(max_tokens=200),
        )
        memory = tmp_path / "a.db"
        async with solver, CoDAgent("a", memory=memory, solver=solver, tools=[add], updates=False) as agent:
            outcome = await agent.solve(Task(id="t", prompt="What is 40 + 2?"))
            await agent.feedback(outcome, reward=1.0)
        assert outcome.answer == "It is 42."
        assert sampler.asked[0][2] == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 200}
        assert "Tools: [{" in TOKENIZER.decode(sampler.asked[0][1])
        assert (endpoint.prompts.extended, endpoint.prompts.apart) == (1, 0)
    trains_as_one_sequence(memory, sampler)


async def test_an_applications_own_loop_is_recorded_exactly(tmp_path: Path) -> None:
    async def solve(task: Task, context: str, tools: Any) -> str:
        messages: list[Any] = [{"role": "user", "content": task.prompt}]
        exact: Any = {"top_k": -1, "return_token_ids": True}
        async with (
            recording_client() as http,
            openai.AsyncOpenAI(base_url=endpoint.base_url, api_key="x", http_client=http) as client,
        ):
            while True:
                answer = await client.chat.completions.create(
                    model="policy", messages=messages, tools=TOOLS, temperature=1.0, logprobs=True, extra_body=exact
                )
                message = answer.choices[0].message
                if not message.tool_calls:
                    return message.content
                messages.append(message.model_dump())
                for call in message.tool_calls:
                    content = str(add(**json.loads(call.function.arguments)))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": content})

    memory = tmp_path / "a.db"
    async with serving(adds) as (endpoint, sampler), CoDAgent("a", memory=memory, solver=solve, updates=False) as agent:
        outcome = await agent.solve(Task(id="t", prompt="What is 40 + 2?"))
        await agent.feedback(outcome, reward=1.0)
    assert outcome.answer == "It is 42."
    trains_as_one_sequence(memory, sampler)


async def test_streamed_pieces_are_the_whole_answer() -> None:
    async with serving(adds) as (endpoint, sampler), client_of(endpoint) as client:
        beside: Any = {"model": "policy", "messages": USER, "tools": TOOLS, "logprobs": True}
        beside["extra_body"] = {"return_token_ids": True}
        whole = await client.chat.completions.create(**beside)
        pieces = await client.chat.completions.create(**beside, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in pieces]
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    message = whole.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == message.content == "Let me see."
    (said,) = [call.function for delta in deltas for call in delta.tool_calls or []]
    assert (said.name, said.arguments) == ("add", '{"a": 40, "b": 2}') and message.tool_calls[0].function.name == "add"
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids == sampler.asked[0][1]
    assert chunks[0].choices[0].token_ids == whole.choices[0].token_ids == sampler.drawn[0].token_ids
    assert [entry.token for entry in whole.choices[0].logprobs.content][-2:] == [">", "<|end|>"]
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == len(sampler.drawn[0].token_ids)
    # The same conversation has the same name, so that it goes to the server that has its keys and values.
    assert sampler.asked[0][0] == sampler.asked[1][0]


async def test_what_is_not_asked_for_is_not_sent() -> None:
    async with serving() as (endpoint, sampler), client_of(endpoint) as client:
        answer = await client.chat.completions.create(model="policy", messages=USER, max_completion_tokens=3, seed=5)
    sent = answer.model_dump(exclude_none=True)
    assert "prompt_token_ids" not in sent and not {"token_ids", "logprobs"} & set(sent["choices"][0])
    assert (answer.choices[0].finish_reason, answer.choices[0].message.content) == ("length", "goa")
    assert (answer.system_fingerprint, answer.model) == ("step-3", "policy")
    assert sampler.asked[0][2] == {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 3, "seed": 5}


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({"n": 2}, "`n` can only be 1 here, not 2"),
        ({"stop": ["\n"]}, "`stop`"),
        ({"min_p": 0.1}, "`min_p`"),
        ({"presence_penalty": 1.0}, "`presence_penalty`"),
        ({"response_format": {"type": "json_object"}}, "`response_format`"),
        ({"tool_choice": "required"}, '`tool_choice` can only be "auto" or "none"'),
        ({"guided_regex": "a*"}, "`guided_regex` is not understood here: leave it out"),
        ({"temperature": -1}, "`temperature` is a number from 0 on, not -1"),
        ({"temperature": "hot"}, "`temperature` is a number"),
        ({"top_p": 0}, "`top_p`"),
        ({"top_k": 1.5}, "`top_k`"),
        ({"max_tokens": 0}, "`max_tokens` is a whole number from 1 on"),
        ({"tools": [{"name": "add"}]}, "`tools` is a list"),
        ({"messages": [{"content": "x"}]}, "a `role`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "reads text"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "JSON object",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "`tool_calls` are a list"),
        ({"messages": []}, "not empty"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_reason(beside: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refused) as refused:
        read_request(json.dumps({"model": "policy", "messages": USER, **beside}).encode(), "policy")
    assert reason in str(refused.value) and refused.value.status == 400


async def test_a_conversation_longer_than_the_context_is_a_400() -> None:
    async with serving() as (endpoint, sampler), client_of(endpoint) as client:
        with pytest.raises(openai.BadRequestError, match="the context has 2048 tokens: the prompt takes") as refused:
            await client.chat.completions.create(model="policy", messages=USER, max_tokens=2048)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="the context has 2048 tokens"):
            long: Any = [{"role": "user", "content": "@\n" * 2048}]
            await client.chat.completions.create(model="policy", messages=long)
        with pytest.raises(openai.BadRequestError, match="`n` can only be 1"):
            await client.chat.completions.create(model="policy", messages=USER, n=2)
        assert not sampler.asked


async def test_values_that_change_nothing_are_taken() -> None:
    neutral: Any = {"min_p": 0.0, "repetition_penalty": 1.0, "top_k": 0, "n": 1, "stop": None, "tool_choice": "none"}
    async with serving(adds) as (endpoint, sampler), client_of(endpoint) as client:
        body = {"model": "policy", "messages": USER, "tools": TOOLS, **neutral}
        answer = await client.post("/chat/completions", cast_to=object, body=body)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": adds("")}  # no tools were to be called
    assert sampler.asked[0][2]["top_k"] == -1


async def test_a_template_that_refuses_a_conversation_is_a_400(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{{ raise_exception('users only' if thinking else 'no') }}")
    async with serving() as (endpoint, _), client_of(endpoint) as client:
        with pytest.raises(openai.BadRequestError, match="users only"):
            extra: Any = {"chat_template_kwargs": {"thinking": True}}
            await client.chat.completions.create(model="policy", messages=USER, extra_body=extra)
        with pytest.raises(openai.BadRequestError, match="tools"):
            extra = {"chat_template_kwargs": {"tools": []}}
            await client.chat.completions.create(model="policy", messages=USER, extra_body=extra)


@pytest.mark.parametrize(
    ("drawn", "reason"),
    [
        (RuntimeError("the replica died"), "RuntimeError: the replica died"),
        (Drawn([5, END], [-1.0], "stop", "w"), "2 sampled ids but 1 log-probabilities"),
        (Drawn([5, END], [-1.0, float("nan")], "stop", "w"), "not finite"),
        (Drawn([], [], "stop", "w"), "no token"),
        (Drawn([5], [-1.0], "abort", "w"), "'abort'"),  # type: ignore[arg-type]
    ],
)
async def test_a_rollout_server_that_fails_is_a_503_and_asked_again(drawn: Any, reason: str) -> None:
    asked = 0

    async def generate(request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Drawn:
        nonlocal asked
        asked += 1
        if isinstance(drawn, Exception):
            raise drawn
        return drawn

    retries = int(isinstance(drawn, Exception))
    async with Endpoint("policy", TOKENIZER, generate, context_length=2048) as endpoint:
        model = OpenAIModel("policy", base_url=endpoint.base_url, retries=retries)
        with pytest.raises(ModelOverloaded, match="503") as failed:
            await model.exchange(USER)
        await model.aclose()
    assert reason in str(failed.value) and asked == 1 + retries


async def test_other_addresses() -> None:
    async with serving() as (endpoint, _), client_of(endpoint) as client:
        (model,) = (await client.models.list()).data
        assert (model.id, model.max_model_len) == ("policy", 2048)
        assert await client.get(endpoint.base_url.removesuffix("/v1") + "/health", cast_to=object) == {}
        with pytest.raises(openai.NotFoundError, match="chat/completions"):
            await client.post("/embeddings", cast_to=object, body={})
        with pytest.raises(openai.NotFoundError, match="no model 'gpt' here: this is 'policy'"):
            await client.chat.completions.create(model="gpt", messages=USER)
        with pytest.raises(openai.BadRequestError, match="not JSON"):
            await client.post("/chat/completions", cast_to=object, content=b"{")


async def test_fifty_conversations_at_once_keep_to_themselves() -> None:
    async with serving(lambda prompt: prompt.split("\n")[0].upper().removeprefix("<|USER|>")) as (endpoint, sampler):
        sampler.seconds = 0.05
        model = OpenAIModel("policy", base_url=endpoint.base_url, exact=True, concurrency=50, retries=0)

        async def converse(name: str) -> None:
            said: list[Any] = [{"role": "user", "content": name}]
            before: list[int] = []
            for _ in range(3):
                answer = (await model.exchange(said)).completion
                assert answer.text == name.upper() and answer.tokens is not None
                assert answer.tokens.prompt[: len(before)] == before
                before = [*answer.tokens.prompt, *answer.tokens.sampled]
                said = [*said, {"role": "assistant", "content": answer.text}, {"role": "user", "content": "And?"}]

        await asyncio.gather(*(converse(f"conversation {number}") for number in range(50)))
        await model.aclose()
        assert sampler.most_at_once == 50 and (endpoint.prompts.extended, endpoint.prompts.apart) == (100, 0)


async def test_it_starts_again_and_says_what_is_wrong() -> None:
    endpoint = Endpoint("policy", TOKENIZER, Sampler(lambda prompt: "goal"), context_length=2048, max_tokens=2)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    for _ in range(2):
        url = await endpoint.start()
        assert signal.getsignal(signal.SIGINT) is on_ctrl_c
        assert url == endpoint.base_url and url.startswith("http://127.0.0.1:")
        with pytest.raises(UsageError, match="already"):
            await endpoint.start()
        model = OpenAIModel("policy", base_url=url)
        assert (await model.exchange(USER)).completion.finish_reason == "length"
        await model.aclose()
        await endpoint.aclose()
    assert endpoint.base_url == ""
    await endpoint.aclose()
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):
        await Endpoint("policy", TOKENIZER, Sampler(str), context_length=9, host="192.0.2.1").start()
    with pytest.raises(UnknownName, match="no tool parser called 'hermess'"):
        Endpoint("policy", TOKENIZER, Sampler(str), context_length=9, tool_parser="hermess")


async def test_it_listens_where_it_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            async with serving(port=port):
                pass
    async with serving(port=port) as (endpoint, _):
        assert endpoint.base_url == f"http://127.0.0.1:{port}/v1"


async def test_a_server_that_refuses_is_a_400_and_not_asked_again() -> None:
    async def generate(request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Drawn:
        raise ModelRefused("no beams here")

    async with Endpoint("policy", TOKENIZER, generate, context_length=2048) as endpoint:
        model = OpenAIModel("policy", base_url=endpoint.base_url)
        with pytest.raises(ModelRefused, match="answered 400: no beams here"):
            await model.exchange(USER)
        await model.aclose()


async def test_closing_does_not_wait_for_a_server_that_hangs() -> None:
    async with serving() as (endpoint, sampler):
        sampler.seconds = 60.0
        model = OpenAIModel("policy", base_url=endpoint.base_url, retries=0)
        call = asyncio.create_task(model.exchange(USER))
        while not sampler.asked:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            await endpoint.aclose()
            with pytest.raises(Exception, match="127.0.0.1"):
                await call
        await model.aclose()


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain", "plain", []),
        (ADD, "", [("add", '{"a": 40, "b": 2}')]),
        (f"First\n\n{ADD}\n{ADD} and more", "First\n", [("add", '{"a": 40, "b": 2}')] * 2),
        ('<tool_call>{"arguments":{},"name":"é"}</tool_call>', "", [("é", "{}")]),
        (f"{ADD}<tool_call>{{</tool_call>", f"{ADD}<tool_call>{{</tool_call>", []),
        ('<tool_call>["add"]</tool_call>', '<tool_call>["add"]</tool_call>', []),
        ('<tool_call>{"name": "add"}</tool_call>', '<tool_call>{"name": "add"}</tool_call>', []),
        ('<tool_call>{"name": "add", "arg', '<tool_call>{"name": "add", "arg', []),
    ],
)
def test_hermes_tool_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert hermes_calls(text) == (content, [ToolCall(*call) for call in calls])


async def test_verls_parsers_do_the_other_forms() -> None:
    pytest.importorskip("verl")
    text = "See.\n<tool_call>\n<function=add>\n<parameter=a>\n40\n</parameter>\n</function>\n</tool_call><|end|>"
    properties = {"a": {"anyOf": [{"type": "integer"}, {"type": "null"}]}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": properties}}}]
    parse = parser_called("qwen3_coder", TOKENIZER)
    content, calls = await parse(TOKENIZER.encode(text, add_special_tokens=False), tools)
    assert content.strip() == "See." and calls == [ToolCall("add", '{"a": 40}')]
