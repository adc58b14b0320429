"""Grid Navigation: fields that are the same everywhere, rules checked by a second implementation, and players whose memory pays."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from itertools import product
from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_agent import CoDAgent
from cod_agent.context import COMPACT, NATURAL, Message, Trajectory, Turn, message, parse_update
from cod_agent.environments.base import Environment, Remembering, started
from cod_agent.environments.draws import below, randomness, uniform
from cod_agent.environments.grid_navigation import PLAYERS, PRESETS, GridNavigation, GridSession
from cod_agent.environments.grid_navigation.fields import Field, Trip, draw_field, draw_trip, split_of, way
from cod_agent.environments.grid_navigation.players import choices, costs_in, noted, read_trip
from cod_agent.environments.grid_navigation.world import _drawn, parse_answer
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.statistics import at_least
from cod_agent.tasks import Pack, Task

GOLDEN = {
    "tiny": "0beecbd6a391231646564f21f116830abd0b8378fa2d92ed9478ebc87ccd07f0",
    "small": "4b8bc3be1f72befddf39ee2f5f59c10cc4880c307c74eb5487082b1e6a2e77d4",
    "paper": "e9845a1780e50623a60802f37fc1ad2376e300b11668098b2fcb0790ea37ea06",
    "paper-27b": "c11f59e95db06a63f3d061406003a431d48114c0e2a38a09e5260288e4d58aca",
    "paper-hard": "51ec6a66007cd8779a2f68bb436c67028981a89772e83326965543411d27501a",
    "paper-large": "33a80a9e36866f453203af439563f38ff4aeea277404544e6a33d40713e12055",
    "paper-forgets": "e9845a1780e50623a60802f37fc1ad2376e300b11668098b2fcb0790ea37ea06",
    "paper-hard-forgets": "51ec6a66007cd8779a2f68bb436c67028981a89772e83326965543411d27501a",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""


def secret(world: GridNavigation, task: Task) -> tuple[Field, Trip]:
    return _drawn(world.place(task))


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = GridNavigation("paper", form="compact")
    assert isinstance(world, Environment) and isinstance(world, Remembering)
    assert (world.name, world.form, world.recovery) == ("grid-navigation:paper", "compact", "deterministic")
    assert {name for name in PRESETS if GridNavigation(name).remembers} == {
        "paper",
        "paper-27b",
        "paper-hard",
        "paper-large",
    }


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        GridNavigation(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    world = GridNavigation(preset, 7, form="compact")
    shown = [[world.start(task).reset().text for task in pack] for pack in world.packs(4, 4)]
    hidden = [secret(world, pack[0])[0].costs for pack in world.packs(4, 4)]
    assert hashlib.sha256(json.dumps([shown, hidden]).encode()).hexdigest() == GOLDEN[preset]


def test_a_longer_pack_begins_with_the_shorter_one_and_shares_its_field():
    world = GridNavigation("paper", 5)
    assert world.pack(6, 2).tasks[:3] == world.pack(3, 2).tasks
    fields, trips = zip(*(secret(world, task) for task in world.pack(8, 2)), strict=True)
    assert len(set(fields)) == 1 and len(set(trips)) > 6
    assert len({secret(world, pack[0])[0] for pack in world.packs(30, 1)}) == 30


def test_a_preset_that_forgets_has_the_packs_of_the_one_that_remembers():
    for name in ("paper", "paper-hard"):
        one, other = GridNavigation(name, 3), GridNavigation(f"{name}-forgets", 3)
        assert [secret(one, task) for task in one.pack(3)] == [secret(other, task) for task in other.pack(3)]


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = GridNavigation("small", 5)
    task = Task.model_validate_json(world.pack(3, 1)[2].model_dump_json())
    assert GridNavigation("small", 99).start(task).reset() == world.start(world.pack(3, 1)[2]).reset()
    assert set(task.data) == {"preset", "split", "seed", "pack", "index"}
    with pytest.raises(UsageError, match="no task of grid-navigation:tiny"):
        GridNavigation("tiny").start(task)


# Fields and trips


def hills_by_hand(seed: int, preset: str) -> list[list[float]]:
    """The first field drawn from `seed`, by the formula and the C library: not how the world does it."""
    kind, rng = PRESETS[preset], randomness("by hand", seed)
    size = kind.size[0] + below(rng, kind.size[1] - kind.size[0] + 1)
    heights = [[0.0] * size for _ in range(size)]
    for _ in range(kind.hills):
        top, left = uniform(rng, 0, size - 1), uniform(rng, 0, size - 1)
        long = uniform(rng, *kind.scale)
        short = uniform(rng, kind.scale[0], long)
        x = y = 2.0
        while math.hypot(x, y) > 1:
            x, y = uniform(rng, -1, 1), uniform(rng, -1, 1)
        angle, amplitude = math.atan2(y, x), uniform(rng, 0.8, 1.2)
        for row, column in product(range(size), repeat=2):
            down, right = row - top, column - left
            along = right * math.cos(angle) + down * math.sin(angle)
            across = right * math.sin(angle) - down * math.cos(angle)
            far = (along / long / size) ** 2 + (across / short / size) ** 2
            heights[row][column] += amplitude * math.exp(-far / 2)
    low, high = min(map(min, heights)), max(map(max, heights))
    return [[99 * ((height - low) / (high - low)) ** 2 for height in row] for row in heights]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_field_is_the_sum_of_its_hills_squared(preset):
    for seed in range(4):
        wanted = np.array(hills_by_hand(seed, preset))
        split = split_of(len(wanted), [round(cost) for cost in wanted.ravel()])
        field = draw_field(randomness("by hand", seed), PRESETS[preset], split)
        assert np.abs(np.array(field.costs) - wanted.ravel()).max() < 0.51
        assert (min(field.costs), max(field.costs)) == (0, 99)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_trip_can_be_made_and_every_size_and_length_occurs(preset):
    kind, seen = PRESETS[preset], set()
    for seed in range(60):
        for size in range(kind.size[0], kind.size[1] + 1):
            trip = draw_trip(randomness("trips", seed, size), size, kind)
            seen.add(trip.rounds)
            apart = [a != b for a, b in zip(divmod(trip.start, size), divmod(trip.goal, size), strict=True)]
            assert sum(apart) == 2 if kind.across else any(apart)
            assert trip.rounds > 1 or sum(apart) == 1  # two moves or more lead from anywhere to anywhere
    assert seen == set(range(kind.rounds[0], kind.rounds[1] + 1))
    sizes = {draw_field(randomness("sizes", seed), kind, "train").size for seed in range(24)}
    assert sizes == set(range(kind.size[0], kind.size[1] + 1))


def test_no_field_of_one_split_occurs_in_the_other_even_turned_or_mirrored_and_in_tens():
    seen: dict[str, set[bytes]] = {"train": set(), "eval": set()}
    for split, images in seen.items():
        world = GridNavigation("tiny", 3, split=split)
        for pack in world.packs(150, 1):
            tens = np.array(secret(world, pack[0])[0].costs).reshape(3, 3) // 10
            for _ in range(4):
                tens = np.array([list(row) for row in zip(*tens[::-1], strict=True)])
                images |= {tens.tobytes(), tens[::-1].copy().tobytes()}
    assert seen["train"] and seen["eval"] and not seen["train"] & seen["eval"]


def test_a_quarter_of_all_fields_is_for_evaluation():
    dice = Random(0)
    drawn = [split_of(4, [dice.randrange(100) for _ in range(16)]) for _ in range(1500)]
    assert 0.2 < drawn.count("eval") / 1500 < 0.3


# The rules, by a second implementation


class Naive:
    """The rules once more, cell by cell, in the compact form."""

    def __init__(self, field: Field, trip: Trip, radius: int, seen: set[tuple[int, int]]) -> None:
        n = self.n = field.size
        self.cost = {(r, c): field.costs[r * n + c] for r in range(n) for c in range(n)}
        self.at, self.goal, self.left = divmod(trip.start, n), divmod(trip.goal, n), trip.rounds
        self.radius, self.seen, self.paid = radius, set(seen), []
        self.untold = self.look(self.at)

    def look(self, cell: tuple[int, int]) -> set[tuple[int, int]]:
        new = {at for at in self.cost if max(abs(at[0] - cell[0]), abs(at[1] - cell[1])) <= self.radius} - self.seen
        self.seen |= new
        return new

    def lines(self, cells: set[tuple[int, int]]) -> list[str]:
        return [f"{'abcdefghijklmnop'[c]}{r + 1}: {self.cost[r, c] // 10}" for r, c in sorted(cells)]

    def where(self) -> str:
        (r, c), (gr, gc) = self.at, self.goal
        return f"@{'abcdefghijklmnop'[c]}{r + 1} *{'abcdefghijklmnop'[gc]}{gr + 1} {self.left}"

    def move(self, to: tuple[int, int]) -> tuple[str, str, float | None, str]:
        """Text, summary, reward (None: it goes on) and ending."""
        straight = (to[0] == self.at[0]) != (to[1] == self.at[1])
        new: set[tuple[int, int]] = set()
        if not straight or to not in self.cost:
            text, ending = "illegal", "illegal"
        else:
            while self.at != to:
                self.at = tuple(a + (b > a) - (b < a) for a, b in zip(self.at, to, strict=True))
                self.paid.append(self.cost[self.at])
                new |= self.look(self.at)
            self.left -= 1
            text = "\n".join([*self.lines(new), self.where()])
            ending = "" if self.left else "goal" if self.at == self.goal else "missed"
        summary = "\n".join(self.lines(new | self.untold)) or "known"
        self.untold = set()
        reward = 1 - sum(self.paid) / len(self.paid) / 100 if ending == "goal" else 0.0
        return text, summary, reward if ending else None, ending


@pytest.mark.parametrize("preset", PRESETS)
def test_a_second_implementation_of_the_rules_agrees(preset):
    world, dice, endings = GridNavigation(preset, 11, form="compact"), Random(preset), []
    for pack in world.packs(8, 3):
        carried, remembered = None, set()
        for task in pack:
            session, naive = started(world, task, carried), Naive(*secret(world, task), world.preset.radius, remembered)
            first = session.reset()
            assert first.text == "\n".join([naive.where(), *naive.lines(naive.seen)])
            seen, reward = first, None
            while reward is None:
                row, column = naive.at
                ends = [(row, i) for i in range(naive.n)] + [(i, column) for i in range(naive.n)]
                if naive.left < 3 and dice.random() < 0.8:
                    ends = [naive.goal] if naive.left == 1 else [(row, naive.goal[1]), (naive.goal[0], column)]
                wild = (dice.randrange(naive.n + 2), dice.randrange(naive.n + 2))
                to = wild if dice.random() < 0.05 else dice.choice(ends)
                text, summary, reward, ending = naive.move(to)
                seen = session.step(f"{'abcdefghijklmnopqr'[to[1]]}{to[0] + 1}")
                assert (seen.text, seen.summary, seen.done) == (text, summary, reward is not None)
            assert seen.feedback.reward == pytest.approx(reward) and seen.feedback.ending == ending
            endings.append(ending)
            assert (seen.carried is not None) == world.remembers
            carried, remembered = seen.carried, naive.seen if world.remembers else set()
    assert {"goal", "missed", "illegal"} == set(endings)


def by_hand(form: str, rounds: int = 2, radius: int = 0, **more) -> GridSession:
    """From the top left to the bottom right of a field that is known."""
    return GridSession(
        Field(3, (5, 30, 99, 0, 12, 7, 48, 90, 20)), Trip(0, 8, rounds), radius=radius, form=form, **more
    )


def test_the_compact_form_names_cells_and_shows_tens():
    session = by_hand("compact")
    assert session.reset().text == "@a1 *c3 2\na1: 0"
    seen = session.step("a3")
    assert (seen.text, seen.summary) == ("a2: 0\na3: 4\n@a3 *c3 1", "a1: 0\na2: 0\na3: 4")
    seen = session.step(" c3\n")
    assert (seen.text, seen.summary, seen.done) == ("b3: 9\nc3: 2\n@c3 *c3 0", "b3: 9\nc3: 2", True)
    assert (seen.feedback.text, seen.feedback.reward) == ("goal", 1 - (0 + 48 + 90 + 20) / 400)
    with pytest.raises(UsageError, match="over"):
        session.step("a1")


def test_what_is_entered_again_is_paid_again_and_the_goal_may_be_passed():
    session = by_hand("compact", rounds=4)
    session.reset()
    for cell in ("c1", "c3", "c2"):
        assert not session.step(cell).done
    seen = session.step("c3")
    assert (seen.summary, seen.text) == ("known", "@c3 *c3 0")
    assert seen.feedback.reward == pytest.approx(1 - (30 + 99 + 7 + 20 + 7 + 20) / 600)


def test_the_natural_form_says_the_same_in_sentences():
    session = by_hand("natural", radius=1)
    first = session.reset().text
    assert first.startswith("Round 1 of 2. You are at (row, column) (0, 0), the goal is (2, 2).\n")
    assert first.endswith("      0  1  2\n 0 |  5 30 ??\n 1 |  0 12 ??\n 2 | ?? ?? ??")
    seen = session.step("I go right.\n<answer> (0, 2) </answer>")
    assert seen.summary == "You moved from (0, 0) to (0, 2) and paid for (0, 1) 30, (0, 2) 99. You also saw (1, 2) 7."
    assert "Round 2 of 2." in seen.text and " 1 |  0 12  7" in seen.text
    seen = session.step("<answer>2,2</answer>")
    assert seen.done and seen.feedback.ending == "goal" and seen.feedback.reward == pytest.approx(1 - 156 / 400)
    assert "The 4 cells you entered cost 39.0 on average." in seen.feedback.text
    assert " 2 | ?? 90 20" in seen.feedback.text


@pytest.mark.parametrize("preset", PRESETS)
def test_the_rules_say_what_is_seen_and_whether_it_stays(preset):
    assert GridNavigation(preset, form="compact").pack(1)[0].prompt == ""
    world = GridNavigation(preset)
    rules = world.pack(1)[0].prompt
    assert ("stays on your map" in rules) == world.remembers
    assert (f"a distance of {world.preset.radius} of" in rules) == (world.preset.radius > 0)
    assert "{" not in rules and rules in NATURAL.solve(world.pack(1)[0], "", None)[-1].content


# What the environment remembers


def test_what_was_seen_stays_in_the_run_and_nowhere_else():
    world = GridNavigation("paper", 4, form="compact")
    first, second = world.pack(2)
    session = world.start(first)
    session.reset()
    carried = session.step("nonsense").carried
    known = costs_in(session.reset().text)
    again = started(world, second, json.loads(json.dumps(carried))).reset().text
    assert known.items() <= costs_in(again).items()
    assert not known.keys() <= costs_in(world.start(second).reset().text).keys()
    elsewhere = GridNavigation("paper", 5, form="compact").pack(1)[0]
    assert world.start(elsewhere, carried).reset() == world.start(elsewhere).reset()


def test_a_field_that_forgets_carries_nothing():
    world = GridNavigation("paper-forgets", 4, form="compact")
    session = started(world, world.pack(1)[0], {"anything": 1})
    session.reset()
    assert session.step("nonsense").carried is None


NUMBER = 254445153618636
"""Of the field of the first pack of paper, seed 4."""


@pytest.mark.parametrize(
    "carried",
    [
        [],
        "seen",
        {"seen": [1]},
        {"field": "1", "seen": []},
        {"field": NUMBER, "seen": "12"},
        {"field": NUMBER, "seen": [-1]},
        {"field": NUMBER, "seen": [144]},
        {"field": NUMBER, "seen": [True]},
        {"field": NUMBER, "seen": [1.0]},
        {"field": NUMBER, "seen": [], "more": 1},
    ],
)
def test_what_no_session_carried_is_an_error_of_use(carried):
    world = GridNavigation("paper", 4)
    with pytest.raises(UsageError, match="carried"):
        world.start(world.pack(1)[0], carried)


@pytest.mark.parametrize(
    ("seed", "redact"), [(2, None), (4111111111111111, lambda text: re.sub("[0-9]{9,}", "[number]", text))]
)
def test_an_agents_run_carries_the_map_from_task_to_task(tmp_path, seed, redact):
    world, shown = GridNavigation("paper", seed, form="compact"), []

    class Player:
        name, form = "player", "compact"
        play = staticmethod(PLAYERS["memoryless"](Random(0)))

        async def complete(self, messages, *, on_delta=None):
            from cod_agent import Completion

            if len(messages) == 1 and not messages[0].content.startswith("Update"):
                shown.append(costs_in(messages[0].content))
            return Completion(self.play(messages))

    for tasks in (2, 4):  # the second agent goes on where the first one stopped
        with CoDAgent("walker", model=Player(), memory=tmp_path / "grid.db", redact=redact) as agent:
            for outcome in agent.run_sync(world.pack(4), run="one"):
                assert outcome.reward and outcome.reward > 0
                if outcome.position == tasks - 1:
                    break
    assert len(shown) == 4
    for before, after in zip(shown, shown[1:], strict=False):
        assert len(before) < len(after) and before.items() <= after.items()


# Answers

MALFORMED = [
    "",
    "5",
    "a",
    "a0",
    "a01",
    "A1",
    "a1 b2",
    "a١",
    "á1",
    "a100",
    "1a",
    "<answer></answer>",
    "<answer>2</answer>",
    "<answer>2,3",
    "2,3</answer>",
    "<answer>1,1</answer><answer>1,2</answer>",
    "<answer><answer>0,2</answer></answer>",
    "</answer>0,2<answer>",
    "<answer>٠,٢</answer>",
    "<answer>０,２</answer>",
    "<answer>(0,2</answer>",
    "<answer>-1,2</answer>",
    "<answer>0,2,2</answer>",
    "<answer>0,200</answer>",
    "<answer>0.0,2.0</answer>",
    "<answer>__import__('os')</answer>",
    "null",
    "\x00",
    "\ud800",
    "a1" * 500_000,
    "<answer>" * 100_000,
    None,
    2,
    float("nan"),
    ["a3"],
    b"a3",
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_malformed_answers_end_the_episode_with_reward_0(answer, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(answer)
    assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (0.0, "malformed")
    assert ("malformed" if form == "natural" else "invalid") in seen.feedback.text


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("cell", [(0, 0), (1, 1), (2, 2), (0, 3), (3, 0), (0, 98)])
def test_what_is_no_move_ends_the_episode_as_illegal(cell, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(
        f"{chr(ord('a') + cell[1] % 26)}{cell[0] + 1}"
        if form == "compact"
        else f"<answer>{cell[0]}, {cell[1]}</answer>"
    )
    assert seen.done and (seen.feedback.reward, seen.feedback.ending) == (0.0, "illegal")
    assert form == "natural" or (seen.text, seen.summary, seen.feedback.text) == ("illegal", "a1: 0", "illegal")


def test_what_a_thinking_model_thinks_does_not_count():
    said = "<think>maybe <answer>1,1</answer></think>So: <answer>0,2</answer>"
    assert parse_answer(said, "natural") == (0, 2)


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "0",
        "2",
        "٢",
        ",",
        "(",
        ")",
        "a",
        "c",
        "3",
        "1",
        "-",
        "</think>",
        " ",
        "\n",
        "null",
        "é",
        "{}",
    ]
)
ANSWERS = st.one_of(st.text(), st.none(), st.integers(), st.binary(), st.lists(PIECES, max_size=9).map("".join))


@given(st.lists(ANSWERS, min_size=3, max_size=3), st.sampled_from(["natural", "compact"]), st.sampled_from([0, 1]))
def test_no_answer_raises_or_wins_wrongly(answers, form, radius):
    session, at, seen = by_hand(form, radius=radius), 0, None
    session.reset()
    for answer in answers:
        named = parse_answer(answer, form)
        legal = named is not None and max(named) < 3 and way(3, at, named[0] * 3 + named[1]) is not None
        seen = session.step(answer)
        if seen.done:
            break
        assert legal
        at = named[0] * 3 + named[1]
    wanted = "malformed" if named is None else "illegal" if not legal else "goal" if named == (2, 2) else "missed"
    assert seen.done and seen.feedback.ending == wanted
    assert (seen.feedback.reward > 0) == (wanted == "goal")


# Players


def live(pack: Pack, player) -> tuple[list[float], list[str]]:
    """The rewards and notes of a player's life through a pack, by the compact prompts of the runtime."""
    note, carried, rewards, notes = "", None, [], []
    for task in pack:
        session = started(pack.environment, task, carried)
        first = seen = session.reset()
        said, turns = COMPACT.solve(task, note, first), []
        while not seen.done:
            answer = player(said)
            seen = session.step(answer)
            turns.append(Turn(answer, seen))
            said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
        assert seen.feedback.ending == "goal"
        carried = seen.carried
        rewards.append(seen.feedback.reward)
        note = parse_update(player(COMPACT.update(task, note, Trajectory(first, tuple(turns)), seen.feedback)), 4000)
        notes.append(note)
    return rewards, notes


def rewards_of(preset: str, packs: int, name: str, seed: int = 0) -> np.ndarray:
    world, player = GridNavigation(preset, seed, form="compact"), PLAYERS[name](Random(0))
    return np.array([live(pack, player)[0] for pack in world.packs(packs, 4)])


@pytest.mark.parametrize(
    ("preset", "packs", "gain"), [("tiny", 150, 0.02), ("small", 60, 0.02), ("paper-forgets", 16, 0.003)]
)
def test_who_remembers_does_better_at_the_last_task(preset, packs, gain):
    perfect, memoryless = (rewards_of(preset, packs, name) for name in ("perfect", "memoryless"))
    assert (perfect[:, 0] == memoryless[:, 0]).mean() > 0.9
    assert at_least(perfect[:, -1] - memoryless[:, -1]).low > gain


def test_where_the_environment_remembers_nobody_needs_a_note():
    perfect, memoryless = (rewards_of("paper", 6, name) for name in ("perfect", "memoryless"))
    assert np.array_equal(perfect, memoryless)
    assert (rewards_of("paper-forgets", 6, "perfect") == perfect).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_players_come_to_the_goal_on_every_field(preset):
    for name in PLAYERS:
        assert (rewards_of(preset, 3, name, seed=1) > 0).all()


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_a_player_who_knows_all_goes_the_best_way(preset):
    world = GridNavigation(preset, 8, form="compact")
    for pack in world.packs(10, 2):
        for task in pack:
            field, trip = secret(world, task)
            cost = [10 * (cell // 10) + 4.5 for cell in field.costs]
            means: dict[int, float] = {}
            for stops in product(range(field.size**2), repeat=trip.rounds - 1):
                moves = [way(field.size, a, b) for a, b in zip((trip.start, *stops), (*stops, trip.goal), strict=True)]
                if all(moves):
                    entered = [cost[cell] for cells in moves for cell in cells]
                    means[stops[0]] = min(means.get(stops[0], 99.0), sum(entered) / len(entered))
            note = "\n".join(
                f"{'abcdef'[i % field.size]}{i // field.size + 1}: {c // 10}" for i, c in enumerate(field.costs)
            )
            answers = choices(COMPACT.solve(task, note, world.start(task).reset()))
            ends = ["abcdef".index(answer[0]) + field.size * (int(answer[1:]) - 1) for answer in answers]
            assert min(means.values()) == pytest.approx(min(means[end] for end in ends), abs=1e-6)


def test_the_note_has_every_known_cell_row_by_row_and_none_twice():
    prompt = "Update\n<context>\nb2: 3\na1: 5\n</context>\nc1: 0\na2: 9\nknown\na1: 5\ngoal 0.7"
    assert noted(prompt) == "a1: 5\nc1: 0\na2: 9\nb2: 3"
    assert noted("Update\n<context>\nnull\n</context>\nknown\nillegal 0") == ""
    other = "Update\n<context>\nb2: 3\na1: 5\n</context>\nc1: 0\na1: 6\ngoal 0.7"
    assert noted(other) == "a1: 6\nc1: 0"  # a note that what was seen contradicts is of another field


def test_the_notes_of_a_life_are_the_field_and_stay_short():
    world = GridNavigation("tiny", 0, form="compact")
    for pack in world.packs(20, 8):
        notes = live(pack, PLAYERS["perfect"](Random(1)))[1]
        field = secret(world, pack[0])[0]
        for note in notes:
            assert all(field.costs[row * 3 + column] // 10 == tens for (row, column), tens in costs_in(note).items())
        assert len(notes[-1].splitlines()) >= 7


def test_a_player_without_a_compact_prompt_says_so():
    natural = GridNavigation("small")
    task = natural.pack(1)[0]
    for messages in ([], NATURAL.solve(task, "", natural.start(task).reset())):
        with pytest.raises(UsageError):
            choices(messages)
    with pytest.raises(UsageError, match="compact"):
        read_trip("@a1 c3 2")


@given(st.text(max_size=60), st.text(alphabet="abc123:@* \n", max_size=60))
def test_players_take_any_note(note, more):
    for text in (note, more):
        asked: list[Message] = [message("user", ("environment", f"<context>\n{text}\n</context>\n@a1 *c3 2\na1: 5"))]
        assert choices(asked) and isinstance(noted(f"Update\n<context>\n{text}\n</context>\n{more}"), str)


# Cost


@pytest.mark.parametrize("preset", ["small", "paper-large"])
def test_a_step_costs_far_below_a_millisecond(preset):
    world, costs = GridNavigation(preset, 0), []
    for pack in world.packs(30, 1):
        field, trip = secret(world, pack[0])
        row, column = divmod(trip.start, field.size)
        session = world.start(pack[0])
        session.reset()
        began = time.perf_counter()
        session.step(f"<answer>{row},{(column + 1) % field.size}</answer>")
        costs.append(time.perf_counter() - began)
    assert median(costs) < 0.5e-3
