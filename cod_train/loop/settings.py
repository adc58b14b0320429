"""What a loop does, as a TOML file says it; kept in the loop's folder, so that one that goes on is the same loop.

settings = Settings.named("cpu_tiny")            # or gpu_small, or a file
settings = settled(Path("runs/loop"), "cpu_tiny", {})   # what the folder was begun with is checked
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cod_agent.environments.base import Form
from cod_agent.errors import UnknownName, UsageError
from cod_agent.policies import POLICIES
from cod_train.loop.rounds import write_whole

CONF = Path(__file__).parent.parent / "conf"
SHIPPED = ("cpu_tiny", "gpu_small")
"""Configs that come with the package: conf/loop_NAME.toml."""
DEFAULT = SHIPPED[0]
KEPT = "loop.json"
FREE = ("rounds", "serve")
"""What a loop that goes on may be told anew: how long it lasts, and how weights are served, which changes no answer's meaning."""

EngineName = Literal["vllm", "embedded"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Record(Section):
    """Agents that live the same packs of the train split, each with a run database of its own."""

    agents: int = Field(default=8, ge=1)
    packs: int = Field(default=64, ge=1)
    """Each round, new ones."""
    concurrency: int = Field(default=16, ge=1)
    """Packs that one agent lives at once."""


class Train(Section):
    """`cod train` on what the round recorded: the agents' lives of a pack are its group."""

    config: str = "cpu_tiny"
    """Of the training: cpu_tiny, gpu_small, or your own."""
    in_process: bool = True
    steps: int = Field(default=8, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    """Steps between checkpoints, from which a killed training goes on; None: at the end only."""
    keys: tuple[str, ...] = ()
    """More KEY=VALUE of the training's config."""


class Gate(Section):
    """Candidate and incumbent on the same new held-out packs."""

    engine: EngineName = "embedded"
    packs: int = Field(default=512, ge=8)
    margin: float = Field(default=0.1, gt=0)
    """Part of the range of rewards that a position may lose, as far as the packs can tell."""


class Serve(Section):
    """`cod serve`, which follows the promoted checkpoint."""

    engine: EngineName = "vllm"
    while_training: bool = True
    """Off where weights and training do not fit on the machine together: the server stops while a round trains."""
    # Of model servers, also the gate's.
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, ge=1)
    """Longest conversation in tokens; None: what the model takes."""
    gpu_memory: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU's memory; two servers stand side by side while weights are switched."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that one model is spread over."""

    @property
    def flags(self) -> list[str]:
        """As `cod serve` takes them."""
        words = ["--engine", self.engine, "--dtype", self.dtype, "--tensor-parallel", str(self.tensor_parallel)]
        for flag, value in (("--max-model-len", self.max_model_len), ("--gpu-memory", self.gpu_memory)):
            words += [] if value is None else [flag, str(value)]
        return words


class Settings(Section):
    """All that a loop is told."""

    base: str = "embedded-base"
    """What is deployed first: a shipped policy or a Hugging Face folder."""
    world: str = "frozen-lake:small"
    form: Form = "natural"
    """How the world talks to the policy."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer, recorded or judged; None: as the server has it."""
    pack_size: int = Field(default=4, ge=1)
    rounds: int = Field(default=6, ge=1)
    seed: int = Field(default=0, ge=0)
    """Of the packs that are recorded and of the training; the gate draws its own."""
    record: Record = Record()
    train: Train = Train()
    gate: Gate = Gate()
    serve: Serve = Serve()

    @field_validator("base")
    @classmethod
    def _absolute(cls, base: str) -> str:
        return base if base in POLICIES or not Path(base).is_dir() else str(Path(base).resolve())

    @model_validator(mode="after")
    def _whole_steps(self) -> Settings:
        if self.record.packs % self.train.steps:
            raise ValueError(
                f"record.packs ({self.record.packs}) must be a multiple of train.steps ({self.train.steps}): each step takes as many"
            )
        return self

    @property
    def step_packs(self) -> int:
        """Packs of a step, each lived by all agents."""
        return self.record.packs // self.train.steps

    def pack_seed(self, round: int) -> int:
        """Of the packs that are recorded in a round: no two rounds share it, nor do loops of another seed."""
        return 100_000 * (self.seed + 1) + round

    @classmethod
    def named(cls, name: str | Path, changes: Mapping[str, Any] | None = None) -> Settings:
        """Those of a shipped config or a TOML file.

        Args:
            changes: keys (`section.key` with a dot) that are said otherwise.

        Raises:
            UnknownName: no such config, or a key nobody knows; with the nearest.
            UsageError: the file is no TOML, or its values do not hold together.
        """
        path = CONF / f"loop_{name}.toml" if name in SHIPPED else Path(name)
        if not path.is_file():
            raise UnknownName.among("config of a loop", str(name), [*SHIPPED, "FILE.toml"])
        try:
            given = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is no TOML file: {error}") from None
        return cls.checked(changed(given, changes or {}), str(path))

    @classmethod
    def checked(cls, given: Mapping[str, Any], where: str) -> Settings:
        """Raises: UsageError, with what is wrong in `where`."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            for one in error.errors():
                if one["type"] == "extra_forbidden":
                    raise _unknown(where, one["loc"]) from None
            lines = [f"  {'.'.join(map(str, one['loc'])) or 'the whole'}: {one['msg']}" for one in error.errors()]
            raise UsageError(f"{where} does not hold together:\n" + "\n".join(lines)) from None


def changed(given: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with `section.key` said otherwise."""
    out: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in given.items()}
    for key, value in changes.items():
        section, dot, name = key.rpartition(".")
        (out.setdefault(section, {}) if dot else out)[name] = value
    return out


def settled(out: Path, config: str | None, changes: Mapping[str, Any]) -> Settings:
    """The settings of the loop in a folder: as it was begun, or new ones, which `keep` then keeps there.

    Args:
        config: which config was asked for; None: the folder's own, or the default.
        changes: what was said beside it.

    Raises:
        UsageError: the folder was begun otherwise, and what differs is not FREE.
    """
    before = _read(out / KEPT)
    if before is None:
        settings = Settings.named(config or DEFAULT, changes)
    elif config is None:
        settings = Settings.checked(changed(before.model_dump(), changes), "the command line")
    else:
        settings = Settings.named(config, changes)
    if before is not None and (other := _differences(before, settings)):
        raise UsageError(
            f"{out} is of another loop: {'; '.join(other)}. Say the same to go on, or choose another --out "
            f"({' and '.join(FREE)} may change)"
        )
    return settings


def keep(out: Path, settings: Settings) -> None:
    """Note in its folder what a loop is told."""
    if settings != _read(out / KEPT):
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / KEPT, settings.model_dump(mode="json"))


def _read(note: Path) -> Settings | None:
    if not note.is_file():
        return None
    try:
        return Settings.checked(json.loads(note.read_text()), str(note))
    except json.JSONDecodeError as error:
        raise UsageError(f"{note} cannot be read ({error}): restore it, or choose another --out") from None


def _differences(before: Settings, now: Settings) -> list[str]:
    """What differs and may not, as `record.packs is 64 there and 8 here`."""
    there, here = _flat(before), _flat(now)
    return [
        f"{key} is {there[key]} there and {here[key]} here"
        for key in there
        if there[key] != here[key] and key.split(".")[0] not in FREE
    ]


def _flat(settings: Settings) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in settings.model_dump().items():
        out |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return out


def _unknown(where: str, place: tuple[int | str, ...]) -> UnknownName:
    section: Any = Settings
    for name in place[:-1]:
        section = section.model_fields[str(name)].annotation
    known = list(section.model_fields)
    key = ".".join(map(str, place))
    return UnknownName.among(f"key in {where}", key, [".".join([*map(str, place[:-1]), name]) for name in known])
