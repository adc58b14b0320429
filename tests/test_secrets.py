"""Secrets never enter: what is found, what is not taken for one, who gets a value, and that a planted one is found nowhere."""

from __future__ import annotations

import html
import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
import unicodedata
import zlib
from array import array
from base64 import b64encode, urlsafe_b64encode
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import markupsafe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Answer, Fault, ScriptedServer
from typer.testing import CliRunner

from cod_agent import CoDAgent, Feedback, Memory, Observation, Secrets, Task, recorded_tool, tool
from cod_agent.cli import app
from cod_agent.environments import WORLDS, make_world
from cod_agent.errors import ModelError, ModelRefused, UsageError
from cod_agent.events import Delta
from cod_agent.journal.answers import read_answer
from cod_agent.journal.http import recording_client
from cod_agent.journal.pieces import Events
from cod_agent.journal.tap import Tap
from cod_agent.memory.hashing import canonical
from cod_agent.memory.projection import projection
from cod_agent.models.openai import OpenAIModel
from cod_agent.secrets import SHORTEST

ROOT = Path(__file__).parent
VALUE = 'Tr0ub4dor&3/+~"x\\y'
CANARY = "cAn4ry/7f3a+9b=QQ0-zz"
KIND = {
    "github": "ghp_" + "a1B2" * 9,
    "github fine": "github_pat_11ABCDEFG0abcdefghij_klmnop",
    "gitlab": "glpat-ab12cd34ef56gh78ij90",
    "aws": "AKIAIOSFODNN7EXAMPLE",
    "aws secret": "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "slack": "xoxb-123456789012-abcdefghij",
    "stripe": "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
    "openai": "sk-proj-abcdefghij0123456789",
    "anthropic": "sk-ant-api03-abcdefghij0123456789",
    "google": "AIza" + "Sy0" * 11 + "ab",
    "hugging face": "hf_" + "aB3d" * 9,
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEab+/=\n-----END RSA PRIVATE KEY-----",
    "address": "postgres://bob:s3cr3t@db.example/shop",
    "basic": "Authorization: Basic dXNlcjpwYXNz",
    "bearer": '{"Authorization": "Bearer abcdefgh12345678"}',
}
KEPT = {
    "aws secret": "aws_secret_access_key",
    "address": "postgres://bob:",
    "basic": "Authorization: Basic",
    "bearer": "Bearer",
}


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without secrets."""
    for name in os.environ:
        if name.upper().endswith(("_KEY", "_TOKEN", "_SECRET", "_PASSWORD", "_CREDENTIALS")):
            monkeypatch.delenv(name)
    return monkeypatch


def secrets(**values: str) -> Secrets:
    return Secrets(values=values or {"LOGIN": VALUE}, environment=False)


# ---- what is found ----

WRITTEN = {
    "as it is": VALUE,
    "json": json.dumps({"a": VALUE}),
    "json in json": json.dumps({"arguments": json.dumps({"a": VALUE})}),
    "in an address": f"https://x.example/?key={quote(VALUE, safe='')}&y=1",
    "in a form": f"key={quote_plus(VALUE)}",
    "hex": VALUE.encode().hex(),
    "HEX": VALUE.encode().hex().upper(),
    "url-safe": urlsafe_b64encode(VALUE.encode()).decode(),
    **{
        f"base64 after {before} and before {after}": b64encode(b"u:" * before + VALUE.encode() + b"!" * after).decode()
        for before in range(3)
        for after in range(3)
    },
}


@pytest.mark.parametrize("written", WRITTEN.values(), ids=WRITTEN)
def test_a_named_value_is_found_however_it_is_written(written: str) -> None:
    said = secrets()(f"before {written} after")
    assert "[secret:LOGIN]" in said and said.startswith("before ") and said.endswith(" after")
    for form in (
        VALUE,
        json.dumps(VALUE)[1:-1],
        quote(VALUE, safe=""),
        VALUE.encode().hex(),
        VALUE.encode().hex().upper(),
    ):
        assert form not in said
    left = said.replace("[secret:LOGIN]", "").removeprefix("before ").removesuffix(" after")
    assert len(left) <= len(written) - len(VALUE)


@pytest.mark.parametrize("kind", KIND)
def test_well_known_keys_are_found_by_their_form(kind: str) -> None:
    said = secrets()(f"Look: {KIND[kind]}, and so on.")
    assert said.count("[secret:") == 1 and said.endswith(", and so on.") and KEPT.get(kind, "Look: [secret:") in said
    assert Secrets(environment=False, kinds=False)(KIND[kind]) == KIND[kind]


ODD = "gr\u00fc\u00df/a\\b\"c'd&<e>"


@pytest.mark.parametrize(
    "written",
    [
        repr({"token": ODD}),
        repr(KeyError(ODD)),
        repr(f"it is {ODD.replace(chr(34), '')}"),
        ascii(ODD),
        repr(ODD.encode()),
        json.dumps(ODD).replace("/", "\\/"),
        html.escape(ODD),
        str(markupsafe.escape(ODD)),
        html.escape(ODD, quote=False),
        unicodedata.normalize("NFD", ODD),
    ],
)
def test_what_programs_do_to_odd_characters_does_not_hide_a_value(written: str) -> None:
    value = ODD if "it is" not in written else ODD.replace('"', "")
    said = secrets(LOGIN=value)(f"before {written} after")
    assert said.count("[secret:LOGIN]") == 1 and "gr" not in said


def test_a_number_may_be_a_secret() -> None:
    tap = Tap(secrets(PIN="9081726354"))
    assert tap.value({"pin": 9081726354, "other": 9081726355, "yes": True, "less": 7}) == {
        "pin": "[secret:PIN]",
        "other": 9081726355,
        "yes": True,
        "less": 7,
    }


def test_what_was_redacted_is_redacted_to_the_same() -> None:
    found = secrets(LOGIN=VALUE, OTHER="OTHER]x[secret:LOGIN", LONGER=f"{VALUE}longer", SAME="[secret:SAME]")
    text = " ".join([VALUE, f"{VALUE}longer", *KIND.values(), *WRITTEN.values()])
    once = found(text)
    assert found(once) == once and "[secret:LONGER]" in once


def test_lines_of_a_key_of_several_lines_are_found() -> None:
    key = "-----BEGIN X-----\nabcdefghijklmnopqrstuvwx\nyz0123456789ABCDEFGHIJKL\n-----END X-----"
    for given_as in (key, key.replace("\n", "\\n")):
        found = secrets(DEPLOY=given_as)
        assert found(f"1: {key.splitlines()[1]}\n2: {key.splitlines()[2]}") == "1: [secret:DEPLOY]\n2: [secret:DEPLOY]"
        assert found(key) == found(key.replace("\n", "\\n")) == "[secret:DEPLOY]"


def test_plain_texts_are_left_alone() -> None:
    found = Secrets(environment=False)
    for text in (
        "Authorization: required for this page. See the authorization header: Bearer of news.",
        "risk-adjusted-returns-and-more-words, task_live_and_let_live, https://x.example:8080/a@b",
        "the sk- prefix, eyJ, AKIA, a 40 character hash da39a3ee5e6b4b0d3255bfef95601890afd80709",
    ):
        assert found(text) == text


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_no_world_says_anything_that_looks_like_a_secret(world: str) -> None:
    found = Secrets(environment=False)
    for seed in range(2):
        made = make_world(world, seed=seed)
        for task in made.pack(3):
            session = made.start(task)
            said = f"{task.model_dump_json()} {session.reset().text}"
            assert found(said) == said


def test_the_environment_says_what_is_secret(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("SHOP_PASSWORD", "opensesame")
    bare.setenv("shop_api_key", "lower-case-name")
    bare.setenv("PASSWORD", "just-the-word")
    bare.setenv("SHORT_KEY", "x" * (SHORTEST - 1))
    bare.setenv("SHOP_LOGIN", "not-by-its-name")
    bare.setenv("DATABASE_URL", "postgres://bob:pa%24sword12@db/x")
    assert Secrets().names == {"PASSWORD", "SHOP_PASSWORD", "shop_api_key", "DATABASE_URL_PASSWORD"}
    assert Secrets()("opensesame lower-case-name not-by-its-name pa$sword12") == (
        "[secret:SHOP_PASSWORD] [secret:shop_api_key] not-by-its-name [secret:DATABASE_URL_PASSWORD]"
    )
    assert Secrets("SHOP_LOGIN")("not-by-its-name") == "[secret:SHOP_LOGIN]"
    with pytest.raises(UsageError, match="no environment variable NOWHERE"):
        Secrets("NOWHERE")
    with pytest.raises(UsageError, match="fewer than 8"):
        Secrets("SHORT_KEY")
    with pytest.raises(UsageError, match="name has letters"):
        Secrets(values={"a b": "long enough"})


def test_two_keys_of_one_name_are_both_kept(bare: pytest.MonkeyPatch) -> None:
    found = (
        secrets(A_KEY="first-value").beside({"A_KEY": "second-value", "B": "short"}).beside({"A_KEY": "first-value"})
    )
    assert found("first-value second-value short") == "[secret:A_KEY] [secret:A_KEY_] short"


TEXTS = st.lists(
    st.sampled_from(
        [*KIND.values(), *WRITTEN.values(), VALUE, "Authorization: ", "Bearer ", "日本", "a pass phrase", " ", "x", "."]
    ),
    max_size=6,
).map("".join)


@settings(deadline=None, max_examples=100)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_a_text_in_pieces_shows_what_the_whole_shows(text: str, cuts: list[int]) -> None:
    found, held, told, at = secrets(LOGIN=VALUE, PHRASE="a pass phrase", WORD="日本" * 4), "", "", 0
    for number in range(len(text)):
        if at >= len(text):
            break
        held, at = held + text[at : at + cuts[number % len(cuts)]], at + cuts[number % len(cuts)]
        settled = found.settled(held)
        told, held = told + found(held[:settled]), held[settled:]
    assert told + found(held) == found(text)


@settings(deadline=None, max_examples=50)
@given(text=TEXTS)
def test_nothing_in_json_escapes_the_quick_look(text: str) -> None:
    found = secrets()
    if found(text) != text:
        assert found.suspects(json.dumps([text])) and found.suspects(json.dumps([text], ensure_ascii=False))


# ---- tools ----


@tool(secrets=("LOGIN",))
def deploy(login: Any) -> str:
    """Deploy."""
    SEEN.append(login)
    return f"deployed by {login}"


def post(text: str) -> str:
    """Post something."""
    SEEN.append(text)
    raise ValueError(f"the server, whose key is {VALUE}, refused {text}")


SEEN: list[Any] = []


def agent(tmp_path: Path, solver: Any = None, **more: Any) -> CoDAgent:
    SEEN.clear()
    return CoDAgent("a", memory=tmp_path / "a.db", solver=solver, updates=False, **{"redact": secrets(), **more})


async def test_only_a_tool_that_declares_a_secret_gets_it(tmp_path: Path) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        one, other = tools
        shown = await one({"headers": ["key [secret:LOGIN]"], "other": "[secret:OTHER]"})
        try:
            await other("[secret:LOGIN]")
        except Exception as error:
            shown += f" {error}"
        return f"{shown} {await recorded_tool(deploy)('[secret:LOGIN]')}"

    both = Secrets(values={"LOGIN": VALUE, "OTHER": "another-secret"}, environment=False)
    for _ in range(2):
        async with agent(tmp_path, solver, tools=[deploy, post], redact=both) as made:
            outcome = await made.solve(Task(id="t"), position=0)
    assert SEEN == [], "the second time all of it came from the record"
    assert VALUE not in outcome.answer and "whose key is [secret:LOGIN], refused [secret:LOGIN]" in outcome.answer
    assert outcome.answer.endswith("deployed by [secret:LOGIN]")
    assert VALUE not in str(kept(tmp_path / "a.db"))


async def test_values_are_those_that_the_tool_gets(tmp_path: Path) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        await tools[0]({"headers": ["key [secret:LOGIN]"], "other": "[secret:OTHER]"})
        return ""

    both = Secrets(values={"LOGIN": VALUE, "OTHER": "another-secret"}, environment=False)
    async with agent(tmp_path, solver, tools=[deploy], redact=both) as made:
        await made.solve(Task(id="t"))
    (got,) = SEEN
    assert got == {"headers": [f"key {VALUE}"], "other": "[secret:OTHER]"}


async def test_a_declared_name_is_found_in_the_environment_or_missed_at_once(
    tmp_path: Path, bare: pytest.MonkeyPatch
) -> None:
    async def solver(task: Task, context: str, tools: Any) -> str:
        return str(await tools[0]("[secret:LOGIN]"))

    with pytest.raises(UsageError, match="no environment variable LOGIN"):
        agent(tmp_path, solver, tools=[deploy], redact="secrets")
    async with agent(tmp_path, solver, tools=[deploy], redact=None) as made:
        with pytest.raises(UsageError, match="asks for the secret LOGIN"):
            await made.solve(Task(id="t"))
    bare.setenv("LOGIN", VALUE)
    async with agent(tmp_path, solver, tools=[deploy], redact="secrets") as made:
        assert (await made.solve(Task(id="t"))).answer == "deployed by [secret:LOGIN]"
    assert SEEN == [VALUE]
    with pytest.raises(UsageError, match="list of names"):
        tool(secrets="LOGIN")


@pytest.mark.parametrize("framework", ["own", "agentscope"])
async def test_a_model_that_was_talked_into_it_sends_no_secret_anywhere(tmp_path: Path, framework: str) -> None:
    """It writes the placeholder into every tool it has; one of them may have the secret."""

    def reply(request: dict[str, Any], n: int) -> Any:
        calls = [("deploy", {"login": "[secret:LOGIN]"}), ("post", {"text": "[secret:LOGIN]"})]
        return Answer(None, calls) if n == 0 else "done"

    solver = None
    with ScriptedServer(reply) as server:
        if framework == "agentscope":
            pytest.importorskip("agentscope")
            from cod_agent.solvers import AgentScopeSolver

            solver = AgentScopeSolver("m", base_url=server.url)
        model = OpenAIModel("m", base_url=server.url)
        async with agent(tmp_path, solver, model=model, tools=[deploy, post]) as made:
            assert (await made.solve(Task(id="t", prompt="Go."))).answer == "done"
        await model.aclose()
        assert sorted(SEEN) == sorted([VALUE, "[secret:LOGIN]"])
        assert not [body for body in server.bodies if json.dumps(VALUE)[1:-1].encode() in body]
        assert b"deployed by [secret:LOGIN]" in server.bodies[1] and b"whose key is [secret:LOGIN]" in server.bodies[1]


# ---- calls ----


def kept(path: Path, query: str = "SELECT * FROM effects") -> list[Any]:
    with closing(sqlite3.connect(path)) as conn:
        return conn.execute(query).fetchall()


@pytest.mark.parametrize("where", ["nowhere", "prompt", "answer", "thought"])
async def test_a_call_with_a_secret_is_marked_has_no_tokens_and_is_not_trained_on(tmp_path: Path, where: str) -> None:
    from cod_train.rollouts import read_rollout

    texts = {name: f"{name} {VALUE if name == where else 'plain'}" for name in ("prompt", "answer", "thought")}
    answer = Answer(texts["answer"], message={"reasoning_content": texts["thought"]})
    with ScriptedServer(lambda request, n: answer) as server:
        model = OpenAIModel("m", base_url=server.url, exact=True)
        async with agent(tmp_path, model=model) as made:
            outcome = await made.solve(Task(id="t", prompt=texts["prompt"]))
            await made.feedback(outcome, 1.0)
        await model.aclose()
    ((inexact, tokens, envelope),) = kept(tmp_path / "a.db", "SELECT inexact, sampled_ids, envelope FROM calls")
    with closing(sqlite3.connect(tmp_path / "a.db")) as conn:
        (segment,) = read_rollout(conn, 1).segments
    if where == "nowhere":
        assert (inexact, segment.refused) == ("", "") and tokens is not None
    else:
        assert (inexact, tokens) == ("redacted", None) and "redacted" in segment.refused
        assert "token_ids" not in envelope and "logprobs" not in envelope


async def test_a_prompt_that_shows_a_placeholder_of_before_is_marked_too(tmp_path: Path) -> None:
    """Its tokens are those of a model that had to do without."""

    class Shows:
        name = "shows"

        def start(self, task: Task) -> Any:
            return self

        def reset(self) -> Observation:
            return Observation(VALUE)

        def step(self, answer: str) -> Observation:
            return Observation("", done=True, feedback=Feedback(reward=1.0))

    with ScriptedServer() as server:
        model = OpenAIModel("m", base_url=server.url, exact=True)
        async with agent(tmp_path, model=model, environment=Shows()) as made:
            await made.solve(Task(id="t"))
        await model.aclose()
    assert kept(tmp_path / "a.db", "SELECT inexact, sampled_ids FROM calls") == [("redacted", None)]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_secret_that_the_model_says_piece_by_piece_is_shown_nowhere(tmp_path: Path, stream: bool) -> None:
    text = f"I think that {VALUE} is it, or {KIND['github']}, or else"
    told: list[str] = []
    with ScriptedServer(lambda request, n: text) as server:
        model = OpenAIModel("m", base_url=server.url, stream=stream)
        async with agent(tmp_path, model=model) as made:
            async for event in made.stream([Task(id="t", prompt="?")]):
                told += [event.text] if isinstance(event, Delta) else []
        await model.aclose()
    if stream:
        assert "".join(told) == "I think that [secret:LOGIN] is it, or [secret:GITHUB_TOKEN], or else" and len(told) > 3


@pytest.mark.parametrize("secret", ["", VALUE, KIND["jwt"]])
async def test_another_programs_stream_passes_up_to_the_secret_and_then_without_it(tmp_path: Path, secret: str) -> None:
    openai = pytest.importorskip("openai")
    text = f"One two three four five {secret} six seven"
    calls = [("look", {"place": f"at {secret}"})]
    before: list[int] = []

    def said(chunks: list[Any]) -> tuple[str, str, str]:
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        arguments = [call.function.arguments for one in choices for call in one.delta.tool_calls or []]
        names = [call.function.name or "" for one in choices for call in one.delta.tool_calls or []]
        content = "".join(one.delta.content or "" for one in choices)
        return content, "".join(names), "".join(filter(None, arguments))

    async def solver(task: Task, context: str, tools: Any) -> str:
        client = openai.AsyncOpenAI(
            base_url=server.url, api_key="unused-key", http_client=recording_client(), max_retries=0
        )
        chunks = []
        messages = [{"role": "user", "content": "?"}]
        async for chunk in await client.chat.completions.create(model="m", messages=messages, stream=True):
            before.append(len(kept(tmp_path / "a.db", "SELECT 1 FROM calls")))
            chunks.append(chunk)
        await client.close()
        return json.dumps(said(chunks))

    with ScriptedServer(lambda request, n: Answer(text, calls, delay=0.01)) as server:
        for _ in range(2):
            async with agent(tmp_path, solver) as made:
                outcome = await made.solve(Task(id="t"), position=0)
    clean = secrets()
    assert json.loads(outcome.answer) == [clean(text), "look", clean(json.dumps(calls[0][1]))]
    assert before[0] == 0 and before[-1] == 1, "it was shown as it came, and its end was on record first"
    assert secret == "" or secret not in str(kept(tmp_path / "a.db", "SELECT body FROM messages"))


def test_a_thought_does_not_hold_the_answer_back_and_a_secret_holds_all_that_follows() -> None:
    def event(**delta: str) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"

    events = Events(secrets())
    assert events.add(event(reasoning="I see.")) == b"", "a secret may begin so"
    assert events.add(event(content="Yes ")) == event(reasoning="I see.") + event(content="Yes ")
    assert events.add(event(content=VALUE[:5])) == events.add(event(content=f"{VALUE[5:]} ")) == b""
    assert events.add(event(content="and so on ")) == b""
    message = {"role": "assistant", "reasoning": "I see.", "content": "Yes [secret:LOGIN] and so on "}
    whole = {"id": "1", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    left = events.rest(read_answer("application/json", json.dumps(whole).encode()))
    assert read_answer("text/event-stream", left).message == {
        "content": "[secret:LOGIN] and so on ",
        "role": "assistant",
    }


async def test_a_request_that_hides_a_secret_behind_escapes_is_redacted(tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    hidden = "".join(f"\\u{ord(c):04x}" for c in VALUE)

    async def solver(task: Task, context: str, tools: Any) -> str:
        async with recording_client() as client:
            body = f'{{"model": "m",  "messages": [{{"role": "user", "content": "{hidden}"}}]}}'
            found = await client.post(
                f"{server.url}/chat/completions", content=body, headers={"authorization": "Bearer k"}
            )
            return str(found.status_code)

    assert openai
    with ScriptedServer() as server:
        async with agent(tmp_path, solver) as made:
            assert (await made.solve(Task(id="t"))).answer == "200"
        assert server.requests[0]["messages"][0]["content"] == "[secret:LOGIN]"


# ---- around the calls ----


async def test_a_login_in_the_address_is_shown_nowhere(tmp_path: Path, bare: pytest.MonkeyPatch) -> None:
    with ScriptedServer(lambda request, n: Fault(status=404)) as server:
        url = server.url.replace("://", "://bob:opensesame@")
        model = OpenAIModel("m", base_url=url, api_key="key-of-the-endpoint")
        settings = {"plan": {"base_url": url, "key": "key-of-the-endpoint"}}
        async with agent(tmp_path, model=model, redact="secrets", settings=settings) as made:
            with pytest.raises(ModelRefused) as refused:
                await made.solve(Task(id="t", prompt="opensesame"))
        await model.aclose()
    said = f"{refused.value} {kept(tmp_path / 'a.db', 'SELECT * FROM runs')} {server.bodies}"
    assert "opensesame" not in said and "key-of-the-endpoint" not in said and "bob" not in str(refused.value)


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("before", [140, 290, 490])
async def test_a_secret_that_an_error_is_cut_off_in_is_not_kept_in_part(
    tmp_path: Path, status: int, before: int
) -> None:
    with ScriptedServer(lambda request, n: Fault(status=status, garbage=b"x" * before + VALUE.encode())) as server:
        model = OpenAIModel("m", base_url=server.url, retries=0)
        async with agent(tmp_path, model=model) as made:
            with pytest.raises(ModelError) as failed:
                await made.solve(Task(id="t", prompt="?"))
        await model.aclose()
    assert VALUE[:6] not in f"{failed.value} {kept(tmp_path / 'a.db', 'SELECT detail FROM attempts')}"


async def test_a_state_of_an_environment_that_holds_a_secret_is_not_stored(tmp_path: Path) -> None:
    """After a crash the environment cannot be brought back without it: the task is lost, not the secret."""
    died = []

    class Vault:
        name, recovery = "vault", "snapshot"

        def start(self, task: Task) -> Any:
            return self

        def reset(self) -> Observation:
            return Observation("a door")

        def step(self, answer: str) -> Observation:
            if not died:
                died.append(True)
                raise KeyboardInterrupt
            return Observation("open", done=True, feedback=Feedback(reward=1.0))

        def snapshot(self) -> Any:
            return {"combination": VALUE}

        def restore(self, state: Any) -> None:
            raise AssertionError("there is nothing to restore")

    for last in (False, True):
        with ScriptedServer() as server:
            model = OpenAIModel("m", base_url=server.url)
            made = agent(tmp_path, model=model, environment=Vault())
            if last:
                outcome = await made.solve(Task(id="t"))
                assert outcome.reward != outcome.reward and "held a secret" in outcome.reason
            else:
                with pytest.raises(KeyboardInterrupt):
                    await made.solve(Task(id="t"))
            await made.aclose()
            await model.aclose()
    assert VALUE not in str(kept(tmp_path / "a.db"))


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes")
def test_a_new_database_is_its_owners_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for mode in (0o600, 0o660):
            memory = Memory.open(tmp_path / "m.db")
            memory.write_sync(lambda conn: conn.execute("UPDATE runs SET name = name"))
            beside = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
            memory.close()
            assert {"m.db", "m.db-wal", "m.db-shm"} <= set(beside)
            assert {name: beside[name] for name in beside if name != "m.db.lock"} == dict.fromkeys(
                set(beside) - {"m.db.lock"}, mode
            )
            (tmp_path / "m.db").chmod(0o660)
    finally:
        os.umask(before)


# ---- a planted one is found nowhere ----


def everything(folder: Path) -> bytes:
    """All bytes of all files, and of databases the columns: unpacked, and tokens spelt (a token is a character)."""
    said = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for file in folder.rglob("*.db"):
        with closing(sqlite3.connect(file)) as conn:
            for (table,) in conn.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                for row in conn.execute(f"SELECT * FROM {table}"):
                    for value in row:
                        raw = value if isinstance(value, bytes) else str(value).encode()
                        try:
                            raw = zlib.decompress(raw)
                            size = len(raw) // 4
                            ids = array("i", bytes(raw[k * size + i] for i in range(size) for k in range(4)))
                            said += "".join(chr(i) for i in ids if 0 < i < 0x110000).encode("utf-8", "replace")
                        except (zlib.error, ValueError):
                            pass
                        said += raw
    return said


def planted(said: bytes, *canaries: str) -> list[str]:
    """Which canaries there are in it, and how they are written."""
    found = []
    for canary in canaries:
        forms = {
            canary,
            json.dumps(canary)[1:-1],
            quote(canary, safe=""),
            canary.encode().hex(),
            *(b64encode(b"x" * k + canary.encode()).decode()[4:-4] for k in range(3)),
        }
        found += [form for form in forms if form.encode() in said]
    return found


KEY = "sk-canary-key-0123456789abcdef"
VALUE_IN_ADDRESS = "cAn4ry-in-the-address"


def live(server: ScriptedServer, folder: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "canary_life.py"), server.url, str(folder / "life.db"), str(kill_at)]
    found = subprocess.run(
        command,
        env={**os.environ, "CANARY_KEY": CANARY, "OPENAI_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (folder / f"log-{kill_at}").write_text(found.stdout + found.stderr)
    return found


def test_a_planted_secret_is_found_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real life with everything in it, killed in the middle, resumed, exported and copied; the search itself is tried first."""
    monkeypatch.setenv("CANARY_KEY", CANARY)
    from canary_life import reply

    with ScriptedServer(reply) as server:
        assert live(server, tmp_path, 2).returncode == -signal.SIGKILL
        done = live(server, tmp_path, 0)
        assert done.returncode == 0, done.stderr
        sent = b"".join(server.bodies)
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    got = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("deploy")}
    assert got <= {sha256(text.encode()).hexdigest() for text in (CANARY, f"key {CANARY}")} and got
    assert "post [secret:CANARY_KEY]" in done.stdout and "context remember [secret:CANARY_KEY]" in done.stdout
    told = [cod(*shown, tmp_path / "life.db", *json) for shown in SHOWN for json in ((), ("--json",))]
    for layout in ("episodes", "chat"):
        told.append(exported := cod("export", tmp_path / "life.db", "--format", layout))
        cod("export", tmp_path / "life.db", "--format", layout, "--out", tmp_path / f"{layout}.jsonl")
        assert "[secret:CANARY_KEY]" in exported
    (tmp_path / "told").write_text("".join(told) + canonical(projection(tmp_path / "life.db")))
    cod("backup", tmp_path / "life.db", tmp_path / "copy.db")
    said = everything(tmp_path)
    assert said.count(b"[secret:CANARY_KEY]") > 50
    assert planted(said, CANARY, KEY) == [] and planted(sent, CANARY, KEY) == []
    assert b"Bearer" not in said
    assert set(kept(tmp_path / "life.db", "SELECT inexact FROM calls")) == {("redacted",)}
    with closing(sqlite3.connect(tmp_path / "life.db")) as conn, conn:
        conn.execute(
            "UPDATE effects SET result = ? WHERE id = 1", (f'["{b64encode(b"y" + CANARY.encode()).decode()}"]',)
        )
    assert planted(everything(tmp_path), CANARY, KEY), "the search finds what is there"


SHOWN = (("context", "log"), ("context", "show"), ("context", "diff"), ("context", "blame"), ("verify",), ("doctor",))


def test_what_an_evaluation_leaves_shows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report, figures, JSON, database and what is printed, where the model says secrets in answers and notes."""
    monkeypatch.setenv("CANARY_KEY", CANARY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    said = f"<context>\nuse {CANARY}\n</context> <answer>Direction 1, {CANARY}</answer>"
    with ScriptedServer(lambda request, n: said) as server:
        address = server.url.replace("://", f"://me:{VALUE_IN_ADDRESS}@")
        command = ("eval", "frozen-lake:tiny", "--model", "openai:m", "--packs", 1, "--pack-size", 2)
        printed = cod(*command, "--base-url", address, "--out", tmp_path / "lake")
    (tmp_path / "printed").write_text(printed)
    assert {"report.html", "eval.json", "runs.db"} <= {file.name for file in (tmp_path / "lake").iterdir()}
    assert "[secret:CANARY_KEY]" in (tmp_path / "lake" / "report.html").read_text()
    assert planted(everything(tmp_path), CANARY, KEY, VALUE_IN_ADDRESS) == []


def cod(*command: Any) -> str:
    found = CliRunner().invoke(app, [*map(str, command)])
    assert found.exit_code == 0, found.output
    return found.output


def test_a_host_keeps_logs_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks, keys and tokens that hold one, an endpoint that repeats them all in its errors, kill -9 with tasks in the queue."""
    pytest.importorskip("uvicorn")
    from test_host import TOKEN, hosting

    monkeypatch.setenv("CANARY_KEY", CANARY)
    calm = False

    def reply(request: dict[str, Any], n: int) -> Any:
        if "Write the new note" in str(request["messages"]):
            return f"<context>\nwrite down {CANARY}\n</context>"
        error = {"error": {"message": f"wrong key {KEY}, or was it {CANARY} or {TOKEN}?"}}
        return f"it is {CANARY}" if calm else Fault(status=401, garbage=json.dumps(error).encode())

    told = []
    with ScriptedServer(reply) as server:
        url = server.url.replace("://", "://bob:s3same-0pen@")
        with hosting(tmp_path, url, api_key=KEY, timeout="5", log_level="debug") as host:
            for _ in range(3):
                task = {"id": CANARY, "prompt": f"say {CANARY}", "data": {CANARY: [CANARY]}, "wait": False}
                told.append(str(host.http.post("/v1/agents/a/tasks", json=task).json()))
            deadline = time.monotonic() + 20
            while not (place := host.place(0)).get("trouble"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            told.append(str(place))
            host.stop(signal.SIGKILL)
        calm = True
        with hosting(tmp_path, url, api_key=KEY) as host:
            for number in range(3):
                host.eventually(number, "solved", "judged", "updated", "closed")
                said = {"reward": 1.0, "text": f"well done, {CANARY}"}
                told.append(host.http.post(f"/v1/agents/a/runs/life/tasks/{number}/feedback", json=said).text)
            told.append(host.http.get("/v1/events?after=0&follow=false").text)
            told.append(host.http.get("/v1/agents/a/contexts").text)
            host.stop()
        sent = b"".join(server.bodies)
    (tmp_path / "told").write_text("\n".join(told))
    said = everything(tmp_path)
    assert said.count(b"[secret:CANARY_KEY]") > 20 and b"s3same" not in said
    assert planted(said, CANARY, KEY, TOKEN) == [] and planted(sent, CANARY, KEY, TOKEN) == []
