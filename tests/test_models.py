"""Models by name, what a model file's head says, chat templates, and LiteLLM against a scripted server."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cod_agent.context import message
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.errors import (
    CodError,
    ModelGarbled,
    ModelOverloaded,
    ModelRefused,
    ModelTimeout,
    ModelUnreachable,
    UnknownName,
    UsageError,
)
from cod_agent.models import Sampling, resolve
from cod_agent.models.gguf import LONGEST_ARRAY, read_metadata
from cod_agent.models.prompt_tokens import PromptTokens
from cod_agent.policies import folder_of

HELLO = [message("user", ("application", "hello"))]


# ---- names ----


def test_importing_models_imports_no_engine() -> None:
    heavy = ("openai", "litellm", "xllamacpp", "jinja2", "httpx")
    code = f"import sys, cod_agent.models; print([name for name in {heavy} if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("embeded", UnknownName, "did you mean embedded"),
        ("gpt-5", UnknownName, "no model called 'gpt-5'"),
        ("", UnknownName, "no model called ''"),
        ("openai", UsageError, "openai:NAME"),
        ("openai:", UsageError, "openai:NAME"),
        ("gguf:no/such/file.gguf", UsageError, "no model file"),
        ("scripted:perfect", UsageError, "no world is named"),
    ],
)
def test_names_that_lead_nowhere_say_where_to_go(name: str, kind: type[CodError], says: str) -> None:
    with pytest.raises(kind, match=says):
        resolve(name)


def test_players_belong_to_their_world() -> None:
    lake = FrozenLake("tiny", seed=1, form="compact")
    assert resolve("scripted:perfect", world=lake).name == "scripted:perfect"
    with pytest.raises(UnknownName, match="did you mean scripted:perfect"):
        resolve("scripted:prefect", world=lake)


def test_a_missing_extra_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UsageError, match=r"pip install 'connect-the-dots\[local\]'"):
        resolve("embedded")


async def test_the_shipped_policies_are_found_by_name() -> None:
    pytest.importorskip("xllamacpp")
    model = resolve("embedded", sampling=Sampling(seed=1), concurrency=2)
    answer = await model.complete(HELLO)
    model.close()
    assert (model.name, model.form) == ("embedded", "compact")
    assert answer.usage[1] <= 40 and answer.weights == model.weights


# ---- model files ----


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(path: Path, **entries: bytes) -> Path:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries))
    path.write_bytes(head + b"".join(text(key.replace("__", ".")) + value for key, value in entries.items()))
    return path


def test_the_head_of_a_model_file_is_read_without_long_arrays(tmp_path: Path) -> None:
    long = struct.pack("<IIQ", 9, 8, LONGEST_ARRAY + 1) + text("t") * (LONGEST_ARRAY + 1)
    short = struct.pack("<IIQ", 9, 5, 2) + struct.pack("<2i", -1, 7)
    entries = {"long": long, "short": short, "cod__form": struct.pack("<I", 8) + text("compact")}
    assert read_metadata(gguf(tmp_path / "m.gguf", **entries)) == {"short": [-1, 7], "cod.form": "compact"}


def test_a_damaged_head_is_one_clear_sentence(tmp_path: Path) -> None:
    whole = (folder_of("embedded") / "model.gguf").read_bytes()
    for size in (5, 20, 30, 100, 1000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(UsageError, match="damaged or cut off"):
            read_metadata(path)


def test_prompts_are_tokenised_whole_where_cutting_is_not_safe() -> None:
    safe: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}
    safe |= {"tokenizer.ggml.tokens": ["<|end|>", "a", "yes"], "tokenizer.ggml.token_type": [3, 1, 4]}

    def pieces(**changes: object) -> list[str]:
        seen: list[str] = []
        PromptTokens(
            safe | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, lambda t: seen.append(t) or []
        )("a\nb<|end|>c\n\nd\n")
        return seen

    assert pieces() == ["a", "\n", "b", "<|end|>", "c\n\nd\n"]
    whole = ["a\nb<|end|>c\n\nd\n"]
    assert pieces(pre="llama-bpe") == pieces(model="llama") == pieces(tokens=None) == whole
    assert pieces(tokens=["<|end|>", "a", ">x"]) == pieces(tokens=["<|end|>", "a", "b\nc"]) == whole


def test_a_chat_template_cannot_reach_out() -> None:
    pytest.importorskip("jinja2")
    from cod_agent.models.chat_template import ChatTemplate

    assert ChatTemplate("{{ bos_token }}{{ messages[0].content | tojson }}", bos="<s>").render(HELLO) == '<s>"hello"'
    for source, says in {
        "{{ messages.__class__.__mro__ }}": "unsafe",
        "{{ raise_exception('no system role') }}": "no system role",
        "{% for m in messages %}{{ m.parts.x }}{% endfor %}": "no attribute",
    }.items():
        with pytest.raises(ModelRefused, match=says):
            ChatTemplate(source).render(HELLO)
    with pytest.raises(UsageError, match="not valid"):
        ChatTemplate("{% for %}")


# ---- LiteLLM ----

ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "m-1",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}


class Scripted(ThreadingHTTPServer):
    """Answers what `script` says, (status, headers, body), then ANSWER."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, str], bytes]] = []
        self.requests: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        self.server.requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        script = self.server.script
        status, headers, body = script.pop(0) if script else (200, {}, json.dumps(ANSWER).encode())
        if status == 0:
            time.sleep(2)
            return
        self.send_response(status)
        for key, value in ({"content-type": "application/json", "content-length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Scripted]:
    with Scripted() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def lite(server: Scripted, **options: Any) -> Any:
    pytest.importorskip("litellm")
    from cod_agent.models.litellm import LiteLLMModel

    return LiteLLMModel("openai/m", **({"api_base": server.url, "api_key": "k", "retries": 0} | options))


def stream(*pieces: str, finish: bool = True) -> tuple[int, dict[str, str], bytes]:
    choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    if finish:
        choices.append({"index": 0, "delta": {}, "finish_reason": "stop"})
    chunks = [
        {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m-1", "choices": [c]} for c in choices
    ]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + (["data: [DONE]\n\n"] if finish else [])
    return 200, {"content-type": "text/event-stream"}, "".join(lines).encode()


async def test_litellm_answers_and_says_why_it_is_inexact(server: Scripted) -> None:
    answer = await lite(server, sampling=Sampling(temperature=0.5, max_tokens=7)).complete(HELLO)
    assert (answer.text, answer.usage, answer.tokens) == ("hi", (3, 1), None) and "token ids" in answer.inexact
    sent = server.requests[0]
    assert (sent["temperature"], sent["max_tokens"]) == (0.5, 7) and "top_p" not in sent


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "no"}}', ModelRefused),
        (401, b'{"error": {"message": "no"}}', ModelRefused),
        (404, b'{"error": {"message": "no"}}', ModelRefused),
        (429, b'{"error": {"message": "no"}}', ModelOverloaded),
        (500, b'{"error": {"message": "no"}}', ModelOverloaded),
        (503, b"", ModelOverloaded),
        (200, b"<html>", ModelGarbled),
        (0, b"", ModelTimeout),
    ],
)
async def test_litellm_trouble_has_a_kind(server: Scripted, status: int, body: bytes, kind: type[CodError]) -> None:
    server.script.append((status, {}, body))
    with pytest.raises(kind):
        await lite(server, timeout=1 if status == 0 else 20).complete(HELLO)
    assert len(server.requests) == 1


async def test_litellm_endpoint_down(server: Scripted) -> None:
    with pytest.raises(ModelUnreachable):
        await lite(server, api_base="http://127.0.0.1:9/v1").complete(HELLO)


async def test_litellm_retries_are_ours_and_honour_retry_after(server: Scripted) -> None:
    server.script += [(429, {"retry-after": "1"}, b'{"error": {"message": "wait"}}')]
    model, began = lite(server, retries=2), time.perf_counter()
    assert (await model.complete(HELLO)).text == "hi"
    assert len(server.requests) == 2 and time.perf_counter() - began >= 1


async def test_litellm_streams_and_notices_a_cut(server: Scripted) -> None:
    pieces: list[str] = []
    server.script += [stream("a", "b"), stream("a", finish=False)]
    model = lite(server, stream=True)
    answer = await model.complete(HELLO, on_delta=pieces.append)
    assert (answer.text, pieces, answer.finish_reason) == ("ab", ["a", "b"], "stop")
    with pytest.raises(ModelGarbled, match="middle"):
        await model.complete(HELLO)
