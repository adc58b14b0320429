"""Any world of ours as a Gymnasium environment: text in, text out, one episode a task, the tasks of a pack in turn.

    env = to_gymnasium(lake, lake.pack(4))
    text, info = env.reset()                  # the next task, from the first again after the last
    text, reward, terminated, truncated, info = env.step("<answer>3</answer>")

What carries an agent from task to task, its context, is the agent's business and not in here. What an environment itself remembers
is: it goes on from task to task of the pack, and is forgotten when the pack begins anew.
"""

from __future__ import annotations

import string
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cod_agent.environments.base import Environment, Form, Session, Split, awaited, started
from cod_agent.errors import MissingExtra, UsageError
from cod_agent.tasks import Observation, Pack

if TYPE_CHECKING:
    import gymnasium

CHARACTERS = string.printable
"""What the text spaces are made of. Gymnasium compares observations with them; answers may hold anything."""

NAMESPACE = "cod"
"""Of the ids under which Gymnasium knows our worlds."""


def to_gymnasium(
    environment: Environment, pack: Pack, *, longest: int = 16_384, longest_answer: int = 1024
) -> gymnasium.Env[str, str]:
    """`pack` of `environment` as a `gymnasium.Env` of text observations and text actions.

    A bare `reset()` goes on to the next task. `reset(seed=k)` and `reset(options={"position": k})` begin anew at task k
    (modulo the length of the pack), with an environment that remembers nothing; the hidden property comes from the pack,
    whatever the seed. `info` has the task's id, its position and prompt and, with the last observation, the words of the
    feedback. Feedback without a reward counts 0.

    Args:
        longest: bound of the observation space, in characters.
        longest_answer: bound of the action space, in characters.

    Raises:
        MissingExtra: gymnasium is not installed.
        UsageError: the pack is empty.
    """
    gymnasium = installed()
    if not len(pack):
        raise UsageError("an empty pack has no task to start")

    class PackEnv(gymnasium.Env[str, str]):  # type: ignore[name-defined]
        """The tasks of a pack, one an episode."""

        metadata: dict[str, Any] = {"render_modes": []}

        def __init__(self) -> None:
            self.observation_space = gymnasium.spaces.Text(longest, min_length=0, charset=CHARACTERS)
            self.action_space = gymnasium.spaces.Text(longest_answer, min_length=0, charset=CHARACTERS)
            self._position = -1
            self._session: Session | None = None
            self._carried: Any = None

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[str, dict[str, Any]]:
            super().reset(seed=seed)
            wanted = (options or {}).get("position", seed)
            self._position = (self._position + 1 if wanted is None else int(wanted)) % len(pack)
            if self._position == 0 or wanted is not None:
                self._carried = None
            self._session = started(environment, pack[self._position], self._carried)
            seen = awaited(self._session.reset())
            return seen.text, self._info(seen)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            if self._session is None:
                raise UsageError("no task is being lived: call reset() before step()")
            seen = awaited(self._session.step(action))
            self._carried = seen.carried if seen.done else self._carried
            reward = seen.feedback.reward if seen.feedback and seen.feedback.reward is not None else 0.0
            return seen.text, float(reward), seen.done, False, self._info(seen)

        def _info(self, seen: Observation) -> dict[str, Any]:
            task = pack[self._position]
            told = {"task": task.id, "position": self._position, "prompt": task.prompt}
            return {**told, "feedback": seen.feedback.text} if seen.feedback else told

    return PackEnv()


def make(
    world: str, *, seed: int = 0, pack: int = 0, size: int = 4, split: Split = "eval", form: Form = "natural"
) -> gymnasium.Env[str, str]:
    """A pack of a world as a `gymnasium.Env`: what stands behind the ids `cod/WORLD-PRESET-v0`.

    Args:
        world: as on the command line.
        seed, split, form: of the world.
        pack: which of its packs.
        size: tasks in it.

    Raises:
        MissingExtra, UsageError, UnknownName: see `to_gymnasium` and `make_world`.
    """
    from cod_agent.environments import make_world

    made = make_world(world, seed=seed, split=split, form=form)
    return to_gymnasium(made, made.pack(size, pack))


def register() -> list[str]:
    """Make `cod/WORLD-PRESET-v0` known to Gymnasium for every preset of every built-in world; returns all these ids.

    Gymnasium 1 loads no plugins: what is not imported, it does not know. `gymnasium.make("cod_agent.environments.gymnasium:ID")`
    imports this first.

    Raises:
        MissingExtra: gymnasium is not installed.
    """
    gymnasium = installed()
    from cod_agent.environments.named import WORLDS

    ids = []
    for world, (module, kind, _) in WORLDS.items():
        for preset in getattr(import_module(module), kind).presets:
            ids.append(f"{NAMESPACE}/{world}-{preset}-v0")
            if ids[-1] not in gymnasium.registry:
                gymnasium.register(ids[-1], f"{__name__}:make", kwargs={"world": f"{world}:{preset}"})
    return ids


def installed() -> ModuleType:
    """Gymnasium itself. Raises: MissingExtra, if it is not installed."""
    try:
        import gymnasium
    except ImportError:
        raise MissingExtra("a Gymnasium environment", "gymnasium") from None
    return gymnasium
