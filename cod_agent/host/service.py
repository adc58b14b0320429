"""The service without HTTP: many agents, one memory, one model; each run's tasks one after the other, the agents side by side.

What was accepted is on disk before the client hears of it (`inbox`), and is lived exactly once, whatever ends the process: `open` finds
what was left and goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from cod_agent.agent import CoDAgent
from cod_agent.budget import Budget
from cod_agent.errors import CodError, ModelError, ModelGarbled, ModelRefused
from cod_agent.events import TaskEnded
from cod_agent.host import inbox, schema, views
from cod_agent.host.errors import Busy, Draining, Invalid, StillUnderWay, said_of
from cod_agent.host.events import Hub
from cod_agent.host.lines import Job, Line
from cod_agent.host.settings import Settings, secrets_of
from cod_agent.host.setup import kept_of, set_up
from cod_agent.journal.tap import Tap
from cod_agent.memory import Memory, read, runs, versions
from cod_agent.memory.readonly import look
from cod_agent.tasks import Feedback, Outcome, Task

log = logging.getLogger("cod_agent.host")
T = TypeVar("T")
FRESH = 1.0
"""Seconds that a look at the database's health holds."""


class Service:
    """Open between `open` and `aclose`, in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.hub, self.draining = settings, Hub(), False
        self._budget, self._run_budget = (
            Budget.parse(limits) if limits else None for limits in (settings.budget, settings.run_budget)
        )
        self.trouble = ""
        """The kind of error the model last had instead of an answer."""
        self._agents: OrderedDict[str, CoDAgent] = OrderedDict()
        self._lines: dict[tuple[str, str], Line] = {}
        self._at_work: Counter[str] = Counter()
        """Lines of each agent that has any."""
        self._load: Counter[str] = Counter()
        self._opening = asyncio.Lock()
        self._health = (0.0, "")

    async def open(self) -> int:
        """Open memory and model, and go on with what was left. Returns how many tasks and updates that is.

        Raises:
            StoreError, UnknownName, UsageError, MissingExtra: see `Memory.open` and `set_up`.
        """
        self.memory = Memory.open(self.settings.memory)
        try:
            self.world, self.model = set_up(self.settings)
            self._tap = Tap(secrets_of(self.settings).beside(getattr(self.model, "secrets", {})))
        except BaseException:
            self.memory.close()
            raise
        await self.memory.write(inbox.make)
        left = await self.memory.read(lambda conn: inbox.unfinished(conn, self._world_name))
        for one in left:
            job = Job(one.position, one.task, one.feedback)
            self._line(one.agent, one.run).add(job)
        if left:
            log.info("going on with %d tasks and updates that were left", len(left))
        return len(left)

    @property
    def _world_name(self) -> str | None:
        return self.world.name if self.world else None

    # ---- what clients ask for ----

    async def submit(self, agent: str, asked: schema.NewTask, key: str | None) -> Outcome | inbox.Kept:
        """Accept a task; its outcome, or, where the client does not wait, where it stands.

        Raises:
            Draining, Busy, Invalid, StillUnderWay: see `cod_agent.host.errors`.
            CodError: whatever keeps the task from being lived; it goes on being tried.
        """
        self._refuse_draining()
        # Redacted before it is kept: nobody can give it again as it was, so that the world gets it like this, too.
        task = Task.model_construct(**self._tap.value({"id": asked.id, "prompt": asked.prompt, "data": asked.data}))
        self._fits(task)
        with self._joining(agent, asked.run) as line:
            kept = await self.memory.write(
                lambda conn: inbox.accept(
                    conn, agent, asked.run, task, environment=self._world_name, position=asked.position, key=key
                )
            )
            job = line.find(kept.position)
            if job is None and kept.state in ("queued", "open", "judged"):
                job = line.add(Job(kept.position, task))
        if not asked.wait:
            return kept
        if job is None:
            return await self._outcome(agent, asked.run, kept.position)
        self._refuse_draining()
        return await self._patiently(job)

    async def feedback(self, agent: str, run: str, position: int, said: schema.NewFeedback) -> Outcome:
        """Judge a solved task; its outcome with the update.

        Raises:
            UnknownName, UsageError: see `CoDAgent.feedback`; and those of `submit`.
        """
        self._refuse_draining()
        found = await self.memory.read(lambda conn: runs.find_run(conn, agent, run))
        await self.memory.read(lambda conn: read.position(conn, found, position))
        given = Feedback(reward=said.reward, text=self._tap.text(said.text))
        with self._joining(agent, run) as line:
            job = line.find(position, given) or line.add(Job(position, None, given, recorded=False))
        return await self._patiently(job)

    async def abandon(self, agent: str, run: str) -> list[int]:
        """Give up what stands unfinished in a run, a task or else an update, so that the next task can be solved. Returns its position,
        if there is one.

        Raises:
            UnknownName: no such agent or run.
        """
        self._refuse_draining()
        found = await self.memory.read(lambda conn: runs.find_run(conn, agent, run))
        line = self._lines.get((agent, run))
        if line is not None:
            await line.stop()
        try:
            left = await self.memory.read(lambda conn: read.in_state(conn, found, "open"))
            left = left or (await self.memory.read(lambda conn: read.due(conn, found)))[:1]
            given_up = [one.position for one in left]
            if given_up:
                await (await self._agent(agent)).abandon(run=run)
            for position in given_up:
                outcome = await self._outcome(agent, run, position)
                job = line.find(position) if line else None
                if line is not None and job is not None:
                    line.remove(job)
                    job.attempt.set_result(outcome)
                self.hub.tell(agent, TaskEnded(run, position, outcome))
        finally:
            if line is not None and self._lines.get((agent, run)) is line:
                line.start()
        return given_up

    async def decide(self, agent: str, run: str, said: schema.NewDecision) -> schema.Decided:
        """Accept or refuse a version that is held back, or go back to an older one, between two tasks of the run.

        Raises:
            UnknownName, UsageError: see `cod_agent.trust.review.Review`.
            StillUnderWay: the task under way takes longer than a request waits; ask again.
        """
        self._refuse_draining()
        found = await self.memory.read(lambda conn: runs.find_run(conn, agent, run))
        review = (await self._agent(agent)).review(run=run)
        try:
            async with asyncio.timeout(self.settings.patience):
                if said.decision == "accept":
                    await review.accept(said.version, why=said.why, force=said.force)
                elif said.decision == "refuse":
                    await review.refuse(said.version, why=said.why)
                else:
                    await review.rollback(said.version, why=said.why)
        except TimeoutError:
            raise StillUnderWay(
                f"a task of run {run!r} is under way for more than {self.settings.patience:g} s, and a decision waits for its end: ask "
                "again"
            ) from None
        head = await self.memory.read(lambda conn: versions.latest(conn, found.id))
        return schema.Decided(agent=agent, run=run, version=head.version)

    def look(self, view: Callable[..., T], *given: Any) -> T:
        """What `views` show; in a thread of its own, as it may take its time."""
        with look(self.memory.path) as conn:
            return view(conn, *given)

    def place(self, agent: str, run: str, position: int) -> schema.Place:
        """Where a task stands. Raises: UnknownName."""
        found = self.look(views.place, agent, run, position)
        line = self._lines.get((agent, run))
        for job in list(line or ()):
            if job.position == position and job.trouble is not None:
                kind, message = said_of(job.trouble)
                return found.model_copy(update={"trouble": schema.Trouble(type=kind, message=message)})
        return found

    def waiting(self, agent: str, run: str) -> int:
        """Tasks and feedback in a run's line."""
        return len(self._lines.get((agent, run), ()))

    async def ready(self) -> schema.Ready:
        """Whether it is worth sending a task here."""
        if time.monotonic() - self._health[0] > FRESH:
            try:
                await self.memory.write(inbox.writable)
                self._health = (time.monotonic(), "")
            except CodError as error:
                self._health = (time.monotonic(), type(error).__name__)
        database = self._health[1]
        return schema.Ready(
            ready=not (self.draining or database or self.trouble),
            draining=self.draining,
            database=database or "ok",
            model=self.trouble or "ok",
            agents=len(self._agents),
            waiting=self._load["waiting"],
        )

    # ---- ending ----

    async def drain(self, seconds: float) -> int:
        """Begin nothing more and let what is under way finish; what takes longer is cut off, and goes on at the next start.

        Returns how many were cut off.
        """
        self.draining = True
        for line in list(self._lines.values()):
            line.drain()
        working = [line.ended for line in self._lines.values() if line.ended and not line.ended.done()]
        cut: set[Any] = set()
        if working:
            _, cut = await asyncio.wait(working, timeout=seconds)
        for line in list(self._lines.values()):
            await line.stop()
            for job in line:
                job.failed(Draining("the service stops; the task goes on when it runs again"))
        self.hub.close()
        return len(cut)

    async def aclose(self) -> None:
        """Give up the leases, close memory and model. `drain` comes first."""
        await asyncio.gather(*(agent.aclose() for agent in self._agents.values()))
        if hasattr(self.model, "aclose"):
            await self.model.aclose()
        if hasattr(self.model, "close"):
            self.model.close()
        self.memory.close()

    # ---- inside ----

    async def _do(self, line: Line, job: Job) -> Outcome:
        agent = await self._agent(line.agent)
        # Only while anybody listens: whoever watches has the model stream its answers.
        agent.watch = partial(self.hub.tell, line.agent) if len(self.hub) else None
        try:
            if job.feedback is not None:
                outcome = await agent.feedback(job.position, job.feedback.reward, job.feedback.text, run=line.run)
            else:
                outcome = await agent.solve(job.task, run=line.run, position=job.position)  # type: ignore[arg-type]
        except ModelError as error:
            job.recorded = True  # the model is asked after the feedback is on record
            if not _about_request(error):
                self.trouble = type(error).__name__
            raise
        self.trouble = ""
        return outcome

    async def _patiently(self, job: Job) -> Outcome:
        try:
            async with asyncio.timeout(self.settings.patience):
                return await asyncio.shield(job.attempt)
        except TimeoutError:
            raise StillUnderWay(
                f"position {job.position} is not done after {self.settings.patience:g} s, and goes on: look at it, or ask again "
                "with the same position"
            ) from None

    async def _outcome(self, agent: str, run: str, position: int) -> Outcome:
        def find(conn: Any) -> Outcome:
            return read.outcome(conn, runs.find_run(conn, agent, run), position)

        return await self.memory.read(find)

    def _refuse_draining(self) -> None:
        if self.draining:
            raise Draining("the service is about to stop: ask again when it runs again, or ask another one")

    def _fits(self, task: Task) -> None:
        """Raises: Invalid, where the world cannot make anything of the task, before it stands in the run for ever."""
        if self.world is None:
            return
        try:
            self.world.start(task)
        except CodError as error:
            raise Invalid(str(error)) from None
        except Exception as error:
            raise Invalid(f"{self.world.name} cannot make anything of this task: {type(error).__name__}") from error

    @contextmanager
    def _joining(self, agent: str, run: str) -> Iterator[Line]:
        """The run's line, with a place in it for one more.

        Raises:
            Busy: it is full, or all are, or too many agents are at work.
        """
        known = self._lines.get((agent, run))
        if known is not None and len(known) >= self.settings.queue:
            raise Busy(f"{len(known)} tasks wait for run {run!r} of agent {agent!r}, as many as may: come back later")
        if self._load["waiting"] >= self.settings.queue_all:
            raise Busy(f"{self.settings.queue_all} tasks wait in this service, as many as may: come back later")
        if not self._at_work.get(agent) and len(self._at_work) >= self.settings.max_agents:
            raise Busy(f"{self.settings.max_agents} agents are at work, as many as may be: come back later")
        line = known or self._line(agent, run)
        with line.entered():
            yield line

    def _line(self, agent: str, run: str) -> Line:
        line = self._lines.get((agent, run))
        if line is None:
            line = self._lines[agent, run] = Line(agent, run, self._do, self._over, self._load)
            self._at_work[agent] += 1
        return line

    def _over(self, line: Line) -> None:
        if self._lines.pop((line.agent, line.run), None) is not None:
            self._at_work[line.agent] -= 1
            if not self._at_work[line.agent]:
                del self._at_work[line.agent]

    async def _agent(self, name: str) -> CoDAgent:
        if name not in self._agents:
            async with self._opening:  # whoever gives up its leases does so before it is opened again
                await self._make_room()
                self._agents.setdefault(name, self._made(name))
        self._agents.move_to_end(name)
        return self._agents[name]

    async def _make_room(self) -> None:
        """Close agents that have had nothing to do for longest."""
        while len(self._agents) >= self.settings.max_agents:
            idle = next((name for name in self._agents if name not in self._at_work), None)
            if idle is None:
                return
            await self._agents.pop(idle).aclose()

    def _made(self, name: str) -> CoDAgent:
        return CoDAgent(
            name,
            model=self.model,
            memory=self.memory,
            environment=self.world,
            max_context=self.settings.max_context,
            updates=self.settings.updates,
            budget=self._budget,
            run_budget=self._run_budget,
            gate=self.settings.gate,
            redact=self._tap.redact,
            settings={inbox.MARK: kept_of(self.settings)},
        )


def _about_request(error: ModelError) -> bool:
    """Whether another request may well be answered: this one was too long, say, or its answer none."""
    refused = isinstance(error, ModelRefused) and error.status not in (401, 403, 404)
    return refused or isinstance(error, ModelGarbled)
