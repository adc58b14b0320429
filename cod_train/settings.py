"""The part of a training config that is ours, checked: `data.*` says what is lived, `cod.*` how it is credited and laid out.

Everything else in a config is verl's own (docs/training.md names the dials that matter).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cod_agent.errors import UsageError
from cod_train.batch import Credit, Shaping
from cod_train.estimate import Gpu, Shape

DEVICE = "COD_TRAIN_DEVICE"
"""Environment variable, cpu or gpu: what a run computes on, decided once, by its driver, for all its processes."""

CPU_BACKEND = "cod_cpu"
"""`rollout.name` on a machine without a GPU."""

DISAGREEMENT = 0.1
"""Nats between what sampled and what trains that are too many: a few optimizer steps on fresh rollouts are a hundredth of it."""

OURS_IN_DATA = [
    "source",
    "world",
    "form",
    "pack_size",
    "train_packs",
    "eval_packs",
    "eval_seed",
    "recorded",
    "recorded_share",
    "max_staleness",
]


class Settings(BaseModel):
    """All that this project's trainer is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "trained"
    """Of the model, in the record; weights are called NAME/step-N."""
    # What is lived.
    source: Literal["live", "recorded", "mixed"] = "live"
    world: str | tuple[str, ...] = "frozen-lake:small"
    """One, or several to take packs of in turn."""
    form: Literal["natural", "compact"] = "natural"
    pack_size: int = Field(4, ge=1)
    train_packs: int = Field(1_000_000, ge=1)
    eval_packs: int = Field(64, ge=1)
    seed: int = 0
    eval_seed: int = 7
    """Not the seed that `cod run` and `cod eval` take: what they recorded may be trained on."""
    recorded: tuple[str, ...] = ()
    """Run databases, for source=recorded|mixed."""
    recorded_share: float = Field(0.5, gt=0, lt=1)
    """Of a step's packs, for source=mixed."""
    max_staleness: int = Field(20, ge=0)
    """Steps of training after which what older weights recorded is not trained on any more."""
    # How the agent lives it.
    max_tokens: int = Field(..., ge=1)
    """Longest answer, in tokens."""
    context_length: int | None = None
    """Longest conversation with its answer, in tokens."""
    max_context: int = Field(4000, ge=1)
    """Longest context, in characters."""
    gate: Literal["open", "quarantine"] = "open"
    """What becomes of updates in live packs, as where the policy is deployed (`cod_agent.trust.write_gate`)."""
    template: dict[str, Any] = {}
    """Variables of the chat template, such as enable_thinking; say the same where the policy is served."""
    solver: str | None = None
    """module:function, called with (base_url, model): a solver that speaks HTTP, lived live; None: the runtime's own."""
    keep_rollouts: bool = True
    """Whether the run databases of past steps stay."""
    # What rollouts are worth.
    credit: Credit = Credit()
    format_penalty: float = Field(0.1, ge=0)
    """Taken for an update that was refused."""
    shaping: Shaping = Shaping()
    # How rows are laid out.
    merge: bool = True
    """Calls that continue one another as one row; off only to compare."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps of a step."""
    micro_batches: int | None = Field(None, ge=1)
    """Parts of a mini-batch that are computed at once; None: as many tokens as ppo_max_token_len_per_gpu says."""
    poll_interval: float = Field(0.05, gt=0)
    """Seconds between two looks whether all rollouts have come."""
    # What --dry-run reckons with where it cannot look.
    model_shape: Shape | None = None
    """Of a model that is not there yet; a folder's config.json says it itself."""
    gpu: Gpu = Gpu()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        if self.source != "live" and not self.recorded:
            raise ValueError(f"source={self.source} needs data.recorded: the run databases to train from")
        if self.source == "live" and self.recorded:
            raise ValueError("data.recorded is given and source=live: say data.source=recorded or mixed")
        return self

    @classmethod
    def of(cls, config: Any) -> Settings:
        """Out of a composed hydra config.

        Raises:
            UsageError: with what is wrong and where.
        """
        from omegaconf import OmegaConf

        given = {
            name: OmegaConf.select(config, f"data.{name}")
            for name in OURS_IN_DATA
            if OmegaConf.select(config, f"data.{name}") is not None
        }
        plain = OmegaConf.to_container(OmegaConf.create({**given, **config.get("cod", {})}), resolve=True)
        seed = OmegaConf.select(config, "data.seed")
        return cls.checked({**plain, "seed": 0 if seed is None else seed})  # type: ignore[dict-item]

    @classmethod
    def checked(cls, given: dict[str, Any]) -> Settings:
        """Raises: UsageError, with what is wrong and where."""
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            lines = [f"  {_where(one['loc'])}: {one['msg']}" for one in error.errors()]
            raise UsageError("the training config does not hold together:\n" + "\n".join(lines)) from None

    @property
    def worlds(self) -> tuple[str, ...]:
        return (self.world,) if isinstance(self.world, str) else self.world

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(file) for file in self.recorded)


def _where(place: Sequence[Any]) -> str:
    first = str(place[0]) if place else ""
    section = "data." if first in OURS_IN_DATA else "cod."
    return section + ".".join(map(str, place)) if place else "the whole"
