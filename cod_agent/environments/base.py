"""The two protocols of a world: `Environment` starts a `Session` for each task, the session is lived once.

    session = environment.start(task)
    observation = session.reset()
    while not observation.done:
        observation = session.step(answer_of_the_agent(observation.text))
    observation.feedback                      # reward and words; None if they come later

Methods may be plain or `async`. All state of a task lives in its session, never in the environment or a module: many agents
share one environment. A world where an answer is judged at once is a session whose first step is its last; a world with
tools gives them by `Session.tools`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from cod_agent.tasks import Observation, Task

Form = Literal["natural", "compact"]
"""How a world talks: in sentences for large models, or in the terse form the shipped tiny policies speak."""

Split = Literal["train", "eval"]
"""Which packs: to learn from, or to be measured on. The two have no task in common."""
SPLITS: tuple[Split, ...] = get_args(Split)

MALFORMED = "malformed"
"""The `Feedback.ending` of an episode that ended because the answer said nothing the world understands."""

Recovery = Literal["deterministic", "snapshot", "abort"]
"""What a crash in the middle of a task means. deterministic: the same steps give the same observations, so recorded steps
are taken again when (and only when) the episode goes on past them; snapshot: the session has `snapshot()` and `restore(state)`;
abort: the task cannot be continued and ends with reward NaN."""


@runtime_checkable
class Session(Protocol):
    """One task being lived."""

    def reset(self) -> Observation | Awaitable[Observation]:
        """The first observation."""
        ...

    def step(self, answer: str) -> Observation | Awaitable[Observation]:
        """Take the agent's answer, whatever it holds; malformed answers end the episode with reward 0, never an exception."""
        ...


@runtime_checkable
class Environment(Protocol):
    """What tasks act on. Optional attributes: `form` (default "natural"), `recovery` (default "deterministic"), and
    `highest_reward` (default 1), which no task can better."""

    name: str
    """As on the command line, WORLD:PRESET."""

    def start(self, task: Task) -> Session:
        """A fresh session for `task`; sessions of different tasks share nothing but what is immutable."""
        ...


@runtime_checkable
class Remembering(Environment, Protocol):
    """An environment that itself remembers, from task to task of one run, what the agent did to it.

    What it remembers is JSON and lives in the run: a session's last observation carries it (`Observation.carried`), and the session
    of the run's next task is started with it. So runs share nothing, and a crash loses nothing.
    """

    remembers: bool
    """Whether this one does."""

    def start(self, task: Task, carried: Any = None) -> Session:
        """A session for `task` in a run whose environment remembers `carried`; None: it remembers nothing yet."""
        ...


def started(environment: Environment, task: Task, carried: Any = None) -> Session:
    """A session for `task`, with what the run's environment remembers if it does such a thing."""
    if isinstance(environment, Remembering) and environment.remembers:
        return environment.start(task, carried)
    return environment.start(task)


def awaited(seen: Observation | Awaitable[Observation]) -> Observation:
    """The observation itself, for who is synchronous where a session may not be."""
    if not inspect.isawaitable(seen):
        return seen

    async def wait() -> Observation:
        return await seen

    return asyncio.run(wait())


Tool = Callable[..., Any]
"""A function a tool-using solver may call; plain or async, JSON arguments, anything with a `str()` back."""


def tools_of(session: Session | None) -> Sequence[Tool]:
    """The session's tools; sessions without any need not define the method."""
    give = getattr(session, "tools", None)
    return tuple(give()) if callable(give) else ()
