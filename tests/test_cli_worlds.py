"""`cod worlds`: every world is listed and shown, and a person can play it."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from typer.testing import CliRunner, Result

import cod_agent.cli
from cod_agent.environments import WORLDS, make_world
from cod_agent.environments.base import started
from cod_agent.environments.draws import randomness


def cod(*words: str, typed: str = "") -> Result:
    return CliRunner().invoke(cod_agent.cli.app, ["worlds", *words], input=typed)


def test_every_world_and_preset_is_listed() -> None:
    listed = {row["world"]: row for row in json.loads(cod("--json").stdout)["worlds"]}
    assert list(listed) == sorted(WORLDS)
    shown = cod().stdout
    for name, (module, kind, default) in WORLDS.items():
        presets = list(getattr(import_module(module), kind).presets)
        assert listed[name]["presets"] == presets and listed[name]["default"] == default
        assert name in shown and len(listed[name]["about"]) > 20


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_a_world_is_shown_as_a_solver_sees_it(name: str) -> None:
    pack = make_world(name).pack(1)
    first = started(pack.environment, pack[0]).reset()
    found = cod(name)
    assert found.exit_code == 0 and pack[0].prompt in found.stdout and first.text in found.stdout
    told = json.loads(cod(name, "--form", "compact", "--seed", "3", "--json").stdout)
    compact = make_world(name, seed=3, form="compact").pack(1)
    assert told == {
        "world": f"{name}:small",
        "prompt": "",
        "observation": started(compact.environment, compact[0]).reset().text,
    }


def test_a_person_plays_and_the_answer_needs_no_tags() -> None:
    found = cod("frozen-lake:tiny", "--play", "--pack-size", "2", typed="1\n2\n3\n4\n" * 20)
    assert found.exit_code == 0
    assert found.stdout.count("\nReward ") == 2 and "---- task 2 of 2 ----" in found.stdout
    assert "malformed" not in found.stdout
    assert "Ctrl-D stops" in found.stdout.splitlines()[0] and "without tags" in found.stdout.splitlines()[0]


def test_the_packs_to_train_on_are_shown_on_demand() -> None:
    train, held_out = (make_world("alchemy:tiny", split=split).pack(1) for split in ("train", "eval"))
    ours, theirs = (pack.environment.start(pack[0]).reset().text for pack in (train, held_out))
    assert ours != theirs
    shown = cod("alchemy:tiny", "--split", "train").stdout
    assert ours in shown and theirs not in shown
    assert theirs in cod("alchemy:tiny", "--split", "eval").stdout


def test_what_a_person_plays_is_judged_as_a_model_is() -> None:
    world = make_world("alchemy:tiny", seed=5, form="compact")
    pack, play = world.pack(1), world.players["perfect"](randomness("person"))
    session = world.start(pack[0])
    seen, typed = session.reset(), list[str]()
    from cod_agent.context import COMPACT, message

    said = COMPACT.solve(pack[0], "", seen)
    while not seen.done:
        typed.append(play(said))
        seen = session.step(typed[-1])
        said = [*said, message("assistant", ("model", typed[-1])), message("user", ("environment", seen.text))]
    words = ("alchemy:tiny", "--form", "compact", "--seed", "5", "--pack-size", "1", "--play")
    found = cod(*words, typed="\n".join(typed) + "\n")
    assert f"Reward {seen.feedback.reward:.3g}. {seen.feedback.text}" in found.stdout


def test_who_types_no_more_has_stopped() -> None:
    found = cod("frozen-lake", "--play")
    assert found.exit_code == 0 and found.stdout.rstrip().endswith("Stopped.")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["frozen-lak"], "did you mean frozen-lake"),
        (["frozen-lake:big"], "known are"),
        (["frozen-lake", "--form", "terse"], "no form called"),
        (["frozen-lake", "--split", "test"], "no split called"),
        (["all"], "a suite of cod eval; its worlds are alchemy:small"),
        (["--play"], "name the world"),
        (["frozen-lake", "--play", "--json"], "leave --json out"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(words: list[str], told: str) -> None:
    found = cod(*words)
    assert found.exit_code == 1 and told in found.output and "Traceback" not in found.output
