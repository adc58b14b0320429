"""One task of one run, brought as far as it can go now: solve, judge, update, each a transaction.

`Lifecycle.live` reads where the position stands and does what comes next; after a crash it is the same code that goes on. What an
episode does inside is in its journal. A policy's failure (a malformed answer, a bad update) is data; an exception that leaves here
leaves the task where it stood, to be resumed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cod_agent.budget import Limits
from cod_agent.completions import Completion
from cod_agent.context import Message, Prompts, Trajectory, UpdateRefused, parse_update, prompts_for
from cod_agent.environments.base import Environment, Session, Tool, started, tools_of
from cod_agent.errors import BudgetSpent, UsageError
from cod_agent.events import (
    Answered,
    ContextHeld,
    ContextKept,
    ContextWritten,
    Delta,
    Event,
    Judged,
    Observed,
    Solved,
    TaskBegun,
    TaskEnded,
)
from cod_agent.journal.boundary import Aborted, Boundary
from cod_agent.journal.episode import Episode
from cod_agent.journal.pieces import Pieces
from cod_agent.journal.tap import Redact, Tap
from cod_agent.memory import read, runs, versions
from cod_agent.memory.database import Memory
from cod_agent.models.base import Model
from cod_agent.solvers.base import Solver
from cod_agent.solvers.text import TextSolver
from cod_agent.solvers.tools import ToolSolver
from cod_agent.tasks import Feedback, Outcome, Task
from cod_agent.trust.blame import Line, blame, encode, follow, read_by
from cod_agent.trust.write_gate import OPEN_GATE, Proposal, WriteGate

Emit = Callable[[Event], None]
Give = Callable[[str, int], str | Awaitable[str]]
"""(run, position) -> the context to solve the task there with, from somewhere else than the run's own updates."""
NAN = float("nan")


@dataclass(frozen=True, slots=True)
class Ways:
    """How an agent does things: what `CoDAgent` was given."""

    memory: Memory
    model: Model | None
    solver: Solver | None
    tools: Sequence[Tool]
    prompts: Prompts | None
    max_context: int
    updates: bool
    redact: Redact | None
    on_doubt: Callable[[str, Any], str | Awaitable[str]] | None
    given: Give | None = None
    limits: Limits | None = None
    gate: WriteGate = OPEN_GATE


@dataclass(frozen=True, slots=True)
class _Update:
    """An update episode that is due."""

    episode_id: int
    before: versions.Context
    lines: tuple[Line, ...]
    """Of `before`."""
    trajectory: Trajectory
    fresh: bool


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """The lives of a run's tasks. `emit`, if any, is told what happens."""

    ways: Ways
    run: runs.Run
    environment: Environment | None
    emit: Emit | None = None

    async def live(self, position: int, task: Task) -> Outcome:
        """Everything that can happen now with the task at `position`.

        Raises:
            TaskMismatch: another task stands there.
        """
        memory, given, task = self.ways.memory, task, self._cleaned(task)
        handed = await self._handed(position)
        known, before = await memory.write(lambda conn: runs.begin_task(conn, self.run, position, task, handed))
        due: _Update | None = None
        if known.state == "open":
            self._tell(TaskBegun(self.run.name, position, task, before.body, before.version))
            known, due = await self._solve(known, before, given)
        elif known.state == "judged":
            known, due = await memory.write(lambda conn: self._proceed(conn, position))
        if due is not None:
            await self._update(known, due)
        outcome = await memory.read(lambda conn: read.outcome(conn, self.run, position))
        self._tell(TaskEnded(self.run.name, position, outcome))
        return outcome

    def abort(self, conn: sqlite3.Connection, known: runs.Lived, reason: str) -> None:
        """Inside a transaction: give a task up, its reward lost."""
        runs.solved(conn, self.run, known, "", state="aborted", reason=reason)
        runs.judged(conn, self.run, known, Feedback(reward=NAN, text=reason))
        runs.closed(conn, self.run, known)

    def keep(self, conn: sqlite3.Connection, known: runs.Lived, reason: str) -> None:
        """Inside a transaction: give up an update that is due; the last good context stays."""
        latest = versions.latest(conn, self.run.id)
        episode_id, _ = runs.begin_episode(conn, self.run.id, known.position, "update", latest.id)
        runs.kept(conn, self.run, known, episode_id, reason)

    async def _handed(self, position: int) -> versions.Given | None:
        """The context that is given to a task which was not begun yet; one that was has it on record."""
        give = self.ways.given
        if give is None or await self.ways.memory.read(
            lambda conn: runs.lived(conn, self.run.id, position) is not None
        ):
            return None
        said = give(self.run.name, position)
        body = await said if isinstance(said, Awaitable) else said
        if not isinstance(body, str):
            raise UsageError(f"given(run, position) is the text of a context, not {type(body).__name__} {body!r:.60}")
        body = self.ways.redact(body) if self.ways.redact else body
        return versions.Given(body, str(getattr(give, "name", "given")))

    # ---- solve ----

    def _cleaned(self, task: Task) -> Task:
        """As it may be stored and shown to the solver. The environment, which made it, gets it as it is."""
        if self.ways.redact is None:
            return task
        return Task.model_validate(Tap(self.ways.redact).value(task.model_dump()))

    async def _session(self, position: int, task: Task) -> Session | None:
        if self.environment is None:
            return None
        remembers = getattr(self.environment, "remembers", False)
        before = await self.ways.memory.read(lambda conn: read.carried(conn, self.run, position)) if remembers else None
        return started(self.environment, task, before)

    async def _solve(
        self, known: runs.Lived, before: versions.Context, given: Task
    ) -> tuple[runs.Lived, _Update | None]:
        ways, position = self.ways, known.position
        episode = await self._episode(int(known.solve_id or 0), known.fresh)
        session = await self._session(position, given)
        tools = Boundary(
            episode,
            session,
            getattr(self.environment, "recovery", "deterministic"),
            (*ways.tools, *tools_of(session)),
            ask=self._asking("solve", position),
            exchange=getattr(ways.model, "exchange", None),
            saw=lambda seen: self._tell(Observed(self.run.name, position, seen)),
            decide=ways.on_doubt,
        )
        prompts = ways.prompts or prompts_for(self.environment)
        solver = ways.solver or (ToolSolver(prompts) if len(tools) else TextSolver(prompts))
        with episode:
            try:
                async with episode.timed():
                    answer = await _solved(solver, known.task, before.body, tools)
            except BudgetSpent:
                if episode.spent is None:
                    raise
        spent = episode.spent
        lost = str(spent) if spent is not None and spent.what == "seconds" else tools.aborted
        if lost:
            await ways.memory.write(episode.commit(lambda conn: self.abort(conn, known, lost)))
            return known, None
        episode.finish()
        answer, feedback = "" if spent else episode.tap.text(answer), _judgement(tools, spent)

        def commit(conn: sqlite3.Connection) -> tuple[runs.Lived, _Update | None]:
            runs.solved(conn, self.run, known, answer, reason=str(spent or ""))
            if feedback is not None:
                runs.judged(conn, self.run, known, feedback)
            return self._proceed(conn, position)

        then = await ways.memory.write(episode.commit(commit))
        self._tell(Solved(self.run.name, position, answer))
        if feedback is not None:
            self._tell(Judged(self.run.name, position, feedback))
        return then

    def _proceed(self, conn: sqlite3.Connection, position: int) -> tuple[runs.Lived, _Update | None]:
        """Inside a transaction: what a judged task needs next is begun."""
        known = read.position(conn, self.run, position)
        if known.state != "judged":
            return known, None
        if not self._wants_update(known):
            runs.closed(conn, self.run, known)
            return known, None
        latest = versions.latest(conn, self.run.id)
        episode_id, fresh = runs.begin_episode(conn, self.run.id, position, "update", latest.id)
        before = latest if fresh else versions.started_from(conn, episode_id)
        trajectory = read.trajectory(conn, int(known.solve_id or 0), known)
        return known, _Update(episode_id, before, blame(conn, before.id), trajectory, fresh)

    def _wants_update(self, known: runs.Lived) -> bool:
        reward = known.feedback.reward if known.feedback else None
        lost = reward is not None and reward != reward
        return self.ways.updates and not lost and (self.run.length is None or known.position < self.run.length - 1)

    # ---- update ----

    async def _update(self, known: runs.Lived, due: _Update) -> None:
        ways, position = self.ways, known.position
        episode = await self._episode(due.episode_id, due.fresh)
        prompts = ways.prompts or prompts_for(self.environment)
        messages = prompts.update(known.task, due.before.body, due.trajectory, known.feedback or Feedback())
        with episode:
            try:
                async with episode.timed():
                    completion = await self._asking("update", position)(messages)
            except BudgetSpent:
                if episode.spent is None:
                    raise
        episode.finish()
        try:
            if episode.spent is not None:
                raise UpdateRefused(str(episode.spent))
            if completion.finish_reason == "length":
                raise UpdateRefused("cut off: the answer reached its longest length")
            body = parse_update(completion.text, ways.max_context)
        except UpdateRefused as refused:
            await self._keep(known, due, str(refused))
            return
        proposal = self._proposal(known, due, messages, body)
        tap = Tap(ways.redact)  # a judge may have words of its own
        verdict = await ways.gate.decide(proposal)
        if verdict.outcome == "refused":
            await self._keep(known, due, tap.text(verdict.reason))
            return
        origins = sorted({part.origin for said in messages for part in said.parts} - {"framework"})
        source = {"position": position, "version": due.before.version, "origins": origins}
        source |= {"lines": encode(proposal.lines)}
        source |= {"findings": tap.value(verdict.json())} if verdict.findings else {}
        reason = tap.text(verdict.reason)
        written = await ways.memory.write(
            lambda conn: runs.updated(conn, self.run, known, due.episode_id, body, [source], reason)
        )
        said = (self.run.name, position, written.body, written.version)
        self._tell(ContextHeld(*said, reason) if verdict.outcome == "held" else ContextWritten(*said))

    async def _keep(self, known: runs.Lived, due: _Update, reason: str) -> None:
        """The last good context stays."""
        await self.ways.memory.write(lambda conn: runs.kept(conn, self.run, known, due.episode_id, reason))
        self._tell(ContextKept(self.run.name, known.position, reason))

    def _proposal(self, known: runs.Lived, due: _Update, messages: Sequence[Message], body: str) -> Proposal:
        """What an update wrote, with where each of its lines is from."""
        read_of = read_by(messages)
        lines = follow(due.lines, body, known.position, read_of)
        return Proposal(self.run.agent, self.run.name, known.position, due.before.body, body, lines, read_of)

    # ---- both ----

    async def _episode(self, episode_id: int, fresh: bool) -> Episode:
        """An episode's journal, with what it recorded before and what it may still spend."""
        ways, limits = self.ways, self.ways.limits
        episode = Episode(ways.memory, self.run.id, episode_id, ways.redact)
        if not fresh:
            await episode.load()
        if limits is not None:
            episode.meter = await ways.memory.read(lambda conn: limits.meter(conn, self.run.id, episode_id))
        return episode

    def _asking(self, kind: Literal["solve", "update"], position: int) -> Callable[[Sequence[Message]], Any]:
        async def ask(messages: Sequence[Message]) -> Completion:
            if self.ways.model is None:
                raise UsageError(
                    "this agent has no model to ask: give CoDAgent(model=...), or updates=False with a solver of your own"
                )
            pieces = Pieces(self.ways.redact, lambda text: self._tell(Delta(self.run.name, position, text)))
            completion = await self.ways.model.complete(messages, on_delta=self.emit and pieces.add)
            pieces.end()
            if not isinstance(completion, Completion):
                what = type(completion).__name__
                raise UsageError(
                    f"the model {self.ways.model.name} answered with {what}: complete() gives a Completion"
                )
            if not isinstance(completion.text, str):
                what = type(completion.text).__name__
                raise UsageError(
                    f'the model {self.ways.model.name} answered with a text that is {what}: give a str, "" for none'
                )
            # A model of somebody else's may have gone past the journal.
            completion = replace(completion, text=Tap(self.ways.redact).text(completion.text))
            self._tell(Answered(self.run.name, position, kind, completion.text))
            return completion

        return ask

    def _tell(self, event: Event) -> None:
        if self.emit is not None:
            self.emit(event)


def _judgement(tools: Boundary, spent: BudgetSpent | None) -> Feedback | None:
    """What the environment says; a solver that left before the end has failed, which is data like any other failure."""
    if tools.last is not None and tools.last.done:
        return tools.last.feedback
    if spent is not None and tools.in_environment:
        return Feedback(reward=0.0, text=f"{spent} before the end", ending=f"budget-{spent.what}")
    if tools.last is None:
        return None
    return Feedback(reward=0.0, text="the solver stopped before the end")


async def _solved(solver: Solver, task: Task, context: str, tools: Boundary) -> str:
    """The solver's answer. One that did not live the environment's episode to its end itself has its answer taken as a step."""
    try:
        given: Any = solver(task, context, tools)
        given = await given if isinstance(given, Awaitable) else given
        answer = "" if given is None else str(given)
        if tools.in_environment and not tools.aborted:
            seen = tools.last or await tools.observe()
            if not seen.done:
                await tools.act(answer)
        return answer
    except Aborted:
        return ""
