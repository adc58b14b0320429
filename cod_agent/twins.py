"""The sync twins of `CoDAgent`: the same methods for code without an event loop, on one of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from cod_agent.errors import UsageError
from cod_agent.tasks import Outcome, Pack, Task

T = TypeVar("T")


class SyncTwins:
    """What `CoDAgent` is in code that does not await."""

    if TYPE_CHECKING:

        def run(
            self, tasks: Pack | Iterable[Task], *, run: str | None = None, fork: tuple[str, int] | None = None
        ) -> AsyncIterator[Outcome]: ...

        async def solve(self, task: Task, *, run: str = ..., position: int | None = None) -> Outcome: ...

        async def feedback(
            self, outcome: Outcome | int, reward: float | None = None, text: str = "", *, run: str | None = None
        ) -> Outcome: ...

        async def _release_model(self) -> None: ...

    def run_sync(
        self, tasks: Pack | Iterable[Task], *, run: str | None = None, fork: tuple[str, int] | None = None
    ) -> Iterator[Outcome]:
        """`run` for code without an event loop."""
        _refuse_loop("`async for outcome in agent.run(...)`")
        with asyncio.Runner() as runner:
            living = self.run(tasks, run=run, fork=fork)
            try:
                while True:
                    try:
                        yield runner.run(_next(living))
                    except StopAsyncIteration:
                        return
            finally:
                runner.run(living.aclose())  # type: ignore[attr-defined]
                runner.run(self._release_model())

    def solve_sync(self, task: Task, *, run: str = "life", position: int | None = None) -> Outcome:
        """`solve` for code without an event loop."""
        _refuse_loop("`await agent.solve(...)`")
        return self._sync(self.solve(task, run=run, position=position))

    def feedback_sync(
        self, outcome: Outcome | int, reward: float | None = None, text: str = "", *, run: str | None = None
    ) -> Outcome:
        """`feedback` for code without an event loop."""
        _refuse_loop("`await agent.feedback(...)`")
        return self._sync(self.feedback(outcome, reward, text, run=run))

    def _sync(self, work: Coroutine[Any, Any, T]) -> T:
        async def whole() -> T:
            try:
                return await work
            finally:
                await self._release_model()

        return asyncio.run(whole())


def _refuse_loop(instead: str) -> None:
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise UsageError(f"an event loop runs here already (an async function, a notebook): use {instead}")


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)
