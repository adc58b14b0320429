"""Learn2Ask: stable packs, splits that share no protocol, rules that hold, no answer that breaks it, players that reckon rightly."""

from __future__ import annotations

import hashlib
import json
import time
from itertools import combinations
from math import comb
from random import Random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_agent.context import COMPACT, NATURAL, Message, Trajectory, Turn
from cod_agent.environments import make_world
from cod_agent.environments.base import Environment
from cod_agent.environments.learn2ask import PLAYERS, PRESETS, Consultation, Learn2Ask, Preset
from cod_agent.environments.learn2ask.clinic import STOPPING, ClinicCase
from cod_agent.environments.learn2ask.players import belief, choices, clinics, noted
from cod_agent.environments.learn2ask.topics import ASIDES, COMPLAINTS, TOPICS, named
from cod_agent.environments.learn2ask.verdicts import reward
from cod_agent.environments.learn2ask.world import _drawn
from cod_agent.errors import UnknownName, UsageError
from cod_agent.evaluation.players import played
from cod_agent.evaluation.statistics import difference
from cod_agent.tasks import Observation, Pack, Task

GOLDEN = {
    "small": "a9ce9b151b9ea78ef4ae3d6f4bf73fa7b1505d011228292b878e9dd4b5648fca",
    "paper": "dedefb96d4d8fdbf791f03da8ba23c47fbdb041e7030bffd41707f04353edc61",
    "paper-additive": "a1509a56321a884b5736fc42d5cd16f7770d7ced7c4cccff5af884cc9e8fc811",
    "paper-content": "024fec7cbcdc987b935a16fa13fe665e09fec616fe644f387bf03c3a2a397a97",
    "paper-action": "7584d571891f222ffb14f1ab1a8868d991ace0bf1686850cc76f9d35a0939e94",
    "paper-shared": "6a0ca220940d35bb5e4edb530b3794ca5fe3ac13deefb5c29addae4e3a679a41",
}
"""SHA-256 of what the first packs of seed 7 show and hide. A change here makes every earlier figure incomparable."""

LETTERS = "abcdefghijklmn"


def cases(pack: Pack) -> list[ClinicCase]:
    """The secrets of a pack's tasks."""
    return [_drawn(pack.environment.place(task)) for task in pack]


# Worlds and packs


def test_it_is_an_environment_with_a_name_and_a_form():
    world = make_world("learn2ask", form="compact")
    assert isinstance(world, Environment) and isinstance(world, Learn2Ask)
    assert (world.name, world.form, world.recovery) == ("learn2ask:small", "compact", "deterministic")


@pytest.mark.parametrize(
    "wrong",
    [{"preset": "smal"}, {"split": "test"}, {"form": "terse"}, {"preset": "small@nobody"}, {"preset": "small@"}],
)
def test_unknown_names_are_answered_with_the_known_ones(wrong):
    with pytest.raises(UnknownName, match="known are"):
        Learn2Ask(**wrong)


@pytest.mark.parametrize("preset", PRESETS)
def test_packs_are_the_same_on_every_machine_and_version(preset):
    worlds = [
        Learn2Ask(preset, 7, split=split, form=form) for split in ("train", "eval") for form in ("natural", "compact")
    ]
    shown = [
        [[world.start(task).reset().text for task in pack], [case.missing for case in cases(pack)]]
        for world in worlds
        for pack in world.packs(3, 4)
    ]
    assert hashlib.sha256(json.dumps(shown).encode()).hexdigest() == GOLDEN[preset]


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_a_longer_pack_begins_with_the_shorter_one(preset):
    world = Learn2Ask(preset, 5)
    for index in range(10):
        longer, shorter = world.pack(8, index), world.pack(3, index)
        assert longer.tasks[:3] == shorter.tasks and cases(longer)[:3] == cases(shorter)


def test_a_task_can_be_set_up_again_from_its_json_and_does_not_tell_the_secret():
    world = Learn2Ask("small", 5)
    pack = world.pack(3, 1)
    task = Task.model_validate_json(pack[2].model_dump_json())
    assert Learn2Ask("small", 99).start(task).reset() == world.start(pack[2]).reset()
    assert set(task.data) == {"preset", "split", "seed", "pack", "index"}
    with pytest.raises(UsageError, match="no task of"):
        Learn2Ask("paper").start(task)


def test_tasks_of_a_pack_share_a_protocol_where_the_preset_says_so():
    for preset, kind in PRESETS.items():
        found = [{case.protocol for case in cases(pack)} for pack in Learn2Ask(preset, 3).packs(6, 4)]
        assert all((len(of) == 1) == kind.shared for of in found) and len(set().union(*found)) > 4


@pytest.mark.parametrize("preset", ["small", "paper-shared", "paper"])
def test_no_protocol_of_one_split_occurs_in_the_other(preset):
    found = {
        split: {case.protocol for pack in Learn2Ask(preset, 3, split=split).packs(200, 2) for case in cases(pack)}
        for split in ("train", "eval")
    }
    assert min(map(len, found.values())) > 60 and not found["train"] & found["eval"]


@pytest.mark.parametrize("preset", PRESETS)
def test_dialogues_are_as_the_preset_says_and_do_not_tell_whether_something_is_missing(preset):
    kind = PRESETS[preset]
    drawn = [case for pack in Learn2Ask(preset, 11).packs(150, 4) for case in cases(pack)]
    for case in drawn:
        assert kind.wanted[0] <= len(case.protocol) <= kind.wanted[1] <= kind.covered[0] <= len(case.covered)
        assert len(set(case.covered)) == len(case.covered) <= kind.covered[1] < kind.topics == case.topics
    complete = np.array([not case.open for case in drawn])
    sizes = np.array([len(case.covered) for case in drawn])
    assert abs(complete.mean() - STOPPING) < 0.06
    assert abs(sizes[complete].mean() - sizes[~complete].mean()) < 0.3


def test_both_forms_are_the_same_pack():
    asked = {question: LETTERS[number] for number, topic in enumerate(TOPICS) for question, _ in topic.exchanges}
    natural, compact = Learn2Ask("small", 3), Learn2Ask("small", 3, form="compact")
    for at in range(4):
        dialogue = natural.start(natural.pack(4)[at]).reset().text.split("\n")
        said = compact.start(compact.pack(4)[at]).reset().text
        topics = sorted(asked[line.removeprefix("Doctor: ")] for line in dialogue if line.startswith("Doctor: "))
        assert said.partition(" | ")[2].split(" ") == topics
        assert any(dialogue[0].startswith(f"Patient: {way}") for way in COMPLAINTS[said.split(" ")[0]])


# The data set


def test_every_question_of_the_data_set_is_found_to_be_about_its_topic_and_nothing_else_is():
    for number, topic in enumerate(TOPICS):
        assert all(named(question) == {number} for question, _ in topic.exchanges) and named(topic.name) == {number}
    openings = [said for ways in COMPLAINTS.values() for said in ways]
    assert not any(map(named, openings))
    assert all(len(set(said)) == len(said) > 1 for said in (openings, ASIDES))


# Rules


def by_hand(form: str, *, covered: str = "a b c", protocol: str = "a d e", kind: str = "small") -> Consultation:
    """A session with a known protocol; when it began, how it is now and fever came up, how bad it is and medicines did not."""
    topics = tuple(LETTERS.index(letter) for letter in covered.split())
    wanted = frozenset(LETTERS.index(letter) for letter in protocol.split())
    lines = tuple(("Doctor", TOPICS[topic].exchanges[0][0]) for topic in topics)
    case = ClinicCase("cough", PRESETS[kind].topics, wanted, topics, (("Patient", "I cough."), *lines))
    return Consultation(case, PRESETS[kind], form)


@pytest.mark.parametrize(
    ("answer", "text", "worth", "ending"),
    [
        ("ask d", "direct", 4, "asked"),
        ("ask c", "related", 3, "asked"),
        ("ask a", "irrelevant", 2, "asked"),
        ("ask j", "irrelevant", 2, "asked"),
        ("ask d e", "direct", 3.5, "asked"),
        ("ask c d", "related", 2.5, "asked"),
        ("ask d e j", "irrelevant", 1, "asked"),
        ("ask a b c d e f g h i j", "irrelevant", 1, "asked"),
        ("stop", "early", 0, "early"),
        ("ask k", "invalid", 0, "malformed"),
    ],
)
def test_the_compact_form_says_what_an_answer_is_worth(answer, text, worth, ending):
    session = by_hand("compact")
    assert session.reset().text == "cough 10 | a b c"
    seen = session.step(f" {answer}\n")
    assert (seen.done, seen.feedback.text, seen.feedback.ending) == (True, text, ending)
    assert seen.feedback.reward == worth / 4
    assert seen.text == ("invalid" if ending == "malformed" else f"{answer} | a b c")
    with pytest.raises(UsageError, match="over"):
        session.step(answer)


def test_where_nothing_is_missing_only_stopping_is_right():
    complete = {"covered": "a d e h"}
    seen = by_hand("compact", **complete).step("ask a")
    assert (seen.text, seen.feedback.text, seen.feedback.reward) == ("ask a | a d e h", "late", 0)
    assert seen.feedback.ending == "late"
    seen = by_hand("compact", **complete).step("stop")
    assert (seen.text, seen.feedback.text, seen.feedback.reward) == ("stop | a d e h", "stopped", 1)
    seen = by_hand("natural", **complete).step("<answer>Enough. <stop /></answer>")
    assert (
        seen.feedback.reward == 0.75 and "exactly <stop />" in seen.feedback.text and seen.feedback.ending == "stopped"
    )
    assert by_hand("natural", **complete).step("<answer><stop /></answer>").feedback.reward == 1
    assert by_hand("natural", **complete).step("<answer>A fever?</answer>").feedback.ending == "late"


@pytest.mark.parametrize(
    ("question", "worth", "words"),
    [
        ("How bad is it: mild, moderate, or severe?", 4, "direct"),
        ("What MEDICATION do you take?", 4, "direct"),
        ("Do you have a fever?", 3, "related"),
        ("Do you travel a lot?", 2, "irrelevant"),
        ("Hm, what else?", 2, "irrelevant"),
        ("Is it severe? And do you take any pills?", 3.5, "2 questions"),
        ("Tell me of fever, pills, travel and sleep", 1, "irrelevant"),
        ("Is it severe? Really? Are you sure?", 3, "3 questions"),
        ("Well.", 1, "no question"),
    ],
)
def test_the_natural_form_is_judged_by_words(question, worth, words):
    session = by_hand("natural")
    assert session.reset().text.startswith("Patient: I cough.\nDoctor: How long have you had this?")
    seen = session.step(f"<think>c, then</think> I ask.\n<answer>\n{question}\n</answer>")
    assert seen.done and seen.feedback.ending == "asked" and words in seen.feedback.text
    assert seen.feedback.reward == worth / 4 and "Asking was right" in seen.text
    assert not any(topic.name in seen.feedback.text for topic in TOPICS)


@pytest.mark.parametrize(
    ("kind", "worths"),
    [
        ("paper", (4, 3, 2.5, 1, 4, 3)),
        ("paper-additive", (3, 2.5, 2, 1, 3, 2)),
        ("paper-content", (3, 2, 1.5, 0, 3, 2)),
        ("paper-action", (4, 4, 3.5, 3, 4, 3)),
    ],
)
def test_rewards_are_the_published_ones(kind, worths):
    answers = [by_hand("compact", kind=kind).step(f"ask {topics}") for topics in ("d", "c", "c d", "d e j")]
    stops = [
        by_hand("natural", kind=kind, covered="a d e").step(f"<answer>{said}</answer>")
        for said in ("<stop />", "Bye. <stop />")
    ]
    assert tuple(seen.feedback.reward for seen in [*answers, *stops]) == worths
    assert by_hand("compact", kind=kind).step("stop").feedback.reward == 0
    assert by_hand("compact", kind=kind, covered="a d e").step("ask d").feedback.reward == 0


def test_the_rules_are_told_in_the_natural_form_only():
    assert Learn2Ask("small", form="compact").pack(1)[0].prompt == ""
    rules = Learn2Ask("small").pack(1)[0].prompt
    assert "3 to 5 of the topics" in rules and "- fever; how bad it is" in rules and "<stop />" in rules
    assert "contact with ill people; travel" in rules and "smoking" not in rules and "same for all patients" in rules
    assert "another one for every patient" in Learn2Ask("paper").pack(1)[0].prompt
    assert rules in NATURAL.solve(Learn2Ask("small").pack(1)[0], "", None)[-1].content


def test_sessions_share_no_state():
    world = Learn2Ask("small", 2, form="compact")
    task = world.pack(1)[0]
    one, other = world.start(task), world.start(task)
    shown = one.reset().text, other.reset().text
    one.step("stop")
    assert shown[0] == shown[1] == other.reset().text == one.reset().text
    assert other.step("stop").done


def naive(protocol: set[str], covered: set[str], asked: list[str]) -> tuple[str, float]:
    """The rules once more, on letters: what is said, and the published reward."""
    missing = protocol - covered
    if not asked:
        return ("early", 0) if missing else ("stopped", 4)
    if not missing:
        return "late", 0
    near = {
        "ab"[letter in "bdfhjln"] and other for letter in missing for other in LETTERS if _pair(letter) == _pair(other)
    }
    worths = [1.0 if letter in missing else 0.5 if letter in near else 0.0 for letter in set(asked)]
    worth, form = min(worths), {1: 1.0, 2: 0.5}.get(len(worths), 0.0)
    return {1.0: "direct", 0.5: "related", 0.0: "irrelevant"}[worth], 1 + 2 * worth + form


def _pair(letter: str) -> int:
    return LETTERS.index(letter) // 2


@pytest.mark.parametrize("preset", ["small", "paper", "paper-shared"])
def test_an_independent_implementation_of_the_rules_agrees_on_random_packs(preset):
    dice, kind, seen_words = Random(1), PRESETS[preset], set()
    world = Learn2Ask(preset, 13, form="compact")
    for pack in world.packs(60, 4):
        for task, case in zip(pack, cases(pack), strict=True):
            session = world.start(task)
            covered = set(session.reset().text.partition(" | ")[2].split())
            asked = dice.sample(LETTERS[: kind.topics], dice.choice([0, 1, 1, 1, 2, 3]))
            seen = session.step(f"ask {' '.join(asked)}" if asked else "stop")
            words, worth = naive({LETTERS[topic] for topic in case.protocol}, covered, asked)
            assert (seen.feedback.text, seen.feedback.reward) == (words, worth / kind.unit)
            seen_words.add(words)
    assert len(seen_words) == 6


# Answers

MALFORMED = [
    *(
        "",
        "ask",
        "ask ",
        "stop ask c",
        "ask C",
        "ask c,d",
        "ask cd",
        "ask ç",
        "ask 3",
        "ask ３",
        "Stop",
        "STOP",
        "null",
    ),
    *(
        "ask c d e f" * 50_000,
        "s" * 1_000_000,
        "ask " + "c " * 300_000,
        "\x00",
        "\ud800",
        "ask c c",
        "ask c\x00",
        "ask\tc",
    ),
    *("<answer></answer>", "<answer>  </answer>", "<answer>A fever?", "A fever?</answer>", "A fever? Or pills?"),
    *("<answer>A fever?</answer><answer>A fever?</answer>", "<answer><answer>A fever?</answer></answer>"),
    *("</answer>A fever?<answer>", f"<answer>{'A fever? ' * 100_000}</answer>", "<answer>" * 100_000),
    *(None, 3, b"stop", ["stop"], {"ask": "c"}, float("nan")),
]


@pytest.mark.parametrize("form", ["natural", "compact"])
@pytest.mark.parametrize("answer", MALFORMED, ids=lambda answer: repr(answer)[:30])
def test_malformed_answers_end_the_episode_with_reward_0(answer, form):
    session = by_hand(form)
    session.reset()
    seen = session.step(answer)
    assert seen.done and seen.feedback.reward == 0.0 and seen.feedback.ending == "malformed"
    assert ("malformed" if form == "natural" else "invalid") in seen.feedback.text


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "<stop />",
        "stop",
        "ask",
        " ",
        "c",
        "d",
        "e",
        "fever",
        "?",
        "？",
        "</think>",
        "\n",
        "é",
        "ａ",
        "\u212a",
    ]
)


@given(
    st.one_of(st.text(), st.lists(PIECES, max_size=8).map("".join), st.text().map("<answer>{}</answer>".format)),
    st.sampled_from(["natural", "compact"]),
    st.booleans(),
)
def test_no_answer_raises_or_wins_wrongly(answer, form, complete):
    session = by_hand(form, covered="a d e" if complete else "a b c")
    seen = session.step(answer)
    assert seen.done and 0 <= seen.feedback.reward <= 1
    stops = "<stop />" in answer if form == "natural" else answer.strip(" \n") == "stop"
    if stops != complete:
        assert seen.feedback.reward == 0
    elif seen.feedback.ending == "malformed":
        assert seen.feedback.reward == 0 and seen.feedback.text


# Players


def first_prompt(task: Task, note: str, world: Learn2Ask) -> list[Message]:
    return COMPACT.solve(task, note, world.start(task).reset())


def by_counting(topics: int, covered: str, note: str) -> dict[frozenset[str], float]:
    """How likely each protocol is, protocol by protocol and set by set. Not as the players do it."""
    kind = next(preset for preset in PRESETS.values() if preset.topics == topics)
    letters, found = LETTERS[:topics], {}

    def seen(protocol: frozenset[str], came_up: frozenset[str]) -> float:
        sets = list(map(frozenset, combinations(letters, len(came_up))))
        complete = sum(protocol <= one for one in sets)
        return STOPPING / complete if protocol <= came_up else (1 - STOPPING) / (len(sets) - complete)

    for size in range(kind.wanted[0], kind.wanted[1] + 1):
        for protocol in map(frozenset, combinations(letters, size)):
            likely = seen(protocol, frozenset(covered.split())) / comb(topics, size)
            for line in note.splitlines():
                what, _, came_up = line.partition(" | ")
                how, _, asked = what.partition(" ")
                words = naive(
                    set(protocol), set(came_up.split()), [] if how in ("early", "stopped") else [asked or "a"]
                )[0]
                likely *= seen(protocol, frozenset(came_up.split())) * (words == how)
            if likely:
                found[protocol] = likely
    total = sum(found.values())
    return {protocol: value / total for protocol, value in found.items()}


def test_what_a_player_believes_is_what_counting_gives():
    note = "direct d | a b c e f\nearly | a b d g h i\nirrelevant j | a c d e g"
    expected = by_counting(10, "a b c d e", note)
    covered = 0b11111
    likely = belief(10, covered, note)
    found = {
        frozenset(LETTERS[i] for i in range(10) if mask >> i & 1): value
        for mask, value in zip(clinics(10).protocols.tolist(), (likely / likely.sum()).tolist(), strict=True)
        if value
    }
    assert found.keys() == expected.keys() and len(found) > 5
    assert all(abs(found[protocol] - value) < 1e-12 for protocol, value in expected.items())


@pytest.mark.parametrize(("preset", "packs"), [("small", 100), ("paper-shared", 60)])
def test_memory_pays(preset, packs):
    world = Learn2Ask(preset, 0, form="compact")
    perfect, memoryless = (played(world, name, packs, 4) for name in ("perfect", "memoryless"))
    assert difference(perfect, memoryless).low > 0.1
    assert np.ptp(memoryless.mean(0)) < 0.25 and perfect[:, 3].mean() > perfect[:, 0].mean() + 0.1


def test_where_nothing_is_shared_both_players_do_the_same():
    task = (world := Learn2Ask("paper", 0, form="compact")).pack(1)[0]
    said = first_prompt(task, "direct a | b c d e f g", world)
    assert choices(said) == choices(said, remember=False)


def test_a_player_who_knows_the_protocol_loses_nothing():
    world, player = Learn2Ask("small", 1, form="compact"), PLAYERS["perfect"](Random(0))
    for pack in world.packs(10, 4):
        protocol = {LETTERS[topic] for topic in cases(pack)[0].protocol}
        others = [letter for letter in LETTERS[:10] if letter not in protocol]
        # Without it, each of its topics was missing; nothing else ever was.
        note = "\n".join(f"direct {one} | {' '.join(x for x in LETTERS[:10] if x != one)}" for one in sorted(protocol))
        note += "\n" + "\n".join(f"stopped | {' '.join(x for x in LETTERS[:10] if x != one)}" for one in others)
        for task in pack:
            session = world.start(task)
            said = COMPACT.solve(task, note, session.reset())
            assert session.step(player(said)).feedback.reward == 1


def updated(world: Learn2Ask, task: Task, note: str, answer: str) -> str:
    session = world.start(task)
    first, seen = session.reset(), session.step(answer)
    (said,) = COMPACT.update(task, note, Trajectory(first, (Turn(answer, seen),)), seen.feedback)
    return noted(said.content)


def test_the_note_has_a_line_for_each_patient_and_fits():
    world, note = Learn2Ask("paper-shared", 4, form="compact"), ""
    pack = world.pack(8)
    for number, task in enumerate(pack, 1):
        note = updated(world, task, note, "ask c" if number % 2 else "stop")
        assert len(note.splitlines()) == number
    assert len(note) < 400
    assert updated(world, pack[0], "early | a b", "what?") == "early | a b"
    assert updated(world, pack[0], "early | a b", "ask c d") in ("early | a b", "early | a b\nlate | a b")
    assert len(updated(world, pack[0], "\n".join(["early | a b"] * 500), "stop")) < 4000


FACTS = st.lists(
    st.builds(
        "{} | {}".format,
        st.sampled_from(["direct a", "related n", "irrelevant c", "early", "late", "stopped", "late c"]),
        st.lists(st.sampled_from(LETTERS), min_size=1, max_size=14).map(" ".join),
    ),
    max_size=12,
).map("\n".join)


@given(st.one_of(FACTS, st.text()), st.sampled_from(["small", "paper-shared", "paper"]))
def test_a_wrong_note_breaks_no_player(note, preset):
    world = Learn2Ask(preset, 0, form="compact")
    answers = choices(first_prompt(world.pack(1)[0], note, world))
    assert answers and len(set(answers)) == len(answers)
    assert set(answers) <= {"stop", *(f"ask {letter}" for letter in LETTERS)}


@pytest.mark.parametrize("said", [[], COMPACT.solve(Task(id="x"), "", Observation("cough 11 | a b"))])
def test_players_read_the_compact_form_only(said):
    with pytest.raises(UsageError):
        choices(said)
    with pytest.raises(UsageError, match="compact form only"):
        choices(NATURAL.solve(Learn2Ask().pack(1)[0], "", Learn2Ask().start(Learn2Ask().pack(1)[0]).reset()))
    with pytest.raises(UsageError, match="compact form only"):
        choices(COMPACT.solve(Task(id="x"), "", Observation("cough 10 | a n")))


def test_no_two_kinds_of_clinic_have_the_same_number_of_topics():
    def kind(preset: Preset) -> tuple:
        return preset.topics, preset.wanted, preset.covered, preset.shared

    assert len({kind(preset) for preset in PRESETS.values()}) == len({preset.topics for preset in PRESETS.values()})
    assert reward("default", 1, 1) == 4


# Cost


@pytest.mark.parametrize(("preset", "most"), [("small", 2e-3), ("paper-shared", 4e-3)])
def test_steps_and_answers_are_quick(preset, most):
    world, steps, answers = Learn2Ask(preset, 0, form="compact"), [], []
    player = PLAYERS["perfect"](Random(0))
    note = "direct a | b c d e f g\nearly | b c d e f g\nirrelevant j | a b c d e f\nrelated h | a b c d f j"
    for pack in world.packs(30, 1):
        session = world.start(pack[0])
        said = COMPACT.solve(pack[0], note, session.reset())
        began = time.thread_time()  # other tests may want this core, too
        answer = player(said)
        between = time.thread_time()
        session.step(answer)
        steps.append(time.thread_time() - between)
        answers.append(between - began)
    assert median(steps) < 1e-3 and median(answers) < most


@pytest.mark.parametrize("preset", PRESETS)
def test_no_reward_is_above_what_the_world_says_is_the_highest_and_that_one_is_reached(preset: str) -> None:
    world = Learn2Ask(preset, 4, form="compact")
    letters = [chr(ord("a") + topic) for topic in range(PRESETS[preset].topics)]
    found = [
        world.start(task).step(said) for task in world.pack(12) for said in ("stop", *(f"ask {one}" for one in letters))
    ]
    assert max(seen.feedback.reward for seen in found) == world.highest_reward
    assert world.highest_reward == {"paper": 4, "paper-action": 4, "paper-additive": 3, "paper-content": 3}.get(
        preset, 1
    )


@pytest.mark.parametrize(
    ("said", "worth"), [("<stop />", 1.0), ("<stop/>", 0.75), ("<stop>", 0.75), ("Stop.", 0.75), ("stop it?", 0.0)]
)
def test_stopping_in_another_spelling_is_stopping_and_costs_the_form(said: str, worth: float) -> None:
    world = Learn2Ask("small", 3)
    compact = Learn2Ask("small", 3, form="compact")
    over = next(task for task in world.pack(60) if compact.start(task).step("stop").feedback.ending == "stopped")
    assert world.start(over).step(f"<answer>{said}</answer>").feedback.reward == worth
