"""llama.cpp's server inside this process, and nothing of it elsewhere: load, tokenise, complete, close.

Completions are calls into the library. Only the tokeniser has no such call, so that alone goes over the loopback
socket which the library opens anyway, with a key made for this process. The engine is silent: trouble comes back as
our errors.
"""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cod_agent.errors import MissingExtra, ModelError, ModelGarbled, ModelRefused, UsageError
from cod_agent.models.chat_template import ChatTemplate
from cod_agent.models.gguf import all_f32
from cod_agent.models.prompt_tokens import PromptTokens

Listener = Callable[[str], bool]
"""Called with each piece of text, from the engine's thread; False ends the answer."""

LONGEST = 8192
"""Tokens of a conversation where nothing else is asked for; what larger models allow costs memory nobody asked for."""

CACHE_BYTES = 1 << 30
"""What the keys and values of all parallel answers may take together."""


class Engine:
    """A loaded model.

    Raises:
        MissingExtra, UsageError: see `GgufModel`.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], parallel: int, threads: int, context_length: int | None
    ) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise MissingExtra("a GGUF model", "local") from None
        length = context_length or min(_of(metadata, "context_length", LONGEST), LONGEST)
        self.parallel = max(1, min(parallel, CACHE_BYTES // _cache_bytes(metadata, length)))
        self._key = secrets.token_hex(16)
        params = self._params(xllamacpp, path, metadata, threads, length)
        try:
            with _signals_kept():
                self._server: Any = xllamacpp.Server(params)
        except RuntimeError:
            raise UsageError(f"llama.cpp cannot load {path}: it is damaged, or of a kind it does not know") from None
        self._address = self._server.listening_address.removeprefix("http://")
        props = self._ask("GET", "/props")
        self.context_length: int = props["default_generation_settings"]["n_ctx"]
        # Where the file names no such token, llama.cpp makes one up; the template must not see it.
        ends = [which for which in ("bos", "eos") if f"tokenizer.ggml.{which}_token_id" in metadata]
        self.template = ChatTemplate(props["chat_template"], **{which: props[f"{which}_token"] for which in ends})
        self.tokenize = PromptTokens(metadata, self._tokenize)

    def _params(self, library: Any, path: Path, metadata: dict[str, Any], threads: int, length: int) -> Any:
        params = library.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.kv_unified = self.parallel, self.parallel * length, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity, params.warmup, params.fit_params, params.ui = -1, False, False, False
        # Slots keep their last conversation, which is the reuse there is to have; a second store costs time per call.
        params.cache_ram_mib, params.n_ctx_checkpoints = 0, 0
        params.api_keys = [self._key]
        if all_f32(metadata):
            params.n_gpu_layers = 0
            params.cache_type_k = params.cache_type_v = library.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return params

    def _tokenize(self, text: str) -> list[int]:
        """Token ids of a text: control tokens are read as such, none is added."""
        said = self._ask("POST", "/tokenize", {"content": text, "parse_special": True, "add_special": False})
        return said["tokens"]

    def complete(
        self, prompt: list[int], request: dict[str, Any], listen: Listener | None
    ) -> tuple[str, str, list[dict[str, Any]], tuple[int, int]]:
        """Text, finish reason, one entry of {id, logprob} per token, (prompt tokens, sampled tokens).

        Raises:
            ModelRefused: the engine does not take the request.
            ModelGarbled: its answer is of an unknown shape, or was ended by `listen`.
        """
        pieces: list[dict[str, Any]] = []
        body = {**request, "prompt": prompt}
        if listen is None:
            pieces.append(self._server.handle_completions(body))
        else:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            self._server.handle_completions(body, lambda piece: _heard(piece, pieces, listen))
        text, finish, scored, usage = "", "", list[dict[str, Any]](), None
        for piece in pieces:
            if "error" in piece or "choices" not in piece:
                raise _failure(piece)
            for choice in piece["choices"]:
                text += choice["text"]
                finish = choice["finish_reason"] or finish
                scored += (choice["logprobs"] or {}).get("content", [])
            usage = piece.get("usage") or usage
        if usage is None:
            raise ModelGarbled("llama.cpp ended an answer without counting its tokens")
        return text, finish, scored, (usage["prompt_tokens"], usage["completion_tokens"])

    def close(self) -> None:
        """Ends the engine's threads and frees its memory."""
        self._server = None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        # A connection each: the library closes idle ones, and most prompts need none (`PromptTokens`).
        link = http.client.HTTPConnection(self._address)
        head = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json", "Connection": "close"}
        try:
            link.request(method, path, None if body is None else json.dumps(body), head)
            said = json.loads(link.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ModelError(f"llama.cpp's tokeniser does not answer: {error!r}") from None
        finally:
            link.close()
        if "error" in said:
            raise _failure(said)
        return said


def _heard(piece: dict[str, Any], pieces: list[dict[str, Any]], listen: Listener) -> bool:
    """Keeps a piece; True, which ends the answer, if nobody listens any more."""
    pieces.append(piece)
    return not listen("".join(choice["text"] for choice in piece.get("choices", ())))


def _failure(said: dict[str, Any]) -> ModelError:
    error = said.get("error", said)
    message = error.get("message", str(error)) if isinstance(error, dict) else str(error)
    refused = isinstance(error, dict) and error.get("code") == 400
    return (ModelRefused if refused else ModelError)(f"llama.cpp did not answer: {message}")


def _of(metadata: dict[str, Any], key: str, default: int) -> int:
    value = metadata.get(f"{metadata.get('general.architecture')}.{key}", default)
    return value if isinstance(value, int) and value > 0 else default


def _cache_bytes(metadata: dict[str, Any], length: int) -> int:
    """Roughly what the keys and values of one conversation take."""
    heads = _of(metadata, "attention.head_count", 1)
    width = _of(metadata, "attention.key_length", _of(metadata, "embedding_length", 4096) // heads)
    kept = _of(metadata, "attention.head_count_kv", heads) * width * _of(metadata, "block_count", 32)
    return 2 * kept * length * (4 if all_f32(metadata) else 2)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """llama.cpp's server takes SIGINT and SIGTERM for itself; this gives them back, from any thread."""
    if os.name != "posix":
        yield
        return
    libc, kept = ctypes.CDLL(None), {}
    for number in (signal.SIGINT, signal.SIGTERM):
        kept[number] = ctypes.create_string_buffer(512)
        libc.sigaction(int(number), None, kept[number])
    try:
        yield
    finally:
        for number, action in kept.items():
            libc.sigaction(int(number), action, None)
