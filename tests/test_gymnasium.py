"""The Gymnasium adapter: it passes Gymnasium's own check, and says what is missing."""

from __future__ import annotations

import sys

import pytest

from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.environments.gymnasium import to_gymnasium
from cod_agent.errors import MissingExtra, UsageError
from cod_agent.tasks import Feedback, Observation, Pack, Task


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("preset", ["tiny", "small", "5x5", "6x6", "paper", "paper-hard"])
def test_frozen_lake_passes_check_env(preset, form):
    checker = pytest.importorskip("gymnasium.utils.env_checker")
    lake = FrozenLake(preset, 1, form=form)
    checker.check_env(to_gymnasium(lake, lake.pack(3)), skip_render_check=True)


def test_the_tasks_of_a_pack_come_in_turn():
    pytest.importorskip("gymnasium")
    lake = FrozenLake("small", 1, form="compact")
    env = to_gymnasium(lake, lake.pack(2))
    texts, places = zip(*(env.reset() for _ in range(3)), strict=True)
    assert [info["position"] for info in places] == [0, 1, 0]
    assert texts[0] == texts[2] != texts[1]
    assert env.reset(options={"position": 1})[0] == texts[1]
    text, reward, terminated, truncated, info = env.step("no direction")
    assert (reward, terminated, truncated, info["feedback"]) == (0.0, True, False, "invalid")


def test_asynchronous_sessions_work_too():
    pytest.importorskip("gymnasium")

    class Asked:
        async def reset(self):
            return Observation("6 * 7?")

        async def step(self, answer):
            return Observation("", done=True, feedback=Feedback(reward=float(answer == "42")))

    class Sums:
        name = "sums:one"

        def start(self, task):
            return Asked()

    world = Sums()
    env = to_gymnasium(world, Pack("p", (Task(id="a"),), world))
    assert env.reset()[0] == "6 * 7?"
    assert env.step("42")[1:3] == (1.0, True)


def test_stepping_before_reset_and_an_empty_pack_are_errors_of_use():
    pytest.importorskip("gymnasium")
    lake = FrozenLake()
    with pytest.raises(UsageError, match="reset"):
        to_gymnasium(lake, lake.pack(1)).step("1")
    with pytest.raises(UsageError, match="empty"):
        to_gymnasium(lake, Pack("none", (), lake))


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    lake = FrozenLake()
    with pytest.raises(MissingExtra, match=r"connect-the-dots\[gymnasium\]"):
        to_gymnasium(lake, lake.pack(1))
