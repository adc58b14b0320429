"""What an agent is given and what comes of it: `Task`, `Pack`, `Feedback`, `Observation`, `Outcome`.

These are values: frozen, comparable, free of behaviour. Rewards are floats, usually in [0, 1]; `None` means "not known yet"
(an application whose feedback arrives later), NaN means "lost to the infrastructure" and never counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Field, field_validator

if TYPE_CHECKING:
    from cod_agent.environments import Environment


class Task(BaseModel):
    """One thing to solve."""

    # What is read back after a crash must have the same fingerprint: NaN and infinities survive being stored.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    id: str
    """A name for people. It may repeat: a Ralph loop is one task many times."""
    prompt: str = ""
    """What the solver is told; in an environment, the rules that hold for the whole episode."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Anything JSON can hold: what the environment needs to set the task up again after a crash."""

    @field_validator("data")
    @classmethod
    def _is_json(cls, data: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(data)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"a task's data must be what JSON can hold ({error}): it is stored with the task"
            ) from None
        return data

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of id, prompt and data: what makes a position resumable."""
        body = json.dumps([self.id, self.prompt, self.data], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True)
class Pack(Sequence[Task]):
    """Related tasks in order, from one environment with one hidden property.

    A declared pack of n tasks is a rollout: n solve episodes and n-1 updates, none after the last.
    """

    id: str
    tasks: tuple[Task, ...]
    environment: Environment
    data: dict[str, Any] = field(default_factory=dict)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Task, ...]: ...
    def __getitem__(self, index: int | slice) -> Task | tuple[Task, ...]:
        return self.tasks[index]

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)


class Feedback(BaseModel):
    """What the environment or the application says about a solved task."""

    # NaN must survive being stored: "lost" is not "not known yet".
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    reward: float | None = None
    """How good the answer was, usually in [0, 1]."""
    text: str = ""
    """The same in words, for the update episode. It is data from outside: never an instruction."""
    ending: str = ""
    """How the episode ended, in a word of the environment's, as `goal` or `malformed`; nobody but statistics reads it."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an environment shows after a reset or a step."""

    text: str
    summary: str = ""
    """The same in fewer words: what an update episode reads of this step. Empty: it reads `text`."""
    done: bool = False
    feedback: Feedback | None = None
    """Given with the last observation by environments that judge at once."""
    carried: Any = None
    """With the last observation: what the environment remembers for the run's next task (see `Remembering`); JSON."""


UpdateStatus = Literal["none", "written", "held", "kept"]


class Outcome(BaseModel):
    """What came of one task in one run."""

    model_config = ConfigDict(frozen=True)

    run: str
    position: int
    """0-based place in the run."""
    task: Task
    answer: str = ""
    reward: float | None = None
    feedback: Feedback | None = None
    context: str = ""
    """The context after this task: what its update wrote, or what stayed in force because that was held back or refused; what the task
    was solved with while there was no update."""
    version: int = 0
    """Its version in this run; 0 is the empty context a run starts from."""
    update: UpdateStatus = "none"
    """written: a new version; held: a new version that waits for a decision, the one before it staying in force; kept: the update was
    refused and the last good version stays; none: no update (yet)."""
    reason: str = ""
    """Why an update was refused or held back, or why the episode ended without an answer."""
    calls: int = 0
    """Model calls of this task's episodes, as the file has them."""
