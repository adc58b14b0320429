"""What goes over the wire: requests as clients have to write them, answers as they get them. Strict, finite, bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from cod_agent.host.errors import BadRequest, Invalid
from cod_agent.tasks import Outcome

T = TypeVar("T")

NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@~-]{0,127}$"
LAST = 2**31 - 1

Name = Annotated[str, Field(pattern=NAME, description="Letters, digits and . _ : @ ~ -, at most 128.")]
Position = Annotated[int, Field(ge=0, le=LAST, description="0-based place in the run.")]
Whole = BeforeValidator(lambda said: int(said) if isinstance(said, float) and said.is_integer() else said)
"""3.0 is a whole number in JSON."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
State = Literal["queued", "open", "solved", "judged", "updated", "closed"]


class Asked(BaseModel):
    """A body: exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class NewTask(Asked):
    """A task for an agent."""

    id: str = Field(
        min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]*$", description="A name for people; it may repeat."
    )
    prompt: str = Field("", description="What the agent is told.")
    data: dict[str, Any] = Field(default_factory=dict, description="What the world needs to set the task up.")
    run: Name = "life"
    position: Annotated[Position | None, Whole] = Field(
        None, description="Where the task belongs, for clients that count: asking again gives the same outcome."
    )
    wait: bool = Field(True, description="Answer when it is lived; false answers at once, with a URL to look at.")


_SAYS_SOMETHING: dict[str, Any] = {
    "anyOf": [
        {"required": ["reward"], "properties": {"reward": {"type": "number"}}},
        {"required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}},
    ]
}


class NewFeedback(Asked):
    """How a task went: a reward, words, or both. Given once; repeating the same is harmless."""

    model_config = ConfigDict(json_schema_extra=_SAYS_SOMETHING)

    reward: Finite | None = Field(None, description="Usually in [0, 1].")
    text: str = ""


class NewDecision(Asked):
    """What becomes of a version that is held back, or the way back to an older one."""

    version: Annotated[int, Field(ge=0, le=LAST), Whole]
    decision: Literal["accept", "refuse", "rollback"]
    why: str = Field("", max_length=2000, description="Kept with the decision.")
    force: bool = Field(False, description="Accept it although another version came in force since.")


class Said(BaseModel):
    """An answer; what is not finite is null."""

    model_config = ConfigDict(ser_json_inf_nan="null", json_schema_serialization_defaults_required=True)


class Trouble(Said):
    type: str = Field(description="The class of the error, as in docs/errors.md.")
    message: str


class Failure(Said):
    """What every answer says that is no success."""

    error: Trouble


class Judgement(Said):
    reward: float | None
    text: str


class Lived(Said):
    """What came of a task so far."""

    agent: str
    run: str
    position: Position
    id: str = Field(description="The task's.")
    answer: str
    reward: float | None
    feedback: Judgement | None = Field(description="null while nobody judged it.")
    context: str = Field(description="After this task.")
    version: int
    update: Literal["none", "written", "held", "kept"]
    reason: str
    calls: int


class Accepted(Said):
    """The task is on disk, and will be lived."""

    agent: str
    run: str
    position: Position
    state: State
    url: str = Field(description="Where to look at it.")


class GivenTask(Said):
    id: str
    prompt: str
    data: dict[str, Any]


class Place(Said):
    """A position of a run."""

    agent: str
    run: str
    position: Position
    state: State
    task: GivenTask
    outcome: Lived | None = Field(description="Once it is solved.")
    trouble: Trouble | None = Field(description="What the last attempt ended with, where it goes on being tried.")


class Abandoned(Said):
    agent: str
    run: str
    abandoned: list[Position]


class AgentLine(Said):
    agent: str
    runs: int
    tasks: int


class Agents(Said):
    agents: list[AgentLine]
    next: str | None = Field(description="`after` of the next page.")


class RunLine(Said):
    run: str
    environment: str | None
    tasks: int
    mean_reward: float | None
    versions: int
    waiting: int = Field(description="Tasks and feedback in this process's queue.")


class Runs(Said):
    agent: str
    runs: list[RunLine]
    next: int | None = Field(description="`after` of the next page.")


class VersionLine(Said):
    version: int
    position: int | None = Field(description="The task after which it was written; null for the first.")
    parent: int | None
    hash: str
    weights: str = Field(description="Those that wrote it.")
    created: float = Field(description="Seconds since 1970.")
    held: str = Field("", description="Why it waits for a decision, or waited; empty if it was in force at once.")
    decided: Literal["", "adopted", "refused"] = Field("", description="What was decided.")


class Contexts(Said):
    agent: str
    run: str
    versions: list[VersionLine]
    next: int | None = Field(description="`after` of the next page.")


class Context(VersionLine):
    agent: str
    run: str
    context: str


class HeldLine(Said):
    version: int
    position: int = Field(description="The task after which it was written.")
    reason: str = Field(description="Why it is held back.")
    context: str
    head: int = Field(description="The version in force.")
    diff: str = Field(description="From the version in force, unified.")
    moved_on: bool = Field(description="Whether accepting it undoes what came in force since it was written.")


class HeldVersions(Said):
    agent: str
    run: str
    held: list[HeldLine]
    next: int | None = Field(description="`after` of the next page.")


class Decided(Said):
    agent: str
    run: str
    version: int = Field(description="The one in force now.")


class Health(Said):
    status: Literal["ok"]


class Ready(Said):
    ready: bool
    draining: bool
    database: str = Field(description="ok, or what is wrong with it.")
    model: str = Field(description="ok as far as is known, or what it last said.")
    agents: int
    waiting: int


ANSWERS: tuple[type[Said], ...] = (
    Failure, Lived, Accepted, Place, Abandoned, Agents, Runs, Contexts, Context, HeldVersions, Decided, Health, Ready,
)  # fmt: skip


A = TypeVar("A", bound=Asked)


def read(kind: type[A], body: bytes) -> A:
    """The body of a request.

    Raises:
        BadRequest: it is no JSON, or has a number that is not finite.
        Invalid: it is not what was asked for.
    """
    try:
        said = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is no JSON: {error}") from None
    _finite(said)
    return checked(kind.model_validate, said)


def checked(validate: Callable[[Any], T], said: Any, where: str = "") -> T:
    """`validate(said)`, its complaint as one sentence.

    Raises:
        Invalid: there is one.
    """
    try:
        return validate(said)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = where or ".".join(map(str, first["loc"])) or "the body"
        raise Invalid(f"{at}: {first['msg']}") from None


def _finite(said: Any) -> None:
    """JSON has no infinity, but 1e999 reads as one, and could not be given back."""
    if isinstance(said, dict):
        for value in said.values():
            _finite(value)
    elif isinstance(said, list):
        for value in said:
            _finite(value)
    elif isinstance(said, float) and not math.isfinite(said):
        raise BadRequest("the body has a number that is too large")


def lived(agent: str, outcome: Outcome) -> Lived:
    """An outcome, for the wire."""
    said = outcome.feedback
    return Lived.model_construct(
        agent=agent,
        run=outcome.run,
        position=outcome.position,
        id=outcome.task.id,
        answer=outcome.answer,
        reward=outcome.reward,
        feedback=said and Judgement.model_construct(reward=said.reward, text=said.text),
        context=outcome.context,
        version=outcome.version,
        update=outcome.update,
        reason=outcome.reason,
        calls=outcome.calls,
    )
