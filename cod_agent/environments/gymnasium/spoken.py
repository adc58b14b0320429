"""What a Gymnasium environment would say, had it words: its observations, its actions, its documentation."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cod_agent.environments.gymnasium.exported import installed
from cod_agent.errors import UsageError

if TYPE_CHECKING:
    import gymnasium

_TOLD = ("", "Description", "Action Space", "Observation Space", "Starting State", "Rewards?", "Episode End")
"""Sections of an environment's documentation that help whoever acts in it, as Gymnasium's own environments have them."""

_MANY = 20


def described(space: gymnasium.Space[Any], observation: Any) -> str:
    """An observation in words: text as it is, numbers to four digits, what has parts part by part."""
    spaces = installed().spaces
    if isinstance(space, spaces.Dict):
        return "\n".join(f"{key}: {described(part, observation[key])}" for key, part in space.items())
    if isinstance(space, spaces.Tuple):
        return ", ".join(described(part, seen) for part, seen in zip(space.spaces, observation, strict=True))
    if isinstance(space, spaces.Box | spaces.MultiBinary | spaces.MultiDiscrete):
        import numpy as np

        return np.array2string(np.asarray(observation), precision=4, suppress_small=True, separator=", ")
    return str(observation)


def actions_in(space: gymnasium.Space[Any], name: str) -> dict[str, Any] | None:
    """Names of all actions of a space: the numbers of a discrete one; None for text, which names itself.

    Raises:
        UsageError: the space is neither.
    """
    spaces = installed().spaces
    if isinstance(space, spaces.Text):
        return None
    if isinstance(space, spaces.Discrete):
        first = int(space.start)
        return {str(action): action for action in range(first, first + int(space.n))}
    raise UsageError(f"the actions of {name} are {space}: name some of them, actions={{'left': ..., 'right': ...}}")


def listed(names: Mapping[str, Any]) -> str:
    """The names of actions, for a prompt."""
    said = list(names)
    return ", ".join(said) if len(said) <= _MANY else f"{', '.join(said[:3])}, ..., {said[-1]}"


def documented(environment: gymnasium.Env[Any, Any], *, actions: bool) -> str:
    """What the environment's documentation says to whoever acts in it; `actions=False` leaves out which action does what."""
    text = inspect.getdoc(type(environment.unwrapped)) or ""
    heading, *sections = re.split(r"^#+ +(.*?) *$\n", "\n" + text, flags=re.MULTILINE)
    parts = [("", heading), *zip(sections[::2], sections[1::2], strict=True)]
    kept = [kind for kind in _TOLD if actions or kind != "Action Space"]
    told = [(f"{title}:\n" if title else "") + body.strip() for title, body in parts if _is_one_of(kept, title)]
    return "\n\n".join(part for part in told if part)


def _is_one_of(kinds: list[str], title: str) -> bool:
    return any(re.fullmatch(kind, title) for kind in kinds)
