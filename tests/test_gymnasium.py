"""Gymnasium, both ways: ours pass its own check, and its environments are worlds that can be lived, measured and resumed."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from servers import ScriptedServer

from cod_agent import CoDAgent
from cod_agent.cli import app
from cod_agent.context import NATURAL
from cod_agent.environments import WORLDS, make_world
from cod_agent.environments.frozen_lake import FrozenLake
from cod_agent.environments.gymnasium import from_gymnasium, register, to_gymnasium
from cod_agent.errors import MissingExtra, UnknownName, UsageError
from cod_agent.models.scripted import ScriptedModel
from cod_agent.tasks import Feedback, Observation, Pack, Task

gymnasium = pytest.importorskip("gymnasium")
spaces = gymnasium.spaces

IDS = register()


# ---- ours, as Gymnasium's ----


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("name", IDS)
def test_every_world_and_preset_passes_gymnasiums_own_check(name: str, form: str) -> None:
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(name, seed=1, size=3, form=form).unwrapped, skip_render_check=True)


def test_there_is_an_id_for_every_world() -> None:
    assert {name.removeprefix("cod/").rpartition("-v0")[0] for name in IDS} >= {f"{world}-small" for world in WORLDS}


def test_an_id_names_a_pack_for_good() -> None:
    env, lake = gymnasium.make("cod/frozen-lake-small-v0", seed=5, pack=3, size=2, split="train"), "frozen-lake:small"
    world = make_world(lake, seed=5, split="train")
    for task in world.pack(2, 3):
        text, info = env.reset()
        assert (text, info["task"]) == (world.start(task).reset().text, task.id)


def test_gymnasium_alone_does_not_know_us_and_imports_the_module_an_id_names() -> None:
    code = """
import sys, gymnasium
assert not [name for name in gymnasium.registry if name.startswith("cod/")] and "cod_agent" not in sys.modules
gymnasium.make("cod_agent.environments.gymnasium:cod/alchemy-small-v0").reset()
assert not {"torch", "ray", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_tasks_of_a_pack_come_in_turn() -> None:
    lake = FrozenLake("small", 1, form="compact")
    env = to_gymnasium(lake, lake.pack(2))
    texts, places = zip(*(env.reset() for _ in range(3)), strict=True)
    assert [info["position"] for info in places] == [0, 1, 0]
    assert texts[0] == texts[2] != texts[1]
    assert env.reset(options={"position": 1})[0] == texts[1]
    text, reward, terminated, truncated, info = env.step("no direction")
    assert (reward, terminated, truncated, info["feedback"]) == (0.0, True, False, "invalid")


class Asked:
    """A session that is over after one answer, and says what the environment remembered before."""

    def __init__(self, carried: Any) -> None:
        self.carried = carried

    async def reset(self) -> Observation:
        return Observation(f"6 * 7? {self.carried}")

    async def step(self, answer: str) -> Observation:
        told = Feedback(reward=float(answer == "42"))
        return Observation("", done=True, feedback=told, carried=(self.carried or 0) + 1)


class Sums:
    name, remembers = "sums:one", True

    def start(self, task: Task, carried: Any = None) -> Asked:
        return Asked(carried)


SUMS = Sums()


def test_asynchronous_sessions_work_too() -> None:
    env = to_gymnasium(SUMS, Pack("p", (Task(id="a"),), SUMS))
    assert env.reset()[0] == "6 * 7? None"
    assert env.step("42")[1:3] == (1.0, True)


def test_an_environment_that_remembers_does_so_from_task_to_task_and_not_past_the_pack() -> None:
    env, seen = to_gymnasium(SUMS, Pack("p", (Task(id="a"), Task(id="b"), Task(id="c")), SUMS)), []
    for _ in range(4):
        seen.append(env.reset()[0].split()[-1])
        env.step("0")
    assert seen == ["None", "1", "2", "None"]
    assert env.reset(seed=1)[0].endswith("None"), "what is begun by a seed does not depend on what was before"


def test_the_map_of_grid_navigation_stays_uncovered_for_the_next_task() -> None:
    env = gymnasium.make("cod/grid-navigation-paper-v0", seed=1, size=2, form="compact")
    first, _ = env.reset()
    env.step("no cell")
    second, _ = env.reset()
    assert set(first.splitlines()[1:]) < set(second.splitlines()[1:])
    assert set(env.reset()[0].splitlines()[1:]) == set(first.splitlines()[1:]), "the pack begins anew"


def test_stepping_before_reset_and_an_empty_pack_are_errors_of_use() -> None:
    lake = FrozenLake()
    with pytest.raises(UsageError, match="reset"):
        to_gymnasium(lake, lake.pack(1)).step("1")
    with pytest.raises(UsageError, match="empty"):
        to_gymnasium(lake, Pack("none", (), lake))


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    lake = FrozenLake()
    for needs in (lambda: to_gymnasium(lake, lake.pack(1)), lambda: make_world("gymnasium:CliffWalking-v1")):
        with pytest.raises(MissingExtra, match=r"connect-the-dots\[gymnasium\]"):
            needs()


# ---- Gymnasium's, as ours ----


class Switches(gymnasium.Env[Any, Any]):
    """Each action is worth the next number of the seed's; whoever does 3 is done, which the observation space is free to show."""

    def __init__(self, observation_space: Any, action_space: Any = spaces.Discrete(4)) -> None:  # noqa: B008
        self.observation_space, self.action_space = observation_space, action_space
        self.done: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.done = []
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.done.append(action)
        return self.observation_space.sample(), float(self.np_random.integers(10)), action == 3, action == 2, {}


SPACES = {
    "text": spaces.Text(8),
    "discrete": spaces.Discrete(500, start=2),
    "box": spaces.Box(-1, 1, (2, 2)),
    "binary": spaces.MultiBinary(3),
    "parts": spaces.Dict(
        {"hand": spaces.Tuple((spaces.Discrete(9), spaces.Text(3))), "dials": spaces.MultiDiscrete([3, 4])}
    ),
}


def switches(name: str = "discrete", **how: Any) -> Any:
    return from_gymnasium(lambda pack_seed: Switches(SPACES[name]), name="switches", **how)


def lived(world: Any, task: Task, answers: list[str]) -> list[Observation]:
    session = world.start(task)
    return [session.reset(), *(session.step(answer) for answer in answers)]


def tagged(answer: object) -> str:
    return f"<answer>{answer}</answer>"


@pytest.mark.parametrize("name", SPACES)
def test_any_observation_is_text_and_the_same_again(name: str) -> None:
    world = switches(name)
    task = world.pack(2)[1]
    once, again = (lived(world, task, [tagged(1), tagged(0), tagged(3)]) for _ in range(2))
    assert once == again and once[-1].done and once[-1].feedback is not None
    assert world.recovery == "deterministic" and world.form == "natural"
    assert lived(world, world.pack(2)[0], [])[0] != once[0], "tasks have seeds of their own"


def test_parts_of_an_observation_are_named() -> None:
    text = lived(switches("parts"), switches("parts").pack(1)[0], [])[0].text
    assert text.partition("\n")[2].startswith("dials: [") and "\nhand: " in text


def test_an_end_a_cut_and_the_limit_are_told_apart_and_rewards_are_scored() -> None:
    world = switches(score=lambda total: total / 100, steps=3)
    task, endings = world.pack(1)[0], {}
    for answers in ([1, 3], [1, 2], [0, 0, 0], ["up"]):
        last = lived(world, task, [tagged(answer) for answer in answers])[-1]
        assert last.done and last.feedback is not None
        endings[last.feedback.ending] = endings.get(last.feedback.ending, 0) + 1
    assert endings == {"terminated": 1, "truncated": 2, "malformed": 1}
    raw = lived(switches(), task, [tagged(1), tagged(3)])[-1].feedback
    scored = lived(world, task, [tagged(1), tagged(3)])[-1].feedback
    assert raw.reward == 100 * scored.reward > 0


WORLD, MEAN = switches(), switches(compact=str, form="compact", malformed=-1.0)


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40), st.builds(tagged, st.text(max_size=8)), st.sampled_from([None, 3, b"3", [], "<answer>"])
    )
)
def test_whatever_is_answered_ends_the_episode_or_is_an_action(answer: Any) -> None:
    for world, said in ((WORLD, answer), (MEAN, answer)):
        last = lived(world, world.pack(1)[0], [said])[-1]
        named = (
            isinstance(answer, str)
            and (answer if world is MEAN else answer.removeprefix("<answer>").removesuffix("</answer>")).strip()
        )
        if last.feedback is None or last.feedback.ending != "malformed":
            assert named in ("0", "1", "2", "3")
        else:
            assert last.done and last.feedback.reward == (-1.0 if world is MEAN else 0.0)


def test_the_splits_share_no_seed() -> None:
    seeds: dict[str, set[int]] = {"train": set(), "eval": set()}

    class Told(Switches):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            seeds[split].add(int(seed or 0))
            return super().reset(seed=seed)

    for split in seeds:
        world = from_gymnasium(lambda pack_seed: Told(SPACES["discrete"]), name="told", split=split)  # type: ignore[arg-type]
        for pack in range(100):
            for task in world.pack(3, pack):
                world.start(task).reset()
    assert {seed % 2 for seed in seeds["train"]} == {0} and {seed % 2 for seed in seeds["eval"]} == {1}
    assert len(seeds["train"]) == len(seeds["eval"]) == 300


def test_shuffled_actions_mean_the_same_within_a_pack_and_something_else_in_another() -> None:
    world, meant = switches(shuffled=True), set()
    for pack in range(20):
        found = []
        for task in world.pack(3, pack):
            ends = [lived(world, task, [tagged(n)])[-1].feedback for n in range(4)]
            found.append(tuple(end.ending if end else "" for end in ends))
        assert len(set(found)) == 1 and sorted(found[0]) == ["", "", "terminated", "truncated"]
        meant.add(found[0])
    assert len(meant) > 5
    assert "not told" in world.rules() and "not told" not in switches().rules()


def test_a_function_makes_what_a_pack_shares_from_the_packs_seed() -> None:
    made: list[int] = []
    world = from_gymnasium(lambda seed: made.append(seed) or Switches(SPACES["discrete"]), name="made")
    made.clear()
    for pack in (0, 0, 1):
        for task in world.pack(2, pack):
            world.start(task).reset()
    assert len(made) == 6 and len(set(made)) == 2 and made[0] == made[3] != made[4]


def test_named_and_text_actions() -> None:
    named = switches(actions={"wait": 0, "leave": 3})
    assert lived(named, named.pack(1)[0], [tagged("leave")])[-1].feedback.ending == "terminated"
    assert lived(named, named.pack(1)[0], [tagged("3")])[-1].feedback.ending == "malformed"
    env = Switches(SPACES["text"], spaces.Text(5))
    texts = from_gymnasium(lambda seed: env, name="texts", compact=str, form="compact")
    assert not lived(texts, texts.pack(1)[0], ["abc"])[-1].done and env.done == ["abc"]
    assert lived(texts, texts.pack(1)[0], ["longer than five"])[-1].feedback.ending == "malformed"


def test_the_compact_form_sums_a_step_up_in_a_line() -> None:
    world = switches(compact=str, form="compact")
    first, then = lived(world, world.pack(1)[0], ["1"])
    before, action, after, reward = then.summary.split()
    assert switches(form="compact").form == "natural", "there is no compact form without a renderer"
    assert then.text.startswith(then.summary + "\n")
    assert (before, action, after) == (first.text, "1", then.text.splitlines()[-1]) and 0 <= float(reward) < 10


def test_what_cannot_be_a_world_says_why() -> None:
    for match, wrong in {
        "doesn't exist": lambda: make_world("gymnasium:CliffWalkin-v1"),
        "name some of them": lambda: make_world("gymnasium:Pendulum-v1"),
        "no name": lambda: from_gymnasium(lambda seed: Switches(SPACES["text"])),
        "cannot be shuffled": lambda: from_gymnasium(
            lambda seed: Switches(SPACES["text"], spaces.Text(3)), name="x", shuffled=True
        ),
        "at least one task": lambda: switches().pack(0),
    }.items():
        with pytest.raises(UsageError, match=match):
            wrong()
    with pytest.raises(UnknownName, match="natural"):
        switches(form="loud")


def test_a_life_that_was_interrupted_goes_on_where_it_was(tmp_path: Path) -> None:
    class Down(BaseException):
        pass

    said = iter(["0", "1", Down, "0", "3"])

    def play(messages: Any) -> str:
        answer = next(said)
        if answer is Down:
            raise Down
        return tagged(answer)

    world = from_gymnasium("FrozenLake-v1", steps=4)
    pack, model = world.pack(1), ScriptedModel("player", play, "natural")
    with pytest.raises(Down):
        list(CoDAgent("a", model=model, memory=tmp_path / "a.db").run_sync(pack))
    with CoDAgent("a", model=model, memory=tmp_path / "a.db") as agent:
        (outcome,) = agent.run_sync(pack)
    assert outcome.calls == 4 and outcome.feedback is not None and "4 steps" in outcome.feedback.text
    assert NATURAL.solve(pack[0], "", Observation(""))[0].content.startswith("<task>\nYou act in the environment")


def test_a_seed_is_a_pack_for_good() -> None:
    seen: list[int] = []

    class Told(Switches):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            seen.append(int(seed or 0))
            return super().reset(seed=seed)

    def made(pack_seed: int) -> Told:
        seen.append(pack_seed)
        return Told(SPACES["discrete"])

    world = from_gymnasium(made, name="told", seed=7, shuffled=True)
    seen.clear()
    endings = [lived(world, task, [tagged(2)])[-1].feedback for task in world.pack(2, 3)]
    assert seen == [1766494165, 812137871, 1766494165, 2129010361]
    assert [end and end.ending for end in endings] == ["terminated", "terminated"]


def test_the_command_line_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ScriptedServer(lambda request, n: "<context>\nStick.\n</context><answer>0</answer>") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        measured = ["eval", "gymnasium:Blackjack-v1", "--model", "openai:m", "--packs", "3", "--pack-size", "2"]
        result = CliRunner().invoke(app, measured)
    assert result.exit_code == 0 and "3 packs of 2" in result.output
    for arguments, match in {
        ("gymnasium:CliffWalking-v1", "--model", "scripted:perfect"): "gymnasium:CliffWalking-v1 has none",
        ("gymnasium:CliffWalking-v1", "--model", "embedded"): "speaks the compact form only",
    }.items():
        result = CliRunner().invoke(app, ["eval", *arguments, "--packs", "1"])
        assert result.exit_code == 1 and match in result.output
