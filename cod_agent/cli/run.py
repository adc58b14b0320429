"""`cod run`: live through packs of a world, and go on with it after anything that stopped it."""

from __future__ import annotations

import asyncio
from collections import Counter
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cod_agent.cli import options
from cod_agent.cli.eval_tables import by_position
from cod_agent.cli.output import Progress, command_line, console, counted, print_json, resumable, say

if TYPE_CHECKING:
    from cod_agent.evaluation import Evaluation, Lane, Plan
    from cod_agent.memory import Memory
    from cod_agent.tasks import Outcome


def run(
    world: options.World = None,
    model: options.Model = None,
    db: Annotated[Path, typer.Option("--db", help="The run database; made if absent.")] = Path("cod.db"),
    packs: options.Packs = None,
    pack_size: options.PackSize = None,
    seed: options.Seed = None,
    split: options.Split = None,
    packing: options.Packing = None,
    agent: options.Agent = None,
    resume: options.Resume = False,
    only: Annotated[str | None, typer.Option("--run", help="With --resume: this one run only.")] = None,
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
    budget: options.Limits = None,
    run_budget: options.RunLimits = None,
    anchor: Annotated[
        Path | None,
        typer.Option("--anchor", help="Note each task's commit in this file, kept elsewhere: see cod anchor."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Live through packs of a world.

    Every call is recorded in one SQLite file before it counts; whatever stops it, --resume goes on.

    Example: cod run frozen-lake:small --model embedded --packs 8 --db lake.db
    """
    from cod_agent.evaluation.suites import refuse_suite

    flags = options.flags_of(locals())
    if world is not None:
        refuse_suite(world)
    plan = options.resumed(db, flags, only) if resume else options.plan_of(flags, {"packs": 8})
    with resumable(command_line("cod", "run", "--resume", "--db", db), db):
        told = _Told(plan, quiet=as_json)
        found = asyncio.run(_live(plan, db, told, api_key, only, anchor))
    if as_json:
        print_json({**found.json(), "db": str(db), "agent": plan.agent, "tasks": told.tasks})
    else:
        _summary(found, told, plan, db)


class _Told:
    """What happens, as a line and a count each."""

    def __init__(self, plan: Plan, *, quiet: bool) -> None:
        self.quiet, self.before, self.tasks = quiet, set[tuple[str, int]](), list[dict[str, Any]]()
        self.lived, self.packs = 0, set[int]()
        self.lost, self.malformed = Counter[str](), 0
        self.progress = Progress(plan.packs * plan.pack_size, "tasks")

    def outcome(self, lane: Lane, pack: int, outcome: Outcome) -> None:
        from cod_agent.environments.base import MALFORMED
        from cod_agent.evaluation.measures import lost_by

        reward = outcome.reward if outcome.reward is not None and outcome.reward == outcome.reward else None
        self.tasks.append(
            {
                "run": outcome.run,
                "position": outcome.position,
                "reward": reward,
                "ending": outcome.feedback.ending if outcome.feedback else "",
                "update": outcome.update,
                "version": outcome.version,
                "calls": outcome.calls,
                "reason": outcome.reason,
            }
        )
        if outcome.reward is not None and reward is None:
            self.lost[lost_by(outcome.feedback)] += 1
        elif outcome.feedback is not None and outcome.feedback.ending == MALFORMED:
            self.malformed += 1
        self.progress.step()
        self.packs.add(pack)
        if (outcome.run, outcome.position) in self.before:
            self.lived += 1
        elif not self.quiet:
            self.progress.line(_line(outcome))


def _line(outcome: Outcome) -> str:
    reward = "none" if outcome.reward is None else "lost" if isnan(outcome.reward) else f"{outcome.reward:g}"
    if outcome.reward is not None and not outcome.reward > 0:  # no success, or nobody knows
        how = (outcome.feedback.ending if outcome.feedback else "") or (
            outcome.reason if outcome.update == "none" else ""
        )
        reward += f" ({how})" if how else ""
    said = {
        "written": f"context version {outcome.version}",
        "held": f"context held back ({outcome.reason})",
        "kept": f"context kept ({outcome.reason})",
    }.get(outcome.update, "")
    return f"{outcome.run} task {outcome.position}: reward {reward}" + (f", {said}" if said else "")


async def _live(
    plan: Plan, db: Path, told: _Told, api_key: str | None, only: str | None, anchor: Path | None
) -> Evaluation:
    from cod_agent.evaluation import Watch, lanes_of, live_all, refuse_mixture, release, set_up, summarise
    from cod_agent.memory import Memory
    from cod_agent.memory.anchor import Anchor, check_place

    if anchor is not None:
        check_place(anchor, db)
    plan, world, model = set_up(plan, api_key=api_key)
    try:
        memory = Memory.open(db)
        try:
            refuse_mixture(memory, plan, (world.pack(plan.pack_size, pack).id for pack in range(plan.packs)))
            told.before = finished(memory, plan.agent)
            lanes = lanes_of(plan, world, model)
            chosen = None if only is None else lambda lane, life: lane.run(life) == only
            kept = Anchor(anchor) if anchor else None

            def outcome(lane: Lane, pack: int, outcome: Outcome) -> None:
                if kept is not None:
                    memory.read_sync(lambda conn: kept.note(conn, (plan.agent, outcome.run)))
                told.outcome(lane, pack, outcome)

            with told.progress:
                seconds = await live_all(lanes, memory, Watch(outcome=outcome), chosen=chosen)
            return summarise(lanes, seconds, rows=None if only is None else sorted(told.packs))
        finally:
            memory.close()
    finally:
        await release(model)


def finished(memory: Memory, agent: str) -> set[tuple[str, int]]:
    """The (run, position) pairs that need nothing more."""
    query = (
        "SELECT r.name, t.position FROM tasks t JOIN runs r ON r.id = t.run_id "
        "WHERE r.agent = ? AND t.state IN ('updated', 'closed')"
    )
    return memory.read_sync(lambda conn: {(name, position) for name, position in conn.execute(query, (agent,))})


def _summary(found: Evaluation, told: _Told, plan: Plan, db: Path) -> None:
    from cod_agent.evaluation.words import losses

    if told.lived:
        say(f"({counted(told.lived, 'task')} had been lived before)")
    say("")
    for table in by_position(found, console().width):
        console().print(table)
    kept = f", {found.kept} refused" if found.kept else ""
    kept += f", {found.held} held back" if found.held else ""
    say(
        f"{found.amount} lived in {found.seconds:.1f} s: "
        f"mean reward {found.main.overall}, {found.calls} calls, {found.written} contexts written{kept}."
    )
    if told.lost:
        say(losses(told.lost, len(told.tasks)))
    if told.malformed:
        share = f"{told.malformed} of {counted(len(told.tasks), 'task')}"
        say(f"{share} ended with an answer that said nothing the world understands (malformed).")
    say(f"All of it is in {db}. Look at the contexts: {command_line('cod', 'context', 'log', db)}")
    if found.held:
        say(f"Decide about what is held back: {command_line('cod', 'context', 'review', db)}")
    if left := _unfinished(db):
        go_on = command_line("cod", "run", "--resume", "--run", left[0], "--db", db)
        say(f"{len(left)} other runs in it stand unfinished; to go on with the first: {go_on}")


def _unfinished(db: Path) -> list[str]:
    """Runs of the file with a task that something is still to be done with."""
    from cod_agent.memory.readonly import look

    query = (
        "SELECT DISTINCT r.name FROM tasks t JOIN runs r ON r.id = t.run_id WHERE t.state IN ('open', 'judged') "
        "OR (r.length IS NOT NULL AND r.length > (SELECT count(*) FROM tasks l WHERE l.run_id = r.id)) ORDER BY r.id"
    )
    with look(db) as conn:
        return [row[0] for row in conn.execute(query)]
