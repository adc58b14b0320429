"""A plan: which packs of which world a model lives through, and how. It is kept with every run it makes.

Run names are the packs' ids, so the same plan on the same file goes on where it was; and since the plan itself is
in the file, `--resume` needs nothing but the file. What would mix two experiments in one run is refused.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cod_agent.budget import Budget
from cod_agent.environments import PACKINGS, SPLITS, Form, Packing, Split, make_world, packed
from cod_agent.errors import UnknownName, UsageError
from cod_agent.memory import Memory
from cod_agent.models import resolve
from cod_agent.models.base import Model, Sampling
from cod_agent.secrets import without_login
from cod_agent.trust.write_gate import POLICIES

PLAN = "plan"
"""The key of a run's settings under which its plan stands."""

_SAME = (
    "agent",
    "world",
    "split",
    "packing",
    "model",
    "pack_size",
    "form",
    "temperature",
    "max_tokens",
    "budget",
    "exact",
    "gate",
)
"""What may not differ between two plans that share a run."""

STUDY = "study"
"""The key of a run's settings under which the parts of its study stand, where there are several."""

_PART = ("world", "pack_size", "agent")
"""In what the parts of a study differ."""

_LISTS = ("controls", "more_seeds")

_MEANT = {"split": "eval", "packing": "cod", "gate": "open"}
"""What a plan means that an older version kept without these fields."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to live through: packs of one size of one world. The fields are the flags of `cod run` and `cod eval`."""

    world: str
    model: str
    packs: int = 8
    pack_size: int = 4
    seed: int = 1
    agent: str = "agent"
    controls: tuple[str, ...] = ()
    split: Split = "eval"
    """Live to be measured, or to record what is trained on: the two share no map."""
    packing: Packing = "cod"
    """Related tasks, or one again and again."""
    form: Form | None = None
    """How the world talks; None: as the model likes it."""
    temperature: float = 1.0
    max_tokens: int | None = None
    base_url: str | None = None
    exact: bool = False
    gate: str = "open"
    """What becomes of updates: see `cod_agent.trust.write_gate`."""
    stream: bool = False
    timeout: float | None = None
    concurrency: int = 32
    """Packs lived at once."""
    budget: str | None = None
    """What each episode may spend, as `Budget.parse` reads it."""
    run_budget: str | None = None
    """What each run may spend in all."""
    more_seeds: tuple[int, ...] = ()
    """Each of them has as many packs more."""
    repeats: int = 1
    """Runs of each pack; their rewards are averaged."""
    against: str | None = None
    """Another model on the same packs, with a context of its own."""
    against_base_url: str | None = None
    """Of its endpoint; None: the same as the model's."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """All of them."""
        return self.seed, *self.more_seeds

    @property
    def rows(self) -> int:
        """Packs of all seeds: first those of the first seed, then those of the next."""
        return self.packs * len(self.seeds)

    def check(self) -> Plan:
        """The plan itself.

        Raises:
            UsageError: it asks for nothing, or for less than nothing.
            UnknownName: no such split, packing or policy of the write gate.
        """
        for name in ("packs", "pack_size", "concurrency", "repeats"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if self.timeout is not None and self.timeout <= 0:
            raise UsageError(f"--timeout must be more than 0 seconds, not {self.timeout:g}")
        if self.temperature < 0:
            raise UsageError(f"--temperature cannot be negative, and is {self.temperature:g}")
        for limits in filter(None, (self.budget, self.run_budget)):
            Budget.parse(limits)
        if self.split not in SPLITS:
            raise UnknownName.among("split", str(self.split), list(SPLITS))
        if self.gate not in POLICIES:
            raise UnknownName.among("policy of the write gate", str(self.gate), list(POLICIES))
        if self.packing not in PACKINGS:
            raise UnknownName.among("packing", str(self.packing), list(PACKINGS))
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seed names a seed twice: {', '.join(map(str, self.seeds))}")
        if self.against_base_url is not None and self.against is None:
            raise UsageError("--against-base-url is the address of another model: name it with --against MODEL")
        return self

    def settings(self) -> dict[str, Any]:
        """As it is kept with each run. Credentials in an address are left out."""
        said = asdict(self)
        addresses = {name: _public(said[name]) for name in ("base_url", "against_base_url")}
        return {PLAN: {**said, **{name: list(said[name]) for name in _LISTS}, **addresses}}

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


def world_of(plan: Plan, form: Form) -> Any:
    """The plan's world with its packs, talking in `form`.

    Raises:
        UnknownName: see `make_world`.
    """
    return worlds_of(plan, form)[0]


def worlds_of(plan: Plan, form: Form, packing: Packing | None = None) -> tuple[Any, ...]:
    """The plan's world for each of its seeds; `packing`: another one than the plan's."""
    made = (make_world(plan.world, seed=seed, split=plan.split, form=form) for seed in plan.seeds)
    return tuple(packed(world, packing or plan.packing) for world in made)


def set_up(
    plan: Plan, *, api_key: str | None = None, model: Callable[[Plan, Any], Model] | None = None
) -> tuple[Plan, Any, Model]:
    """The plan with its world's full name, the world, and the model, which whoever sets up closes (`release`).

    Args:
        api_key: of the model's endpoint.
        model: who gives the model for the plan and its world; it is resolved by its name if not given.

    Raises:
        UnknownName, UsageError, MissingExtra: see `make_world` and `cod_agent.models.resolve`.
    """
    plan.check()
    # Players of a world speak its compact form; a language model says itself what it speaks.
    world = world_of(plan, plan.form or "compact")
    plan = replace(plan, world=world.name)
    found = model(plan, world) if model else resolved(plan, world, api_key=api_key)
    form = plan.form or found.form
    return plan, world if world.form == form else world_of(plan, form), found


def resolved(plan: Plan, world: Any, *, api_key: str | None = None) -> Model:
    """The plan's model."""
    return resolve(
        plan.model,
        world=world,
        sampling=plan.sampling,
        base_url=plan.base_url,
        api_key=api_key,
        stream=plan.stream,
        exact=plan.exact,
        concurrency=plan.concurrency,
        timeout=plan.timeout,
    )


async def release(model: Model) -> None:
    """Close a model that was resolved by its name."""
    if hasattr(model, "aclose"):
        await model.aclose()
    if hasattr(model, "close"):
        model.close()


def kept_plan(memory: Memory, run: str | None = None) -> Plan:
    """The plan of a run, or of the newest one in the file.

    Raises:
        UnknownName: no such run.
        UsageError: it was not made by a plan.
    """
    return _plan(_kept(memory, run))


def kept_study(memory: Memory) -> tuple[Plan, ...]:
    """The plans of the study that the newest run in the file belongs to, in their order.

    Raises:
        UsageError: it was not made by a plan.
    """
    settings = _kept(memory)
    plan = _plan(settings)
    return tuple(replace(plan, **dict(zip(_PART, part, strict=True))) for part in settings.get(STUDY, ())) or (plan,)


def study_settings(parts: Sequence[Plan]) -> dict[str, Any]:
    """What each run of a study keeps beside its own plan: in what the parts differ. A single plan needs nothing."""
    return {STUDY: [[getattr(part, name) for name in _PART] for part in parts]} if len(parts) > 1 else {}


def _plan(settings: dict[str, Any]) -> Plan:
    said = settings[PLAN]
    names = {field.name for field in fields(Plan)}
    known_fields = {key: value for key, value in said.items() if key in names}
    return Plan(**{**known_fields, **{name: tuple(said.get(name, ())) for name in _LISTS}})


def _kept(memory: Memory, run: str | None = None) -> dict[str, Any]:
    """The settings of the run, or of the newest one, that a plan made."""

    def read(conn: sqlite3.Connection) -> list[tuple[str, str]]:
        where, values = ("WHERE name = ?", (run,)) if run else ("", ())
        return conn.execute(f"SELECT name, settings FROM runs {where} ORDER BY id DESC", values).fetchall()

    found = memory.read_sync(read)
    if not found and run:
        known = memory.read_sync(lambda conn: [row[0] for row in conn.execute("SELECT name FROM runs LIMIT 20")])
        raise UnknownName.among("run", run, known)
    for _, settings in found:
        said: dict[str, Any] = json.loads(settings)
        if said.get(PLAN) is not None:
            return said
    raise UsageError(
        f"{memory.path} holds no run that a command could resume: those of a program of yours go on when it runs again"
        if found
        else f"{memory.path} holds no run yet: name a world and a model to begin one"
    )


def refuse_mixture(
    memory: Memory, plan: Plan, names: Iterable[str], *, agent: str | None = None, more: Sequence[str] = ()
) -> None:
    """Make sure that what the file holds under the plan's run names was made by the same plan.

    Args:
        names: of the runs.
        agent: whose they are; the plan's if not given.
        more: fields that count beside those that always do.

    Raises:
        UsageError: it was made by another one.
    """

    def read(conn: sqlite3.Connection) -> list[tuple[str, str]]:
        return conn.execute("SELECT name, settings FROM runs WHERE agent = ?", (agent,)).fetchall()

    agent = agent or plan.agent
    ours, mine = plan.settings()[PLAN], set(names)
    for settings in {settings for name, settings in memory.read_sync(read) if name in mine}:
        said = json.loads(settings).get(PLAN) or {}
        for name in (*_SAME, *more):
            if (before := said.get(name, _MEANT.get(name))) != ours[name]:
                raise UsageError(
                    f"{memory.path} holds these packs lived by agent {agent!r} with {name.replace('_', ' ')} "
                    f"{before}, not {ours[name]}: choose another file or agent, or resume what is there"
                )


def _public(address: str | None) -> str | None:
    return None if address is None else without_login(address)
