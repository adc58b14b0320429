"""`cod host`: agents as a service, until it is told to stop."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cod_agent.cli import options
from cod_agent.cli.output import print_json, say

if TYPE_CHECKING:
    from cod_agent.host.server import Running


_LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def host(
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings as TOML; COD_HOST_* and flags win over it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="openai:NAME, litellm:NAME, gguf:PATH, embedded (no default).")
    ] = None,
    memory: Annotated[Path | None, typer.Option("--memory", help="The run database (default: cod.db).")] = None,
    environment: Annotated[
        str | None, typer.Option("--environment", help="A world the tasks act on; without one, tasks are prompts.")
    ] = None,
    form: options.Form = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    base_url: options.BaseUrl = None,
    exact: options.Exact = None,
    timeout: options.Timeout = None,
    budget: options.Limits = None,
    run_budget: options.RunLimits = None,
    updates: Annotated[
        bool | None, typer.Option("--updates/--no-updates", help="Rewrite the context after each judged task.")
    ] = None,
    gate: options.Gate = None,
    max_context: Annotated[int | None, typer.Option("--max-context", help="Longest context, in characters.")] = None,
    address: Annotated[
        str | None, typer.Option("--host", help="Where to listen (default: 127.0.0.1); elsewhere a token is needed.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="0 takes a free one (default: 8080).")] = None,
    token_file: Annotated[Path | None, typer.Option("--token-file", help="A file with the clients' token.")] = None,
    drain: Annotated[
        float | None, typer.Option("--drain", help="Seconds tasks under way get after SIGTERM (default: 30).")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option("--log-level", metavar="debug|info|warning|error", help="What is logged.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Offer agents as a service, over HTTP.

    Tasks and feedback come in, contexts and events can be looked at; what was accepted is lived exactly once.

    Example: cod host --model openai:Qwen/Qwen3-8B --memory agents.db
    """
    given = {name: value for name, value in locals().items() if name not in ("config", "address", "as_json")}
    from cod_agent.host.settings import load, secrets_of

    settings = load({**given, "host": address}, config)
    from cod_agent.host.server import serve
    from cod_agent.secrets import CleanFormatter

    logging.basicConfig(level=settings.log_level.upper(), stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(CleanFormatter(secrets_of(settings), _LINE))
    for chatty in ("httpx", "httpx2", "httpcore", "openai", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLogger().level))
    serve(settings, lambda running: _say(running, as_json))


def _say(running: Running, as_json: bool) -> None:
    if running.made_token:
        say(f"No token was set. This one holds until the service stops: {running.made_token}", err=True)
    said = {name: getattr(running, name) for name in ("url", "model", "environment", "memory", "left")}
    if as_json:
        print_json(said)
    else:
        world = f" in {running.environment}" if running.environment else ""
        say(f"Agents of {running.model}{world} at {running.url}, remembered in {running.memory}.")
        say(f"What it takes: {running.url}/openapi.json. Ctrl-C ends it.")
    sys.stdout.flush()
