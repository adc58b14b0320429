"""What the built-in worlds have in common: packs drawn from seeds, in two splits and two forms.

A task names its place (preset, split, seed, pack, index) and nothing else, so that it can be set up again from its JSON and
tells no secret. What a place looks like is a function of it: what the tasks of a pack share is drawn from the pack's names, what is
a task's own from those and its index.

A world is a subclass:

    class Shop(DrawnWorld[Preset]):
        world, presets = "shop", {"small": Preset(...)}

        def rules(self) -> str: ...                        # the natural form's prompt of every task
        def session(self, place: Place) -> PlainSession: ...    # a fresh session, which answers as `self.form` says
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar, get_args

from cod_agent.environments.base import SPLITS, Form, Recovery, Split
from cod_agent.environments.draws import below, randomness
from cod_agent.environments.players import Players
from cod_agent.errors import UnknownName, UsageError
from cod_agent.tasks import Observation, Pack, Task

P = TypeVar("P")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a task stands among all tasks of its world."""

    preset: str
    split: Split
    seed: int
    pack: int
    index: int
    """Of the task in its pack."""


def carried_number(*names: object) -> int:
    """What `Observation.carried` calls the pack of these names, so that nothing is taken for another pack's.

    A number: a text would be changed by a `redact` that takes what is in it for a secret, and all be forgotten.
    """
    return below(randomness(*names, "carried"), 2**48)


def not_carried(world: str) -> UsageError:
    """What starting a session raises for something `carried` that no session of the world gave."""
    return UsageError(f"a session of {world} goes on from what the run's last observation carried, and this is not it")


class PlainSession(Protocol):
    """A `Session` that is not `async`."""

    def reset(self) -> Observation: ...

    def step(self, answer: str) -> Observation: ...


class DrawnWorld(Generic[P]):
    """A built-in world: an `Environment` and the packs to live in it.

    Args:
        preset: one of `presets`.
        seed: which packs; any whole number. Equal seeds of the two splits have nothing in common.
        split: train or eval; the two share nothing.
        form: natural (sentences) or compact (what the shipped tiny policies speak).

    Raises:
        UnknownName: no such preset, split or form.
    """

    world: ClassVar[str]
    """Its name on the command line."""
    presets: ClassVar[Mapping[str, Any]]
    """By name; of type P."""
    players: ClassVar[Players]
    recovery: Recovery = "deterministic"

    def __init__(self, preset: str, seed: int = 0, *, split: Split = "eval", form: Form = "natural") -> None:
        if preset not in self.presets:
            raise UnknownName.among(f"{self.world} preset", str(preset), list(self.presets))
        if split not in SPLITS:
            raise UnknownName.among("split", str(split), list(SPLITS))
        if form not in get_args(Form):
            raise UnknownName.among("form", str(form), list(get_args(Form)))
        self.preset: P = self.presets[preset]
        self.name, self.form, self.seed, self.split = f"{self.world}:{preset}", form, int(seed), split
        self._preset = preset

    def rules(self) -> str:
        """What the solver is told of every task of the world, in the natural form."""
        raise NotImplementedError

    def session(self, place: Place) -> PlainSession:
        """A fresh session of the task at `place`."""
        raise NotImplementedError

    def pack(self, n: int, index: int = 0) -> Pack:
        """The `index`-th pack of `n` tasks. A longer pack of the same index begins with the tasks of a shorter one.

        Raises:
            UsageError: `n` is not positive, or `index` negative.
        """
        if n < 1 or index < 0:
            raise UsageError(f"a pack has at least one task and an index from 0 on, not n={n}, index={index}")
        name = f"{self.name}/{self.split}/{self.seed}/{index}"
        origin = {"preset": self._preset, "split": self.split, "seed": self.seed, "pack": index}
        prompt = "" if self.form == "compact" else self.rules()
        tasks = tuple(Task(id=f"{name}/{i}", prompt=prompt, data={**origin, "index": i}) for i in range(n))
        return Pack(name, tasks, self, origin)

    def packs(self, count: int, n: int) -> Iterator[Pack]:
        """The first `count` packs of `n` tasks."""
        return (self.pack(n, index) for index in range(count))

    def start(self, task: Task) -> PlainSession:
        """A session of `task`.

        Raises:
            UsageError: the task is not one of this world and preset.
        """
        return self.session(self.place(task))

    def place(self, task: Task) -> Place:
        """Where a task stands. Raises: UsageError, if it is not one of this world and preset."""
        data: dict[str, Any] = task.data
        numbers = all(isinstance(data.get(key), int) for key in ("seed", "pack", "index"))
        if not numbers or data.get("preset") != self._preset or data.get("split") not in SPLITS:
            made = f"{type(self).__name__}.pack(n, index)"
            raise UsageError(f"{task.id!r} is no task of {self.name}: make tasks with {made}")
        return Place(data["preset"], data["split"], data["seed"], data["pack"], data["index"])
