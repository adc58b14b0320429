"""PDE Discovery: numbers as other solvers find them, stable seeds, two splits, no answer that breaks it, players that remember."""

from __future__ import annotations

import hashlib
import json
import math
import time
from itertools import combinations
from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, message
from cod_agent.environments import make_world
from cod_agent.environments.base import Environment, Remembering, started
from cod_agent.environments.draws import randomness
from cod_agent.environments.pde_discovery import PLAYERS, PRESETS, TERMS, PdeDiscovery, PdeSession
from cod_agent.environments.pde_discovery.actions import read_action
from cod_agent.environments.pde_discovery.equations import Unreadable, read_equation, values, written
from cod_agent.environments.pde_discovery.packs import AMPLITUDE, draw_noise, draw_start, split_of
from cod_agent.environments.pde_discovery.players import choices, noted
from cod_agent.environments.pde_discovery.reaction import bounded, solution
from cod_agent.environments.pde_discovery.regression import fitted, searched
from cod_agent.environments.pde_discovery.world import KEPT, Rod, _drawn, reward_of
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.players import life, played
from cod_agent.evaluation.statistics import at_least
from cod_agent.tasks import Task

GOLDEN = {
    "small": "34cf083ff58bcf4624d4bd3b87ab396f78f8778bf1518959754406add06de46d",
    "paper": "266597787f1b455d1de93c89f24064ebfa8e4405ddad2a3dc60b737b15a05e32",
    "paper-hard": "5b6ed48cc50a3f4952c1ca2b0c1eb80d10d9c25f25d089d393ba0d9b79a91c5f",
    "paper-forgets": "266597787f1b455d1de93c89f24064ebfa8e4405ddad2a3dc60b737b15a05e32",
    "paper-hard-forgets": "5b6ed48cc50a3f4952c1ca2b0c1eb80d10d9c25f25d089d393ba0d9b79a91c5f",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""

TRUTH = {"u": 1.25, "u^3": -0.8}
ALL = tuple(TERMS)


def secret(world: PdeDiscovery, task: Task) -> Rod:
    return _drawn(world.place(task))


def by_hand(form: str = "compact", preset: str = "small", evidence=()) -> PdeSession:
    """A rod whose equation is known."""
    return PdeSession(Rod(TRUTH, ((1.2, 1), (-0.4, 2)), 5, ("hand",)), PRESETS[preset], form, evidence)


def exact(n: int = 6, top: float = 1.2) -> list[tuple[float, float]]:
    """Points without noise."""
    return [(u, 1.25 * u - 0.8 * u**3) for u in np.linspace(-0.7, top, n).round(2).tolist()]


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = make_world("pde-discovery", form="compact")
    assert isinstance(world, Environment) and isinstance(world, PdeDiscovery) and not world.remembers
    assert (world.name, world.form, world.recovery) == ("pde-discovery:small", "compact", "deterministic")
    assert isinstance(PdeDiscovery("paper"), Remembering) and PdeDiscovery("paper").remembers


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        PdeDiscovery(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    shown = []
    for split in ("train", "eval"):
        for form in ("natural", "compact"):
            world = PdeDiscovery(preset, 7, split=split, form=form)
            for pack in world.packs(3, 4):
                shown.append([written(secret(world, pack[0]).equation)])
                for task in pack:
                    session = world.start(task)
                    looked = "sample .3 .01; .7 .05"
                    looked = looked if form == "compact" else f"<answer>{looked}</answer>"
                    shown[-1] += [session.reset().text, session.step(looked).text]
    assert hashlib.sha256(json.dumps(shown).encode()).hexdigest() == GOLDEN[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_longer_pack_begins_with_the_shorter_one_and_shares_one_equation(preset):
    world = PdeDiscovery(preset, 5)
    for index in range(3):
        pack = world.pack(9, index)
        assert pack.tasks[:4] == world.pack(4, index).tasks
        assert len({written(secret(world, task).equation) for task in pack}) == 1
        assert len({secret(world, task).start for task in pack}) == 9


def test_four_tasks_in_a_row_have_four_different_heights():
    world, width = PdeDiscovery("paper", 2), (AMPLITUDE[1] - AMPLITUDE[0]) / 4
    for pack in world.packs(8, 8):
        for four in (pack[:4], pack[4:]):
            heights = [sum(abs(a) for a, _ in secret(world, task).start) for task in four]
            assert {int((height + 0.005 - AMPLITUDE[0]) / width) for height in heights} == {0, 1, 2, 3}


def test_a_preset_that_forgets_has_the_packs_of_the_one_that_remembers():
    for preset in ("paper", "paper-hard"):
        ours, theirs = PdeDiscovery(preset, 3), PdeDiscovery(f"{preset}-forgets", 3)
        for one, other in zip(ours.pack(4), theirs.pack(4), strict=True):
            assert secret(ours, one) == secret(theirs, other)


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = PdeDiscovery("paper-hard", 5)
    pack = world.pack(3, 1)
    task = Task.model_validate_json(pack[2].model_dump_json())
    assert PdeDiscovery("paper-hard", 99).start(task).reset() == world.start(pack[2]).reset()
    assert set(task.data) == {"preset", "split", "seed", "pack", "index"}
    others = PdeDiscovery("paper-hard", 6).pack(3, 1)
    assert secret(world, task).equation != secret(world, others[2]).equation
    assert task.prompt == others[2].prompt


def test_both_forms_are_the_same_pack_and_show_the_same_points():
    natural, compact = PdeDiscovery("paper", 3), PdeDiscovery("paper", 3, form="compact")
    for one, other in zip(natural.pack(4), compact.pack(4), strict=True):
        said, terse = natural.start(one), compact.start(other)
        said.reset(), terse.reset()
        told = said.step("<answer>Sample x=.25, t=.01; (0.5, 0.2)</answer>").summary.splitlines()
        lines = [line.split(" ") for line in terse.step("sample .25 .01;.5 .2").summary.splitlines()]
        assert told == [
            f"x = {x}, t = {t}: u = {u}, response = {r}"
            for (x, t), (u, r) in zip((("0.25", "0.01"), ("0.50", "0.20")), lines, strict=True)
        ]


@pytest.mark.parametrize("preset", PRESETS)
def test_no_set_of_terms_of_one_split_occurs_in_the_other_and_coefficients_are_as_told(preset):
    kind, seen = PRESETS[preset], {}
    for split in ("train", "eval"):
        world = PdeDiscovery(preset, 1, split=split)
        found = [secret(world, pack[0]).equation for pack in world.packs(24, 1)]
        seen[split] = {frozenset(equation) for equation in found}
        assert {len(equation) for equation in found} == set(kind.sizes)
        assert all(set(equation) <= set(kind.terms) and split_of(tuple(equation)) == split for equation in found)
        coefficients = [c for equation in found for c in equation.values()]
        assert all(0.5 <= abs(c) <= 2 and round(c, 2) == c for c in coefficients)
        assert min(coefficients) < 0 < max(coefficients)
    assert len(seen["train"]) > 10 and len(seen["eval"]) > 5 and not seen["train"] & seen["eval"]


# Physics


@pytest.mark.parametrize("rate", [0.0, 2.0, -1.5])
def test_linear_reactions_are_solved_exactly(rate):
    found = solution({"u": rate}, ((1.2, 1), (-0.5, 3)))
    t, x = np.meshgrid(np.arange(101) / 100, np.arange(101) / 100, indexing="ij")
    modes = ((1.2, 1), (-0.5, 3))
    wanted = sum(a * np.exp((rate - (m * np.pi) ** 2) * t) * np.sin(m * np.pi * x) for a, m in modes)
    assert np.abs(found - wanted).max() < 1e-6


def by_lines(equation: dict, start, cells: int, times: list[float]) -> np.ndarray:
    """u at every tenth of the rod by another way: finite differences in space, BDF in time."""
    from scipy.integrate import solve_ivp

    x = np.linspace(0, 1, cells + 1)[1:-1]

    def rate(t, u):
        padded = np.concatenate([[0.0], u, [0.0]])
        return (padded[2:] - 2 * u + padded[:-2]) * cells**2 + values(equation, u)

    first = sum(a * np.sin(m * np.pi * x) for a, m in start)
    solved = solve_ivp(rate, (0, times[-1]), first, "LSODA", times, lband=1, uband=1, rtol=1e-8, atol=1e-9)
    return solved.y[cells // 10 - 1 :: cells // 10].T


@pytest.mark.parametrize(
    ("equation", "start"),
    [
        ({"u": 2.0, "u^3": -1.5}, ((1.4, 1), (-0.5, 3))),
        ({"u^2": 1.5, "u^4": 1.0}, ((1.0, 1), (0.4, 2))),
        ({"u^7": -2.0, "(exp(u)-1)": 2.0}, ((-1.5, 1), (0.5, 2))),
        ({"sin(2*u)": 1.5, "u/(1+u+u^2)": 2.0, "log(1+u^2)": -2.0}, ((-1.1, 1), (0.5, 2))),
    ],
)
def test_another_solver_and_a_finer_grid_find_the_same(equation, start):
    found = solution(equation, start)
    assert np.abs(found - solution(equation, start, modes=127, stride=0.025)).max() < 1e-5
    hundredths = [1, 5, 20, 60]
    coarse, fine = (by_lines(equation, start, cells, [t / 100 for t in hundredths]) for cells in (80, 160))
    wanted = (4 * fine - coarse) / 3  # of the errors of second order, nothing is left
    assert np.abs(found[hundredths, 10:100:10] - wanted).max() < 2e-5
    assert np.array_equal(solution(equation, start, 20).round(9), found[:21].round(9))


def test_no_task_of_any_pack_comes_near_the_bound():
    for preset in ("paper", "paper-hard"):
        for split in ("train", "eval"):
            world = PdeDiscovery(preset, 3, split=split)
            for pack in world.packs(3, 1):
                equation = secret(world, pack[0]).equation
                for highest in range(4):
                    start = draw_start(randomness(preset, highest), 3)
                    assert np.abs(solution(equation, start, 30, modes=31, stride=0.5)).max() < 3


@pytest.mark.parametrize("equation", [{"u^7": 1.0}, {"u^5": 2.0, "u": 2.0}, {"u^2": -2.0, "u^4": -2.0}])
def test_equations_that_run_away_are_not_drawn(equation):
    assert not bounded(equation, 2.0, steepest=3)
    assert bounded(
        {term: -c if term != "u^2" and term != "u^4" else c / 4 for term, c in equation.items()}, 2.0, steepest=3
    )


# Regression

NAMED = {
    "u": lambda u: u,
    "u^2": lambda u: u**2,
    "u^3": lambda u: u**3,
    "u^4": lambda u: u**4,
    "u^5": lambda u: u**5,
    "u^7": lambda u: u**7,
    "sin(u)": math.sin,
    "sin(2*u)": lambda u: math.sin(2 * u),
    "(exp(u)-1)": lambda u: math.exp(u) - 1,
    "log(1+u^2)": lambda u: math.log(1 + u**2),
    "tanh(u)": math.tanh,
    "u/(1+u^2)": lambda u: u / (1 + u**2),
    "u^2/(1+u^2)": lambda u: u**2 / (1 + u**2),
    "u^4/(1+u^4)": lambda u: u**4 / (1 + u**4),
    "u/(1+u+u^2)": lambda u: u / (1 + u + u**2),
}
"""The terms once more, by name."""


def test_terms_have_the_values_that_their_names_say():
    assert list(NAMED) == list(TERMS)
    for u in (-2.9, -1.0, -0.3, 0.0, 0.7, 2.5):
        for term, value in NAMED.items():
            assert TERMS[term](np.array([u]))[0] == pytest.approx(value(u), abs=1e-12)


def naive(points, terms, most: int) -> dict[frozenset, tuple[float, dict[str, float]]]:
    """Largest error and coefficients of every support: one least-squares problem after the other."""
    found = {}
    for size in range(1, most + 1):
        for support in combinations(terms, size):
            columns = np.array([[NAMED[term](u) for term in support] for u, _ in points])
            target = np.array([r for _, r in points])
            ridge = np.vstack([columns, 1e-4 * np.eye(size)])
            fit = np.linalg.lstsq(ridge, np.concatenate([target, np.zeros(size)]), rcond=None)[0].round(3)
            found[frozenset(support)] = float(abs(columns @ fit - target).max()), dict(zip(support, fit, strict=True))
    return found


def test_the_regression_finds_what_a_naive_one_finds():
    dice = np.random.default_rng(4)
    for most, n in ((2, 3), (2, 12), (3, 8)):
        u = dice.uniform(-1, 1.8, n)
        points = np.stack([u, values({"u": 1.3, "u^4": -0.7}, u) + 0.01 * dice.normal(size=n)], 1).round(4)
        every = naive(points, ALL, most)
        found = searched(points, ALL, most)
        assert [len(one.equation) for one in found] == [size for size in range(1, most + 1) for _ in range(3)]
        for size in range(1, most + 1):
            best = sorted(error for support, (error, _) in every.items() if len(support) == size)[:3]
            ours = [one for one in found if len(one.equation) == size]
            assert [one.error for one in ours] == pytest.approx(best, abs=2e-3)
            for one in ours:
                error, fit = every[frozenset(one.equation)]
                if one.condition < 100:  # else both are as good as any
                    assert one.equation == pytest.approx(fit, abs=1.1e-3) and one.error == pytest.approx(
                        error, abs=5e-3
                    )


def test_exact_points_give_the_equation_back_and_terms_alike_a_large_condition():
    points = np.array(exact())
    best = searched(points, ALL, 2)[3]
    assert best.equation == TRUTH and best.error < 1e-9 and best.condition < 10
    alike, apart = fitted(0.1 * points, [("u", "sin(u)"), ("u", "u^2")])
    assert alike.condition > 500 > 5 > apart.condition


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(-3, 3), st.floats(-9999, 9999)), min_size=1, max_size=6))
def test_any_evidence_can_be_regressed(points):
    for one in searched(np.array(points), ALL, 3):
        assert all(math.isfinite(number) for number in (*one.equation.values(), one.error, one.condition))
        assert read_equation(written(one.equation), ALL).keys() == one.equation.keys()


def test_points_are_recalled_as_they_are_shown():
    assert read_action("recall u = 0.2923, response = -0.1974\nu=.1 r=2", ALL).points == ((0.2923, -0.1974), (0.1, 2))


@pytest.mark.parametrize(("u", "times"), [(2.9986, 64), (-2.9944, 64), (2.9699, 256), (2.9447, 64)])
def test_one_high_point_recalled_many_times_can_be_regressed(u, times):
    session = by_hand(preset="paper-hard-forgets")
    session.reset()
    assert session.step("recall " + "; ".join([f"{u} 1"] * times)).text.startswith(f"recalled {times}")
    seen = session.step("regress")
    assert len(seen.text.splitlines()) == 10 and not seen.done


# Actions


def test_noise_is_as_told_and_asking_again_is_a_new_measurement():
    dice = randomness("noise")
    drawn = np.array([draw_noise(dice, 0.002) for _ in range(2000)])
    assert drawn.std() == pytest.approx(0.002, rel=0.06) and abs(drawn.mean()) < 2e-4
    session = by_hand(preset="paper-forgets")
    session.reset()
    seen = session.step("sample .5 .02; .5 .02; .5 .02; .5 .02; .5 .02; .5 .02").summary.splitlines()
    u, response = np.array([line.split(" ") for line in seen], dtype=float).T
    true = solution(TRUTH, ((1.2, 1), (-0.4, 2)), 2)[2, 50]
    assert len(set(seen)) == 6 and np.abs(u - true).max() < 0.012
    assert np.abs(response - values(TRUTH, np.array(true))).max() < 0.003


def test_the_compact_form_says_what_is_left_and_what_was_found():
    session = by_hand()
    assert session.reset().text == "u0 1.2 1 -0.4 2 noise 0.004\npoints 3 steps 6 evidence 0"
    seen = session.step("recall " + "; ".join(f"{u:.2f} {r:.6f}" for u, r in exact()))
    assert (seen.text, seen.summary) == ("recalled 6\npoints 3 steps 5 evidence 6", "recalled 6")
    seen = session.step("regress u^3, U | u")
    assert seen.text.endswith("\n0.0000 1.25*u - 0.8*u^3\npoints 3 steps 4 evidence 6")
    assert seen.text.startswith(seen.summary) and len(seen.summary.splitlines()) == 2
    seen = session.step("finalize f(u) = -.8 u**3 + 1.25 u")
    assert (seen.text, seen.done) == ("finalised 1.25*u - 0.8*u^3", True)
    assert seen.feedback.model_dump() == {
        "reward": 1.0,
        "text": "finalised 0.0000 1.25*u - 0.8*u^3",
        "ending": "finalised",
    }
    with pytest.raises(UsageError, match="over"):
        session.step("summarise")


def test_the_natural_form_says_the_same_in_sentences():
    session = by_hand("natural")
    assert "u(x, 0) = 1.2*sin(pi*x) - 0.4*sin(2*pi*x)." in session.reset().text
    session.step(f"From my note.\n<answer>recall {'; '.join(f'u={u} r={r:.6f}' for u, r in exact())}</answer>")
    listed = session.step("<answer>summarise</answer>")
    assert listed.text.count("response") == 6 and "6 points in evidence" in listed.summary
    found = session.step("<answer>regress</answer>").text
    assert "With 1 term (" in found and "\n  1.25*u - 0.8*u^3   error 0.0000, condition 4.2\n" in found
    seen = session.step("<answer>finalise 1.25*u - 0.8*u^3</answer>")
    assert seen.feedback.text.startswith(
        "You finalised an equation. Final: f(u) = 1.25*u - 0.8*u^3, largest error 0.0000."
    )


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("sample .1 .1; .2 .1; .3 .1; .4 .1", "more than the 3"),
        ("sample 0 .1", "x is from"),
        ("sample .5 0", "t from"),
        ("sample .5 1.01", "t from"),
        ("sample -.5 .1", "x is from"),
        ("regress", "no evidence"),
        ("regress 3", "no evidence"),
        ("recall 3.1 1", "never beyond 3"),
        ("finalise u", "none of the equations"),
    ],
)
def test_what_cannot_be_done_costs_the_step_and_says_why(answer, why):
    for form in ("compact", "natural"):
        session = by_hand(form)
        session.reset()
        seen = session.step(answer if form == "compact" else f"<answer>{answer}</answer>")
        assert why in seen.summary and not seen.done
        assert "steps 5 evidence 0" in seen.text or "Turns left: 5. Points in evidence: 0." in seen.text


def test_too_many_terms_are_refused_and_only_the_latest_regression_counts():
    session = by_hand(evidence=exact())
    session.reset()
    for too_many in ("regress 3", "regress u, u^2, u^3"):
        assert "at most 2 terms" in session.step(too_many).summary
    session.step("regress u, u^3")
    session.step("regress u^2")
    assert "none of the equations" in session.step("finalise 1.25*u - 0.8*u^3").summary
    seen = session.step("regress")
    assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (0.0, "steps")
    assert seen.feedback.text == "steps 0.0000 1.25*u - 0.8*u^3"


def test_what_was_shown_may_be_finalised_rounded_and_the_agents_numbers_count():
    points = [(u, 1.2536 * u - 0.8044 * u**3) for u, _ in exact()]
    for said, reward in (("1.254*u - 0.804*u^3", 0.004 + 0.004), ("1.25*u - 0.8*u^3", 0), ("1.25 u - .804 u^3", 0.004)):
        session = by_hand(evidence=points)
        session.reset()
        assert "1.254*u - 0.804*u^3" in session.step("regress").summary
        for far in ("1.26*u - 0.8*u^3", "1.25*u - 0.798*u^3", "1.25*u + 0.8*u^3"):
            assert "rounded to two decimals" in session.step(f"finalise {far}").summary
        session.step("sample .5 .01")  # the error that is told is that over the points of the regression
        seen = session.step(f"finalise {said}")
        assert seen.feedback.reward == pytest.approx(1 / (1 + reward / 2.05)) and seen.feedback.ending == "finalised"
        assert written(read_equation(said, ALL)) in seen.feedback.text
        fit = read_equation(said, ALL)
        error = max(abs(float(values(fit, np.array(u))) - response) for u, response in points)
        assert f" {error:.4f} " in seen.feedback.text


def test_a_term_that_the_preset_lacks_is_refused_and_costs_the_step():
    for form in ("natural", "compact"):
        session = by_hand(form, evidence=exact())
        session.reset()
        for left, answer in ((5, "regress u, u^5"), (4, "finalise 1.25*u - 0.8*u^5"), (3, "regress u | sin(u)")):
            seen = session.step(answer if form == "compact" else f"<answer>{answer}</answer>")
            assert not seen.done and "is none of the terms here: u, u^2, u^3, u^4," in seen.summary
            assert f"steps {left} " in seen.text or f"Turns left: {left}." in seen.text


def test_one_point_is_not_1_points():
    session = by_hand("natural", evidence=exact(1))
    session.reset()
    for answer in ("recall .5 .1", "sample .1 .1; .2 .1; .3 .1", "sample .1 .1"):
        seen = session.step(f"<answer>{answer}</answer>")
        assert "1 points" not in seen.text
    assert "1 point is more than the 0 left" in seen.summary


@pytest.mark.parametrize(
    ("found", "reward"),
    [
        ({"u": 1.25, "u^3": -0.8}, 1),
        ({"u": 1.0, "u^3": -0.8}, 1 / (1 + 0.25 / 2.05)),
        ({"u": 1.25}, 1 / (1 + 0.8 / 2.05)),
        ({"u": 1.25, "u^2": 0.8}, 1 / (1 + 1.6 / 2.05)),
        ({"u": 1.25, "u^2": 0.1, "u^3": -0.8}, 1 / (1 + 0.1 / 2.05 + 1)),
        ({"u^2": 0.0}, 1 / 2),
    ],
)
def test_the_reward_is_that_of_the_published_one(found, reward):
    assert reward_of(found, TRUTH) == pytest.approx(reward)


class Naive:
    """The rules once more, for the compact form, on what the session showed; the reading is Python's own splitting."""

    def __init__(self, preset, truth: dict, evidence: list) -> None:
        self.preset, self.truth, self.evidence = preset, truth, list(evidence)
        self.points, self.steps, self.shown = preset.points, preset.steps, []

    def step(self, verb: str, rest: list, text: str) -> str | float:
        """`refused`, `done` or, at the end, the reward; checks the text of the session's step."""
        self.steps -= 1
        outcome: str | float = "refused"
        if verb == "sample" and len(rest) <= self.points:
            new = [tuple(map(float, line.split(" "))) for line in text.splitlines()[: len(rest)]]
            self.points -= len(rest)
            self.evidence, outcome = self.evidence + new, "done"
        elif verb == "recall" and not self.preset.remembers:
            self.evidence, outcome = self.evidence + rest, "done"
        elif verb == "summarise":
            outcome = "done"
        elif verb == "regress" and self.evidence and rest[0] <= self.preset.most:
            every, outcome, self.shown = naive(self.evidence, self.preset.terms, rest[0]), "done", []
            for line in text.splitlines()[: 3 * rest[0]]:
                error, equation = line.split(" ", 1)
                fit = self.parsed(equation)
                left = [abs(sum(c * NAMED[term](u) for term, c in fit.items()) - r) for u, r in self.evidence]
                assert float(error) == pytest.approx(max(left), abs=1e-4)
                self.shown.append(equation)
            for size in range(1, rest[0] + 1):
                best = text.splitlines()[3 * size - 3]
                least = min(error for support, (error, _) in every.items() if len(support) == size)
                assert len(self.parsed(best.split(" ", 1)[1])) == size
                assert float(best.split(" ")[0]) == pytest.approx(least, abs=3e-3)
        elif verb == "finalise" and rest[0] in self.shown:
            return "finalised"
        return 0.0 if self.steps == 0 else outcome

    @staticmethod
    def parsed(equation: str) -> dict[str, float]:
        parts = equation.replace(" - ", " + -").split(" + ")
        return {part.split("*", 1)[1]: float(part.split("*", 1)[0]) for part in parts}


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_random_tasks_go_as_a_naive_implementation_says(preset):
    world, dice, ended = PdeDiscovery(preset, 9, form="compact"), Random(2), set()
    for pack in world.packs(4, 3):
        carried, kept = None, []
        for task in pack:
            session, model = started(world, task, carried), Naive(PRESETS[preset], secret(world, task).equation, kept)
            seen, outcome = session.reset(), "done"
            while not isinstance(outcome, float) and outcome != "finalised":
                verb = dice.choice(["sample", "sample", "recall", "summarise", "regress", "regress", "finalise"])
                rest = {
                    "sample": [
                        (dice.randint(1, 99) / 100, dice.randint(1, 20) / 100) for _ in range(dice.randint(1, 4))
                    ],
                    "recall": [(0.5, -0.25)] * dice.randint(1, 2),
                    "summarise": [],
                    "regress": [dice.randint(1, 3)],
                    "finalise": [dice.choice(model.shown or ["1*u"])],
                }[verb]
                said = (
                    "; ".join(f"{a} {b}" for a, b in rest) if verb in ("sample", "recall") else " ".join(map(str, rest))
                )
                seen = session.step(f"{verb} {said}")
                outcome = model.step(verb, rest, seen.text)
                assert seen.text.startswith("refused") == (outcome == "refused") or seen.done
                if not seen.done:
                    left = f"points {model.points} steps {model.steps} evidence {len(model.evidence)}"
                    assert seen.text.endswith(left)
            assert seen.done
            ended.add(seen.feedback.ending)
            if outcome == "finalised":
                found = model.parsed(rest[0])
                wrong = sum(abs(found.get(name, 0) - model.truth.get(name, 0)) for name in {*found, *model.truth})
                size = sum(abs(c) for c in model.truth.values())
                more = max(0, len(found) - len(model.truth))
                assert seen.feedback.reward == pytest.approx(1 / (1 + wrong / size + more))
            else:
                assert seen.feedback.reward == outcome == 0
            carried = json.loads(json.dumps(seen.carried))
            kept = model.evidence if world.remembers else []
    assert ended == {"finalised", "steps"}


# What the environment remembers


def test_what_was_sampled_stays_in_the_run_and_nowhere_else():
    world = PdeDiscovery("paper", 4, form="compact")
    first, second = world.pack(2)
    session = world.start(first)
    session.reset()
    session.step("sample .3 .01; .5 .01")
    carried = json.loads(json.dumps(session.step("nonsense").carried))
    assert world.start(second, carried).reset().text.endswith("points 6 steps 6 evidence 2")
    assert world.start(second).reset().text.endswith("evidence 0")
    elsewhere = PdeDiscovery("paper", 5, form="compact").pack(1)[0]
    assert world.start(elsewhere, carried).reset() == world.start(elsewhere).reset()
    again = world.start(second, carried)
    again.reset()
    assert "in evidence already" in again.step("recall .5 .5").summary
    forgets = PdeDiscovery("paper-forgets", 4, form="compact")
    session = started(forgets, forgets.pack(1)[0], carried)
    assert session.reset().text.endswith("evidence 0") and session.step("nonsense").carried is None


def test_of_a_long_life_the_newest_points_are_kept():
    session = by_hand(preset="paper", evidence=exact(KEPT))
    session.reset()
    assert session.step("sample .5 .01").text.endswith(f"evidence {KEPT}")
    kept = session.step("nonsense").carried["points"]
    assert len(kept) == KEPT and kept[0] == list(exact(KEPT)[1])


NUMBER = secret(PdeDiscovery("paper", 4), PdeDiscovery("paper", 4).pack(1)[0]).number


@pytest.mark.parametrize(
    "carried",
    [
        [],
        "points",
        {"points": []},
        {"pack": "1", "points": []},
        {"pack": NUMBER, "points": "12"},
        {"pack": NUMBER, "points": [1]},
        {"pack": NUMBER, "points": [[1]]},
        {"pack": NUMBER, "points": [[1, True]]},
        {"pack": NUMBER, "points": [[1.0, float("nan")]]},
        {"pack": NUMBER, "points": [[1.0, "1"]]},
        {"pack": NUMBER, "points": [[99.0, 1.0]]},
        {"pack": NUMBER, "points": [[1.0, 1.0]] * (KEPT + 1)},
        {"pack": NUMBER, "points": [], "more": 1},
    ],
)
def test_what_no_session_carried_is_an_error_of_use(carried):
    world = PdeDiscovery("paper", 4)
    with pytest.raises(UsageError, match="carried"):
        world.start(world.pack(1)[0], carried)


def test_sessions_share_no_state():
    world = PdeDiscovery("paper", 2, form="compact")
    task = world.pack(1)[0]
    one, other = world.start(task), world.start(task)
    shown = one.reset().text, other.reset().text
    sampled = one.step("sample .3 .01; .4 .02").text
    assert shown[0] == shown[1] == other.reset().text == one.reset().text
    assert other.step("sample .3 .01; .4 .02").text == sampled == one.step("sample .3 .01; .4 .02").text


# Answers


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_read_as_it_is_written(term):
    for coefficient in (-1.25, 0.8, 2.0, 999.0, 0.001, 0.0):
        equation = {term: coefficient}
        assert read_equation(written(equation), ALL) == equation
    assert read_equation(f"0.5*u^2 - {term}" if term != "u^2" else f"0.5 u - {term}", ALL)[term] == -1
    assert read_action(f"REGRESS {term} | {term}", ALL).supports == ((term,),)


@pytest.mark.parametrize(
    ("text", "equation"),
    [
        ("u", {"u": 1}),
        ("f(u) = -u*u + 2u", {"u": 2, "u^2": -1}),
        ("u_t = u_xx - .5 sin( 2u ) + 1.5 (e^u - 1)", {"sin(2*u)": -0.5, "(exp(u)-1)": 1.5}),
        ("0.7·u² − 1.2×u³", {"u^2": 0.7, "u^3": -1.2}),
        ("2*ln(u^2+1)-u**7", {"log(1+u^2)": 2, "u^7": -1}),
        ("0.5*u/(1+u^2)+0.5*u^2/(u^2+1)", {"u/(1+u^2)": 0.5, "u^2/(1+u^2)": 0.5}),
    ],
)
def test_equations_may_be_spelled_in_a_few_ways(text, equation):
    assert read_equation(text, ALL) == equation


NO_EQUATIONS = [
    "",
    "0",
    "1.5",
    "u^6",
    "u u^2",
    "u + u",
    "u + + u^2",
    "u +",
    "1000*u",
    "1e3*u",
    "nan*u",
    "inf*u",
    "1.2345678*u",
    "١*u",
    "u^٢",
    "(u)",
    "2*(u + u^3)",
    "u*0.5",
    "--u",
    "sin(3*u)",
    "sin(2*u",
    "cos(u)",
    "__import__('os')",
    "u if u else u",
    "1**9**9*u",
    "{u}",
    "u^3" * 2,
    "\ud800",
    "\x00u",
    "u" * 3000,
    "(" * 3000,
]


@pytest.mark.parametrize("text", NO_EQUATIONS, ids=lambda text: repr(text)[:24])
def test_what_is_no_equation_is_unreadable(text):
    with pytest.raises(Unreadable):
        read_equation(text, ALL)


MALFORMED = [
    *(f"finalise {text}" for text in NO_EQUATIONS),
    "",
    "null",
    "look",
    "sample",
    "sample ;",
    "sample .5",
    "sample .5 .1 .2",
    "sample x=.5 .1;t=.1",
    "sample .5 .1, .6 .1",
    "sample t=.1 x=.5",
    "sample nan .1",
    "sample 1e-1 .1",
    "sample .٥ .1",
    "sample 99999 .1",
    "recall u=.5",
    "recall",
    "summarise all",
    "regress 0",
    "regress 12",
    "regress u, u",
    "regress u |",
    "regress u^3 u",
    "regress " + " | ".join(["u"] * 9),
    "sin(u)",
    "sample .5 .1\x00",
    "sample " + ".5 .1; " * 200_000,
    "<answer>" * 100_000,
    "x" * 1_000_000,
    " " * 1_000_000,
    None,
    3,
    float("nan"),
    ["summarise"],
    b"summarise",
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:24])
def test_malformed_answers_end_the_episode_with_reward_0_and_a_reason(answer, form):
    session = by_hand(form, evidence=exact())
    session.reset()
    session.step("regress" if form == "compact" else "<answer>regress</answer>")
    wrapped = f"<answer>{answer}</answer>" if form == "natural" and isinstance(answer, str) else answer
    seen = session.step(wrapped)
    assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (0.0, "malformed")
    assert seen.feedback.text.startswith("invalid: " if form == "compact" else "The answer was malformed")
    seen.feedback.text.encode()
    best = "; 0.0000 1.25*u - 0.8*u^3" if form == "compact" else "f(u) = 1.25*u - 0.8*u^3, largest error 0.0000."
    assert seen.feedback.text.endswith(best) and "\n" not in seen.feedback.text


def test_reasons_name_what_is_wrong_in_both_forms():
    for answer, why in (("look at it", "'look at it'"), ("regress u^6", "'u^6'"), ("finalise u + 3*w", "at '+3*w'")):
        natural, compact = by_hand("natural").step(f"<answer>{answer}</answer>"), by_hand().step(answer)
        assert why in natural.feedback.text and why in compact.feedback.text
        assert compact.feedback.text.startswith("invalid: ")
    assert read_action("regress u^5", ALL).supports == (("u^5",),)


def test_what_a_thinking_model_thinks_does_not_count():
    session = by_hand("natural")
    assert not session.step("<think><answer>look</answer></think>So: <answer>summarize</answer>").done


PIECES = [
    "<answer>",
    "</answer>",
    "sample ",
    "recall ",
    "regress ",
    "finalise ",
    "summarise",
    "u",
    "^3",
    "sin(u)",
    " + ",
]
PIECES += ["-", "1.25", "*", "0.8", ".5 .1", ";", "|", ",", "x=", "٣", "\n", "</think>", "(", ")", "1", "²", "\x00"]
ANSWERS = st.one_of(st.text(), st.none(), st.integers(), st.lists(st.sampled_from(PIECES), max_size=9).map("".join))


@given(st.lists(ANSWERS, min_size=1, max_size=6), st.sampled_from(["natural", "compact"]))
def test_no_answer_raises_or_wins_wrongly(answers, form):
    session = by_hand(form, evidence=exact())
    session.reset()
    session.step("regress u | u^2" if form == "compact" else "<answer>regress u | u^2</answer>")
    for answer in answers:
        seen = session.step(answer)
        if seen.done:
            assert seen.feedback.ending in ("malformed", "steps", "finalised")
            assert (seen.feedback.reward > 0) == (seen.feedback.ending == "finalised") and seen.feedback.reward <= 1
            break


# Players


def test_who_remembers_does_better_at_the_last_task():
    for preset, packs, gain in (("small", 24, 0.05), ("paper-forgets", 24, 0.01), ("paper-hard-forgets", 12, 0.02)):
        world = PdeDiscovery(preset, 0, form="compact")
        perfect, memoryless = (played(world, name, packs, 4) for name in ("perfect", "memoryless"))
        assert np.array_equal(perfect[:, 0], memoryless[:, 0]) and (memoryless > 0).all()
        assert at_least(perfect[:, -1] - memoryless[:, -1]).low > gain, preset


def test_where_the_environment_remembers_nobody_needs_a_note():
    ours, theirs = (PdeDiscovery(preset, 0, form="compact") for preset in ("paper", "paper-forgets"))
    perfect, memoryless = (played(ours, name, 4, 4) for name in ("perfect", "memoryless"))
    assert np.array_equal(perfect, memoryless)
    assert played(theirs, "perfect", 4, 4) == pytest.approx(perfect, abs=0.02)


def test_notes_are_points_none_twice_and_fit_a_context():
    prompt = (
        "Update\n<context>\n0.5000 -1.2000\n</context>\n0.2500 0.1000\n0.5000 -1.2000\n0.0041 1.25*u\nfinalised 1*u 0.7"
    )
    assert noted(prompt) == "0.5000 -1.2000\n0.2500 0.1000"
    assert noted("Update\n<context>\nnull\n</context>\ninvalid 0") == ""
    many = "\n".join(f"-{i / 1000:.4f} -{4000 - i:.4f}" for i in range(1000))
    note = noted(f"Update\n<context>\nnull\n</context>\n{many}\nsteps 0")
    assert len(note) <= 4000 and note.endswith("-0.9990 -3001.0000")
    asked = COMPACT.solve(Task(id="x"), note, by_hand().reset())
    (recall,) = choices(asked)
    assert not by_hand().step(recall).done and by_hand().step(recall).text.startswith("recalled")


def test_a_note_of_a_whole_pack_of_eight_holds_every_point():
    world, prompts = PdeDiscovery("paper-forgets", 1, form="compact"), []
    play = PLAYERS["perfect"](Random(0))

    def player(messages):
        prompts.append(messages[0].content)
        return play(messages)

    assert min(life(world, world.pack(8), player)) > 0.3
    assert max(len(prompt) for prompt in prompts) < 4000 and prompts[-1].count("\n") > 7 * 6


@pytest.mark.parametrize("said", [[], COMPACT.solve(Task(id="x", prompt="hello"), "", None)])
def test_players_read_the_compact_form_only(said):
    with pytest.raises(UsageError):
        choices(said)
    natural = PdeDiscovery()
    with pytest.raises(UsageError, match="compact form only"):
        choices(NATURAL.solve(natural.pack(1)[0], "", natural.start(natural.pack(1)[0]).reset()))


@settings(max_examples=25)
@given(
    st.one_of(
        st.text(max_size=60), st.lists(st.sampled_from(["0.5000 0.1000", "3.9999 9999.0000", "x"])).map("\n".join)
    )
)
def test_players_take_any_note(note):
    session = by_hand()
    seen = session.reset()
    said = [message("user", ("environment", f"<context>\n{note}\n</context>\n{seen.text}"))]
    while not seen.done:
        (answer,) = choices(said)
        seen = session.step(answer)
        said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
    assert seen.feedback.ending == "finalised"
    assert isinstance(noted(f"Update\n<context>\n{note}\n</context>\n{note}"), str)


# Cost


def test_a_task_costs_far_less_than_a_quarter_of_a_second():
    world, costs = PdeDiscovery("paper-hard", 0, form="compact"), []
    for pack in world.packs(5, 1):
        session = world.start(pack[0])
        began = time.thread_time()  # other tests may want this core, too
        session.reset()
        for answer in ("sample .3 .01; .5 1", "summarise", "regress", "finalise u"):
            session.step(answer)
        costs.append(time.thread_time() - began)
    assert median(costs) < 0.15
