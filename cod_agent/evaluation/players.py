"""The floor and the ceiling of a world: its scripted players, played directly.

No agent, no database, no journal: sessions, the compact prompts and the parser of updates, and nothing else. So the two curves cost
next to nothing and can stand beside every result. A player gets the same prompts as through `CoDAgent`, in the compact form, whatever
form the world at hand talks in: what there is to be had is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cod_agent.context import COMPACT, Message, Trajectory, Turn, UpdateRefused, message, parse_update
from cod_agent.environments import make_world
from cod_agent.environments.base import Environment, started
from cod_agent.environments.draws import randomness
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.statistics import Curve, Rewards, curve

if TYPE_CHECKING:
    from cod_agent.environments.drawn import PlainSession
    from cod_agent.environments.packing import World
    from cod_agent.environments.players import Player
    from cod_agent.tasks import Observation, Task

FLOOR, CEILING = "memoryless", "perfect"
"""The players that every world with players has: the best that remembers nothing, one that remembers everything."""

LIMIT = 4000
"""Characters of a context, as `CoDAgent` has it by default."""


def floor_and_ceiling(world: World, packs: int, n: int) -> tuple[Curve, Curve] | None:
    """Reward by position of the memoryless player and of the one that remembers, over a world's first packs.

    Args:
        world: in either form, packed in any way.
        packs: how many packs.
        n: tasks of each.

    Returns: None for a world that has not both players.
    """
    if not {FLOOR, CEILING} <= set(getattr(world, "players", None) or {}):
        return None
    return curve(played(world, FLOOR, packs, n)), curve(played(world, CEILING, packs, n))


def played(world: World, player: str, packs: int, n: int, *, seed: int = 0) -> Rewards:
    """The rewards of one player of a world. Equal arguments give equal rewards, and more packs begin with those of fewer.

    Args:
        world: in either form, packed in any way.
        player: one of its `players`.
        packs: how many packs.
        n: tasks of each.
        seed: of the player's dice; the packs are the world's own.

    Returns: shape [packs, n].

    Raises:
        UnknownName: the world has no such player.
        UsageError: the player reads the compact form, and the world can be had in the natural one only.
    """
    players = getattr(world, "players", None) or {}
    if player not in players:
        raise UnknownName.among(f"player of {world.name}", player, list(players))
    compact, rewards = _in_compact(world), np.full((packs, n), np.nan)
    for index in range(packs):
        pack = world.pack(n, index)
        dice = randomness("player", player, seed, pack.id)
        rewards[index] = life(compact, pack, players[player](dice))
    return rewards


def life(environment: Environment, tasks: Sequence[Task], player: Player) -> list[float]:
    """A player's rewards for tasks in order, with an update of its note after each but the last; NaN where none was given.

    Args:
        environment: plain (not `async`), in the compact form.
    """
    note, carried, rewards = "", None, []
    for position, task in enumerate(tasks):
        session = cast("PlainSession", started(environment, task, carried))
        trajectory = _episode(session, task, note, player)
        last = trajectory.turns[-1].observation
        feedback, carried = last.feedback, last.carried
        rewards.append(np.nan if feedback is None or feedback.reward is None else feedback.reward)
        if feedback is not None and position + 1 < len(tasks):  # as declared packs: none after the last
            note = _updated(player(COMPACT.update(task, note, trajectory, feedback)), note)
    return rewards


def _episode(session: PlainSession, task: Task, note: str, player: Player) -> Trajectory:
    first = seen = session.reset()
    said, turns = COMPACT.solve(task, note, first), list[Turn]()
    while not seen.done:
        answer = player(said)
        seen = session.step(answer)
        turns.append(Turn(answer, seen))
        said = [*said, *_turn(answer, seen)]
    return Trajectory(first, tuple(turns))


def _turn(answer: str, seen: Observation) -> tuple[Message, Message]:
    return message("assistant", ("model", answer)), message("user", ("environment", seen.text))


def _updated(answer: str, note: str) -> str:
    """The new note; the last good one, where the answer is none."""
    try:
        return parse_update(answer, LIMIT)
    except UpdateRefused:
        return note


def _in_compact(world: World) -> Any:
    """An environment that starts the world's tasks in the compact form: a built-in one's task says everything about itself."""
    if getattr(world, "form", "natural") == "compact":
        return world
    try:
        return make_world(world.name, form="compact")
    except UnknownName as error:
        made = f"{world.name} is none of the built-in worlds: make it with form='compact' for its players"
        raise UsageError(made) from error
