"""`CoDAgent`: lives in an environment, solves task after task, and rewrites its context after each.

    solve -> feedback -> update -> commit, and again

The agent itself holds no state that matters. Every step is a transaction in the run database (`cod_agent.memory.runs`), every
call inside a step is in the journal (`cod_agent.journal`), and living a run means reading where it stands and doing what comes
next. Starting over after kill -9 is therefore the same code as starting.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cod_agent.budget import Budget, Limits
from cod_agent.context import Prompts
from cod_agent.environments.base import Environment, Tool
from cod_agent.errors import TaskMismatch, UsageError
from cod_agent.events import Event, Judged
from cod_agent.journal.boundary import secrets_of
from cod_agent.journal.tap import Redact, Tap
from cod_agent.lifecycle import Emit, Give, Lifecycle, Ways
from cod_agent.memory import read, runs
from cod_agent.memory.database import Memory
from cod_agent.models.base import Model
from cod_agent.secrets import Secrets
from cod_agent.solvers.base import Solver
from cod_agent.tasks import Feedback, Outcome, Pack, Task
from cod_agent.tenancy import Tenancy
from cod_agent.trust.review import Review
from cod_agent.trust.write_gate import OPEN_GATE, WriteGate, gate_of
from cod_agent.twins import SyncTwins

if TYPE_CHECKING:
    from cod_agent.forgetting import Forgotten

T = TypeVar("T")
INFINITE = float("inf")
LIFE = "life"
"""The run that tasks belong to when nothing else is said: an open-ended one."""


class CoDAgent(SyncTwins):
    """An agent with a name, a memory and a context that it rewrites after every task.

    Args:
        name: who it is, in the memory.
        model: a name such as "openai:Qwen/Qwen3-8B" or "embedded" (see `cod_agent.models`), or any `Model`. May be left out if the
            solver has its own and no update is wanted.
        memory: the run database: a path, or a `Memory` shared with other agents of this process.
        environment: what tasks that come without one act on.
        solver: `async (task, context, tools) -> answer`; by default a text dialogue with the environment.
        tools: functions the solver may call, beside those of the environment.
        prompts: how the context is shown and a new one asked for; by default what fits the environment.
        max_context: longest context, in characters; a longer one is refused.
        updates: False gives every solve episode the empty context and writes none (the control "no-context").
        given: `given(run, position)` -> the text of the context that the task there is solved with, plain or async, instead of one the
            agent wrote; no updates are asked for then. Asked once for each task: the text is kept as a version of the run's context.
        redact: applied to every text before it is sent or stored: by default `Secrets` with the keys of the model and the solver and
            the names that tools declare; None changes nothing.
        gate: what an update has to pass before a task is solved with it: open (the default), quarantine, review, or a `WriteGate`
            (see `cod_agent.trust.write_gate`).
        settings: anything else to keep with its runs (JSON), such as the arguments of the program that lives them.
        budget: what each episode may spend. One that spent it has ended: a solve fails, an update is refused (docs/budgets.md).
        run_budget: what each run may spend in all. One that spent it raises `BudgetSpent`, and goes on when it may spend more.
        on_doubt: decides, plain or async, "repeat" or "fail" for a tool declared `on_crash="ask"` that was running when the process died.
        watch: told everything that happens, as `stream` tells it, whichever method it happens in; quick, and it must not raise. It may
            be set anew between two tasks (`agent.watch = None`). `stream` tells whoever iterates it instead.

    Raises:
        StoreError: the memory cannot be opened.
        UnknownName: no such model.
    """

    def __init__(
        self,
        name: str,
        *,
        model: str | Model | None = None,
        memory: str | Path | Memory,
        environment: Environment | None = None,
        solver: Solver | None = None,
        tools: Sequence[Tool] = (),
        prompts: Prompts | None = None,
        max_context: int = 4000,
        updates: bool = True,
        given: Give | None = None,
        redact: Redact | Literal["secrets"] | None = "secrets",
        gate: WriteGate | str = "open",
        settings: dict[str, Any] | None = None,
        budget: Budget | None = None,
        run_budget: Budget | None = None,
        on_doubt: Callable[[str, Any], str | Awaitable[str]] | None = None,
        watch: Emit | None = None,
    ) -> None:
        if not name:
            raise UsageError("an agent needs a name: it is how its memory is found again")
        for what, given_as in {"budget": budget, "run_budget": run_budget}.items():
            if given_as is not None and not isinstance(given_as, Budget):
                raise UsageError(f"{what} is a Budget, as Budget(calls=40), not {given_as!r:.60}")
        if bad := [one for one in tools if not callable(one)]:
            raise UsageError(f"a tool is a function, not {bad[0]!r:.60}")
        self.name, self.environment, self.watch = name, environment, watch
        updates = updates and given is None
        passed = gate_of(gate)
        self._settings = {"max_context": max_context, "updates": updates, **passed.settings(), **(settings or {})}
        self._model = _resolve(model, environment) if isinstance(model, str) else model
        self._settings |= {"budget": budget.json()} if budget else {}
        self._owns_model = isinstance(model, str)
        self._tap = Tap(_secrets(tools, self._model, solver) if redact == "secrets" else redact)
        self._owns_memory = not isinstance(memory, Memory)
        self.memory = memory if isinstance(memory, Memory) else Memory.open(memory)
        self._ways = Ways(
            self.memory,
            self._model,
            solver,
            tuple(tools),
            prompts,
            max_context,
            updates,
            self._tap.redact,
            on_doubt,
            given,
            gate=passed,
            limits=Limits(budget, run_budget) if budget or run_budget else None,
        )
        self._tenancy = Tenancy(self.memory, name)
        self._current: str | None = None

    # ---- living ----

    async def run(
        self,
        tasks: Pack | Iterable[Task] | AsyncIterable[Task],
        *,
        run: str | None = None,
        fork: tuple[str, int] | None = None,
    ) -> AsyncIterator[Outcome]:
        """Live through a sequence of tasks, yielding an outcome for each.

        The same call goes on where it was, after whatever ended it: positions already lived are read, not lived again.

        Args:
            tasks: a pack (n tasks, n-1 updates) or any sequence, sync or async, without end if you like (an update after each).
            run: its name; by default the pack's id, or "life".
            fork: (run, version): a new run begins with that context instead of the empty one.

        Raises:
            TaskMismatch: another task stands at a position already lived.
            ModelError, StoreError, ReplayDiverged, ToolInDoubt, BudgetSpent: see `cod_agent.errors`; the run can be resumed.
        """
        async for outcome in self._live(tasks, run, fork, None):
            yield outcome

    async def stream(
        self,
        tasks: Pack | Iterable[Task] | AsyncIterable[Task],
        *,
        run: str | None = None,
        fork: tuple[str, int] | None = None,
    ) -> AsyncIterator[Event]:
        """`run`, with everything that happens on the way as typed events (`cod_agent.events`)."""
        happened: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        async def live() -> None:
            try:
                async for _ in self._live(tasks, run, fork, happened.put_nowait):
                    pass
                happened.put_nowait(None)
            except BaseException as error:
                happened.put_nowait(error)
                if isinstance(error, asyncio.CancelledError):
                    raise

        living = asyncio.create_task(live())
        try:
            while (event := await happened.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            living.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await living

    async def solve(self, task: Task, *, run: str = LIFE, position: int | None = None) -> Outcome:
        """Solve one task at the end of an open-ended run; a task that a crash left unfinished there is gone on with.

        Args:
            run: its name.
            position: where the task belongs, for callers that count: asking again for a position that was solved gives its
                outcome. Without it, a caller that died before it saw the outcome and asks again has the task solved twice.

        Raises:
            UsageError: the position is further than the next one.
            TaskMismatch: the unfinished task is another one: solve that first, or `abandon` it.
        """
        if not isinstance(task, Task):
            raise UsageError(f"what is solved is a Task, not {type(task).__name__} {task!r:.60}")
        self._understood(self.environment)
        opened = await self._opened(run, None, None)
        async with self._tenancy.living(opened):
            await self._make_up(opened)
            left = await self.memory.read(lambda conn: read.in_state(conn, opened, "open"))
            following = (
                left[0].position if left else await self.memory.read(lambda conn: runs.next_position(conn, opened.id))
            )
            if position is not None and position > following:
                raise UsageError(f"run {run!r} has not come to position {position} yet: the next one is {following}")
            outcome = await self._lifecycle(opened).live(following if position is None else position, task)
            await self._try_held(opened)
            return outcome

    async def feedback(
        self, outcome: Outcome | int, reward: float | None = None, text: str = "", *, run: str | None = None
    ) -> Outcome:
        """Say how a solved task went, whenever that is known and in any order; the update follows at once.

        Args:
            outcome: what `solve` or `run` returned, or a position.
            reward: usually in [0, 1]; None if there are only words.
            run: the position's run; by default the outcome's, or "life".

        Raises:
            UnknownName: no such run or position.
            UsageError: it is not solved yet, or was judged already with another feedback.
        """
        if isinstance(outcome, Outcome):
            run, position = run or outcome.run, outcome.position
        else:
            run, position = run or LIFE, outcome
        opened = await self._opened(run, None, None, must_exist=True)
        if not isinstance(reward, float | int | None) or not isinstance(text, str) or reward in (INFINITE, -INFINITE):
            raise UsageError(f"feedback is a finite number and words, not {reward!r} and {text!r}")
        if reward is None and not text:
            raise UsageError("feedback says something: a reward, words, or both; it is given once")
        if self._model is None and self._ways.updates:
            raise UsageError(
                "an update follows feedback, and there is no model to write it: give CoDAgent(model=...) or updates=False"
            )
        said = Feedback(reward=reward, text=self._tap.text(text))
        async with self._tenancy.living(opened):
            known = await self.memory.read(lambda conn: read.position(conn, opened, position))
            if known.state == "open":
                raise UsageError(
                    f"position {position} of run {run!r} is not solved yet: feedback comes after the answer"
                )
            if known.state == "solved":
                await self.memory.write(lambda conn: runs.judged(conn, opened, known, said))
                if self.watch is not None:
                    self.watch(Judged(run, position, said))
            elif known.feedback is None or known.feedback.model_dump_json() != said.model_dump_json():
                raise UsageError(f"position {position} of run {run!r} was judged already: feedback is given once")
            await self._make_up(opened)
            return await self.memory.read(lambda conn: read.outcome(conn, opened, position))

    async def _make_up(self, opened: runs.Run) -> None:
        """The updates that are due, one after the other, so that each starts from the newest version."""
        for due in await self.memory.read(lambda conn: read.due(conn, opened)):
            await self._lifecycle(opened).live(due.position, due.task)
            await self._try_held(opened)

    async def _try_held(self, opened: runs.Run, emit: Emit | None = None) -> None:
        """What the gate holds back is tried before the next task, where there is something to try it on."""
        if self._ways.gate.canaries:
            from cod_agent.trust.canary import try_held

            await try_held(self, opened, emit or self.watch)

    def _twin(self, purpose: str, environment: Environment | None) -> CoDAgent:
        """The same agent for runs of another purpose than to live and learn: it writes no contexts, and owns nothing."""
        made = copy.copy(self)
        made._ways = replace(self._ways, updates=False, given=None, gate=OPEN_GATE)
        made._settings = {**self._settings, "updates": False, "purpose": purpose}
        made._owns_model = made._owns_memory = False
        made._tenancy = Tenancy(self.memory, self.name)
        made._current, made.watch, made.environment = None, None, environment
        return made

    async def abandon(self, *, run: str = LIFE, reason: str = "abandoned") -> None:
        """Give up what stands unfinished in a run, so that another task can be solved: the task at its end, or else the first update
        that is due, which a model may refuse for good; the last good context stays."""
        opened, reason = await self._opened(run, None, None, must_exist=True), self._tap.text(reason)
        async with self._tenancy.lock(run):
            life = self._lifecycle(opened)
            left = await self.memory.read(lambda conn: read.in_state(conn, opened, "open"))
            for known in left or (await self.memory.read(lambda conn: read.due(conn, opened)))[:1]:
                await self.memory.write(partial(life.abort if left else life.keep, known=known, reason=reason))

    async def forget(
        self,
        task: str | int | None = None,
        *,
        run: str | None = None,
        reason: str = "",
        quoting: Sequence[str] = (),
        vacuum: bool = True,
    ) -> Forgotten:
        """Take everything descended from a bad task out of the memory, and learn what remains again (see `cod_agent.forgetting`).

        Args:
            task: its id, wherever this agent lived it, or a position of one run; None: only what `quoting` says.
            run: the run; by default every one that has a task of that id, or "life" for a position.
            reason: kept in the commits, in words that may stay.
            quoting: texts that go wherever they stand in the file, whatever they are descended from.
            vacuum: write the file anew, so that nothing is left in its free room either; other writers wait meanwhile.

        Raises:
            UnknownName: no such task, run or position.
            RunLeased: another process lives a run that is reached; nothing was changed.
            ModelError, StoreError: what stopped the updates that are made again; the same call goes on.
        """
        from cod_agent.forgetting import forget

        return await forget(self, task, run, reason, quoting, vacuum)

    def review(self, *, run: str = LIFE) -> Review:
        """The decisions about what the write gate holds back in a run, and the way back to an older version."""
        return Review(self, run)

    @property
    def context(self) -> str:
        """The newest context in force of the run lived last ("" before the first update)."""
        return self.memory.read_sync(lambda conn: read.newest_body(conn, self.name, self._current))

    # ---- ending ----

    async def _release_model(self) -> None:
        """Close what belongs to the event loop that is about to end."""
        for part in (self._model, self._ways.solver):
            if part is not None and hasattr(part, "aclose"):
                await part.aclose()

    async def aclose(self) -> None:
        """Give up the leases and close what this agent opened."""
        with contextlib.suppress(Exception):
            await self.memory.write(self._tenancy.release)
        if self._model is not None and self._owns_model and hasattr(self._model, "aclose"):
            await self._model.aclose()
        self._close()

    def close(self) -> None:
        """`aclose` for code without an event loop."""
        with contextlib.suppress(Exception):
            self.memory.write_sync(self._tenancy.release)
        self._close()

    def _close(self) -> None:
        self._tenancy = Tenancy(self.memory, self.name)
        if self._model is not None and self._owns_model and hasattr(self._model, "close"):
            self._model.close()
        if self._owns_memory:
            self._owns_memory = False
            self.memory.close()

    async def __aenter__(self) -> CoDAgent:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __enter__(self) -> CoDAgent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----

    async def _live(
        self,
        tasks: Pack | Iterable[Task] | AsyncIterable[Task],
        name: str | None,
        fork: tuple[str, int] | None,
        emit: Emit | None,
    ) -> AsyncIterator[Outcome]:
        pack = tasks if isinstance(tasks, Pack) else None
        environment = pack.environment if pack else self.environment
        name = name or (pack.id if pack else LIFE)
        self._understood(environment)
        opened = await self._opened(name, pack, environment, fork=fork)
        lifecycle = self._lifecycle(opened, environment, emit)
        async with self._tenancy.renewed(opened):
            position = 0
            async for task in _each(tasks):
                if not isinstance(task, Task):
                    raise UsageError(f"a run is made of Tasks, not of {type(task).__name__} {task!r:.60}")
                # Not held while the caller has the outcome: that is when it gives feedback.
                async with self._tenancy.lock(name):
                    outcome = await lifecycle.live(position, task)
                    await self._try_held(opened, emit)
                yield outcome
                position += 1

    async def _opened(
        self,
        name: str,
        pack: Pack | None,
        environment: Environment | None,
        *,
        fork: tuple[str, int] | None = None,
        must_exist: bool = False,
    ) -> runs.Run:
        self._current = name
        world = environment or self.environment
        said: dict[str, Any] = {
            "environment": getattr(world, "name", None) if world else None,
            "pack": self._tap.value({"id": pack.id, **pack.data}) if pack else None,
            "length": len(pack) if pack else None,
            "model": self._tap.text(self._model.name) if self._model else "",
            "settings": self._tap.value(self._settings),
        }

        def open_it(conn: Any) -> runs.Run:
            if must_exist:
                runs.find_run(conn, self.name, name)
            start = read.version_id(conn, self.name, *fork) if fork else None
            return runs.open_run(conn, self.name, name, start=start, **said)

        return _fitting(await self._tenancy.take(name, open_it), pack)

    def _understood(self, environment: Environment | None) -> None:
        """Raises: UsageError, where there is no model for the updates, or one that would not understand the environment."""
        if self._model is None and self._ways.updates and environment is not None:
            raise UsageError(
                "this environment judges at once and an update follows: give CoDAgent(model=...) or updates=False"
            )
        speaks, talks = getattr(self._model, "form", "natural"), getattr(environment, "form", "natural")
        if self._model is not None and speaks == "compact" != talks and self._ways.prompts is None:
            where = (
                f"{environment.name} talks in sentences here" if environment else "there is no environment that does"
            )
            raise UsageError(
                f"the model {self._model.name} speaks the compact form only, and {where}: make the world with "
                'form="compact" if it has one, as FrozenLake("small", form="compact"), or choose a model that reads'
            )

    def _lifecycle(
        self, opened: runs.Run, environment: Environment | None = None, emit: Emit | None = None
    ) -> Lifecycle:
        return Lifecycle(self._ways, opened, environment or self.environment, emit or self.watch)


def _fitting(opened: runs.Run, pack: Pack | None) -> runs.Run:
    if pack is not None and opened.length != len(pack):
        began = "without an end" if opened.length is None else f"as a pack of {opened.length} tasks"
        raise TaskMismatch(
            f"run {opened.name!r} was begun {began}, not {len(pack)}: give the same pack, or name another run"
        )
    return opened


def _resolve(name: str, environment: Environment | None) -> Model:
    from cod_agent.models import resolve

    return resolve(name, world=environment)


def _secrets(tools: Sequence[Tool], *keepers: object) -> Secrets:
    """What is kept secret if nothing else is said: what the environment has, what tools ask for, what models and solvers use."""
    found = Secrets(*(name for tool in tools for name in secrets_of(tool)))
    for keeper in keepers:
        found = found.beside(getattr(keeper, "secrets", {}))
    return found


async def _each(tasks: Iterable[Task] | AsyncIterable[Task]) -> AsyncIterator[Task]:
    if isinstance(tasks, AsyncIterable):
        async for task in tasks:
            yield task
    else:
        for task in tasks:
            yield task
