"""Alchemy-Random: targets that can be made, stable seeds, splits that share nothing, no answer that breaks it, players that remember."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import replace
from itertools import permutations, product
from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, Message, message
from cod_agent.environments import make_world, packed
from cod_agent.environments.alchemy import PLAYERS, PRESETS, Alchemy, AlchemySession, Graph
from cod_agent.environments.alchemy.players import choices, noted
from cod_agent.environments.alchemy.recipes import canonical, draw_graph, plan, split_of
from cod_agent.environments.alchemy.world import Lore, _lore, compact_names, parse_answer
from cod_agent.environments.base import Environment
from cod_agent.environments.draws import randomness
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.players import played
from cod_agent.evaluation.statistics import difference
from cod_agent.tasks import Pack, Task

GOLDEN = {
    "tiny": "99422828e706153951068b959424006de3291342e278e9d7a36373835e8795c0",
    "small": "97d2cc90cfa3cb1a635b4deadf55a25aa637e89e0d17548cc6def61876981e7a",
    "paper": "ad904d4adf7af61663fa6a690c171aa54417716fbc07e49ff6b95fe7b28d9edf",
    "paper-hard": "4ce87b769f632d28ef389d296717ed4b7426f7f97bc20f5625a6e3e054f7181a",
    "paper-large": "d1ba2417786ba4680f361bb7102e166223f2f91f9c0cc246c7e9f46b6b286144",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""


def secret(pack: Pack) -> Lore:
    return _lore(*(pack.data[key] for key in ("preset", "split", "seed", "pack")))


def recipes(pack: Pack, form: str = "compact") -> dict[tuple[str, str], str]:
    """The secret of a pack, by name."""
    lore = secret(pack)
    names = lore.names[form]
    return {(names[one], names[other]): names[made] for (one, other), made in lore.graph.recipes.items()}


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = make_world("alchemy", form="compact")
    assert isinstance(world, Environment) and isinstance(world, Alchemy)
    assert (world.name, world.form, world.recovery) == ("alchemy:small", "compact", "deterministic")


@pytest.mark.parametrize("wrong", [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}])
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        Alchemy(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    worlds = [
        Alchemy(preset, 7, split=split, form=form) for split in ("train", "eval") for form in ("natural", "compact")
    ]
    shown = [
        [[world.start(task).reset().text for task in pack], sorted(map(list, recipes(pack, world.form).items()))]
        for world in worlds
        for pack in world.packs(3, 4)
    ]
    assert hashlib.sha256(json.dumps(shown).encode()).hexdigest() == GOLDEN[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_longer_pack_begins_with_the_shorter_one_and_no_target_repeats(preset):
    world, most = Alchemy(preset, 5, form="compact"), PRESETS[preset].targets
    assert most >= 4
    for index in range(20):
        pack = world.pack(most, index)
        assert pack.tasks[:3] == world.pack(3, index).tasks
        made = [world.start(task).reset().text.split("\n")[-2] for task in pack]
        assert len(set(made)) == most


def test_a_pack_of_more_tasks_than_targets_is_an_error_of_use_that_says_how_many_there_are():
    with pytest.raises(UsageError, match="4 different targets"):
        Alchemy("small").pack(5)
    with pytest.raises(UsageError, match="at least one task"):
        Alchemy("small").pack(0)
    assert len(packed(Alchemy("small"), "ralph-sample").pack(9)) == 9


@pytest.mark.parametrize("index", [-1, 4, 99])
def test_a_task_beyond_the_targets_is_an_error_of_use(index):
    task = Alchemy("small").pack(1)[0]
    with pytest.raises(UsageError, match="no task"):
        Alchemy("small").start(Task(id="x", data={**task.data, "index": index}))


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = Alchemy("paper-hard", 5)
    pack = world.pack(3, 1)
    task = Task.model_validate_json(pack[2].model_dump_json())
    assert Alchemy("paper-hard", 99).start(task).reset() == world.start(pack[2]).reset()
    told = task.model_dump_json() + json.dumps(pack.data)
    assert not any(f'"{name}"' in told or f" {name} " in told for name in secret(pack).names["natural"])


def test_both_forms_are_the_same_pack():
    pack = Alchemy("paper-large", 3).pack(4)
    lore = secret(pack)
    naming = dict(zip(lore.names["natural"], lore.names["compact"], strict=True))
    assert recipes(pack, "compact") == {
        (naming[one], naming[other]): naming[made] for (one, other), made in recipes(pack, "natural").items()
    }
    assert all(name.isascii() and name.islower() and 3 <= len(name) <= 5 for name in naming)


# Recipes


def derivations(target: int, ways: dict[int, list[tuple[int, int]]]) -> list[tuple[frozenset[int], Counter, list]]:
    """Every way to make it: what is made, how often each element is put in, and the pairs in order. Not as the world does it."""
    if target not in ways:
        return [(frozenset(), Counter(), [])]
    return [
        (a[0] | b[0] | {target}, a[1] + b[1] + Counter(pair), [*a[2], *b[2], pair])
        for pair in ways[target]
        for a, b in product(derivations(pair[0], ways), derivations(pair[1], ways))
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_target_can_be_made_within_the_rounds_and_with_the_materials(preset):
    world, kind = Alchemy(preset, 11, form="compact"), PRESETS[preset]
    for pack in world.packs(12, kind.targets):
        graph, names = secret(pack).graph, secret(pack).names["compact"]
        for task, target in zip(pack, secret(pack).targets, strict=True):
            session = world.start(task)
            held = session.reset().text.split("\n")[-1].split(" ")
            ways = derivations(target, graph.ways())
            if kind.limited:
                given = [int(name[1:]) for name in held]
                steps = min((way[2] for way in ways), key=len)
                enough = [
                    w
                    for w in ways
                    if all(w[1][i] <= count for i, count in enumerate(given)) and len(w[2]) <= kind.rounds
                ]
                assert enough and len(steps) <= kind.rounds and len(set(given)) == 1
                steps = enough[0][2]
            else:
                steps = list(dict.fromkeys(min(ways, key=lambda way: len(way[0]))[2]))
                assert len(steps) <= kind.rounds
            for one, other in steps:
                seen = session.step(f"{names[one]}+{names[other]}")
            assert seen.done and seen.feedback.reward == 1.0 and seen.feedback.ending == "made"


@pytest.mark.parametrize("preset", PRESETS)
def test_graphs_are_as_the_preset_says(preset):
    kind, sizes = PRESETS[preset], set()
    noisy = across = 0
    for i in range(25):
        graph, targets = draw_graph(randomness("graphs", i), kind, "train")
        ways = graph.ways()
        sizes.add(graph.base)
        assert set(ways) == set(range(graph.base, len(graph.tiers))) and not graph.noise & set(targets)
        assert kind.tiers[0] <= max(graph.tiers) + 1 <= kind.tiers[1]
        for element, pairs in ways.items():
            most = (1, 1) if element in graph.noise else kind.recipes
            assert most[0] <= len(pairs) <= most[1]
            for pair in pairs:
                low, high = sorted(graph.tiers[part] for part in pair)
                assert high == graph.tiers[element] - 1 and high - low <= kind.gap
                assert element in graph.noise or not set(pair) & graph.noise
                across += low < high
        noisy += len(graph.noise)
    assert sizes <= set(range(kind.base[0], kind.base[1] + 1)) and (len(sizes) > 1) == (kind.base[0] < kind.base[1])
    assert (noisy > 0) == (kind.noise[1] > 0) and (across > 0 or kind.cross[1] < 0.2)


def test_a_gap_of_one_is_no_dead_setting():
    graph, _ = draw_graph(randomness("cross"), replace(PRESETS["paper-hard"], cross=(0.9, 0.9)), "train")
    tiers = [tuple(sorted(graph.tiers[part] for part in pair)) for pair in graph.recipes]
    assert {high - low for low, high in tiers} == {0, 1} and (0, 1) in tiers


def test_no_target_takes_more_rounds_than_there_are():
    for i in range(20):
        graph, targets = draw_graph(randomness("rounds", i), replace(PRESETS["small"], rounds=2), "train")
        assert all(min(len(way[0]) for way in derivations(target, graph.ways())) <= 2 for target in targets)


def test_no_place_in_a_pack_asks_for_higher_elements_than_another():
    world = Alchemy("paper-large", 2)
    tiers = np.array([[secret(p).graph.tiers[t] for t in secret(p).targets] for p in world.packs(120, 8)], dtype=float)
    assert np.ptp(tiers.mean(0)) < 0.35 and tiers.min() == 1 and tiers.max() == 3


# Splits


def shape(pack: Pack) -> tuple:
    """The pairs that make something, the smallest under every renaming of the given elements."""
    graph = secret(pack).graph
    return min(
        tuple(sorted(tuple(sorted((order[one], order[other]))) for one, other in graph.recipes))
        for order in permutations(range(graph.base))
    )


def test_no_graph_of_one_split_occurs_in_the_other_however_its_elements_are_named():
    seen = {
        split: {shape(pack) for pack in Alchemy("tiny", 3, split=split).packs(150, 1)} for split in ("train", "eval")
    }
    assert len(seen["train"]) > 8 and len(seen["eval"]) > 3 and not seen["train"] & seen["eval"]


@pytest.mark.parametrize("preset", PRESETS)
def test_names_do_not_change_the_split(preset):
    dice = Random(3)
    for i in range(10):
        graph, _ = draw_graph(randomness("named", i), PRESETS[preset], "eval")
        given, made = list(range(graph.base)), list(range(graph.base, len(graph.tiers)))
        dice.shuffle(given)
        dice.shuffle(made)
        to = [*given, *made]
        named = {tuple(sorted((to[a], to[b]))): to[c] for (a, b), c in graph.recipes.items()}
        tiers = tuple(graph.tiers[to.index(element)] for element in range(len(to)))
        again = Graph(tiers, dict(sorted(named.items())), frozenset(to[element] for element in graph.noise))
        assert canonical(again) == canonical(graph) and split_of(again) == "eval"


# Combining


def by_hand(form: str, count: int | None = None, rounds: int = 4) -> AlchemySession:
    """A session with known recipes: a, b, c; a+b makes A, A+A makes B, which is the target; c+c makes C."""
    graph = Graph((0, 0, 0, 1, 2, 1), {(0, 1): 3, (3, 3): 4, (2, 2): 5}, frozenset())
    names = {"compact": compact_names(graph), "natural": ("salt", "tin", "ash", "iron", "gold", "mud")}
    return AlchemySession(Lore(graph, names, (4,)), 4, count, rounds, form)


def test_the_compact_form_says_what_really_happened():
    session = by_hand("compact")
    assert session.reset().text == "make B 2\na b c"
    seen = session.step("c+b")
    assert (seen.text, seen.summary, seen.done) == ("none: b+c\nmake B 2\na b c", "none: b+c", False)
    assert session.step("A+a").text == "lack: A+a\nmake B 2\na b c"
    assert session.step(" b + a\n").text == "A: a+b\nmake B 2\na b c A"
    seen = session.step("A+A")
    assert (seen.text, seen.summary, seen.done) == ("B: A+A", "B: A+A", True)
    assert (seen.feedback.reward, seen.feedback.text, seen.feedback.ending) == (1.0, "made", "made")


def test_limited_materials_are_used_up_also_for_nothing():
    session = by_hand("compact", count=2, rounds=9)
    assert session.reset().text == "make B 2\na2 b2 c2"
    assert session.step("a+c").text == "none: a+c\nmake B 2\na1 b2 c1"
    assert session.step("c+c").text == "lack: c+c\nmake B 2\na1 b2 c1"
    assert session.step("b+b").text == "none: b+b\nmake B 2\na1 c1"
    seen = session.step("a+c")
    assert seen.done and (seen.feedback.reward, seen.feedback.text, seen.feedback.ending) == (0.0, "stuck", "stuck")


def test_the_natural_form_says_the_same_in_sentences():
    session = by_hand("natural")
    first = session.reset().text
    assert (
        "Round 1 of 4" in first
        and "gold (tier 2)" in first
        and "Tier 0: salt, tin, ash" in first
        and "Tier 1" not in first
    )
    seen = session.step("I try this.\n<answer> TIN + Salt </answer>")
    assert seen.summary == "salt + tin made iron (tier 1)." and "Tier 1: iron" in seen.text
    assert "made nothing" in session.step("<answer>salt+salt</answer>").text
    assert "do not hold" in session.step("<answer>water + fire</answer>").text
    seen = session.step("<answer>ash + ash</answer>")
    assert seen.done and seen.feedback.reward == 0.0 and "out of rounds" in seen.feedback.text
    with pytest.raises(UsageError, match="over"):
        session.step("<answer>ash + ash</answer>")
    assert "ash (2)" in by_hand("natural", count=2).reset().text


def test_the_rules_are_told_in_the_natural_form_only():
    assert Alchemy("small", form="compact").pack(1)[0].prompt == ""
    rules = Alchemy("small").pack(1)[0].prompt
    assert "6 rounds" in rules and "<answer>abc + xyz</answer>" in rules and "uses nothing up" in rules
    assert "uses up both" in Alchemy("paper-hard").pack(1)[0].prompt
    assert rules in NATURAL.solve(Alchemy("small").pack(1)[0], "", None)[-1].content


def test_sessions_share_no_state():
    world = Alchemy("paper-hard", 2, form="compact")
    task = world.pack(1)[0]
    one, other = world.start(task), world.start(task)
    shown = one.reset().text, other.reset().text
    one.step("a+b")
    assert shown[0] == shown[1] == other.reset().text == one.reset().text


class Naive:
    """The rules once more, on names and nothing else."""

    def __init__(self, recipes: dict, first: str, rounds: int, limited: bool) -> None:
        self.recipes, self.rounds, self.limited = (
            {frozenset(pair): made for pair, made in recipes.items()},
            rounds,
            limited,
        )
        self.target = first.split("\n")[0].split(" ")[1]
        self.held: Counter = Counter()
        for shown in first.split("\n")[1].split(" "):
            name = shown.rstrip("0123456789")
            self.held[name] = int(shown[len(name) :] or 1)

    def step(self, one: str, other: str) -> tuple[str, str]:
        """The effect, and how it ended, if it did."""
        self.rounds -= 1
        used = Counter([one, other]) if self.limited else Counter({one: 1, other: 1})
        if any(self.held[name] < count for name, count in used.items()):
            effect = f"lack: {one}+{other}"
        else:
            made = self.recipes.get(frozenset((one, other)), "none")
            if self.limited:
                self.held -= used
            if made != "none":
                self.held[made] += 1
            one, other = sorted((one, other), key=lambda name: (name.isupper(), name))
            effect = f"{made}: {one}+{other}"
            if made == self.target:
                return effect, "made"
        stuck = self.limited and self.held.total() < 2
        return effect, "rounds" if not self.rounds else "stuck" if stuck else ""

    def shown(self) -> str:
        names = sorted((name for name, n in self.held.items() if n), key=lambda name: (name.isupper(), name))
        return " ".join(f"{name}{self.held[name]}" if self.limited else name for name in names)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_independent_implementation_of_the_rules_agrees_on_random_games(preset):
    dice, kind, ends = Random(1), PRESETS[preset], Counter()
    world = Alchemy(preset, 13, form="compact")
    for pack in world.packs(25, 4):
        for task in pack:
            session, names = world.start(task), list(secret(pack).names["compact"])
            seen = session.reset()
            naive, how = Naive(recipes(pack), seen.text, kind.rounds, kind.limited), ""
            while not how:
                held = [name for name in names if naive.held[name]] if dice.random() < 0.9 else names
                pair = dice.choice(held), dice.choice(held)
                effect, how = naive.step(*pair)
                seen = session.step("+".join(pair))
                assert seen.done == bool(how) and seen.summary == effect
                assert seen.text == (
                    effect if how else f"{effect}\nmake {naive.target} {seen.text.split()[4]}\n{naive.shown()}"
                )
            assert (seen.feedback.text, seen.feedback.reward) == (how, float(how == "made"))
            ends[how] += 1
    assert ends["made"] and ends["stuck" if kind.limited else "rounds"]


# Answers

MALFORMED = [
    *("", "a", "+", "a+", "+b", "a++b", "a+b+c", "a b", "a-b", "a＋b", "a+b\x00", "null", "None", "\x00", "\ud800"),
    *("<answer></answer>", "<answer>salt</answer>", "<answer>salt + tin", "salt + tin</answer>", "salt + tin"),
    *("<answer>salt + tin</answer><answer>salt + tin</answer>", "<answer><answer>salt + tin</answer></answer>"),
    *("</answer>salt + tin<answer>", "<answer>salt + tin + ash</answer>", "<answer>salt\n+ tin\n, done</answer>"),
    *(
        "<answer>соль + tin</answer>",
        "<answer>salt + t1n</answer>",
        "<answer>ＳＡＬＴ + tin</answer>",
        "<answer>__import__('os')</answer>",
    ),
    *(
        "a+b " * 100_000,
        "<answer>" * 100_000,
        "a" * 1_000_000,
        f"<answer>{'a' * 100_000} + b</answer>",
        f"a{' ' * 300_000}b",
    ),
    *(None, 3, b"a+b", ["a+b"], {"pair": "a+b"}, float("nan")),
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_malformed_answers_end_the_episode_with_reward_0(answer, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(answer)
    assert seen.done and seen.feedback.reward == 0.0 and seen.feedback.ending == "malformed"
    assert ("malformed" if form == "natural" else "invalid") in seen.feedback.text


def test_what_a_thinking_model_thinks_does_not_count():
    said = "<think>maybe <answer>a + b</answer> or <answer>c + d</answer></think>So: <answer>tin + ash</answer>"
    assert parse_answer(said, "natural") == ("tin", "ash")


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "A",
        "a",
        "b",
        "+",
        " + ",
        "salt",
        "iron",
        "gold",
        "</think>",
        " ",
        "\n",
        "\t",
        "é",
        "K",
        "\u212a",
    ]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join)), st.sampled_from(["natural", "compact"]))
def test_no_answer_raises_or_wins_wrongly(answer, form):
    session = by_hand(form, count=1)
    session.reset()
    seen = session.step(answer)
    assert seen.done == (parse_answer(answer, form) is None)  # no single round makes the target or ends the task
    assert not seen.done or (seen.feedback.reward, seen.feedback.ending) == (0.0, "malformed")


# Players


def first_prompt(task: Task, note: str, world: Alchemy) -> list[Message]:
    return COMPACT.solve(task, note, world.start(task).reset())


def note_of(pack: Pack) -> str:
    return "\n".join(f"{made}: {one}+{other}" for (one, other), made in recipes(pack).items())


@pytest.mark.parametrize(
    ("preset", "packs"), [("tiny", 100), ("small", 100), ("paper", 100), ("paper-hard", 64), ("paper-large", 32)]
)
def test_memory_pays(preset, packs):
    world = Alchemy(preset, 0, form="compact")
    perfect, memoryless = (played(world, name, packs, 4) for name in ("perfect", "memoryless"))
    assert difference(perfect, memoryless).low > 0.05
    assert np.ptp(memoryless.mean(0)) < 0.35 and perfect[:, 3].mean() > perfect[:, 0].mean()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_player_who_knows_all_makes_every_target_in_the_fewest_rounds(preset):
    world, kind = Alchemy(preset, 1, form="compact"), PRESETS[preset]
    for pack in world.packs(4, 4):
        for task, target in zip(pack, secret(pack).targets, strict=False):
            session, player = world.start(task), PLAYERS["perfect"](Random(0))
            seen = session.reset()
            said, rounds = COMPACT.solve(task, note_of(pack), seen), 0
            while not seen.done:
                answer = player(said)
                seen, rounds = session.step(answer), rounds + 1
                said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
            assert seen.feedback.text == "made"
            if max(kind.recipes) == 1:
                assert rounds == len(set(derivations(target, secret(pack).graph.ways())[0][2]))


def test_the_note_has_old_facts_first_and_none_twice():
    note = "K: a+b\nnone: a+a"
    prompt = f"Update\n<context>\n{note}\n</context>\nnone: a+a\nK: a+b\nnone: c+c\nlack: d+d\nM: a+K\nrounds 0"
    assert noted(prompt) == "K: a+b\nnone: a+a\nnone: c+c\nM: a+K"
    assert noted("Update\n<context>\nnull\n</context>\ninvalid\ninvalid 0") == ""


def test_a_tiny_note_stays_below_forty_tokens_of_facts():
    world, player = Alchemy("tiny", 4, form="compact"), PLAYERS["perfect"](Random(1))
    for pack in world.packs(20, 4):
        note = ""
        for task in pack:
            session, lines = world.start(task), []
            seen = session.reset()
            said = COMPACT.solve(task, note, seen)
            while not seen.done:
                answer = player(said)
                seen = session.step(answer)
                lines.append(seen.summary)
                said = [*said, message("assistant", ("model", answer)), message("user", ("environment", seen.text))]
            note = noted(f"Update\n<context>\n{note or 'null'}\n</context>\n" + "\n".join([*lines, seen.feedback.text]))
        assert 0 < len(note.split("\n")) <= 10


def test_what_was_tried_is_not_tried_again_and_memory_is_ignored_without_one():
    world = Alchemy("tiny", 0, form="compact")
    task = world.pack(1)[0]
    tried = "\n".join(f"none: {one}+{other}" for one, other in ("aa", "ab", "ac", "ad", "bb", "bc", "bd", "cc", "cd"))
    said = first_prompt(task, tried, world)
    assert choices(said) == ["d+d"] and len(choices(said, remember=False)) == 10


FACTS = st.lists(
    st.builds(
        lambda made, one, other: f"{made}: {one}+{other}",
        *(st.sampled_from(names) for names in (["none", "A", "B", "C", "lack"], list("abcdAB"), list("abcdABC"))),
    ),
    max_size=12,
).map("\n".join)


@given(st.one_of(FACTS, st.text()), st.sampled_from(["small", "paper-hard"]))
def test_a_wrong_note_breaks_no_player(note, preset):
    world = Alchemy(preset, 0, form="compact")
    answers = choices(first_prompt(world.pack(1)[0], note, world))
    assert answers and len(set(answers)) == len(answers)
    assert all(set(answer.split("+")) <= set("abcdef") for answer in answers)


def test_what_really_happened_counts_more_than_the_note():
    world = Alchemy("tiny", 0, form="compact")
    pack = world.pack(1)
    target, wrong = (
        secret(pack).targets[0],
        next(pair for pair in ("aa", "bb", "ab") if tuple(pair) not in recipes(pack)),
    )
    note = f"{secret(pack).names['compact'][target]}: {wrong[0]}+{wrong[1]}"
    session, said = world.start(pack[0]), first_prompt(pack[0], note, world)
    session.reset()
    (answer,) = choices(said)
    assert answer == "+".join(wrong)
    after = [*said, message("user", ("environment", session.step(answer).text))]
    assert answer not in choices(after) and len(choices(after)) == 9


@pytest.mark.parametrize("said", [[], COMPACT.solve(Task(id="x", prompt="hello"), "", None)])
def test_players_read_the_compact_form_only(said):
    with pytest.raises(UsageError):
        choices(said)
    with pytest.raises(UsageError, match="compact form only"):
        choices(NATURAL.solve(Alchemy().pack(1)[0], "", Alchemy().start(Alchemy().pack(1)[0]).reset()))


def test_a_plan_uses_up_what_is_limited():
    ways = {"K": [("a", "b")], "L": [("K", "K")]}
    assert plan("L", ways, {"a": 1, "b": 1}, limited=False) == [("a", "b"), ("K", "K")]
    assert plan("L", ways, {"a": 1, "b": 1}, limited=True) is None
    assert plan("L", ways, {"a": 1, "b": 1, "K": 1}, limited=True) == [("a", "b"), ("K", "K")]
    assert plan("M", ways, {"a": 1}, limited=False) is None


# Cost


@pytest.mark.parametrize("preset", ["small", "paper-large"])
def test_a_step_costs_below_a_millisecond_with_its_player(preset):
    world, costs = Alchemy(preset, 0, form="compact"), []
    player = PLAYERS["perfect"](Random(0))
    for pack in world.packs(20, 1):
        session = world.start(pack[0])
        said = COMPACT.solve(pack[0], "", session.reset())
        began = time.thread_time()  # other tests may want this core, too
        session.step(player(said))
        costs.append(time.thread_time() - began)
    assert median(costs) < 1e-3
