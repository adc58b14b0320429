"""Floors and ceilings: a world's players, played directly, against the same players lived through `CoDAgent`."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest

from cod_agent import CoDAgent, Task
from cod_agent.environments import make_world, packed
from cod_agent.environments.draws import randomness
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.players import floor_and_ceiling, life, played
from cod_agent.evaluation.statistics import curve
from cod_agent.models.scripted import ScriptedModel
from cod_agent.tasks import Feedback, Observation

LAKE = make_world("frozen-lake:small", seed=3)


def lived(world, name: str, packs: int, n: int, player, path: Path) -> np.ndarray:
    """The rewards of a player that lives a world's packs through an agent and a database."""
    model = ScriptedModel(f"scripted:{name}", player)
    with CoDAgent("agent", model=model, memory=path) as agent:
        return np.array([[seen.reward for seen in agent.run_sync(world.pack(n, index))] for index in range(packs)])


def first_choice(name: str, world=LAKE):
    """A world's player that never throws its dice: every draw is the first of the equally good answers."""

    class Dice:
        def random(self) -> float:
            return 0.0

    return world.players[name](Dice())


@pytest.mark.parametrize("packing", ["cod", "ralph-sample", "ralph-full"])
@pytest.mark.parametrize("name", ["memoryless", "perfect"])
def test_without_dice_the_rewards_are_those_of_the_agent(name: str, packing: str, tmp_path: Path) -> None:
    world = packed(make_world("frozen-lake:small", seed=3, form="compact"), packing)
    direct = [life(world, world.pack(3, index), first_choice(name)) for index in range(8)]
    assert (lived(world, name, 8, 3, first_choice(name), tmp_path / "runs.db") == np.array(direct)).all()


@pytest.mark.parametrize("name", ["alchemy:tiny", "grid-navigation:tiny", "grid-navigation:paper"])
def test_so_it_is_in_other_worlds_and_where_the_environment_itself_remembers(name: str, tmp_path: Path) -> None:
    world = make_world(name, seed=3, form="compact")
    for player in world.players:
        direct = [life(world, world.pack(3, index), first_choice(player, world)) for index in range(3)]
        theirs = lived(world, player, 3, 3, first_choice(player, world), tmp_path / f"{player}.db")
        assert (theirs == np.array(direct)).all()


def test_with_dice_the_curves_are_those_of_the_agent(tmp_path: Path) -> None:
    """Other dice, the same packs: at each position the difference is within what the dice can do."""
    world = make_world("frozen-lake:small", seed=3, form="compact")
    agents = lived(world, "perfect", 60, 3, world.players["perfect"](Random(1)), tmp_path / "runs.db")
    direct = played(LAKE, "perfect", 600, 3)
    for theirs, ours in zip(agents.T, direct.T, strict=True):
        spread = math.sqrt(ours.var() * (1 / 60 + 1 / 600))
        assert abs(theirs.mean() - ours.mean()) < 3.5 * spread + 0.01


def test_the_form_of_the_world_does_not_matter() -> None:
    natural, compact = LAKE, make_world("frozen-lake:small", seed=3, form="compact")
    assert (played(natural, "perfect", 20, 3) == played(compact, "perfect", 20, 3)).all()


def test_dice_are_stable_and_of_each_pack() -> None:
    few, many = played(LAKE, "memoryless", 10, 3), played(LAKE, "memoryless", 40, 3)
    assert (few == many[:10]).all()
    assert (played(LAKE, "memoryless", 40, 3) == many).all()
    assert (played(LAKE, "memoryless", 40, 3, seed=1) != many).any()
    assert (played(make_world("frozen-lake:small", seed=4), "memoryless", 40, 3) != many).any()


def test_the_ceiling_is_above_the_floor() -> None:
    found = floor_and_ceiling(LAKE, 200, 3)
    assert found is not None
    floor, ceiling = found
    assert ceiling.points[2].low > floor.points[2].high
    assert ceiling == curve(played(LAKE, "perfect", 200, 3))


class Cellar:
    """A world of one door, which its environment remembers having opened; its name is none of the built-in ones."""

    name, form, remembers = "cellar:dark", "compact", True

    def start(self, task: Task, carried: object = None) -> Cellar:
        made = Cellar()
        made.opened = carried
        return made

    def reset(self) -> Observation:
        return Observation("open" if self.opened else "shut")

    def step(self, answer: str) -> Observation:
        reward = 1.0 if self.opened else 0.0
        return Observation(answer, done=True, feedback=Feedback(reward=reward, text="seen"), carried="opened")


def test_an_environment_that_remembers_is_handed_on() -> None:
    tasks = [Task(id=str(number)) for number in range(3)]
    assert life(Cellar(), tasks, lambda messages: "push") == [0.0, 1.0, 1.0]


def test_a_refused_note_keeps_the_last_good_one() -> None:
    seen: list[str] = []
    answers = iter(["push", "<context>\nfirst\n</context>", "push", "no note at all", "push"])

    def player(messages) -> str:
        seen.append(messages[0].content)
        return next(answers)

    life(Cellar(), [Task(id=str(number)) for number in range(3)], player)
    assert seen[4].startswith("<context>\nfirst\n</context>\n")


def test_what_cannot_be_played_is_said() -> None:
    assert floor_and_ceiling(Cellar(), 4, 2) is None
    with pytest.raises(UnknownName, match="perfect"):
        played(LAKE, "perfct", 4, 2)

    class Natural(Cellar):
        form, players = "natural", LAKE.players

    with pytest.raises(UsageError, match="form='compact'"):
        played(Natural(), "perfect", 4, 2)


def test_a_player_s_dice_are_its_own() -> None:
    """Drawn from stable randomness, not from Python's own."""
    pack = make_world("frozen-lake:small", seed=3, form="compact").pack(3)
    mine = life(pack.environment, pack, LAKE.players["memoryless"](randomness("player", "memoryless", 0, pack.id)))
    assert mine == played(LAKE, "memoryless", 1, 3)[0].tolist()
