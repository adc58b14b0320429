"""Optimal control: carts that are the same everywhere, flights checked by a second implementation, laws of any kind, memory that pays."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import sys
import time
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, Message, Trajectory, Turn, message
from cod_agent.environments import make_world
from cod_agent.environments.base import Environment, Remembering, started
from cod_agent.environments.draws import randomness
from cod_agent.environments.expressions import LENGTH, parse
from cod_agent.environments.optimal_control import (
    PLAYERS,
    PRESETS,
    ControlSession,
    Dynamics,
    OptimalControl,
    Trip,
    flown,
)
from cod_agent.environments.optimal_control.dynamics import NAMES, split_of
from cod_agent.environments.optimal_control.players import Start, _best, _gains, choices, noted, read_note, read_trip
from cod_agent.environments.optimal_control.world import _drawn
from cod_agent.errors import MissingExtra, UnknownName, UsageError
from cod_agent.evaluation.players import played
from cod_agent.evaluation.statistics import difference
from cod_agent.tasks import Observation, Task

GOLDEN = {
    "small": "037064bee6ccb14d9a5dd827cee53843150b0fa367bfb48e1f8b53b06908d31c",
    "medium": "560ee82e63ec29cd299ef93793749557268f1bfc789ff888a09b474193acf832",
    "paper": "0738563197327fa6fc2775b93013a659dbe660dbe345f457c435c101cd72a677",
    "paper-noisy": "b925a5534a401eef17514eece4cbc4423818724f3c212a8bd0348671422bffac",
    "paper-improve": "0738563197327fa6fc2775b93013a659dbe660dbe345f457c435c101cd72a677",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""


def secret(world: OptimalControl, task: Task) -> tuple[Dynamics, Trip]:
    return _drawn(world.place(task))


def by_hand(form: str, **more) -> ControlSession:
    """Three steps with a cart that is known."""
    return ControlSession(Dynamics(0.5, -1.0), Trip(1.0, 0.5, -1.0, (0.0, 0.0, 0.0)), form, **more)


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = make_world("optimal-control", form="compact")
    assert isinstance(world, OptimalControl) and isinstance(world, Environment) and isinstance(world, Remembering)
    assert (world.name, world.form, world.recovery) == ("optimal-control:small", "compact", "deterministic")
    assert [name for name in PRESETS if OptimalControl(name).remembers] == ["paper-improve"]


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        OptimalControl(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    world = OptimalControl(preset, 7, form="compact")
    shown = [[world.start(task).reset().text for task in pack] for pack in world.packs(4, 4)]
    hidden = [
        [(drawn[0].a, drawn[0].b, drawn[1].noise) for drawn in (secret(world, task) for task in pack)]
        for pack in world.packs(4, 4)
    ]
    assert hashlib.sha256(json.dumps([shown, hidden]).encode()).hexdigest() == GOLDEN[preset]


def test_a_longer_pack_begins_with_the_shorter_one_and_shares_its_cart():
    world = OptimalControl("paper", 5)
    assert world.pack(6, 2).tasks[:3] == world.pack(3, 2).tasks
    carts, trips = zip(*(secret(world, task) for task in world.pack(8, 2)), strict=True)
    assert len(set(carts)) == 1 and len(set(trips)) == 8
    assert len({secret(world, pack[0])[0] for pack in world.packs(30, 1)}) == 30


def test_the_presets_of_the_paper_have_the_same_packs_but_for_the_noise():
    for name in ("paper-noisy", "paper-improve"):
        for one, other in zip(OptimalControl("paper", 3).pack(3), OptimalControl(name, 3).pack(3), strict=True):
            (cart, trip), (same, noisy) = secret(OptimalControl("paper"), one), secret(OptimalControl(name), other)
            assert (cart, trip.x, trip.v, trip.target) == (same, noisy.x, noisy.v, noisy.target)
            assert any(noisy.noise) == (name == "paper-noisy")


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = OptimalControl("paper-noisy", 5)
    task = Task.model_validate_json(world.pack(3, 1)[2].model_dump_json())
    for answer in ("<answer>1</answer>", "no"):
        one, other = OptimalControl("paper-noisy", 99).start(task), world.start(world.pack(3, 1)[2])
        assert (one.reset(), one.step(answer)) == (other.reset(), other.step(answer))
    assert set(task.data) == {"preset", "split", "seed", "pack", "index"}
    with pytest.raises(UsageError, match="no task of optimal-control:small"):
        OptimalControl("small").start(task)


@pytest.mark.parametrize("preset", PRESETS)
def test_everything_drawn_lies_where_the_preset_says(preset):
    kind, world = PRESETS[preset], OptimalControl(preset, 1)
    drawn = [secret(world, task) for pack in world.packs(80, 2) for task in pack]
    assert all(0.55 <= cart.a <= 1.2 and 0.35 <= abs(cart.b) <= 1.5 for cart, _ in drawn)
    assert {cart.b > 0 for cart, _ in drawn} == {True, False} and len({len(trip.noise) for _, trip in drawn}) == 1
    for name in ("x", "v", "target"):
        values = [getattr(trip, name) for _, trip in drawn]
        most = getattr(kind, name)
        assert max(map(abs, values)) <= most and min(values) < -0.8 * most and max(values) > 0.8 * most
    noise = [abs(w) for _, trip in drawn for w in trip.noise]
    assert max(noise) <= kind.noise and sum(noise) / len(noise) == pytest.approx(kind.noise / 2, rel=0.1)


def test_the_splits_share_no_cart_not_even_in_hundredths():
    seen = {}
    for split in ("train", "eval"):
        world = OptimalControl("small", 3, split=split)
        carts = [secret(world, pack[0])[0] for pack in world.packs(400, 1)]
        seen[split] = {(math.floor(cart.a * 100 + 1e-9), math.floor(cart.b * 100 + 1e-9)) for cart in carts}
    assert len(seen["train"]) > 300 and len(seen["eval"]) > 300 and not seen["train"] & seen["eval"]
    dice = Random(0)
    drawn = [split_of(dice.randrange(5500, 12_000), dice.randrange(-15_000, 15_000)) for _ in range(1500)]
    assert 0.2 < drawn.count("eval") / 1500 < 0.3


# Flights, by a second implementation


def grown(dice: Random, size: int) -> str:
    """A law, of so many parts, that this test makes: for Python to evaluate, too."""
    if size <= 1:
        return dice.choice([*NAMES, f"{dice.uniform(0, 2):.2f}", "1.0"])
    one, other = grown(dice, size // 2), grown(dice, size - size // 2)
    kinds = [
        "({} + {})",
        "({} - {})",
        "{} * {}",
        "({}) / ({})",
        "min({}, {})",
        "max({}, {})",
        "-abs({} - {})",
        "clip({}, -1.0, {})",
    ]
    kinds += [
        "(0.2 if {} < {} else -v)",
        "({} and {})",
        "({} or not {})",
        "abs({}) ** min(abs({}), 2.0)",
        "pow({}, 2.0) - {}",
    ]
    return dice.choice(kinds).format(one, other)


PYTHON = {
    "__builtins__": {},
    "abs": abs,
    "min": min,
    "max": max,
    "pow": pow,
    "clip": lambda u, low, high: min(max(u, low), high),
}


def naive(law: str, cart: Dynamics, trip: Trip) -> tuple[float, list[str]]:
    """Reward and table of a flight, step by step, the law evaluated by Python."""
    code, x, v, rows, effort, n = compile(law, "law", "eval"), trip.x, trip.v, [], 0.0, len(trip.noise)
    for t in range(n):
        fixed = {"x_target": trip.target, "v_target": 0.0, "horizon": float(n), "remaining": float(n - t)}
        try:
            u = float(eval(code, {**PYTHON, "x": x, "v": v, "t": float(t), **fixed}))  # noqa: S307
        except ZeroDivisionError:
            return 0.0, [*rows, f"{t}: {x:z.4f} {v:z.4f}"]
        u = 1.0 if u > 1 else -1.0 if u < -1 else u
        rows.append(f"{t}: {x:z.4f} {v:z.4f} {u:z.4f}")
        effort += u**2
        v = cart.a * v + cart.b * u + trip.noise[t]
        x = x + v
    rows.append(f"{n}: {x:z.4f} {v:z.4f}")
    return 1 / (1 + (x - trip.target) ** 2 + 2 * v**2 + 0.03 * effort), rows


@pytest.mark.parametrize("preset", PRESETS)
def test_a_second_implementation_agrees_on_laws_of_all_kinds(preset):
    world, dice, endings = OptimalControl(preset, 11, form="compact"), Random(preset), set()
    for pack in world.packs(30, 3):
        for task in pack:
            law = grown(dice, dice.randint(1, 12))
            reward, rows = naive(law, *secret(world, task))
            session = world.start(task)
            session.reset()
            seen = session.step(law)
            assert seen.done and seen.summary.split("\n") == rows, law
            assert seen.feedback.reward == pytest.approx(reward, rel=1e-9), law
            endings.add(seen.feedback.ending)
    assert endings == {"flown", "runtime"}


def test_the_names_of_a_law_are_what_the_rules_say():
    for name, values in {
        "t": [0, 1, 2], "remaining": [3, 2, 1], "horizon": [3, 3, 3], "x_target": [-1] * 3, "v_target": [0] * 3, "x": [1, 1.25, 1.375],
        "v": [0.5, 0.25, 0.125],
    }.items():  # fmt: skip
        said = []
        law = parse(f"0 * {name}", NAMES)
        flown(
            lambda at, name=name, law=law, said=said: said.append(at[name]) or law(at),
            Dynamics(0.5, 1.0),
            Trip(1, 0.5, -1, (0,) * 3),
        )
        assert said == values


def test_the_compact_form_is_terse():
    session = by_hand("compact")
    assert session.reset().text == "x 1 v 0.5 to -1 in 3"
    seen = session.step(" 2 if t == 0 else v / 2 ")
    assert (
        seen.summary == "0: 1.0000 0.5000 1.0000\n1: 0.2500 -0.7500 -0.3750\n2: 0.2500 0.0000 0.0000\n3: 0.2500 0.0000"
    )
    assert seen.feedback.text == "flown 1.2500 0.0000 1.1406 1.5967"
    assert seen.text == f"{seen.summary}\n{seen.feedback.text}" and seen.done and seen.carried is None
    assert (seen.feedback.ending, seen.feedback.reward) == ("flown", pytest.approx(1 / (1 + 1.25**2 + 0.03 * 1.140625)))
    with pytest.raises(UsageError, match="over"):
        session.step("1")


def test_the_natural_form_says_the_same_in_sentences():
    session = by_hand("natural")
    assert session.reset().text == (
        "At t = 0 the cart is at x = 1 with v = 0.5. After 3 steps it shall be at x_target = -1 with v_target = 0."
    )
    seen = session.step("I push.\n<answer>2 if t == 0 else\n v / 2</answer>")
    assert seen.summary.split("\n")[:3] == [
        " t |         x |         v |       u",
        " 0 |    1.0000 |    0.5000 |  1.0000",
        " 1 |    0.2500 |   -0.7500 | -0.3750",
    ]
    assert seen.summary.endswith(" 3 |    0.2500 |    0.0000 |       -")
    assert seen.feedback.text == (
        "The cart has flown. In the end x - x_target = 1.2500 and v - v_target = 0.0000. The sum of u**2 is 1.1406, the loss 1.5967."
    )
    assert seen.feedback.reward == pytest.approx(1 / 2.59671875)


def test_a_law_that_has_no_value_in_some_step_gets_nothing_and_the_table_up_to_there():
    for form, law in (("compact", "1 / (t - 2)"), ("natural", "<answer>1 / (t - 2)</answer>")):
        session = by_hand(form)
        session.reset()
        seen = session.step(law)
        assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (0.0, "runtime")
        assert "at t = 2 it divides by zero" in seen.feedback.text
        assert "1.0000" in seen.summary and len(seen.summary.split("\n")) == (3 if form == "compact" else 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rules_say_what_the_preset_has(preset):
    assert OptimalControl(preset, form="compact").pack(1)[0].prompt == ""
    world = OptimalControl(preset)
    rules = world.pack(1)[0].prompt
    assert ("-0.1 and 0.1" in rules) == bool(PRESETS[preset].noise)
    assert ("The last law" in rules) == world.remembers
    assert "{" not in rules and rules in NATURAL.solve(world.pack(1)[0], "", None)[-1].content
    assert all(re.search(rf"\b{name}\b", rules) for name in (*NAMES, "abs", "min", "max", "pow", "clip"))
    (example,) = re.findall("<answer>(.*)</answer>", rules)
    session = world.start(world.pack(1)[0])
    session.reset()
    assert session.step(f"<answer>{example}</answer>").feedback.ending == "flown"


# What the environment remembers


def test_the_last_law_that_flew_is_shown_with_the_next_task_of_the_run_and_nowhere_else():
    world = OptimalControl("paper-improve", 4, form="compact")
    tasks, carried = world.pack(4), None
    for task, law, shown in zip(
        tasks, ["1 /", "0.5  *\tx", "1/0", "v"], [None, None, "0.5 * x", "0.5 * x"], strict=True
    ):
        session = started(world, task, json.loads(json.dumps(carried)))
        lines = session.reset().text.split("\n")
        assert lines[0] == world.start(task).reset().text
        assert lines[1].startswith(f"law {shown}  off ") if shown else len(lines) == 1, lines
        seen = session.step(law)
        carried = seen.carried
        if law.startswith("0.5"):
            off, speed = seen.feedback.text.split()[1:3]
            told = f"off {off} {speed} {seen.feedback.reward:.4f}"
    assert lines[1].endswith(told) and carried["law"] == "v"
    natural = started(OptimalControl("paper-improve", 4), tasks[1], carried).reset().text
    assert "The last law that flew in this series: v\n" in natural and f"the reward {carried['reward']:.4f}." in natural
    elsewhere = OptimalControl("paper-improve", 5, form="compact").pack(1)[0]
    assert world.start(elsewhere, carried).reset() == world.start(elsewhere).reset()


def test_a_world_that_forgets_carries_nothing():
    world = OptimalControl("paper", 4, form="compact")
    session = started(world, world.pack(1)[0], {"anything": 1})
    session.reset()
    assert session.step("1").carried is None


GOOD = {"cart": 1, "law": "x", "x": 0.5, "v": 0, "reward": 0.5}


@pytest.mark.parametrize(
    "carried",
    [
        [], "law", {}, {**GOOD, "cart": "1"}, {**GOOD, "cart": True}, {**GOOD, "law": "import os"}, {**GOOD, "law": "x +\n1"},
        {**GOOD, "law": 1}, {**GOOD, "x": "0"}, {**GOOD, "v": math.nan}, {**GOOD, "reward": True}, {**GOOD, "more": 1}, {"cart": 1},
    ],
)  # fmt: skip
def test_what_no_session_carried_is_an_error_of_use(carried):
    world = OptimalControl("paper-improve", 4)
    assert world.start(world.pack(1)[0], GOOD).reset() == world.start(world.pack(1)[0]).reset()
    with pytest.raises(UsageError, match="carried"):
        world.start(world.pack(1)[0], carried)


# Answers

MALFORMED = [
    "", " ", "u = 1", "x +", "1 2", "\u0661", "x\u00b2", "y", "sin(x)", "x^2", "lambda: 1", "__import__('os').system('true')", "x.real",
    "[x]", "'x'", "1e999", "1_0", "0x1", "(" * 1000, "-" * 1000, "x" * 1_000_000, "(" * 1_000_000, "<answer>" * 100_000, "<answer>x",
    "x</answer>", "</answer>x<answer>", "<answer>x</answer><answer>x</answer>", "<answer><answer>x</answer></answer>", "<answer></answer>",
    "<answer>x; v</answer>", "<answer>x = 1</answer>", "\x00", "\ud800", "<answer>\ud800</answer>", None, 2, float("nan"), ["x"], b"x", {},
]  # fmt: skip


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_what_cannot_be_read_ends_the_episode_with_the_published_reward_and_a_reason(answer, form):
    session = by_hand(form)
    session.reset()
    began = time.thread_time()
    seen = session.step(answer)
    assert time.thread_time() - began < 0.2
    assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (-0.1, "malformed")
    assert seen.feedback.text.startswith("The answer was malformed: " if form == "natural" else "invalid: ")
    assert len(seen.text) < 300 and seen.text.isascii()


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from([*"xvt019.*/()<-+", "**", "<answer>", "</answer>", " if ", " else ", "min(", ","]),
            max_size=12,
        ).map("".join),
    ),
    st.sampled_from(["natural", "compact"]),
)
def test_no_answer_raises_or_gets_more_than_a_flight_is_worth(answer, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(answer)
    assert seen.done and seen.feedback.ending in ("flown", "runtime", "malformed")
    assert math.isfinite(seen.feedback.reward) and (seen.feedback.reward <= 0) == (seen.feedback.ending != "flown")
    best = _best(Start(1.0, 0.5, -1.0, 3), 0.5, -1.0).tolist()
    flight = flown(lambda at: best[int(at["t"])], Dynamics(0.5, -1.0), Trip(1.0, 0.5, -1.0, (0.0,) * 3))
    assert seen.feedback.reward <= flight.reward + 1e-9


# Players


def test_a_plan_is_the_best_flight_there_is():
    """The loss is convex, so a flight is the best one where no control that may change would make it less: measured on flights."""
    dice, bound = Random(1), 0
    for _ in range(40):
        cart = Dynamics(dice.uniform(0.55, 1.2), dice.choice([-1, 1]) * dice.uniform(0.35, 1.5))
        start = Start(dice.uniform(-2, 2), dice.uniform(-1.5, 1.5), dice.uniform(-8, 8), dice.choice([8, 12]))
        trip = Trip(start.x, start.v, start.target, (0.0,) * start.steps)
        plan = _best(start, cart.a, cart.b).tolist()
        for t, u in enumerate(plan):
            bent = [[*plan[:t], u + change, *plan[t + 1 :]] for change in (1e-4, -1e-4)]
            more, less = (flown(lambda at, bent=bent: bent[int(at["t"])], cart, trip).loss for bent in bent)
            inside = abs(u) < 1 - 1e-4
            if inside:
                assert more - less == pytest.approx(0, abs=1e-7)
            else:
                assert (less if u > 0 else more) >= flown(lambda at, plan=plan: plan[int(at["t"])], cart, trip).loss
            bound += not inside
    assert 20 < bound < 300


def test_the_gains_are_those_of_the_riccati_equation_and_fly_the_best_unbounded_flight():
    a, b, steps = 0.9, -0.7, 8
    gains, _ = _gains(np.array([a]), np.array([b]), steps)
    now, way = np.array([0.3, 0.1]), np.array([[1, a], [0, a]])
    wanted, state, controls = _best(Start(0.3, 0.1, 0.0, steps), a, b), now, []
    for gain in gains[0]:
        controls.append(float(-gain @ state))
        state = way @ state + np.array([b, b]) * controls[-1]
    assert max(map(abs, controls)) < 1 and controls == pytest.approx(wanted.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("preset", "least", "floor"), [("small", 0.05, 0.88), ("paper", 0.1, 0.71), ("paper-noisy", 0.1, 0.63)]
)
def test_memory_pays(preset, least, floor):
    world = OptimalControl(preset, 0, form="compact")
    perfect, memoryless = (played(world, name, 24, 4) for name in ("perfect", "memoryless"))
    assert difference(perfect[:, 1:], memoryless[:, 1:]).low > least and (perfect[:, 0] == memoryless[:, 0]).all()
    assert memoryless.mean() > floor and perfect[:, 1:].mean() > 0.9


def test_the_law_that_explores_is_never_too_long():
    for x, v, target in itertools.product((-2.0, -0.01, 1.37), (-1.5, 0.0, 1.49), (-8.0, -0.03, 7.77)):
        shown = Observation(f"x {x:g} v {v:g} to {target:g} in 12")
        (law,) = choices(COMPACT.solve(Task(id="any"), "", shown))
        assert len(law) < 0.95 * LENGTH and parse(law, NAMES)


def test_who_knows_the_cart_flies_as_well_as_can_be():
    world = OptimalControl("small", 1, form="compact")
    for pack in world.packs(20, 2):
        (cart, trip), note = secret(world, pack[1]), ""
        for task in pack:
            session = world.start(task)
            first = session.reset()
            law = choices(COMPACT.solve(task, note, first))[0]
            seen = session.step(law)
            note = noted(COMPACT.update(task, note, Trajectory(first, (Turn(law, seen),)), seen.feedback)[0].content)
        plan = _best(Start(trip.x, trip.v, trip.target, 8), cart.a, cart.b)
        assert seen.feedback.reward == pytest.approx(
            flown(lambda at, plan=plan: plan[int(at["t"])], cart, trip).reward, abs=2e-4
        )
        known = read_note(note)
        assert known is not None and known.cart == pytest.approx((cart.a, cart.b), abs=2e-3)


def test_a_note_adds_tables_up():
    table = "0: 0.0000 0.5000 1.0000\n1: 0.0000 1.0000 -1.0000\n2: 0.0000 0.2000\nflown 0 0 0 0 0.5"
    both = f"Update\n<context>\nnull\n</context>\n{table}"
    assert noted(both) == "a 0.8000 b 0.6000 vv 1.2500 vu -0.5000 uu 2.0000"
    again = noted(f"Update\n<context>\n{noted(both)}\n</context>\n{table}")
    assert again == "a 0.8000 b 0.6000 vv 2.5000 vu -1.0000 uu 4.0000"
    assert noted(f"Update\n<context>\n{again}\n</context>\ninvalid: x -0.1") == again
    assert noted("Update\n<context>\nnull\n</context>\ninvalid: x -0.1") == ""
    assert noted("Update\n<context>\nnull\n</context>\n0: 0.0000 0.5000 0.0000\n1: 0.0000 1.0000") == ""


def test_a_player_without_a_compact_prompt_says_so():
    natural = OptimalControl("small")
    task = natural.pack(1)[0]
    for messages in ([], NATURAL.solve(task, "", natural.start(task).reset())):
        with pytest.raises(UsageError):
            choices(messages)
    with pytest.raises(UsageError, match="compact form only"):
        read_trip("x 1 v 2 to 3")


NUMBERS = st.one_of(st.floats(-1e6, 1e6).map(lambda value: f"{value:.4f}"), st.sampled_from(["0", "1", "-1", "0.0001"]))


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.builds("a {} b {} vv {} vu {} uu {}".format, *[NUMBERS] * 5)),
    st.text("0123: -.\n", max_size=60),
)
def test_players_take_any_note(note, more):
    asked: list[Message] = [
        message("user", ("environment", f"<context>\n{note}\n</context>\nx 0.4 v -0.2 to 2.3 in 8"))
    ]
    for remember in (True, False):
        (law,) = choices(asked, remember=remember)
        flown(parse(law, NAMES), Dynamics(0.8, 0.6), Trip(0.4, -0.2, 2.3, (0.0,) * 8))
    assert isinstance(noted(f"Update\n<context>\n{note}\n</context>\n{more}"), str)


def test_without_scipy_who_remembers_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    said = [
        message("user", ("environment", "<context>\na 0.8 b 0.6 vv 2 vu 0 uu 2\n</context>\nx 0.4 v -0.2 to 2.3 in 8"))
    ]
    assert choices(said, remember=False)
    with pytest.raises(MissingExtra, match=r"\[worlds\]"):
        choices(said)


# Cost


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_step_costs_about_a_millisecond_at_most_and_an_answer_a_few(preset):
    world, steps, answers = OptimalControl(preset, 0, form="compact"), [], []
    player = PLAYERS["perfect"](randomness("cost"))
    for pack in world.packs(30, 1):
        session = world.start(pack[0])
        said = COMPACT.solve(pack[0], "", session.reset())
        began = time.thread_time()
        law = player(said)
        between = time.thread_time()
        session.step(law)
        steps.append(time.thread_time() - between)
        answers.append(between - began)
    assert len(law) > 500, "a law that explores is the longest there is"
    # Others may want this core, too, which takes up to twice as long then: docs/benchmarks.md has the medians.
    assert min(steps) < 2e-3 and min(answers) < 10e-3
