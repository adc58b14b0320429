"""`cod eval`: reward by position with intervals and controls, as a table, JSON, figures and a report."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.eval_tables import tell
from cod_agent.cli.output import Progress, command_line, print_json, resumable, say
from cod_agent.errors import UsageError

if TYPE_CHECKING:
    from cod_agent.evaluation import Lane, Plan, Study
    from cod_agent.tasks import Outcome


def evaluate(
    world: Annotated[
        str | None,
        typer.Argument(
            metavar="WORLD",
            help="WORLD, WORLD:PRESET or a suite (harder, cross-domain, tiny); several with commas between.",
        ),
    ] = None,
    model: options.Model = None,
    packs: Annotated[int | None, typer.Option("--packs", help="How many packs of each seed.")] = None,
    pack_size: Annotated[
        str | None,
        typer.Option("--pack-size", help="Tasks in a pack, or several sizes: 4,8 (default: 4, or the suite's)."),
    ] = None,
    seed: Annotated[
        str | None, typer.Option("--seed", help="Which packs, or several seeds: 1,2,3 (default: 1).")
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", help="Runs of each pack, averaged (default: 1).")] = None,
    packing: options.Packing = None,
    controls: Annotated[
        str | None,
        typer.Option(
            "--controls",
            help="Beside it, on the same packs: no-context, frozen, foreign, blank, shuffled, history, attempts, ralph-sample, "
            "ralph-full, or a player of the world; commas between; all; none (default: no-context).",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="Another model on the same packs, to compare the two."),
    ] = None,
    against_base_url: Annotated[
        str | None,
        typer.Option("--against-base-url", metavar="URL", help="Of the other model's endpoint (default: the same)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where report, figure, JSON and database go (default: eval-WORLD-MODEL)."),
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
    gate: options.Gate = None,
    stream: options.Stream = None,
    timeout: options.Timeout = None,
    concurrency: options.Concurrency = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Live the packs on a Ray cluster: auto, HOST:PORT, or local for all cores here.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure reward by position, with 95% intervals over packs, beside controls on the same packs.

    The run database is the evidence: the same command again lives only what is missing.

    Example: cod eval frozen-lake:small --model embedded --packs 512 --controls no-context,frozen,history --out lake
    """
    flags = options.flags_of(locals()) | {"world": None, "pack_size": None, "controls": _controls(controls)}
    names, sizes, seeds = (
        options.words(world),
        options.numbers("--pack-size", pack_size),
        options.numbers("--seed", seed),
    )
    if resume:
        db = db or (out or Path()) / "runs.db"
        parts = _resumed(db, flags | {"seed": None}, names, sizes, seeds)
        out = out or db.parent
    else:
        parts = _parts(flags | ({"seed": seeds[0], "more_seeds": seeds[1:]} if seeds else {"seed": None}), names, sizes)
        out = out or Path(_folder(names, parts[0]))
        db = db or out / "runs.db"
    found = _studied(parts, db, out, api_key, ray)
    _said(found, out, as_json=as_json)


def _controls(said: str | None) -> tuple[str, ...] | None:
    return None if said is None else tuple(name for name in options.words(said) if name != "none")


def _parts(flags: dict[str, Any], names: Sequence[str], sizes: Sequence[int]) -> tuple[Plan, ...]:
    from cod_agent.evaluation import parts_of

    if flags["controls"] is None:
        flags = {**flags, "controls": ("no-context",)}
    plan = options.plan_of({**flags, "world": names[0] if names else None}, {"packs": 512})
    return tuple(part.check() for part in parts_of(plan, names, sizes))


def _resumed(
    db: Path, flags: dict[str, Any], names: Sequence[str], sizes: Sequence[int], seeds: Sequence[int]
) -> tuple[Plan, ...]:
    """Raises: UsageError, for other worlds, sizes, seeds or controls than it was begun with, and where nothing is measured."""
    from cod_agent.evaluation import parts_of

    parts = options.resumed_study(db, {**flags, "controls": None})
    plan, controls = parts[0], flags["controls"]
    if plan.split != "eval":
        go_on = command_line("cod", "run", "--resume", "--db", db)
        raise UsageError(
            f"{db} holds lives in the {plan.split} split, and nothing is measured there; go on with: {go_on}"
        )
    if controls is not None and set(controls) != set(plan.controls):
        kept = ",".join(plan.controls) or "none"
        raise UsageError(f"{db} was begun with controls {kept}: leave --controls out, or use another --out")
    if seeds and tuple(seeds) != plan.seeds:
        kept = ",".join(map(str, plan.seeds))
        raise UsageError(f"{db} was begun with --seed {kept}: leave --seed out, or use another --out")
    if names or sizes:
        worlds = names or tuple(dict.fromkeys(part.world for part in parts))
        asked = parts_of(replace(plan, pack_size=4), worlds, sizes or (() if names else (plan.pack_size,)))
        before = [(part.world, part.pack_size) for part in parts]
        if len(asked) != len(before) or not all(map(_same, asked, parts)):
            kept = ", ".join(f"{name} in packs of {size}" for name, size in before)
            raise UsageError(f"{db} was begun with {kept}: leave worlds and sizes out, or use another --out")
    return parts


def _same(asked: Plan, kept: Plan) -> bool:
    """Whether a part is the one that was asked for, whose world's preset may be left out."""
    return asked.pack_size == kept.pack_size and (asked.world == kept.world or kept.world.startswith(f"{asked.world}:"))


def _studied(parts: Sequence[Plan], db: Path, out: Path, api_key: str | None, ray: str | None) -> Study:
    from cod_agent.evaluation import Watch, study
    from cod_agent.evaluation.cluster import ray_cluster
    from cod_agent.memory import Memory

    go_on = ("--resume", "--out", out) if db == out / "runs.db" else ("--resume", "--out", out, "--db", db)
    with resumable(command_line("cod", "eval", *go_on), db), ExitStack() as stack:
        memory = Memory.open(db)
        stack.callback(memory.close)
        cluster = stack.enter_context(ray_cluster(ray)) if ray is not None else None
        progress: list[Progress] = []

        def begins(lanes: Sequence[Lane]) -> None:
            progress.append(stack.enter_context(Progress(sum(lane.tasks for lane in lanes), "tasks")))

        def told(lane: Lane, pack: int, outcome: Outcome) -> None:
            progress[0].step(f"arm {lane.name}")

        watch = Watch(begins=begins, outcome=told)
        return asyncio.run(study(parts, memory, watch, api_key=api_key, cluster=cluster))


def _said(found: Study, out: Path, *, as_json: bool) -> None:
    from cod_agent.evaluation.report import save

    files = {**save(found, out, tell=lambda said: say(said, err=True)), "database": found.database}
    if as_json:
        print_json({**found.json(), "files": {name: str(path) for name, path in files.items()}})
    else:
        tell(found)
        say(f"Files: {', '.join(str(path) for path in files.values())}")


def _folder(names: Sequence[str], plan: Plan) -> str:
    kind = "" if plan.packing == "cod" else f"-{plan.packing}"
    return f"eval-{_file_name('-'.join(names))}-{_file_name(plan.model)}{kind}"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.") or "model"
