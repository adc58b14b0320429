"""What the registry tells: checkpoints, their changes of state, and what the gate said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cod_train.checkpoint_files import Kind

State = Literal["candidate", "promoted", "retired", "rejected"]

DIGITS = 12
"""Of a digest, in the name of weights."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights that can be served, and where they come from."""

    name: str
    parent: str | None
    """What it was trained from."""
    state: State
    kind: Kind
    folder: Path
    """Hugging Face form, or PEFT form for an adapter; absolute."""
    base: Path | None
    """An adapter's base folder."""
    digest: str
    """SHA-256 over what is served."""
    gguf: Path | None
    gguf_weights: str
    """What `GgufModel.weights` says of the file; "" if there is none."""
    template: str
    """SHA-256 of the chat template."""
    config: dict[str, Any]
    code: str
    """The version of this package that added it, and its commit where it lies in a git checkout."""
    created: float

    @property
    def weights(self) -> str:
        """The name its servers answer to, which is on record with every call."""
        return weights_of(self.name, self.digest)

    def json(self) -> dict[str, Any]:
        """For `--json`."""
        paths = {key: None if (path := getattr(self, key)) is None else str(path) for key in ("folder", "base", "gguf")}
        kept = ("name", "parent", "state", "kind", "digest", "gguf_weights", "template", "config", "code", "created")
        return {"weights": self.weights, **{key: getattr(self, key) for key in kept}, **paths}


@dataclass(frozen=True, slots=True)
class Change:
    """A checkpoint's change of state."""

    checkpoint: str
    act: str
    """add, promote, reject or rollback"""
    before: State | None
    after: State
    why: str
    verdict: int | None
    when: float

    def json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.__slots__}


@dataclass(frozen=True, slots=True)
class KeptVerdict:
    """What the promotion gate said."""

    id: int
    candidate: str
    incumbent: str | None
    promoted: bool
    said: dict[str, Any]
    created: float

    def json(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in self.__slots__}


def weights_of(name: str, digest: str) -> str:
    """The name under which a model server serves a checkpoint."""
    return f"{name}@{digest[:DIGITS]}"


def standing_promotions(history: Sequence[Change]) -> list[str]:
    """What was promoted and not taken back, oldest first."""
    out: list[str] = []
    for change in history:
        if change.act == "promote" and change.after == "promoted":
            out.append(change.checkpoint)
        elif change.before == "promoted" and change.act in ("rollback", "reject"):
            out.pop()
    return out
