"""What `CoDAgent.stream` yields: one small frozen object per thing that happened, each after it is on disk (but `Delta`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cod_agent.tasks import Feedback, Observation, Outcome, Task


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that happens; `run` and `position` say where."""

    run: str
    position: int


@dataclass(frozen=True, slots=True)
class TaskBegun(Event):
    """A solve episode starts (or goes on, after a crash)."""

    task: Task
    context: str
    version: int


@dataclass(frozen=True, slots=True)
class Observed(Event):
    """The environment showed something."""

    observation: Observation


@dataclass(frozen=True, slots=True)
class Delta(Event):
    """A piece of an answer that is still being written: provisional until `Answered`."""

    text: str


@dataclass(frozen=True, slots=True)
class Answered(Event):
    """The model answered."""

    kind: Literal["solve", "update"]
    text: str


@dataclass(frozen=True, slots=True)
class Solved(Event):
    """The solve episode is over."""

    answer: str


@dataclass(frozen=True, slots=True)
class Judged(Event):
    """The reward is known."""

    feedback: Feedback


@dataclass(frozen=True, slots=True)
class ContextWritten(Event):
    """The update wrote a new version."""

    context: str
    version: int


@dataclass(frozen=True, slots=True)
class ContextKept(Event):
    """The update was refused; the last good version stays."""

    reason: str


@dataclass(frozen=True, slots=True)
class ContextHeld(Event):
    """The update wrote a version that is held back until somebody decides; the last one in force stays."""

    context: str
    version: int
    reason: str


@dataclass(frozen=True, slots=True)
class TaskEnded(Event):
    """Everything that happens now with this task has happened: what `run` yields."""

    outcome: Outcome
