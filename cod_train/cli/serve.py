"""`cod serve`: a checkpoint behind a stable address, or whatever the registry says is promoted, one after the other."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cod_agent.cli.output import command_line, print_json, say
from cod_agent.errors import UnknownName, UsageError
from cod_agent.models import LONGEST_POLICY_ANSWER
from cod_agent.policies import POLICIES, folder_of

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint, Registry
    from cod_train.serving.front import Front
    from cod_train.serving.switch import Serving

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SHARE = 0.45
"""Of a GPU's memory, where another server comes beside this one at every switch."""


@app.command("serve")
def serve(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="A name in the registry, a Hugging Face folder or a shipped policy (default: the promoted one, followed).",
        ),
    ] = None,
    registry: Annotated[
        Path, typer.Option("--registry", envvar="COD_REGISTRY", help="Whose promoted checkpoint is followed.")
    ] = Path("registry.db"),
    engine: Annotated[str, typer.Option("--engine", metavar="vllm|embedded", help="What serves.")] = "vllm",
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Where to listen; 0 takes a free one.")] = 8000,
    name: Annotated[str, typer.Option("--name", help="The model's name for clients, whatever serves.")] = "policy",
    dtype: Annotated[str, typer.Option("--dtype", help="Of the computation, as vLLM calls it.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=1, help="Longest conversation in tokens, answer included.")
    ] = None,
    log: Annotated[Path, typer.Option("--log", metavar="DIR", help="For serve.jsonl and the servers' output.")] = Path(
        "serving"
    ),
    ready_timeout: Annotated[float, typer.Option("--ready-timeout", help="Seconds until a server has to answer.")] = (
        300.0
    ),
    drain: Annotated[
        float, typer.Option("--drain", help="Seconds that answers under way get when their server ends.")
    ] = 600.0,
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", help="Python that has vLLM (default: COD_VLLM_PYTHON, or found).")
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Load adapters of one base into the running server.")] = False,
    gpu_memory: Annotated[
        float | None,
        typer.Option("--gpu-memory", help=f"Share of a GPU for one server (default: {SHARE} where it may switch)."),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", min=1, help="GPUs that one model is spread over.")
    ] = 1,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of one server, on a CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it serves as one JSON object.")] = False,
) -> None:
    """Serve a checkpoint with exact token ids, or follow what is promoted without losing a request.

    Example: cod serve --registry registry.db --engine embedded
    """
    from cod_train.serving import Engine

    source = _source(checkpoint, registry)
    follows = checkpoint is None
    served = Engine(
        _kind(engine),
        python=vllm_python,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=SHARE if gpu_memory is None and follows else gpu_memory,
        tensor_parallel=tensor_parallel,
        lora=lora,
        threads=threads,
    )
    code = asyncio.run(_serve(source, served, name, (host, port), log, (ready_timeout, drain), as_json=as_json))
    raise typer.Exit(code)


def _kind(engine: str) -> Literal["vllm", "embedded"]:
    if engine == "vllm":
        return "vllm"
    if engine == "embedded":
        return "embedded"
    raise UnknownName.among("engine", engine, ["vllm", "embedded"])


def _source(named: str | None, registry: Path) -> Registry | Checkpoint:
    """What to serve.

    Raises:
        CodError: there is no such registry, checkpoint, folder or policy, or nothing is promoted.
    """
    from cod_train.checkpoints import Registry

    if named is None:
        found = Registry(registry)
        if found.promoted() is None:
            raise UsageError(
                f"nothing is promoted in {registry}: `cod promote NAME` first, or say which CHECKPOINT to serve"
            )
        return found
    known: list[str] = []
    if registry.is_file():
        with Registry(registry) as kept:
            known = [one.name for one in kept.all()]
            if named in known or (named not in POLICIES and not Path(named).is_dir()):
                return kept.get(named)
    if Path(named).is_dir():
        return unregistered(Path(named))
    if named in POLICIES:
        return unregistered(folder_of(named))
    raise UnknownName.among("checkpoint, folder or policy", named, [*known, *POLICIES])


def unregistered(folder: Path) -> Checkpoint:
    """A folder as a checkpoint that no registry knows, with the digest that a registry would give it.

    Raises:
        UsageError: it could not be served.
    """
    from cod_train.checkpoint_files import check_servable, contents
    from cod_train.checkpoints import Checkpoint
    from cod_train.lineage import code_version, default_name

    held = contents(folder)
    check_servable(held.folder, held.base)
    return Checkpoint(
        name="".join(one if one.isascii() and (one.isalnum() or one in "._-") else "-" for one in default_name(folder)),
        parent=None,
        state="candidate",
        kind=held.kind,
        folder=held.folder,
        base=held.base,
        digest=held.digest,
        gguf=held.gguf,
        gguf_weights="",
        template=held.template,
        config={},
        code=code_version(),
        created=0.0,
    )


async def _serve(
    source: Registry | Checkpoint,
    engine: Any,
    name: str,
    where: tuple[str, int],
    log: Path,
    limits: tuple[float, float],
    *,
    as_json: bool,
) -> int:
    """Serve until a signal comes; the exit code."""
    from cod_train.serving.events import Events
    from cod_train.serving.front import Front
    from cod_train.serving.switch import Serving

    front = Front(name, *where)
    await front.start()  # a port in use is said before anything slow begins
    try:
        events = Events(log, lambda line: say(line, err=True))
    except OSError as error:
        raise UsageError(f"cannot make the folder {log}: {error.strerror}; choose another --log") from None
    ready_timeout, drain = limits
    serving = Serving(source, engine, front, events, log_folder=log, ready_timeout=ready_timeout, drain=drain)
    interrupted = _listen(serving)
    running = asyncio.create_task(serving.run())
    ready = asyncio.create_task(serving.ready.wait())
    await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
    ready.cancel()
    if serving.ready.is_set() and serving.current is not None:
        _tell(serving.current, front, events.path, as_json)
    await running
    return 130 if interrupted else 0


def _listen(serving: Serving) -> list[int]:
    """Have signals end the serving; a list of the Ctrl-Cs that come."""
    loop = asyncio.get_running_loop()
    interrupted: list[int] = []

    def interrupt() -> None:
        interrupted.append(signal.SIGINT)
        say("Stopping when the answers under way are out; Ctrl-C again stops at once.", err=True)
        serving.stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    loop.add_signal_handler(signal.SIGTERM, serving.stop)
    return interrupted


def _tell(checkpoint: Checkpoint, front: Front, log: Path, as_json: bool) -> None:
    """Where it serves, and what to paste."""
    from cod_train.checkpoint_files import form_of

    form = form_of(checkpoint.folder, checkpoint.base)
    # What speaks the compact form is small, and its window soon full.
    longest = LONGEST_POLICY_ANSWER if form == "compact" else 1000
    model = (
        f'OpenAIModel("{front.alias}", base_url="{front.local_url}", exact=True, form="{form}", '
        f"sampling=Sampling(max_tokens={longest}))"
    )
    command = command_line(
        *("cod", "run", "frozen-lake:small", "--model", f"openai:{front.alias}", "--base-url", front.local_url),
        *("--exact", "--form", form, "--max-tokens", str(longest), "--db", "me.db"),
    )
    if as_json:
        said = {"base_url": front.base_url, "model": front.alias, "weights": checkpoint.weights, "log": str(log)}
        print_json({**said, "checkpoint": checkpoint.name, "form": form})
    else:
        say(f'{checkpoint.weights} is served as "{front.alias}" at {front.base_url}; the log is {log}\n')
        say("from cod_agent import CoDAgent, Sampling\nfrom cod_agent.models.openai import OpenAIModel\n")
        say(f'agent = CoDAgent("me", model={model}, memory="me.db")\n')
        say(command)
    sys.stdout.flush()
