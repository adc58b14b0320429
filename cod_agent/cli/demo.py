"""`cod demo`: a small language model lives through packs of a frozen lake while you watch, with and without its
context.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.output import Progress, command_line, console, print_json, resumable, say
from cod_agent.cli.story import Story

if TYPE_CHECKING:
    from cod_agent.evaluation import Curve, Evaluation, Lane, Plan
    from cod_agent.tasks import Outcome

WORLD, MODEL, AGENT, PACK_SIZE = "frozen-lake:small", "embedded", "demo", 4
BAR = 14
TALL = 38
"""Lines of a window that takes everything."""

INTRO = (
    "Each lake is new, but four numbered directions are shuffled once for all {n} tasks of a pack. After each task the "
    "model rewrites a note to itself. Nothing else is carried over."
)


def demo(
    packs: Annotated[int, typer.Option("--packs", min=2, help="How many packs.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Which packs.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="Where database and figure go.")] = Path("demo"),
    as_json: options.Json = False,
) -> None:
    """Watch a small language model live: solve, rewrite its context, do better on the next task.

    It runs on this machine's CPU; no key and no network are needed.

    Example: cod demo --packs 96 --seed 1 --out demo
    """
    from cod_agent.evaluation import NO_CONTEXT, Plan, Study
    from cod_agent.evaluation.report import save

    plan = Plan(WORLD, MODEL, packs, PACK_SIZE, seed, AGENT, controls=(NO_CONTEXT,))
    db = _next_file(out, plan)
    again = command_line("cod", "demo", "--packs", packs, "--seed", seed, "--out", out)
    story = Story(PACK_SIZE)
    with resumable(again, db):
        found, inexact = asyncio.run(_live(plan, db, story, quiet=as_json))
    study = Study((found,), (plan,), db, found.seconds)
    files = {**save(study, out, "demo", tell=lambda said: say(said, err=True)), "database": db}
    if as_json:
        print_json({**found.json(), "files": {name: str(path) for name, path in files.items()}})
    else:
        _tell(found, inexact, db, list(files.values()))


def _next_file(out: Path, plan: Plan) -> Path:
    """A new file for each demo; one that was stopped in the middle is gone on with."""
    number = 1
    while (path := out / ("demo.db" if number == 1 else f"demo-{number}.db")).exists():
        if _unfinished(path, plan):
            return path
        number += 1
    return path


def _unfinished(path: Path, plan: Plan) -> bool:
    from cod_agent.evaluation import kept_plan
    from cod_agent.memory import Memory

    memory = Memory.open(path)
    try:
        before = kept_plan(memory)
        if before != plan:
            return False
        query = "SELECT count(*) FROM tasks WHERE state = 'closed' OR state = 'updated'"
        lived = memory.read_sync(lambda conn: conn.execute(query).fetchone()[0])
        return bool(lived < plan.packs * plan.pack_size * (1 + len(plan.controls)))
    except ValueError:  # no run in it yet
        return True
    finally:
        memory.close()


async def _live(plan: Plan, db: Path, story: Story, *, quiet: bool) -> tuple[Evaluation, int]:
    """What was found, and how many calls lack their exact tokens."""
    from cod_agent.evaluation import Watch, lanes_of, live_all, release, set_up, summarise
    from cod_agent.memory import Memory

    plan, world, model = set_up(plan)
    try:
        memory = Memory.open(db)
        try:
            lanes = lanes_of(plan, world, model)
            with _view(plan, lanes, story, quiet) as step:

                def told(lane: Lane, pack: int, outcome: Outcome) -> None:
                    step()

                seconds = await live_all(lanes, memory, Watch(outcome=told, event=story.hear))
            query = "SELECT count(*) FROM calls WHERE sampled_ids IS NULL"
            inexact = await memory.read(lambda conn: conn.execute(query).fetchone()[0])
            return summarise(lanes, seconds), inexact
        finally:
            memory.close()
    finally:
        await release(model)


# ---- what is seen ----


@contextmanager
def _view(plan: Plan, lanes: Sequence[Lane], story: Story, quiet: bool) -> Iterator[Any]:
    """The story and the curve as they grow; yields what to call after each task."""
    total = plan.packs * plan.pack_size * len(lanes)
    if quiet or not sys.stdout.isatty():
        if not quiet:
            say(f"{MODEL} lives through {plan.packs} packs of {WORLD}, with and without its context.")
            say(INTRO.format(n=plan.pack_size) + "\n")
        with Progress(total, "tasks") as progress:
            yield progress.step
        if not quiet:
            console().print(_seen(plan, lanes, story, None))
        return
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    bars = Bars(TextColumn("tasks lived"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn())
    task = bars.add_task("", total=total)
    with Live(console=console(), refresh_per_second=8, get_renderable=lambda: _seen(plan, lanes, story, bars)) as live:
        yield lambda: bars.advance(task)
        live.refresh()


def _seen(plan: Plan, lanes: Sequence[Lane], story: Story, bars: Any) -> Any:
    from rich.console import Group
    from rich.text import Text

    title = Text.assemble(
        (f"{MODEL}", "bold"), f" in {WORLD}: one of its {plan.packs} packs, and its note after each task\n"
    )
    told = [title, story.table()]
    heading = Text(f"all packs{' so far' if bars else ''}: mean reward by position\n", "bold")
    rewards = [heading, _rewards(lanes), Text("")]
    if bars is None:
        return Group(*told, *rewards)
    intro = Text(INTRO.format(n=plan.pack_size) + "\n", style="dim")
    # A short window shows the top: there the curve belongs.
    parts = [*told, *rewards, bars] if console().height >= TALL else [*rewards, bars, *told]
    return Group(intro, *parts)


def _rewards(lanes: Sequence[Lane]) -> Any:
    import numpy as np
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("", style="dim")
    for number in range(1, lanes[0].rewards.shape[1] + 1):
        table.add_column(f"task {number}", min_width=BAR)
    for lane, color in zip(lanes, ("cyan", "white"), strict=False):
        counts = np.isfinite(lane.rewards).sum(0)
        sums = np.nansum(lane.rewards, axis=0)
        cells = [_bar(total / count, color) if count else "" for total, count in zip(sums, counts, strict=True)]
        table.add_row(lane.name, *cells)
    return table


def _bar(mean: float, color: str) -> Any:
    from rich.text import Text

    full = round(mean * (BAR - 5))
    return Text.assemble(f"{mean:.2f} ", ("█" * full, color), ("░" * (BAR - 5 - full), "dim"))


def _tell(found: Evaluation, inexact: int, db: Path, files: Sequence[Path]) -> None:
    say(conclusion(found))
    say("")
    exact = f"{found.calls - inexact} of them" if inexact else "each"
    say(f"{found.calls} model calls in {found.seconds:.1f} s, {exact} recorded with exact tokens. What remains:")
    say(f"  {', '.join(map(str, files))}")
    say("Try next:")
    pack = f"{WORLD}/eval/{found.seed}/0"
    for command, why in (
        (
            ("cod", "context", "log", db, "--agent", AGENT, "--run", pack),
            "the note of the pack above, version by version",
        ),
        (("cod", "verify", db), "rebuild every request and check every hash"),
        (("cod", "eval", WORLD, "--packs", 512, "--controls", "no-context,perfect"), "the same, measured closely"),
        (("cod", "run", WORLD, "--model", "openai:NAME", "--base-url", "URL"), "a model of your own"),
    ):
        say(f"  {command_line(*command)}\n      {why}")


def conclusion(found: Evaluation) -> str:
    """What was seen, in two sentences."""
    first, last = found.main.points[0], found.main.points[-1]
    with_context = (
        f"With its context, the model's mean reward went from {first} on a pack's first task to "
        f"{last} on its last (95% intervals over {found.packs} packs)."
    )
    bare: Curve | None = next(iter(found.controls.values()), None)
    if bare is None or found.benefit is None:
        return with_context
    without = f"Without it, the same model on the same lakes had {bare.points[0]} and {bare.points[-1]}"
    if found.benefit.low > 0:
        return (
            f"{with_context} {without}: at the last task the note it wrote for itself is worth {found.benefit.signed}."
        )
    chance = f"the difference at the last task, {found.benefit.signed}, may be chance; more --packs would tell"
    return f"{with_context} {without}: {chance}."
