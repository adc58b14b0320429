"""What every built-in world promises, whichever it is: no answer breaks it, tasks come back from their JSON, lives survive a crash."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from cod_agent import CoDAgent, Message
from cod_agent.environments import WORLDS, make_world
from cod_agent.environments.base import MALFORMED, started
from cod_agent.environments.draws import below, randomness
from cod_agent.errors import ModelError, UsageError
from cod_agent.evaluation.players import CEILING, FLOOR, life, played
from cod_agent.evaluation.statistics import difference
from cod_agent.memory.verify import verify
from cod_agent.models.scripted import ScriptedModel
from cod_agent.tasks import Observation, Task

ALL = [
    f"{world}:{preset}"
    for world, (module, kind, _) in sorted(WORLDS.items())
    for preset in getattr(import_module(module), kind).presets
]

NASTY: tuple[Any, ...] = (
    "", " ", "\n", "\x00", "None", "null", "nan", "-inf", "1e999", "٣", "²", "🙂" * 50, "\ud800", "\u202e\u200b",
    "%s%n{0}{x.__class__}",
    "__import__('os').system('true')", "(lambda: 0)()", "().__class__.__bases__", 
    "'; DROP TABLE runs; --", "$(touch x)", "`id`", "../../etc",
    "<answer>", "</answer>", "</answer><answer>", "<answer><answer>1</answer></answer>", "<answer></answer>", "<think>1</think>",
    "(" * 5_000, "-" * 5_000, "9**" * 400 + "9", "a" * 100_000, "1,1;" * 20_000, "<answer>" * 2_000, None, 7, b"1", ["1"], {"a": 1},
)  # fmt: skip


def answers_to(form: str) -> list[Any]:
    """Each as it is, and as the natural form wants it."""
    tagged = [f"<answer>{said}</answer>" for said in NASTY if isinstance(said, str)] if form == "natural" else []
    return [*NASTY, *tagged]


def seen(observation: Observation) -> list[Any]:
    told = observation.feedback
    return [observation.text, observation.summary, observation.done, told and json.loads(told.model_dump_json())]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("form", ["natural", "compact"])
def test_no_answer_breaks_a_session_or_wins_by_accident(name: str, form: str) -> None:
    world = make_world(name, seed=3, form=form)
    task = world.pack(2)[1]
    for answer in answers_to(form):
        session = started(world, task)
        assert session.reset().done is False
        told = session.step(answer)
        assert told.done == (told.feedback is not None) and len(told.text) < 20_000
        if not isinstance(answer, str) or not answer.strip():
            assert told.done and told.feedback.ending == MALFORMED and told.feedback.reward <= 0, answer
        if told.done:
            assert told.feedback.ending and told.feedback.text, answer
            with pytest.raises(UsageError):
                session.step("again")


@pytest.mark.parametrize("name", ALL)
def test_a_task_comes_back_from_its_json_and_the_same_answers_from_the_world(name: str) -> None:
    for form in ("natural", "compact"):
        one, other = make_world(name, seed=4, form=form), make_world(name, seed=9, form=form)
        pack = one.pack(3, 2)
        assert pack.tasks == one.pack(4, 2).tasks[:3] and len({task.fingerprint for task in pack}) == 3
        sessions = [started(one, pack[2]), started(other, Task.model_validate_json(pack[2].model_dump_json()))]
        assert seen(sessions[0].reset()) == seen(sessions[1].reset())
        for answer in ("<answer>1</answer>", "Direction 1", "stop"):
            told = [session.step(answer) for session in sessions]
            assert seen(told[0]) == seen(told[1])
            if told[0].done:
                break


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("wrong", [{}, {"preset": "tiny2"}, {"index": "0"}, {"split": "test"}, {"seed": None}])
def test_a_task_of_elsewhere_is_an_error_of_use(name: str, wrong: dict[str, Any]) -> None:
    world = make_world(name)
    data = {**world.pack(1)[0].data, **wrong} if wrong else {}
    with pytest.raises(UsageError):
        world.start(Task(id="x", data=data))


@pytest.mark.parametrize("name", [name for name in ALL if getattr(make_world(name), "remembers", False)])
@pytest.mark.parametrize("carried", [7, "x", [], {}, {"a": 1}, [[1, 2], 3], True])
def test_what_no_session_gave_to_be_carried_is_refused(name: str, carried: Any) -> None:
    world = make_world(name)
    with pytest.raises(UsageError):
        world.start(world.pack(1)[0], carried).reset()


class Playing:
    """A world's perfect player whose dice are the messages, so that a life can be lived twice; it fails at one answer if asked to."""

    def __init__(self, world: Any, fails_at: int = -1) -> None:
        self._world, self._left = world, fails_at

    def __call__(self, messages: Sequence[Message]) -> str:
        self._left -= 1
        if self._left == -1:
            raise ModelError("the endpoint is down")
        return self._world.players[CEILING](randomness(*(said.content for said in messages)))(messages)


async def lived(world: Any, pack: Any, path: Path, player: Playing) -> list[float]:
    async with CoDAgent("a", model=ScriptedModel("player", player), memory=path, environment=world) as agent:
        return [outcome.reward async for outcome in agent.run(pack)]


@pytest.mark.parametrize("world", sorted(WORLDS))
async def test_a_life_that_was_interrupted_anywhere_goes_on_as_if_nothing_had_happened(
    world: str, tmp_path: Path
) -> None:
    made = make_world(world, seed=6, form="compact")
    pack = made.pack(3)
    whole = await lived(made, pack, tmp_path / "whole.db", Playing(made))
    dice, path, stops = randomness("stops", world), tmp_path / "cut.db", 0
    while True:
        try:
            found = await lived(made, pack, path, Playing(made, 1 + below(dice, 3)))
            break
        except ModelError:
            stops += 1
    assert found == whole and stops >= 1
    assert found == life(made, pack, Playing(made)), "and as without a record"
    assert verify(path).faults == []


@pytest.mark.parametrize("world", sorted(WORLDS))
def test_memory_pays_in_the_default_preset(world: str) -> None:
    made, packs = make_world(world, seed=2), 96 if world == "grid-navigation" else 24
    worth = difference(played(made, CEILING, packs, 4), played(made, FLOOR, packs, 4))
    assert worth.low > 0, worth
