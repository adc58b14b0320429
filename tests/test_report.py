"""The report of a study, its figures and tables: complete, the same numbers everywhere, and harmless whatever a model wrote."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from cod_agent import CoDAgent, Feedback, Memory, Observation, Pack, Task
from cod_agent.cli.eval_tables import by_position, tell
from cod_agent.context import CLOSE, OPEN
from cod_agent.evaluation import (
    Arm,
    Evaluation,
    Plan,
    Study,
    chart,
    compare,
    curve,
    difference,
    draw,
    paired,
    tables,
    words,
)
from cod_agent.evaluation.measures import Measure
from cod_agent.evaluation.report import render, save
from cod_agent.evaluation.samples import changes, chosen
from cod_agent.evaluation.statistics import Interval
from cod_agent.models.scripted import ScriptedModel

pytest.importorskip("jinja2")

CONTROLS = ("no-context", "frozen", "foreign", "blank", "shuffled", "history", "attempts", "ralph-sample", "ralph-full")
PLAYERS = ("memoryless", "perfect")
RIVAL = "against: openai:other-model"


# ---- studies made by hand ----


def rewards(seed: int, first: float, last: float, packs: int = 40, positions: int = 4) -> Any:
    chances = np.linspace(first, last, positions)
    return (np.random.default_rng(seed).random((packs, positions)) < chances).astype(float)


def measure(position: int, refused: int = 0) -> Measure:
    reasons = {"oversized": refused} if refused else {}
    return Measure(position, 40, 40, 1, 0, 40 - refused, refused, reasons, 12.5 * position, 4.5, 170.0, None, 0.5)


def made(
    world: str = "frozen-lake:small",
    others: Sequence[str] = ("no-context",),
    *,
    ours: tuple[float, float] = (0.5, 0.95),
    bare: tuple[float, float] = (0.5, 0.5),
    model: str = "embedded",
    positions: int = 4,
    packs: int = 40,
) -> Evaluation:
    """What an evaluation of some arms might have found."""

    def arm(number: int, name: str, found: Any, main: Any) -> Arm:
        runs = tuple((f"{world}/eval/1/{pack}",) for pack in range(packs))
        measures = tuple(measure(at, refused=at * (number == 0)) for at in range(positions))
        ahead = paired(main, found).points if number else None
        agent = "agent" if number == 0 else f"agent/{name}"
        whose = name.removeprefix("against: ") if name.startswith("against: ") else model
        return Arm(name, agent, whose, world, found, runs, curve(found), ahead, measures)

    main = rewards(1, *ours, packs, positions)
    arms = [arm(0, "with context", main, main)]
    for number, name in enumerate(others, 1):
        goes = bare if name == "no-context" else (0.5, 0.4 + 0.05 * number)
        arms.append(arm(number, name, rewards(number + 1, *goes, packs, positions), main))
    without = next((one.rewards for one in arms if one.name == "no-context"), None)
    rival = next((one for one in arms if one.name == RIVAL), None)
    return Evaluation(
        world=world,
        model=model,
        seeds=(1,),
        packs=packs,
        pack_size=positions,
        arms=tuple(arms),
        benefit=None if without is None else difference(main, without),
        written=90,
        kept=6,
        calls=1234,
        seconds=5.0,
        floor=curve(rewards(98, 0.5, 0.5, packs, positions)),
        ceiling=curve(rewards(99, 0.5, 1.0, packs, positions)),
        comparison=compare(arms[0], rival) if rival else None,
    )


def studied(*found: Evaluation, database: str = "nowhere/runs.db", **fields: Any) -> Study:
    plans = tuple(
        Plan(
            one.world,
            one.model,
            one.packs,
            one.pack_size,
            controls=tuple(arm.name for arm in one.arms[1:] if arm.name != RIVAL),
            **fields,
        )
        for one in found
    )
    return Study(found, plans, Path(database), 5.0)


EVERYTHING = (*CONTROLS, *PLAYERS, RIVAL)


# ---- a page as a reader of markup sees it ----

VOID = {"meta", "br", "hr", "img", "link", "input", "source", "base", "embed", "wbr"}


class Page(HTMLParser):
    """Elements, text and drawn figures of a page; `broken` is not empty if elements do not close as they should."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.broken: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        self.broken += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def drawn(self, *, differences: bool = False) -> dict[Any, tuple[float, float, float]]:
        """(label, position) -> mean and interval of every dot of a curve; label -> the same of every difference."""
        found = {}
        for _, said in self.elements:
            if "data-mean" in said and ("data-position" not in said) == differences:
                numbers = tuple(float(said[f"data-{name}"]) for name in ("mean", "low", "high"))
                key = said["data-arm"] if differences else (said["data-arm"], int(said["data-position"]))
                assert found.setdefault(key, numbers) == numbers, "drawn twice, and not the same"
        return found


def harmless(page: Page) -> None:
    """Nothing in it is loaded, run or sent anywhere."""
    assert page.broken == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
        "form",
        "input",
        "use",
        "image",
        "foreignobject",
    }
    for tag, said in page.elements:
        for name, value in said.items():
            assert not name.startswith("on") and name not in (
                "src",
                "srcset",
                "action",
                "xlink:href",
                "data",
                "ping",
                "poster",
            )
            assert name != "href" or value.startswith("#"), f"{tag} leads to {value}"
            assert "url(" not in value.lower() and "javascript:" not in value.lower() or name == "data-arm"
    style = page.text[: page.text.index("How to read")]
    assert "@import" not in style and "url(" not in style
    policy = [said["content"] for tag, said in page.elements if said.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


# ---- the page ----


def test_a_page_of_every_arm_is_complete_and_needs_nothing_else() -> None:
    found = made(others=EVERYTHING)
    page = Page(render(studied(found)))
    harmless(page)
    for arm in found.arms:
        assert words.label(arm.name, found) in page.text and words.meaning(arm.name) in page.text
    for said in (words.answer(found), words.standing(found), found.comparison.sentence):  # type: ignore[union-attr]
        assert said in page.text
    for said in (
        "updates refused",
        "Updates refused in the arm embedded: oversized 6.",
        "percentile bootstrap",
        "cod verify",
    ):
        assert said in page.text


def test_what_is_drawn_is_what_the_json_says() -> None:
    found = made(others=EVERYTHING)
    said, page = found.json(), Page(render(studied(found)))
    curves = {"embedded": said["positions"], **{words.label(name): at for name, at in said["controls"].items()}}
    curves["openai:other-model"] = [point.json() for point in found.arms[-1].curve.points]
    curves |= {"floor": said["floor"], "ceiling": said["ceiling"]}
    expected = {
        (label, point["position"]): (point["mean"], point["low"], point["high"])
        for label, at in curves.items()
        for point in at
    }
    assert page.drawn() == expected
    last = {words.label(name): points[-1] for name, points in said["differences"].items() if name != RIVAL}
    assert page.drawn(differences=True) == {name: (at["mean"], at["low"], at["high"]) for name, at in last.items()}
    for point in (*said["positions"], *said["controls"]["frozen"]):
        assert f"[{point['low']:.2f}, {point['high']:.2f}]" in page.text


def test_a_study_of_two_worlds_has_an_overview_and_a_section_each() -> None:
    lake, lab = made(), made("alchemy:tiny", ours=(0.9, 0.2), bare=(0.9, 0.9), positions=6)
    page = Page(render(studied(lake, lab)))
    harmless(page)
    ids = [said["id"] for _, said in page.elements if "id" in said]
    links = {said["href"] for tag, said in page.elements if tag == "a"}
    assert (
        len(ids) == len(set(ids)) and links == {"#part-1", "#part-2"} and {"part-1", "part-2", "overview"} <= set(ids)
    )
    assert "The context helps in 1 of 2 parts; it hurts in alchemy:tiny (packs of 6)." in page.text
    assert words.answers([lake, lab])[-1].startswith("40 packs are few"), "what holds for all parts is said once"
    assert words.answer(lake) in page.text and words.answer(lab) in page.text


@pytest.mark.parametrize("others", [(), ("no-context",), PLAYERS])
def test_a_page_of_few_arms_leaves_out_what_there_is_not(others: tuple[str, ...]) -> None:
    bare = replace(made(others=others), floor=None, ceiling=None)
    arms = tuple(replace(arm, measures=()) for arm in bare.arms)
    page = Page(render(studied(replace(bare, arms=arms))))
    harmless(page)
    for said, there in (
        ("arm by arm", bool(others)),
        ("What it took", False),
        ("Two models", False),
        ("Lives to read", False),
    ):
        assert (said in page.text) is there, said


@pytest.mark.parametrize("positions", [1, 2, 64])
def test_packs_may_be_of_any_length(positions: int) -> None:
    found = made(others=("frozen",), positions=positions)
    page = Page(render(studied(found)))
    harmless(page)
    dots = [said for tag, said in page.elements if tag == "circle" and said.get("data-arm") == "with context"]
    assert {int(said["data-position"]) for said in dots} == set(range(positions))
    assert all(0 <= float(said["cx"]) <= 940 and 0 <= float(said["cy"]) <= 400 for said in dots)
    assert words.answer(found) in page.text and ("only task" in page.text) is (positions == 1)


def test_nothing_was_lived_to_the_end() -> None:
    nothing = np.full((3, 4), np.nan)
    found = made(packs=3)
    arms = [replace(arm, rewards=nothing, curve=curve(nothing), measures=()) for arm in found.arms]
    arms[1] = replace(arms[1], difference=paired(nothing, nothing).points)
    empty = replace(found, arms=tuple(arms), benefit=difference(nothing, nothing))
    page = Page(render(studied(empty)))
    harmless(page)
    assert "Nothing is known yet" in page.text


# ---- what others wrote ----

SCRIPT = "<script>alert(1)</script></pre></details>"
NAME = "\"><img src=x onerror='alert(2)'> ${{ 7 * 7 }} $\\frac{1}{0"


class Echo:
    """A world whose observations are hostile."""

    name, form = f"echo:{SCRIPT}", "compact"

    def pack(self, n: int, index: int) -> Pack:
        return Pack(f"{SCRIPT}/{index}", tuple(Task(id=f"{NAME}-{i}", prompt=SCRIPT) for i in range(n)), self)

    def start(self, task: Task) -> Echo:
        return self

    def reset(self) -> Observation:
        return Observation(f"look {SCRIPT} \x00\x1b[31m \ud800 {{{{ self }}}}")

    def step(self, answer: str) -> Observation:
        feedback = Feedback(reward=1.0, text=f"done {SCRIPT}", ending=f"end {SCRIPT}")
        return Observation(f"seen {SCRIPT}", done=True, feedback=feedback)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Path]:
    """Three packs of two tasks, lived with a context and without."""

    def play(messages: Sequence[Any]) -> str:
        asked = messages[0].content
        return f"{OPEN}\nnoted {SCRIPT}\n{'long ' * 700}\n{CLOSE}" if asked.startswith("Update") else f"say {SCRIPT}"

    async def live(memory: Memory) -> None:
        for pack in range(3):
            for agent, updates in (("agent", True), ("agent/no-context", False)):
                async with CoDAgent(agent, model=ScriptedModel(NAME, play), memory=memory, updates=updates) as one:
                    async for _ in one.run(Echo().pack(2, pack)):
                        pass

    import asyncio

    memory = Memory.open(tmp_path / "runs.db", durable=False)
    asyncio.run(live(memory))
    memory.close()
    yield tmp_path / "runs.db"


def hostile(database: Path) -> Study:
    found = made(f"echo:{SCRIPT}", ("no-context", RIVAL), model=NAME, positions=2, packs=3)
    runs = tuple((f"{SCRIPT}/{pack}",) for pack in range(3))
    arms = tuple(replace(arm, runs=runs, model=NAME) for arm in found.arms)
    return studied(replace(found, arms=arms), database=str(database))


def test_hostile_text_is_shown_and_does_nothing(database: Path) -> None:
    page = Page(render(hostile(database)))
    harmless(page)
    for said in ("noted", "look", "say", "seen", "done", "end"):
        assert f"{said} {SCRIPT}" in page.text, said
    assert NAME in page.text and "{{ self }}" in page.text
    assert not any(char in page.text for char in "\x00\x1b\ud800")
    assert "more characters" in page.text and "long " * 700 not in page.text


def test_samples_show_the_context_and_what_changed_in_it(database: Path) -> None:
    page = Page(render(hostile(database)))
    assert page.text.count("(empty)") >= 3, "the first task of each pack"
    assert f"+ noted {SCRIPT}" in page.text and "The same pack without context" in page.text


def test_a_figure_of_a_hostile_name_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = made(NAME, EVERYTHING, model=NAME)
    assert draw(found, tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


# ---- files ----


def test_saving_leaves_json_a_figure_for_each_part_and_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    study = studied(made(), made("alchemy:tiny"))
    told: list[str] = []
    files = save(study, tmp_path / "new" / "out", tell=told.append)
    assert told == [] and files.keys() == {"json", "figure", "figure-2", "report"}
    assert json.loads(files["json"].read_text())["parts"][1]["world"] == "alchemy:tiny"
    assert files["report"].read_text(encoding="utf-8") == render(study)
    assert {path.name for path in files.values()} == {"eval.json", "eval.png", "eval-2.png", "report.html"}


@pytest.mark.parametrize(
    ("gone", "said", "left"), [("matplotlib", "No figure", "report"), ("jinja2", "No report", "figure")]
)
def test_without_a_library_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: str, said: str, left: str
) -> None:
    pytest.importorskip("matplotlib")
    for name in [name for name in sys.modules if name.partition(".")[0] == gone] + [gone, f"{gone}.figure"]:
        monkeypatch.setitem(sys.modules, name, None)
    told: list[str] = []
    files = save(studied(made()), tmp_path, tell=told.append)
    assert files.keys() == {"json", left} and len(told) == 1
    assert told[0].startswith(said) and "pip install" in told[0]


def test_the_command_says_how_to_repeat_it_and_no_secret() -> None:
    study = studied(
        made(others=("no-context", "frozen")),
        made("alchemy:tiny"),
        seed=3,
        more_seeds=(5,),
        repeats=2,
        base_url="https://me:secret@host/v1",
        against="embedded-base",
    )
    (command,) = words.commands(study)
    said = shlex.split(command)
    assert said[:3] == ["cod", "eval", "frozen-lake:small,alchemy:tiny"] and "secret" not in command
    flags = dict(zip(said[3::2], said[4::2], strict=True))
    assert flags["--seed"] == "3,5" and flags["--repeats"] == "2" and flags["--controls"] == "no-context,frozen"
    assert (
        flags["--base-url"] == "https://host/v1"
        and flags["--against"] == "embedded-base"
        and flags["--out"] == "nowhere"
    )
    assert "--temperature" not in flags
    uneven = studied(made(positions=4), made("alchemy:tiny", positions=8))
    assert [shlex.split(one)[2] for one in words.commands(uneven)] == ["frozen-lake:small", "alchemy:tiny"]


# ---- words ----


@pytest.mark.parametrize(
    ("ours", "bare", "packs", "said", "short"),
    [
        ((0.5, 0.95), (0.5, 0.5), 64, "The context helps: ", "helps"),
        ((0.5, 0.3), (0.5, 0.9), 64, "The context hurts: ", "hurts"),
        ((0.5, 0.6), (0.5, 0.5), 12, "The data do not say", "not clear"),
        ((1.0, 1.0), (1.0, 1.0), 64, "no difference that matters", "no difference"),
    ],
)
def test_the_answer_is_what_the_interval_says(
    ours: tuple[float, float], bare: tuple[float, float], packs: int, said: str, short: str
) -> None:
    found = made(ours=ours, bare=bare, packs=packs)
    assert said in words.answer(found) and words.verdict(found) == short
    assert found.benefit is not None and found.benefit.signed in words.answer(found)


def test_packs_that_all_went_alike_say_little_if_they_are_few() -> None:
    few, many = (made(ours=(1, 1), bare=(1, 1), packs=packs) for packs in (8, 64))
    assert (words.verdict(few), words.verdict(many)) == ("not clear", "no difference")


def test_where_no_task_comes_later_nothing_is_said_of_the_context() -> None:
    """Both arms have the empty one there: what lies between them is chance, however clear it looks."""
    found = made(ours=(0.95, 0.95), bare=(0.3, 0.3), packs=200, positions=1)
    assert found.benefit is not None and found.benefit.low > 0
    assert "no context is read" in words.answer(found) and words.verdict(found) == "not compared"


def test_a_part_without_a_comparison_is_not_one_whose_data_do_not_say() -> None:
    bare, lake, single = made(others=()), made("alchemy:tiny"), made(positions=1)
    assert words.answers([bare, single])[0].startswith("Whether the context helps is not known")
    said = words.answers([lake, bare])[0]
    assert said == "The context helps in 1 of 2 parts; in frozen-lake:small (packs of 4) nothing was compared."


def test_what_speaks_against_the_figures_is_said_at_the_top() -> None:
    found = made(packs=64)
    assert words.doubts(found) == []
    bad = (replace(measure(0), malformed=30, written=10, refused=30),)
    said = words.doubts(replace(found, packs=12, arms=(replace(found.arms[0], measures=bad), *found.arms[1:])))
    assert [one.split(" ")[0] for one in said] == ["75%", "75%", "12"]
    assert "3 updates were held back" in words.doubts(replace(found, held=3))[0]
    assert said[0] in Page(render(studied(replace(found, arms=(replace(found.arms[0], measures=bad),))))).text


def test_lost_rewards_are_counted_by_how_their_tasks_ended() -> None:
    found = made(packs=64)
    lost = tuple(replace(measure(at), lost={"unjudged": 2, "aborted": at}) for at in range(2))
    (said,) = words.doubts(replace(found, arms=(replace(found.arms[0], measures=lost), *found.arms[1:])))
    assert said.startswith("5 of 80 rewards are lost, and left out: 4 unjudged, 1 aborted.")
    assert words.losses({"unjudged": 1}, 1).startswith("1 of 1 reward is lost")


def test_without_the_control_nothing_is_claimed() -> None:
    found = made(others=("frozen",))
    assert "not known" in words.answer(found) and words.verdict(found) == "not compared"


@pytest.mark.parametrize(
    ("last", "floor", "ceiling", "said"),
    [
        (0.75, 0.5, 1.0, "has come 50% of the way"),
        (0.25, 0.5, 1.0, "is below both"),
        (1.0, 0.5, 0.75, "as good as the ceiling"),
        (0.5, 0.5, 0.5, "memory hardly pays"),
    ],
)
def test_where_the_model_stands_between_floor_and_ceiling(last: float, floor: float, ceiling: float, said: str) -> None:
    def flat(mean: float) -> Any:
        return curve(np.full((200, 2), mean))

    found = made(positions=2)
    arms = (replace(found.arms[0], curve=flat(last)), *found.arms[1:])
    assert said in words.standing(replace(found, arms=arms, floor=flat(floor), ceiling=flat(ceiling)))
    assert words.standing(replace(found, floor=None)) == ""


@pytest.mark.parametrize("last", [0.5, 0.7])
def test_what_is_said_does_not_depend_on_the_scale_of_the_rewards(last: float) -> None:
    found = made(ours=(0.5, last), packs=4096)
    arms = tuple(replace(arm, rewards=4 * arm.rewards, curve=curve(4 * arm.rewards)) for arm in found.arms)
    large = replace(found, arms=arms, benefit=difference(arms[0].rewards, arms[1].rewards))
    assert words.verdict(large) == words.verdict(found) == ("no difference" if last == 0.5 else "helps")


def test_whether_memory_pays_is_not_said_of_few_packs() -> None:
    """Floor 0.81 and ceiling 0.81 of 16 packs: there may be nothing between them, or a lot."""
    chance = curve(np.repeat([[1.0]] * 13 + [[0.0]] * 3, 2, axis=1))
    said = words.standing(replace(made(positions=2, packs=16), floor=chance, ceiling=chance))
    assert "too few packs to say" in said and "hardly" not in said


@pytest.mark.parametrize("packs", [2, 15])
def test_below_16_packs_nothing_is_said_of_the_ceiling_or_of_no_difference(packs: int) -> None:
    flat = curve(np.full((200, 2), 0.5))
    found = replace(made(positions=2, packs=packs), floor=flat, ceiling=flat, benefit=Interval(0.0, -0.01, 0.01))
    assert words.standing(found).endswith(f": {packs} packs are too few to say where between them the model is.")
    assert words.verdict(found) == "not clear"
    enough = replace(found, packs=16)
    assert "hardly pays" in words.standing(enough) and words.verdict(enough) == "no difference"


def test_how_often_chance_shows_something_follows_from_the_differences() -> None:
    assert "With 1 difference, expect about one evaluation in 20" in words.by_chance(1)
    assert "With 11 differences, expect about one evaluation in 2 " in words.by_chance(11)
    assert words.by_chance(9) in Page(render(studied(made(others=CONTROLS)))).text


@pytest.mark.parametrize(
    ("failed", "why"), [({"malformed": 40}, "this world's language"), ({"written": 0, "refused": 40}, "every update")]
)
def test_a_context_that_nobody_reads_or_writes_cannot_be_measured(failed: dict[str, int], why: str) -> None:
    found = made(ours=(0, 0), bare=(0, 0), packs=64)
    deaf = tuple(replace(measure(at), **failed) for at in range(4))  # type: ignore[arg-type]
    found = replace(found, arms=(replace(found.arms[0], measures=deaf), *found.arms[1:]))
    assert words.verdict(found) == "cannot be measured" and "more packs" not in words.answer(found)
    assert sum(why in said for said in words.answers([found])) == 1
    assert "it cannot be measured" in words.answers([found, made("alchemy:tiny")])[0]
    assert "cannot be measured" in [cell.mean for cell in tables.overview([found, made()]).rows[0].cells]
    hurt = replace(found, benefit=difference(np.zeros((64, 4)), np.ones((64, 4))))
    assert words.verdict(hurt) == "hurts"


def test_two_models_are_what_the_answer_the_title_and_the_tables_are_about() -> None:
    lake, lab = made(others=(RIVAL,), ours=(0.9, 0.95)), made("alchemy:tiny", (RIVAL,), ours=(0.9, 0.95))
    assert lake.comparison is not None
    assert words.answers([lake])[0] == lake.comparison.sentence
    assert not any("context did it" in said for said in words.answers([lake]))
    study = studied(lake, lab)
    whole, page = study.json()["overall"]["comparison"], Page(render(study)).text
    assert whole["better"] == "embedded" and f"Over all 2 parts: {whole['sentence']}" in page
    assert "Which is better, embedded or openai:other-model?" in page and "What the context is worth" not in page
    assert tables.overview([lake, lab]).rows[-1].cells[-1].mean == "embedded"


def test_one_pack_is_one_pack() -> None:
    page = Page(render(studied(made(others=("no-context", RIVAL), packs=1)))).text
    assert "1 packs" not in page and "over 1 pack." in page and "One pack says next to nothing" in page


def test_before_any_note_a_difference_is_luck() -> None:
    found = made(others=("no-context", "attempts"), packs=200, ours=(0.95, 0.95), bare=(0.2, 0.2))
    bare, more = tables.differences(found).rows
    assert [cell.kind for cell in bare.cells] == ["", "up", "up", "up", "up"] and more.cells[0].kind == "up"


def test_floor_and_ceiling_are_not_called_as_the_arms_of_their_players() -> None:
    found = made(others=PLAYERS)
    names = [row.label for row in tables.rewards(found).rows]
    assert names == ["with context", "memoryless player", "perfect player", "floor", "ceiling"]
    assert [one.label for one in chart.principal(found)][:2] == ["floor", "ceiling"]


# ---- figures ----


def test_labels_are_moved_apart_and_stay_inside() -> None:
    dice = Random(4)
    for _ in range(300):
        wanted = [dice.random() for _ in range(dice.randint(1, 12))]
        placed = chart.apart(wanted, 0.055, 1.03)
        order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        assert all(placed[b] - placed[a] >= 0.055 - 1e-9 for a, b in zip(order, order[1:], strict=False))
        assert max(placed) <= 1.03 + 1e-9
    assert chart.apart([0.1, 0.5, 0.9], 0.055, 1.03) == [0.1, 0.5, 0.9], "where there is room nothing moves"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.2, 1), (0, 12), (-300, 20), (-0.013, 0.01), (0, 0.04)])
def test_ticks_are_few_and_round_and_inside(low: float, high: float) -> None:
    found = chart.ticks(low, high)
    assert 3 <= len(found) <= 9 and found == sorted(found) and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0]) and 0.0 in found


def test_rewards_beyond_one_are_inside_the_drawing() -> None:
    steep = curve(np.array([[0.0, 7.0], [-2.0, 9.0]]))
    markup = chart.curves([chart.Line("steep", "main", steep)], width=400, height=300)
    heights = [float(said["cy"]) for tag, said in Page(markup).elements if tag == "circle"]
    assert len(heights) == 2 and all(0 < height < 300 for height in heights)


# ---- the terminal ----


@pytest.mark.parametrize("width", [62, 80, 120, 300])
def test_tables_fit_the_terminal_and_have_every_arm_once(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = made(others=(*CONTROLS, *PLAYERS, RIVAL))
    seen: list[str] = []
    for table in by_position(found, width):
        names = [str(column.header) for column in table.columns]
        assert names[:2] == ["task", "embedded"] and len(names) <= 5
        seen += names[2:]
        Console(width=width).print(table)
    assert seen == [*CONTROLS, *PLAYERS, "openai:other-model", "floor", "ceiling"]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [62, 80, 120])
def test_large_rewards_are_not_cut(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = made(others=("no-context", "frozen"), model="cliffs")
    worse = tuple(replace(arm, curve=curve(arm.rewards * 99 - 199)) for arm in found.arms)
    for table in by_position(replace(found, arms=worse), width):
        Console(width=width).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for arm in worse:
        assert any(str(arm.curve.points[1]) in line for line in lines)
        assert any(arm.curve.gain.signed in line for line in lines)
    for named in (True, False):
        drawn = Page(chart.curves([chart.Line("cliffs", "main", worse[0].curve)], width=320, named=named))
        ends = [(float(said["x"]), said["text-anchor"]) for tag, said in drawn.elements if tag == "text"]
        assert ends and all(x < 320 - 6 * len("-100.50") for x, anchor in ends if anchor == "start")


@pytest.mark.parametrize("width", [62, 80, 120])
def test_nothing_that_is_told_is_cut_off(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cod_agent.cli.output.PIPED_WIDTH", width)
    tell(studied(made(others=(*CONTROLS, RIVAL), positions=16), made("grid-navigation:tiny")))
    said = capsys.readouterr().out
    assert "…" not in said and "task 16" in said and "+0." in said


def test_a_study_is_told_with_its_answer_and_what_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    lake, lab = made(others=("no-context", RIVAL)), made("alchemy:tiny", ("no-context",))
    tell(studied(lake, lab))
    said = capsys.readouterr().out
    for expected in (words.answer(lake), lake.comparison.sentence, "oversized 6", "updates refused", "last - first"):  # type: ignore[union-attr]
        assert expected in said
    assert "The context helps in 2 of 2 parts" in said and "\x1b[" not in said
    assert f"{lake.arms[0].curve.points[3].mean:.2f} [" in said


# ---- single values ----


def test_totals_are_as_heavy_as_what_they_count() -> None:
    found = made(others=())
    odd = (
        replace(measure(0), tasks=10, tries=10, shown=0.0),
        replace(measure(1), tasks=30, tries=30, shown=40.0, written=5, refused=15),
    )
    (row,) = tables.totals(replace(found, arms=(replace(found.arms[0], measures=odd),))).rows
    cells = dict(zip(("malformed", "refused", "given up", "context"), (cell.mean for cell in row.cells), strict=False))
    assert cells["context"] == "30" and cells["refused"] == "25.0%"
    assert row.cells[7].mean == "-", "sampled tokens that nobody counted"


def test_packs_to_be_shown_are_the_best_the_middle_and_the_worst() -> None:
    table = np.array([[0, 0, 1], [1, 1, 1], [1, 0, 0], [0, 1, 1], [np.nan, 0, 1]], float)
    assert chosen(table) == [("gained most", 3), ("lies in the middle", 0), ("gained least", 2)]
    assert chosen(table[:1]) == [("gained most", 0)] and chosen(np.full((2, 3), np.nan)) == []


def test_changes_are_those_of_the_lines() -> None:
    assert changes("a\nb\nc", "a\nx\nc\nd") == ((" ", "a"), ("-", "b"), ("+", "x"), (" ", "c"), ("+", "d"))
    assert changes("", "a") == (("+", "a"),)
