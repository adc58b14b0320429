"""A line is the queue of one run: its tasks and feedback, one after the other, each tried until it is done.

Feedback goes before tasks, because the next task should start from the context it leads to. What failed stays in front: whoever waits
for it is told at once, and it is tried again, later and later, or as soon as a client asks for it again.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import insort
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cod_agent.errors import CodError, UsageError
from cod_agent.host.errors import Draining
from cod_agent.tasks import Feedback, Outcome, Task

log = logging.getLogger("cod_agent.host")

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two attempts."""


@dataclass(slots=True, eq=False)
class Job:
    """A task to be solved, or, with feedback, to be judged."""

    position: int
    task: Task | None
    feedback: Feedback | None = None
    attempt: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """What whoever waits now is told; a new one after each failure."""
    trouble: Exception | None = None
    recorded: bool = True
    """Whether the file knows of it, so that it goes on after a crash; feedback that cannot be recorded is not tried again."""

    def failed(self, error: Exception) -> None:
        """Tell those who wait."""
        self.trouble = error
        if not self.attempt.done():
            self.attempt.set_exception(error)
            self.attempt.exception()  # nobody has to wait for it
        self.attempt = asyncio.get_running_loop().create_future()


Do = Callable[["Line", Job], Awaitable[Outcome]]


class Line:
    """The queue of one run, with the task that works on it while there is something to do."""

    def __init__(self, agent: str, run: str, do: Do, over: Callable[[Line], None], load: Counter[str]) -> None:
        self.agent, self.run = agent, run
        self.judging: list[Job] = []
        self.solving: list[Job] = []
        """By position."""
        self.current: Job | None = None
        self.draining = False
        self._do, self._over, self._load = do, over, load
        self._entering = 0
        self._worker: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def __iter__(self) -> Iterator[Job]:
        yield from self.judging
        yield from self.solving

    def __len__(self) -> int:
        return len(self.judging) + len(self.solving) + self._entering

    @property
    def ended(self) -> asyncio.Task[None] | None:
        """The worker; done when the line is empty, or drained."""
        return self._worker

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A place for a job that is being put on record."""
        self._entering += 1
        self._load["waiting"] += 1
        try:
            yield
        finally:
            self._entering -= 1
            self._load["waiting"] -= 1
            if not len(self):
                self._over(self)

    def find(self, position: int, feedback: Feedback | None = None) -> Job | None:
        """The job of that position: asked for again, it is tried again at once."""
        for job in self.judging if feedback else self.solving:
            if job.position == position and job.feedback == feedback:
                self._wake.set()
                return job
        return None

    def add(self, job: Job) -> Job:
        """Behind those that are there, but in order."""
        if job.feedback is not None:
            self.judging.append(job)
        else:
            insort(self.solving, job, key=lambda one: one.position)
        self._load["waiting"] += 1
        self.start()
        return job

    def start(self) -> None:
        """Work, unless it does already."""
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Cut off what is under way; `start` goes on with it."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    def drain(self) -> None:
        """Begin nothing more; those who wait for what is not begun are told so."""
        self.draining = True
        self._wake.set()
        for job in self:
            if job is not self.current:
                job.failed(Draining("the service is about to stop; what it accepted goes on when it runs again"))

    def remove(self, job: Job) -> None:
        queue = self.judging if job.feedback is not None else self.solving
        if job in queue:
            queue.remove(job)
            self._load["waiting"] -= 1

    async def _work(self) -> None:
        pause = FIRST_PAUSE
        try:
            while (self.judging or self.solving) and not self.draining:
                self.current = job = next(iter(self))
                self._wake.clear()
                try:
                    outcome = await self._do(self, job)
                except Exception as error:
                    self.current = None
                    self._failed(job, error)
                    if job.recorded and not self.draining:
                        await self._rest(pause)
                        pause = min(2 * pause, LONGEST_PAUSE)
                else:
                    self.current, pause = None, FIRST_PAUSE
                    self.remove(job)
                    if not job.attempt.done():
                        job.attempt.set_result(outcome)
        finally:
            self.current = None
            if not len(self):
                self._over(self)

    def _failed(self, job: Job, error: Exception) -> None:
        where = f"{self.agent} {self.run}/{job.position}"
        if isinstance(error, UsageError) and not job.recorded:  # the client's mistake, who hears of it
            log.debug("%s: %s", where, error)
        elif isinstance(error, CodError):
            log.warning("%s: %s: %s", where, type(error).__name__, error)
        else:
            log.error("%s: %s: %s", where, type(error).__name__, error, exc_info=error)
        if not job.recorded:
            self.remove(job)
        job.failed(error)

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass
