"""`cod eval`: reward by position with intervals and controls, as a table, JSON and a figure."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.output import Progress, command_line, console, print_json, resumable, signed
from cod_agent.cli.run import by_position
from cod_agent.errors import UsageError

if TYPE_CHECKING:
    from cod_agent.evaluation import Evaluation, Lane, Plan
    from cod_agent.tasks import Outcome


def evaluate(
    world: options.World = None,
    model: options.Model = None,
    packs: options.Packs = None,
    pack_size: options.PackSize = None,
    seed: options.Seed = None,
    packing: options.Packing = None,
    controls: Annotated[
        str | None,
        typer.Option(
            "--controls",
            help="Beside it, on the same packs: no-context, or a player of the world; commas between; none (default: no-context).",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where figure, JSON and database go (default: eval-WORLD-MODEL).")
    ] = None,
    db: Annotated[Path | None, typer.Option("--db", help="The run database (default: OUT/runs.db).")] = None,
    agent: options.Agent = None,
    resume: options.Resume = False,
    form: options.Form = None,
    temperature: options.Temperature = None,
    max_tokens: options.MaxTokens = None,
    base_url: options.BaseUrl = None,
    api_key: options.ApiKey = None,
    exact: options.Exact = None,
    stream: options.Stream = None,
    timeout: options.Timeout = None,
    concurrency: options.Concurrency = None,
    as_json: options.Json = False,
) -> None:
    """Measure reward by position, with 95% intervals over packs, beside a control without context.

    The run database is the evidence: the same command again lives only what is missing.

    Example: cod eval frozen-lake:small --model embedded --packs 512 --controls no-context,perfect --out lake
    """
    flags = options.flags_of(locals())
    named = tuple(name.strip() for name in (controls or "no-context").split(",") if name.strip() not in ("", "none"))
    if resume:
        db = db or (out or Path()) / "runs.db"
        plan = _resumed(db, flags, named if controls is not None else None)
        out = out or db.parent
    else:
        plan = options.plan_of({**flags, "controls": named}, {"packs": 512})
        kind = "" if plan.packing == "cod" else f"-{plan.packing}"
        out = out or Path(f"eval-{_file_name(plan.world)}-{_file_name(plan.model)}{kind}")
        db = db or out / "runs.db"
    found = _evaluated(plan, db, out, api_key)
    files = {"json": out / "eval.json", "figure": save(found, out, "eval"), "database": db}
    if as_json:
        print_json({**found.json(), "files": {name: str(path) for name, path in files.items() if path}})
        return
    console().print(by_position(found))
    if found.benefit is not None:
        typer.echo(f"What the context is worth at the last task: {signed(found.benefit)}.")
    if found.main.lost:
        typer.echo(f"{found.main.lost} tasks were lost to the infrastructure and are left out.")
    typer.echo(f"{found.amount}, seed {found.seed}, {found.seconds:.1f} s, {found.calls} calls.")
    typer.echo(f"Files: {', '.join(str(path) for path in files.values() if path)}")


def _resumed(db: Path, flags: dict[str, Any], controls: tuple[str, ...] | None) -> Plan:
    """Raises: UsageError, for other controls than it was begun with, and where nothing is measured."""
    plan = options.resumed(db, {**flags, "controls": None})
    if plan.split != "eval":
        go_on = command_line("cod", "run", "--resume", "--db", db)
        raise UsageError(
            f"{db} holds lives in the {plan.split} split, and nothing is measured there; go on with: {go_on}"
        )
    if controls is not None and set(controls) != set(plan.controls):
        kept = ",".join(plan.controls) or "none"
        raise UsageError(f"{db} was begun with controls {kept}: leave --controls out, or use another --out")
    return plan


def _evaluated(plan: Plan, db: Path, out: Path, api_key: str | None) -> Evaluation:
    from cod_agent.evaluation import Watch
    from cod_agent.evaluation import evaluate as measure
    from cod_agent.memory import Memory

    go_on = ("--resume", "--out", out) if db == out / "runs.db" else ("--resume", "--out", out, "--db", db)
    with resumable(command_line("cod", "eval", *go_on), db):
        memory = Memory.open(db)
        try:
            with Progress(plan.packs * plan.pack_size * (1 + len(set(plan.controls))), "tasks") as progress:

                def told(lane: Lane, pack: int, outcome: Outcome) -> None:
                    progress.step(lane.name)

                return asyncio.run(measure(plan, memory, Watch(outcome=told), api_key=api_key))
        finally:
            memory.close()


def save(found: Evaluation, out: Path, name: str) -> Path | None:
    """Write NAME.json and, where matplotlib is installed, NAME.png; returns the figure's path, or None."""
    from cod_agent.errors import MissingExtra
    from cod_agent.evaluation import draw

    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(found.json(), indent=2, allow_nan=False) + "\n")
    try:
        return draw(found, out / f"{name}.png")
    except MissingExtra as missing:
        typer.echo(f"No figure: {missing}", err=True)
        return None


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "model"
