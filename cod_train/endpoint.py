"""The rollout server as an OpenAI-compatible endpoint on loopback, for solvers that speak HTTP.

    async def generate(request_id, prompt_ids, sampling_params):     # the trainer's server: tokens in, tokens out
        ...
        return Drawn(token_ids, log_probs, "stop", weights)

    async with Endpoint("policy", tokenizer, generate, context_length=8192) as endpoint:
        solver = AgentScopeSolver("policy", base_url=endpoint.base_url, exact=True)

The same agent that an application runs against its served model is trained by pointing it here. Messages become token
ids once (`cod_train.prompts`), answers carry the sampled ids and their log-probabilities, and so the runtime's journal
records exact calls, each prompt the extension of the one before. It lives in the caller's event loop and starts no
thread; it asks for no key, which is why it listens on loopback only.
"""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any

from cod_agent.errors import MissingExtra, ModelRefused, UsageError
from cod_agent.journal.answers import as_stream
from cod_train.dialect import Asked, Refused, Said, read_request, write_answer
from cod_train.model import Drawn, Generate
from cod_train.prompts import PromptIds
from cod_train.tool_calls import parser_called, text_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from transformers import PreTrainedTokenizerBase

_IDLE = 3600
"""Seconds a connection may rest: agents wait for tools, and a connection closed under a request costs a retry."""
_CLOSING = 2
"""Seconds that answers under way get to finish when the endpoint closes."""


class Endpoint:
    """Serves between `start` and `aclose`, in the event loop that called `start`.

    Args:
        name: of the model, as requests have to call it.
        tokenizer: a Hugging Face tokenizer with a chat template.
        generate: samples an answer; what it raises becomes a 503, which clients repeat, but for ModelRefused: a 400.
        context_length: longest prompt and answer together, in tokens; a request for more gets a 400.
        max_tokens: longest answer where a request does not say; None for what the context leaves.
        template: variables of the chat template where a request has no `chat_template_kwargs` for them.
        tool_parser: the form of tool calls: `hermes`, or one of verl's parsers.
        host, port: where to listen; port 0 takes a free one.

    Raises:
        UsageError: the tokenizer has no chat template, or there is no such parser.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        generate: Generate,
        *,
        context_length: int,
        max_tokens: int | None = None,
        template: Mapping[str, Any] | None = None,
        tool_parser: str = "hermes",
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.prompts, self._template = PromptIds(tokenizer), dict(template or {})
        """Counts the calls that extend the one before them, and those that do not."""
        self.base_url = ""
        """For clients; "" while it does not serve."""
        self._name, self._tokenizer, self._generate = name, tokenizer, generate
        self._host, self._port = host, port
        self._context_length, self._max_tokens = context_length, max_tokens
        self._calls_of = parser_called(tool_parser, tokenizer)
        self._spelling = lru_cache(None)(lambda token: str(tokenizer.decode([token])))
        self._server: Any = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen. Returns the base URL, which ends in /v1.

        Raises:
            MissingExtra: uvicorn or starlette is not installed.
            UsageError: this machine has no such host, the port is taken, or it serves already.
        """
        if self._serving is not None:
            raise UsageError("the endpoint serves already")
        try:
            import uvicorn

            app = self._app()
        except ImportError:
            raise MissingExtra("the rollout endpoint", "train") from None

        class Server(uvicorn.Server):
            def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
                return nullcontext()  # Ctrl-C belongs to the program around

        # Named, or asyncio leaves Nagle's algorithm on, and every answer waits 40 ms for an acknowledgement.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # A port whose last connections are still closing may be taken again.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self._host, self._port))
        except OSError as error:
            listening.close()
            where = f"{self._host}:{self._port}" if self._port else self._host
            raise UsageError(f"cannot listen on {where}: {error}") from None
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            access_log=False,
            proxy_headers=False,
            log_config=None,
            timeout_keep_alive=_IDLE,
            timeout_graceful_shutdown=_CLOSING,
        )
        self._server = Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
            await asyncio.sleep(0.005)
        self.base_url = f"http://{self._host}:{listening.getsockname()[1]}/v1"
        return self.base_url

    async def aclose(self) -> None:
        """Stop listening; answers under way get two seconds to finish."""
        serving, self._serving, self.base_url = self._serving, None, ""
        if serving is not None:
            self._server.should_exit = True
            await serving

    async def __aenter__(self) -> Endpoint:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _app(self) -> Starlette:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.responses import JSONResponse, Response
        from starlette.routing import Route

        async def chat(request: Request) -> Response:
            try:
                asked = read_request(await request.body(), self._name)
                body = write_answer(asked, await self._answer(asked), self._name, self._spelling)
            except Refused as refused:
                return JSONResponse(refused.body(), refused.status)
            if asked.stream:
                return Response(as_stream(body), media_type="text/event-stream")
            return JSONResponse(body)

        async def models(_: Request) -> Response:
            this = {"id": self._name, "object": "model", "owned_by": "cod_train", "max_model_len": self._context_length}
            return JSONResponse({"object": "list", "data": [this]})

        async def health(_: Request) -> Response:
            return JSONResponse({})

        async def nowhere(_: Request, error: Exception) -> Response:
            status = error.status_code if isinstance(error, HTTPException) else 404
            why = "here are /v1/chat/completions (POST), /v1/models and /health (GET)"
            return JSONResponse(Refused(why, status, "not_found").body(), status)

        routes = [
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: nowhere})

    async def _answer(self, asked: Asked) -> Said:
        try:
            prompt = self.prompts.ids(asked.messages, asked.tools, **{**self._template, **asked.variables})
        except (ModelRefused, TypeError) as error:  # TypeError: a template's variable that is not one
            raise Refused(str(error)) from None
        sampling = {**asked.sampling, "max_tokens": self._limit(len(prompt), asked.sampling.get("max_tokens"))}
        try:
            drawn = _checked(await self._generate(_conversation(asked), [*prompt], sampling))
        except ModelRefused as error:
            raise Refused(str(error)) from None
        except Exception as error:  # whatever the trainer's server does: the client asks again
            said = f"the rollout server gave no answer: {type(error).__name__}: {error}"
            raise Refused(said, 503, "no_answer") from error
        self.prompts.answered(prompt, drawn.token_ids)
        if asked.calls_tools:
            text, calls = await self._calls_of(drawn.token_ids, asked.tools)
        else:
            text, calls = text_of(self._tokenizer, drawn.token_ids), []
        return Said(prompt, drawn.token_ids, drawn.log_probs, drawn.finish, text, calls, drawn.weights)

    def _limit(self, prompt: int, asked: int | None) -> int:
        left = self._context_length - prompt
        limit = asked or min(self._max_tokens or left, left)
        if limit > left or left < 1:
            raise Refused(
                f"the context has {self._context_length} tokens: the prompt takes {prompt}, and the answer may take {max(limit, 1)}; "
                "shorten the conversation, or ask for a smaller max_tokens",
                code="context_length_exceeded",
            )
        return limit


def _checked(drawn: Drawn) -> Drawn:
    """`drawn`, if it can be trained on.

    Raises:
        ValueError: it cannot.
    """
    if not drawn.token_ids:
        raise ValueError("no token was sampled")
    if len(drawn.token_ids) != len(drawn.log_probs):
        raise ValueError(f"{len(drawn.token_ids)} sampled ids but {len(drawn.log_probs)} log-probabilities")
    if not all(map(isfinite, drawn.log_probs)):
        raise ValueError("a log-probability is not finite")
    if drawn.finish not in ("stop", "length"):
        raise ValueError(f"the answer ended with {drawn.finish!r}: only stop and length can be trained on")
    return drawn


def _conversation(asked: Asked) -> str:
    """A name that the turns of a conversation share, so that they go to the server that has their keys and values."""
    return f"{zlib.crc32(repr(asked.messages[:2]).encode(errors='replace')):08x}"
