"""A world of one's own: found by its name, lived, measured and resumed; and the tutorial that builds one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples")]
import your_own_world  # noqa: E402
from servers import ScriptedServer  # noqa: E402
from test_docs import agree, blocks, cod, commands, words  # noqa: E402
from your_own_world import Market  # noqa: E402

from cod_agent.cli import app  # noqa: E402
from cod_agent.environments import WORLDS, make_world, named, packed  # noqa: E402
from cod_agent.errors import UnknownName, UsageError  # noqa: E402
from cod_agent.evaluation.players import floor_and_ceiling  # noqa: E402

PAGE = ROOT / "docs" / "environments" / "your-own.md"
BLOCKS = blocks(PAGE)

SMALLEST = """
from dataclasses import dataclass

from cod_agent import Feedback, Observation, Pack, Task


class Coin:
    name = "coin"

    def __init__(self, seed=0, **_):
        self.seed = seed

    def pack(self, n, index=0):
        tasks = tuple(Task(id=f"{index}/{i}", prompt="Heads or tails?", data={}) for i in range(n))
        return Pack(f"coin/{self.seed}/{index}", tasks, self)

    def start(self, task):
        return Toss()


class Toss:
    def reset(self):
        return Observation("It lands.")

    def step(self, answer):
        return Observation("", done=True, feedback=Feedback(reward=float("heads" in answer)))


def half(*, seed, split, form):
    return Coin(seed)


def deaf():
    return Coin()


def nothing(**_):
    return {}


@dataclass(frozen=True)
class Frozen:
    seed: int
    split: str
    form: str
    name: str = "frozen"
    pack = start = None


NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with worlds in `coins.py`; what is imported from here is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "coins.py").write_text(SMALLEST)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name in ("coins", "broken", "my_worlds"):
            del sys.modules[name]


# ---- by name ----


@pytest.mark.parametrize("name", ["coins:Coin", "coins:half"])
def test_a_class_or_a_function_of_the_current_folder_is_a_world(folder: Path, name: str) -> None:
    world = make_world(name, seed=5, split="train")
    assert (world.name, world.seed, world.form) == (name, 5, "natural")
    assert world.start(world.pack(2)[1]).step("heads").feedback.reward == 1.0


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("coins:Coyn", UnknownName, "did you mean Coin"),
        ("coins:deaf", UsageError, "seed, split and form"),
        ("coins:nothing", UsageError, "lacks name, start, pack"),
        ("coins:NUMBER", UsageError, "is a int"),
        ("coins:Coin:big", UsageError, "coins:Coin:big"),
        ("broken:Coin", UsageError, "ZeroDivisionError"),
        ("coin:Coin", UnknownName, "MODULE:NAME"),
        ("coins.inner:Coin", UsageError, "'coins' is not a package"),
        ("coins:Frozen", UsageError, "cannot be set"),
        ("frozen_lake", UnknownName, "did you mean frozen-lake"),
        ("alchemi:small", UnknownName, "did you mean alchemy"),
        ("../coins:Coin", UnknownName, "MODULE:NAME"),
        (":", UnknownName, "MODULE:NAME"),
        ("", UnknownName, "MODULE:NAME"),
    ],
)
def test_what_is_no_world_says_what_to_do(folder: Path, name: str, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=re.escape(match)):
        make_world(name)


def test_what_lies_in_the_current_folder_hides_nothing_that_is_installed(folder: Path) -> None:
    (folder / "json.py").write_text("Coin = 1\n")
    with pytest.raises(UnknownName, match="detect_encoding"):
        make_world("json:Coin")


def test_a_preset_is_the_third_part_of_the_name() -> None:
    fair = make_world("your_own_world:Market:fair", seed=3, form="compact")
    assert fair.preset.fruits[0] == "figs" and fair.name == "your_own_world:Market:fair"
    again = make_world(fair.name, form="compact")
    assert [again.start(task).reset() for task in fair.pack(3)] == [fair.start(task).reset() for task in fair.pack(3)]
    with pytest.raises(UnknownName, match="did you mean fair"):
        make_world("your_own_world:Market:fare")


def test_packages_name_their_worlds_by_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {
        name: EntryPoint(name, value, named.GROUP)
        for name, value in {"market": "your_own_world:Market", "gone": "your_own_world:Gone"}.items()
    }
    monkeypatch.setattr(named, "_others", lambda: entries)
    world = make_world("market:fair", seed=2)
    assert world.name == "market:fair" and make_world("market").preset is Market.presets["small"]
    with pytest.raises(UsageError, match="'gone'.*cannot be loaded"):
        make_world("gone")
    with pytest.raises(UnknownName, match="did you mean market"):
        make_world("markt")


def test_the_built_in_worlds_lead_back_to_themselves() -> None:
    for name in WORLDS:
        world = make_world(name)
        assert world.name == f"{name}:small" and type(make_world(world.name)) is type(world)


# ---- measured ----


def test_without_players_what_needs_them_is_refused_and_the_rest_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert floor_and_ceiling(make_world("coins:Coin"), 4, 2) is None
    measured = ["eval", "coins:Coin", "--packs", "2", "--pack-size", "2", "--json"]
    with ScriptedServer(lambda request, n: "<context>\nheads\n</context>") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        for arguments, match in {
            ("--model", "scripted:perfect"): "coins:Coin has none",
            ("--model", "openai:m", "--controls", "perfect"): "control",
        }.items():
            result = CliRunner().invoke(app, [*measured, *arguments, "--out", "refused"])
            assert result.exit_code == 1 and match in result.output and "perfect" in result.output
        result = CliRunner().invoke(app, [*measured, "--model", "openai:m"])
    assert result.exit_code == 0, result.output
    assert '"world": "coins:Coin"' in result.stdout


def test_an_interrupted_life_finds_its_world_again(folder: Path) -> None:
    measured = [
        "eval",
        "your_own_world:Market",
        "--model",
        "scripted:perfect",
        "--controls",
        "memoryless",
        "--out",
        "out",
    ]
    assert CliRunner().invoke(app, [*measured, "--packs", "2"]).exit_code == 0
    more = CliRunner().invoke(app, ["eval", "--resume", "--out", "out", "--packs", "3"])
    assert more.exit_code == 0 and "3 packs of 4" in more.output


# ---- the tutorial ----


def test_the_market_is_the_same_for_good() -> None:
    world = Market("small", seed=7, form="compact")
    packs = [world.pack(4, index) for index in range(2)]
    assert [[world.start(task).reset().text for task in pack] for pack in packs] == [
        ["apples 4", "melons 3", "apples 4", "apples 3"],
        ["plums 2", "plums 6", "apples 4", "plums 6"],
    ]
    assert [world.start(pack[0]).step("0").summary for pack in packs] == ["apples: 7", "plums: 7"]


def test_no_list_of_prices_is_in_both_splits() -> None:
    def lists(split: str) -> set[str]:
        world = Market("small", seed=1, split=split)  # type: ignore[arg-type]
        places = (world.place(world.pack(1, index)[0]) for index in range(300))
        return {str(your_own_world.prices_at(place, world.preset)) for place in places}

    assert not lists("train") & lists("eval")


def test_memory_pays() -> None:
    curves = floor_and_ceiling(Market("small", seed=2, form="compact"), packs=150, n=4)
    assert curves is not None
    floor, ceiling = curves
    assert ceiling.points[-1].low > floor.points[-1].high + 0.2
    assert abs(floor.gain.mean) < 0.12
    again = floor_and_ceiling(packed(Market("small", seed=2, form="compact"), "ralph-sample"), packs=40, n=2)
    assert again is not None and again[1].points[-1].mean == 1.0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.text(), st.integers(0, 99999).map(str), st.sampled_from([None, b"28", 28, ["28"], "٢٨", "28" * 9999]))
)
def test_whatever_is_answered_only_the_price_sells(answer: object) -> None:
    for form in ("natural", "compact"):
        world = Market("small", seed=7, form=form)  # type: ignore[arg-type]
        said = f"<answer>{answer}</answer>" if form == "natural" and isinstance(answer, str) else answer
        last = world.start(world.pack(1)[0]).step(said)  # type: ignore[arg-type]
        right = isinstance(answer, str) and answer.strip() in ("28", "028", "0028")
        assert last.done and last.feedback is not None and (last.feedback.reward == 1.0) == right
        assert last.feedback.ending in ("sold", "refused", "malformed")


def test_the_example_is_what_the_page_builds() -> None:
    example = Path(str(your_own_world.__file__)).read_text()
    shown = [block for block in BLOCKS if block.said("in examples/your_own_world.py") is not None]
    assert len(shown) == 4
    for part in (part for block in shown for part in block.body.strip().split("\n\n\n")):
        assert part.strip() in example, f"{PAGE.name} builds what the example does not have:\n{part}"


def test_the_commands_of_the_page_do_as_it_says(folder: Path) -> None:
    first = next(block for block in BLOCKS if "class Shop" in block.body)
    (folder / "my_worlds.py").write_text(first.body.partition("\nshop = ")[0])
    for block in BLOCKS:
        if "tests/test_own_world.py" in (block.said("not run") or ""):
            for command, expected in commands(block.body):
                code, output = cod(words(command)[1:])
                assert code == (expected.startswith("Error")), output
                # What players roll differs from time to time: all but the figures is compared.
                agree(*(re.sub(r"[-+]?\d+\.\d+", "#", text) for text in (expected, output)), command)


def test_the_page_runs_in_a_module_of_its_own() -> None:
    """What is put together from the page's blocks is a module, as a reader would write it."""
    code = "from __future__ import annotations\n" + "\n\n".join(
        block.body for block in BLOCKS if block.said("in examples/your_own_world.py") is not None
    )
    module = ModuleType("market")
    sys.modules["market"] = module
    try:
        exec(compile(code, "market.py", "exec"), module.__dict__)  # noqa: S102 (our own page)
        world = module.Market("small", seed=7, form="compact")
        assert world.start(world.pack(1)[0]).reset().text == "apples 4"
    finally:
        del sys.modules["market"]
