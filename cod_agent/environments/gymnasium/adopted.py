"""Any Gymnasium environment with text or discrete actions as a world of ours.

    world = from_gymnasium("CliffWalking-v1", shuffled=True, score=lambda total: max(0.0, 1 + total / 100))

Each task is an episode: reset with a seed drawn for it (of 2**30, and in the train split never one of the eval split), one
action an answer, until the environment ends or cuts it. What the tasks of a pack share is in how it is made: from the pack's own seed,
and with actions that may be shuffled for the whole pack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cod_agent.environments.answers import tagged
from cod_agent.environments.base import MALFORMED, Form, Recovery, Split
from cod_agent.environments.drawn import DrawnWorld, Place
from cod_agent.environments.draws import below, randomness, shuffled
from cod_agent.environments.gymnasium.exported import installed
from cod_agent.environments.gymnasium.spoken import actions_in, described, documented, listed
from cod_agent.environments.players import Players
from cod_agent.errors import UsageError
from cod_agent.tasks import Feedback, Observation

if TYPE_CHECKING:
    import gymnasium

    Env = gymnasium.Env[Any, Any]

Render = Callable[[Any], str]
"""Observation -> text."""

STEPS = 100
"""Of a task, where neither the caller nor the environment sets a limit."""

TERMINATED, TRUNCATED = "terminated", "truncated"
"""The `Feedback.ending` of an episode that ended by itself, and of one that was cut."""


def _identity(total: float) -> float:
    return total


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How an environment is made into a world; see `from_gymnasium`."""

    make: Callable[[int], Env]
    """Pack seed -> environment."""
    prompt: str
    actions: Mapping[str, Any] | None
    """By name; None: answers are the actions."""
    shuffled: bool
    render: Render
    compact: Render | None
    score: Callable[[float], float]
    malformed: float
    steps: int


class GymnasiumWorld(DrawnWorld[Wrapping]):
    """A world made of a Gymnasium environment: see `from_gymnasium`."""

    world = "gymnasium"

    def __init__(self, name: str, wrapping: Wrapping, seed: int, split: Split, form: Form) -> None:
        self.presets = {name: wrapping}  # type: ignore[misc]  # its one preset is its own
        super().__init__(name, seed, split=split, form=form)
        if wrapping.compact is None:
            self.form = "natural"

    def rules(self) -> str:
        return self.preset.prompt

    def session(self, place: Place) -> EpisodeSession:
        names, preset = (self.world, place.preset, place.split, place.seed, place.pack), self.preset
        actions = preset.actions
        if actions and preset.shuffled:
            meant = shuffled(randomness(*names, "actions"), list(actions.values()))
            actions = dict(zip(actions, meant, strict=True))
        render = preset.compact if self.form == "compact" and preset.compact else preset.render
        make, pack_seed = preset.make, _seed(place.split, *names, "pack")
        return EpisodeSession(
            lambda: make(pack_seed), _seed(place.split, *names, place.index), preset, actions, render, self.form
        )


class EpisodeSession:
    """One episode of an environment, which is made when it begins and closed when it ends."""

    def __init__(
        self,
        make: Callable[[], Env],
        seed: int,
        wrapping: Wrapping,
        actions: Mapping[str, Any] | None,
        render: Render,
        form: Form,
    ) -> None:
        self._make, self._seed, self._wrapping, self._actions = make, seed, wrapping, actions
        self._render, self._compact = render, form == "compact"
        self._env: Env | None = None
        self._step, self._total, self._seen = 0, 0.0, ""

    def reset(self) -> Observation:
        """Make the environment and look."""
        self._env, self._step, self._total = self._make(), 0, 0.0
        observation, _ = self._env.reset(seed=self._seed)
        self._seen = self._render(observation)
        return Observation(self._view(""))

    def step(self, answer: str) -> Observation:
        """Take one action; an answer that names none ends the episode.

        Raises:
            UsageError: the episode has not begun, or was already over.
        """
        if self._env is None:
            raise UsageError("there is no episode to go on with: call reset() first")
        known, action = self._action(answer, self._env)
        if not known:
            told = "invalid" if self._compact else f"The answer was malformed: {self._expected()} was expected."
            return self._end(told, "invalid" if self._compact else "", self._wrapping.malformed, MALFORMED)
        name, before = self._said(answer) or "", self._seen
        observation, reward, terminated, truncated, _ = self._env.step(action)
        self._step, self._total, self._seen = self._step + 1, self._total + float(reward), self._render(observation)
        effect = f"{before} {name} {self._seen} {reward:g}" if self._compact else f"{name}: reward {reward:g}."
        if not (terminated or truncated or self._step >= self._wrapping.steps):
            return Observation(self._view(effect), effect if self._compact else "")
        ending = TERMINATED if terminated else TRUNCATED
        how = "ended by itself" if terminated else "was cut off"
        told = f"The episode {how} after {self._step} steps; its rewards add up to {self._total:g}."
        return self._end(ending if self._compact else told, effect, self._wrapping.score(self._total), ending)

    def _said(self, answer: object) -> str | None:
        """The action an answer names; None where it does not stand where it belongs."""
        if not self._compact:
            return tagged(answer)
        return answer.strip() if isinstance(answer, str) else None

    def _action(self, answer: object, env: Env) -> tuple[bool, Any]:
        """Whether the answer names an action, and which."""
        said = self._said(answer)
        if said is None:
            return False, None
        if self._actions is None:
            return env.action_space.contains(said), said
        return said in self._actions, self._actions.get(said)

    def _expected(self) -> str:
        what = "a text" if self._actions is None else f"exactly one of {listed(self._actions)}"
        return f"{what} between answer tags"

    def _view(self, effect: str) -> str:
        if self._compact:
            return f"{effect}\n{self._seen}" if effect else self._seen
        said = f" {effect}" if effect else ""
        return f"Step {self._step + 1} of {self._wrapping.steps}.{said}\n{self._seen}"

    def _end(self, told: str, effect: str, reward: float, ending: str) -> Observation:
        if self._env is not None:
            self._env.close()
        self._env = None
        text = (effect if self._compact else f"{effect} {told}\n{self._seen}").strip()
        return Observation(text, effect, done=True, feedback=Feedback(reward=float(reward), text=told, ending=ending))


def from_gymnasium(
    made: str | Callable[[int], Env],
    *,
    name: str | None = None,
    prompt: str | None = None,
    actions: Mapping[str, Any] | None = None,
    shuffled: bool = False,
    render: Render | None = None,
    compact: Render | None = None,
    score: Callable[[float], float] = _identity,
    malformed: float = 0.0,
    steps: int | None = None,
    players: Players | None = None,
    seed: int = 0,
    split: Split = "eval",
    form: Form = "natural",
) -> GymnasiumWorld:
    """A Gymnasium environment as a world: `pack(n, index)`, `start(task)`, both splits, whatever it observes.

    Args:
        made: an id of the registry, or a function from the pack's seed to an environment: what it draws from that seed, the tasks of
            a pack share.
        name: of the world; `gymnasium:ID` if not given, which a function cannot do without.
        prompt: the rules; what the environment's documentation says if not given.
        actions: the actions by name; if not given, a discrete space's numbers, and any text of a text space.
        shuffled: whether what the names mean is hidden: a permutation, drawn for each pack.
        render: observation -> text of the natural form; a plain description if not given.
        compact: observation -> text of the compact form, best in one line; without it there is none, whatever `form` says. A step
            is shown, and summed up, as `BEFORE ACTION AFTER REWARD`; the observation stands in a line of its own below.
        score: sum of an episode's rewards -> the task's reward, best in [0, 1]; the sum itself if not given.
        malformed: reward of an answer that names no action. It should be worse than any `score`: where sums can be negative, give a
            `score` that is not, or ending early pays.
        steps: most of a task; the environment's own limit, or 100, if not given.
        players: scripted ones, for the world's floor and ceiling; they read the compact form.
        seed, split, form: as of any world.

    Raises:
        MissingExtra: gymnasium is not installed.
        UsageError: there is no such environment, it needs a package that is missing, or its actions have no names.
        UnknownName: no such split or form.
    """
    gymnasium = installed()
    if not isinstance(made, str) and name is None:
        raise UsageError("a world made of a function has no name of its own: from_gymnasium(..., name='cliff')")
    make = made if callable(made) else _registered(made)
    try:
        probe = make(0)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise UsageError(f"gymnasium cannot make {name or made}: {error}") from error
    with_names = dict(actions) if actions is not None else actions_in(probe.action_space, str(name or made))
    if shuffled and with_names is None:
        raise UsageError(f"the actions of {name or made} are texts, which cannot be shuffled: name some with actions=")
    space = probe.observation_space
    wrapping = Wrapping(
        make,
        prompt if prompt is not None else _prompt(probe, with_names, shuffled),
        with_names,
        shuffled,
        render or (lambda observation: described(space, observation)),
        compact,
        score,
        malformed,
        steps or (probe.spec.max_episode_steps if probe.spec else None) or STEPS,
    )
    world = GymnasiumWorld(made if isinstance(made, str) else str(name), wrapping, seed, split, form)
    world.name = name or world.name
    world.recovery = _recovery(probe)
    if players is not None:
        world.players = players  # type: ignore[misc]  # as its preset
    probe.close()
    return world


def _registered(environment: str) -> Callable[[int], Env]:
    def make(pack_seed: int) -> Env:
        # What its passive checker would find is the environment's business, and costs time each step.
        return installed().make(environment, disable_env_checker=True)

    return make


def _recovery(env: Env) -> Recovery:
    """Steps are taken again after a crash, unless the environment says itself that they lead elsewhere."""
    return "abort" if env.spec is not None and env.spec.nondeterministic else "deterministic"


def _seed(split: Split, *names: object) -> int:
    """A seed for Gymnasium: even ones are for training, odd ones for evaluation."""
    return 2 * below(randomness(*names), 2**30) + (split == "eval")


def _prompt(env: Env, actions: Mapping[str, Any] | None, hidden: bool) -> str:
    about = documented(env, actions=not hidden)
    parts = [f"You act in the environment described here.\n\n{about}" if about else "You act in an environment."]
    if hidden:
        parts.append(
            "Which action does what is not told. It is the same for all tasks of this series, so what you find out by trying also "
            "helps in later tasks."
        )
    if actions is None:
        parts.append("Answer each turn with what you do between answer tags, for example:\n<answer>look</answer>")
    else:
        example = next(iter(actions))
        parts.append(
            f"Answer each turn with exactly one of {listed(actions)} between answer tags, for example:\n<answer>{example}</answer>"
        )
    return "\n\n".join([*parts, "Anything else ends the task."])
