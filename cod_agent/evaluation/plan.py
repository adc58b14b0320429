"""A plan: which packs of which world a model lives through, and how. It is kept with every run it makes.

Run names are the packs' ids, so the same plan on the same file goes on where it was; and since the plan itself is
in the file, `--resume` needs nothing but the file. What would mix two experiments in one run is refused.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from cod_agent.environments import PACKINGS, SPLITS, Form, Packing, Split, make_world, packed
from cod_agent.errors import UnknownName, UsageError
from cod_agent.memory import Memory
from cod_agent.models import resolve
from cod_agent.models.base import Model, Sampling

PLAN = "plan"
"""The key of a run's settings under which its plan stands."""

_SAME = ("world", "split", "packing", "model", "pack_size", "form", "temperature", "max_tokens", "exact")
"""What may not differ between two plans that share a run."""

_MEANT = {"split": "eval", "packing": "cod"}
"""What a plan means that an older version kept without these fields."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to live through. The fields are the flags of `cod run` and `cod eval`."""

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
    stream: bool = False
    timeout: float | None = None
    concurrency: int = 32
    """Packs lived at once."""

    def check(self) -> Plan:
        """The plan itself.

        Raises:
            UsageError: it asks for nothing, or for less than nothing.
            UnknownName: no such split or packing.
        """
        for name in ("packs", "pack_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"--max-tokens must be at least 1, not {self.max_tokens}")
        if self.timeout is not None and self.timeout <= 0:
            raise UsageError(f"--timeout must be more than 0 seconds, not {self.timeout:g}")
        if self.temperature < 0:
            raise UsageError(f"--temperature cannot be negative, and is {self.temperature:g}")
        if self.split not in SPLITS:
            raise UnknownName.among("split", str(self.split), list(SPLITS))
        if self.packing not in PACKINGS:
            raise UnknownName.among("packing", str(self.packing), list(PACKINGS))
        return self

    def settings(self) -> dict[str, Any]:
        """As it is kept with each run. Credentials in an address are left out."""
        return {PLAN: {**asdict(self), "controls": list(self.controls), "base_url": _public(self.base_url)}}

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, max_tokens=self.max_tokens)


def world_of(plan: Plan, form: Form) -> Any:
    """The plan's world with its packs, talking in `form`.

    Raises:
        UnknownName: see `make_world`.
    """
    return packed(make_world(plan.world, seed=plan.seed, split=plan.split, form=form), plan.packing)


def set_up(plan: Plan, *, api_key: str | None = None) -> tuple[Plan, Any, Model]:
    """The plan with its world's full name, the world, and the model, which whoever sets up closes (`release`).

    Raises:
        UnknownName, UsageError, MissingExtra: see `make_world` and `cod_agent.models.resolve`.
    """
    plan.check()
    # Players of a world speak its compact form; a language model says itself what it speaks.
    world = world_of(plan, plan.form or "compact")
    model = resolve(
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
    form = plan.form or model.form
    world = world if world.form == form else world_of(plan, form)
    return replace(plan, world=world.name), world, model


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

    def read(conn: sqlite3.Connection) -> list[tuple[str, str]]:
        where, values = ("WHERE name = ?", (run,)) if run else ("", ())
        return conn.execute(f"SELECT name, settings FROM runs {where} ORDER BY id DESC", values).fetchall()

    found = memory.read_sync(read)
    if not found and run:
        known = memory.read_sync(lambda conn: [row[0] for row in conn.execute("SELECT name FROM runs LIMIT 20")])
        raise UnknownName.among("run", run, known)
    for _, settings in found:
        said = json.loads(settings).get(PLAN)
        if said is not None:
            names = {field.name for field in fields(Plan)}
            known_fields = {key: value for key, value in said.items() if key in names}
            return Plan(**{**known_fields, "controls": tuple(said.get("controls", ()))})
    raise UsageError(
        f"{memory.path} holds no run that a command could resume: those of a program of yours go on when it runs again"
        if found
        else f"{memory.path} holds no run yet: name a world and a model to begin one"
    )


def refuse_mixture(memory: Memory, plan: Plan, names: Iterable[str]) -> None:
    """Make sure that what the file holds under the plan's run names was made by the same plan.

    Raises:
        UsageError: it was made by another one.
    """

    def read(conn: sqlite3.Connection) -> list[tuple[str, str]]:
        return conn.execute("SELECT name, settings FROM runs WHERE agent = ?", (plan.agent,)).fetchall()

    ours, mine = plan.settings()[PLAN], set(names)
    for settings in {settings for name, settings in memory.read_sync(read) if name in mine}:
        said = json.loads(settings).get(PLAN) or {}
        for name in _SAME:
            if (before := said.get(name, _MEANT.get(name))) != ours[name]:
                raise UsageError(
                    f"{memory.path} holds these packs lived by agent {plan.agent!r} with {name.replace('_', ' ')} "
                    f"{before}, not {ours[name]}: choose another file or agent, or resume what is there"
                )


def _public(address: str | None) -> str | None:
    if address is None:
        return None
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
