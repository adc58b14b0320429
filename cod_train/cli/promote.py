"""`cod promote`: a candidate and what is promoted live the same new packs, and the better one is promoted from then on."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cod_agent.cli import options
from cod_agent.cli.output import Progress, command_line, console, print_json, say
from cod_agent.errors import UnknownName
from cod_train.cli.options import REGISTRY, RegistryFile

if TYPE_CHECKING:
    from cod_train.checkpoints import KeptVerdict, Registry
    from cod_train.serving import Engine

REJECTED = 3
"""The exit code of a verdict that rejects: a result, not an error, but scripts must see it."""
ENGINES: tuple[Literal["embedded", "vllm"], ...] = ("embedded", "vllm")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("promote")
def promote(
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="A checkpoint of the registry.")],
    registry: RegistryFile = REGISTRY,
    world: Annotated[str, typer.Option("--world", help="What both live in.")] = "frozen-lake:small",
    packs: Annotated[int, typer.Option("--packs", help="How many packs, the same for both.")] = 512,
    pack_size: Annotated[int, typer.Option("--pack-size", help="Tasks in a pack.")] = 4,
    margin: Annotated[
        float, typer.Option("--margin", help="Part of the range of rewards that a position may lose.")
    ] = 0.1,
    engine: Annotated[
        str, typer.Option("--engine", metavar="embedded|vllm", help="What answers: the embedded engine, or real vLLM.")
    ] = "embedded",
    vllm_python: Annotated[
        Path | None, typer.Option("--vllm-python", envvar="COD_VLLM_PYTHON", help="The Python that has vLLM.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of vLLM's computation.")] = "auto",
    form: options.Form = None,
    max_tokens: options.MaxTokens = None,
    out: Annotated[
        Path, typer.Option("--out", help="The verdict's databases go to OUT/CANDIDATE-against-INCUMBENT.")
    ] = Path("gates"),
    as_json: options.Json = False,
) -> None:
    """Promote a checkpoint if it is better than what is promoted, and worse at no position; else reject it for good.

    Both live the same packs, which nobody has lived before. A running `cod serve` follows. Stopped or killed, the same command goes on.
    Exit code 0: promoted; 3: rejected; 1: nothing was decided.

    Example: cod promote round-3 --registry registry.db --world frozen-lake:small --packs 512
    """
    from cod_train.checkpoints import Registry
    from cod_train.serving import Engine

    for kind, name, known in (("engine", engine, ENGINES), ("form", form or "natural", ("natural", "compact"))):
        if name not in known:
            raise UnknownName.among(kind, name, list(known))
    more = {"margin": margin, "form": form, "max_tokens": max_tokens}
    played = Engine("vllm" if engine == "vllm" else "embedded", python=vllm_python, dtype=dtype)
    with Registry(registry) as opened:
        _warn(opened, candidate)
        kept = _decided(opened, candidate, out, world, packs, pack_size, played, more)
    _tell(kept, as_json)
    if not kept.promoted:
        raise typer.Exit(REJECTED)


def _warn(registry: Registry, candidate: str) -> None:
    """Say which weights in the candidate's line learnt from what is gone now."""
    from cod_train.lineage import taken_out

    for one in registry.lineage(candidate):
        if gone := taken_out(registry.training_runs(one.name)):
            say(
                f"Warning: of what {one.name} was trained on, runs are gone since ({gone}): its weights still know what they taught",
                err=True,
            )


def _decided(
    registry: Registry, name: str, out: Path, world: str, packs: int, size: int, engine: Engine, more: Mapping[str, Any]
) -> KeptVerdict:
    from cod_agent.evaluation import Watch
    from cod_train.gate import Undecided, decide

    incumbent = registry.promoted()
    folder = out / f"{registry.get(name).name}-against-{incumbent.name if incumbent else 'nothing'}"
    again = f"Nothing was decided. Go on with: {command_line(*sys.argv)}"
    try:
        with Progress(packs * size * (2 if incumbent else 1), "tasks") as progress:
            watch = Watch(outcome=lambda lane, pack, outcome: progress.step(lane.agent))
            deciding = decide(
                registry,
                name,
                world=world,
                folder=folder,
                packs=packs,
                pack_size=size,
                engine=engine,
                watch=watch,
                **more,
            )
            return asyncio.run(deciding)
    except KeyboardInterrupt:
        say(f"\nStopped. {again}", err=True)
        raise typer.Exit(130) from None
    except Undecided:
        say(again, err=True)
        raise


def _tell(kept: KeptVerdict, as_json: bool) -> None:
    if as_json:
        print_json({"verdict": kept.id, **kept.said})
        return
    said = kept.said
    if said["positions"]:
        console().print(table(said))
        say("mean reward [95% interval]; the difference pack by pack, and what it is at least (one-sided, 95%)\n")
    for check in said["checks"]:
        say(f"{'holds' if check['holds'] else 'FAILS':5}  {check['name']}: {check['said']}")
    say(
        f"\n{kept.candidate} is {'promoted' if kept.promoted else 'rejected'}{'' if said['incumbent'] else ', as the first'}."
    )
    say(_amount(said))
    say(f"Verdict {kept.id} of the registry; the databases are in {said['folder']}")


def table(said: Mapping[str, Any]) -> Any:
    """Reward by position of both sides, and the paired difference with its one-sided lower end."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("task", justify="right")
    roles = [role for role in ("incumbent", "candidate") if role in said["overall"]]
    for role in roles:
        shown.add_column(said[role], justify="right", no_wrap=True)
    shown.add_column("difference", justify="right", no_wrap=True)
    rows = [(str(row["position"] + 1), row) for row in said["positions"]]
    for name, row in (*rows, ("all", said["overall"])):
        if name == "all":
            shown.add_section()
        shown.add_row(name, *(_interval(row[role]) for role in roles), _difference(row["difference"]))
    return shown


def _interval(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "none"
    return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**found)


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None or found["low"] is None:
        return ""
    return "{mean:+.3f}, at least {low:+.3f}".format(**found)


def _amount(said: Mapping[str, Any]) -> str:
    seconds = sum(one["seconds"] for one in said["played"].values())
    return f"{said['world']}, {said['packs']} packs of {said['pack_size']}, seed {said['seed']}, {seconds:.0f} s."


__all__ = ["REJECTED", "app", "promote", "table"]
