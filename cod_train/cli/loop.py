"""`cod loop`: deploy agents, record, train, gate, serve, deploy again; the same command goes on where it was."""

from __future__ import annotations

import asyncio
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from cod_agent.cli.output import command_line, console, print_json, say
from cod_agent.environments import make_world
from cod_agent.errors import CodError, MissingExtra, StoreFull, UnknownName, UsageError
from cod_agent.policies import POLICIES

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("loop")
def loop(
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="NAME|FILE", help="cpu_tiny (default), gpu_small, or a TOML file of yours."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="The loop's folder.")] = Path("runs/loop"),
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds in all; may grow.")] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Deployed first: a shipped policy or a Hugging Face folder.")
    ] = None,
    world: Annotated[str | None, typer.Option("--world", help="What agents live in, e.g. frozen-lake:small.")] = None,
    serve: Annotated[
        str | None, typer.Option("--serve", metavar="vllm|embedded", help="What serves the weights.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the packs that are recorded, and the training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Close the loop, round after round: agents live and are recorded, a candidate is trained and judged, the better one serves.

    Whatever stops it, the same command goes on.

    Example: cod loop --config cpu_tiny --out runs/loop --rounds 6
    """
    from cod_train.loop.settings import settled

    given = {"rounds": rounds, "base": base, "world": world, "serve.engine": serve, "seed": seed}
    out = out.absolute()
    settings = settled(out, config, {key: value for key, value in given.items() if value is not None})
    _check(settings)
    _run(out, settings)
    _tell(out, settings, as_json)


def _check(settings: Any) -> None:
    """Raises: UnknownName, UsageError, MissingExtra, before anything is started."""
    make_world(settings.world)
    if find_spec("verl") is None:
        raise MissingExtra("training", "train")
    if settings.gate.engine == "embedded" and settings.base in POLICIES and find_spec("xllamacpp") is None:
        raise MissingExtra("the gate's embedded engine", "local")
    if settings.base not in POLICIES and not (Path(settings.base) / "config.json").is_file():
        if Path(settings.base).is_dir() or "/" in settings.base:
            raise UsageError(f"{settings.base} has no config.json: give --base the folder of a Hugging Face model")
        raise UnknownName.among("base", settings.base, list(POLICIES))


def _run(out: Path, settings: Any) -> None:
    """Do what is still to be done."""
    from cod_train.loop.stages import ended
    from cod_train.loop.view import View

    if ended(out, settings):
        return
    go_on = command_line("cod", "loop", "--out", out)
    with View(out, settings.rounds) as view:
        try:
            code = asyncio.run(_going(out, settings, view))
        except KeyboardInterrupt:
            code = 130
        except UsageError:
            raise
        except OSError as error:
            raise StoreFull(f"{error}; everything recorded is in {out}. Make room, then go on with: {go_on}") from error
        except CodError as error:
            view.event("failed", f"Error: {error}")
            say(f"Everything until then is in {out}. Go on with: {go_on}", err=True)
            raise typer.Exit(1) from error
        if code:
            view.event("stopped", f"Stopped; everything until then is in {out}. Go on with: {go_on}")
            raise typer.Exit(code)


async def _going(out: Path, settings: Any, view: Any) -> int:
    """The loop, ended in order by SIGTERM. Returns the exit code."""
    from cod_train.checkpoints import Registry
    from cod_train.loop.settings import keep
    from cod_train.loop.stages import Loop
    from cod_train.verl_main import alone_in

    asked: list[int] = []
    with alone_in(out, "loop"), Registry(out / "registry.db", create=True) as registry:
        keep(out, settings)
        going = asyncio.create_task(Loop(out, settings, registry, view).go_on())

        def end() -> None:
            asked.append(signal.SIGTERM)
            going.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
        try:
            await going
        except asyncio.CancelledError:
            if not asked:
                raise  # Ctrl-C
    return 128 + asked[0] if asked else 0


def _tell(out: Path, settings: Any, as_json: bool) -> None:
    from cod_train.loop import report

    try:
        figure: Path | None = report.draw(out, f"{settings.world}, from {settings.base}")
    except MissingExtra as missing:
        say(f"No figure: {missing}", err=True)
        figure = None
    if as_json:
        said = {"out": str(out), "settings": settings.model_dump(mode="json"), **report.told(out)}
        print_json({**said, "figure": str(figure) if figure else None})
        return
    console().print(report.table(out))
    say(report.seconds(out))
    registry = out / "registry.db"
    say(f"Files: {registry}" + (f", {figure}" if figure else ""))
    say(f"Serve it: {command_line('cod', 'serve', '--registry', registry, '--engine', settings.serve.engine)}")
