"""Making a tiny policy: lives become targets, a short run learns, stops and goes on, and its files say what it says."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from cod_agent.context import COMPACT, Trajectory, Turn, message  # noqa: E402
from cod_agent.environments import make_world  # noqa: E402
from cod_agent.errors import UnknownName, UsageError  # noqa: E402
from cod_train import supervised  # noqa: E402
from cod_train.gguf_file import write_gguf  # noqa: E402
from cod_train.supervised import Sample  # noqa: E402
from cod_train.tiny import clone as cloning  # noqa: E402
from cod_train.tiny.__main__ import app  # noqa: E402
from cod_train.tiny.card import Measured, card, cloned  # noqa: E402
from cod_train.tiny.courses import course_of  # noqa: E402
from cod_train.tiny.evaluate import Speaker, by_position, interval, rewards  # noqa: E402
from cod_train.tiny.export import save_policy  # noqa: E402
from cod_train.tiny.tokenizer import ASSISTANT, LAKES, MIXED, build_tokenizer, vocabulary_of  # noqa: E402
from cod_train.tiny.transcripts import Scribe, Teacher, drills, induction, lives  # noqa: E402

SHORT = cloning.Recipe(steps=24, packs=4, induction=4)
WORLDS = dict.fromkeys((*LAKES.worlds, *MIXED.worlds))


@pytest.fixture(scope="module")
def words():
    return build_tokenizer()


@pytest.fixture(scope="module")
def more_words():
    return build_tokenizer(MIXED)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Words


def test_the_tokenizer_is_the_same_each_time_and_its_atoms_are_atoms(words):
    assert build_tokenizer().backend_tokenizer.to_str() == words.backend_tokenizer.to_str()
    for text, count in {"Left: Direction 3": 2, "Up? Direction 1": 2, "@.#*": 1, "..#": 1, "null": 1}.items():
        assert len(words(text, add_special_tokens=False).input_ids) == count
    text = "Łódź 🧊 anything\tat all"
    assert words.decode(words(text, add_special_tokens=False).input_ids) == text


def test_the_second_tokenizer_is_the_first_with_more_words(words, more_words):
    assert (vocabulary_of(words), vocabulary_of(more_words)) == (LAKES, MIXED)
    for text, count in {"Left: Direction 3": 2, "@.#*\n..#": 3, "K: é 東京": None, "a1: 5": 2, "none: a+c": 2}.items():
        ids = more_words(text, add_special_tokens=False).input_ids
        assert more_words.decode(ids) == text and count in (None, len(ids))


@pytest.mark.parametrize("world", MIXED.worlds)
def test_a_fact_is_three_tokens_and_an_answer_one_or_two(more_words, world):
    long = {}
    for sample in _lives(more_words, world, packs=6):
        for turn in more_words.decode(sample.ids).split(ASSISTANT)[1:]:
            answer = turn.partition("<|end|>")[0]
            facts = answer.split("\n")[1:-1] if "\n" in answer else []
            for text in [f"{fact}\n" for fact in facts] or [answer]:
                long.setdefault(len(more_words(text, add_special_tokens=False).input_ids), set()).add(text)
    answers = long.pop(2 if world in LAKES.worlds else 1)
    assert len(answers) > 5 and long.pop(2, {"null\n"}) == {"null\n"} and set(long) == {3}


# Transcripts


def train_pack(index: int = 0, world: str = "frozen-lake:small"):
    return make_world(world, split="train", form="compact").pack(4, index)


def _lives(words, world: str, packs: int, teacher: Teacher | None = None) -> list[Sample]:
    scribe = Scribe(words, teacher or Teacher())
    return [sample for at in range(packs) for sample in scribe.life(train_pack(at, world), Random(at))]


def test_the_first_policies_are_cloned_from_the_very_lives_they_were_cloned_from(words):
    scribe = Scribe(words, Teacher(noise=0.2, forget=0.3, garble=0.2))
    samples = [*lives(scribe, 3, 5, 8), *induction(words, Random(0))]
    told = repr([(sample.ids, sample.targets) for sample in samples])
    assert hashlib.sha256(told.encode()).hexdigest()[:16] == "5ee5dfd3cdf9f5cd"


@pytest.mark.parametrize("world", WORLDS)
def test_a_life_is_what_the_runtime_shows_byte_for_byte(more_words, world):
    words, pack = more_words, train_pack(world=world)
    first = next(Scribe(words, Teacher(head_start=0.0)).life(pack, Random(0)))
    said = COMPACT.solve(pack[0], "", pack.environment.start(pack[0]).reset())
    prompt = words.apply_chat_template([m.wire() for m in said], tokenize=False, add_generation_prompt=True)
    assert words.decode(first.ids).startswith(prompt)
    assert (
        first.ids[: prompt.count("\n") + 5]
        == words(prompt, add_special_tokens=False).input_ids[: prompt.count("\n") + 5]
    )
    again = words.decode(first.ids)
    assert words(again, add_special_tokens=False).input_ids == first.ids


@pytest.mark.parametrize("world", WORLDS)
def test_an_episode_is_what_the_chat_template_makes_of_it(more_words, world):
    words, episode = more_words, next(Scribe(more_words, Teacher()).life(train_pack(world=world), Random(1)))
    talk = []
    for turn in words.decode(episode.ids).split("<|user|>")[1:]:
        asked, answered = turn.removesuffix("<|end|>").split(ASSISTANT)
        talk += [message("user", ("environment", asked)), message("assistant", ("model", answered))]
    text = words.apply_chat_template([m.wire() for m in talk], tokenize=False)
    assert words(text, add_special_tokens=False).input_ids == episode.ids


@pytest.mark.parametrize("world", WORLDS)
def test_targets_of_answers_sum_to_one_at_each_place(more_words, world):
    words = more_words
    for sample in _lives(words, world, 1, Teacher(off_path=0.0, world_weight=0.0)):
        at: dict[int, float] = {}
        for place, _, weight in sample.targets:
            at[place] = at.get(place, 0.0) + weight
        assert all(abs(total - 1) < 1e-9 for total in at.values())
        said = {i for i, token in enumerate(sample.ids) if token == words.convert_tokens_to_ids("<|assistant|>")}
        assert said <= at.keys()


def test_off_path_turns_have_no_target_and_noise_has(words):
    assert len(_weights(words, Teacher(off_path=1.0, world_weight=0.0))) == 1  # only that the answer ends
    assert len(_weights(words, Teacher(off_path=0.0, noise=1.0, world_weight=0.0))) == 3


def _weights(words, teacher: Teacher) -> list[float]:
    """Of the targets of the first answer."""
    sample = next(Scribe(words, teacher).life(train_pack(), Random(0)))
    begin = sample.ids.index(words.convert_tokens_to_ids(ASSISTANT))
    return [weight for place, _, weight in sample.targets if begin <= place < begin + 3]


def test_who_forgets_everything_writes_null_and_who_remembers_the_truth(words):
    def notes(teacher: Teacher) -> list[str]:
        text = [words.decode(sample.ids) for sample in Scribe(words, teacher).life(train_pack(), Random(0))]
        return [
            said.rpartition("<context>\n")[2].partition("\n</context>")[0]
            for said in text
            if said.count("<context>") == 2
        ]

    assert set(notes(Teacher(remember=False))) == set(notes(Teacher(forget=1.0, head_start=0.0))) == {"null"}
    truth = course_of("frozen-lake:small").truth(train_pack(), Random(0))
    assert set(notes(Teacher(head_start=0.0))[-1].split("\n")) <= set(truth)


@pytest.mark.parametrize("world", WORLDS)
def test_the_truth_of_a_pack_is_what_its_sessions_show_to_random_answers(world):
    course, dice = course_of(world), Random(0)
    for at in range(10):
        pack, seen, found = train_pack(at, world), "", ""
        for task in pack:
            session, turns = pack.environment.start(task), []
            first = seen = session.reset()
            while not seen.done:
                answer = course.wild([message("user", ("environment", seen.text))], dice)
                seen = session.step(answer)
                assert seen.feedback is None or seen.feedback.ending not in ("malformed", "illegal"), answer
                turns.append(Turn(answer, seen))
            update = COMPACT.update(task, found, Trajectory(first, tuple(turns)), seen.feedback)
            found = course.noted(update[0].content)
        assert found and set(found.split("\n")) <= set(course.truth(pack, Random(0)))


def test_a_step_of_lives_depends_on_its_number_alone(words):
    scribe = Scribe(words, Teacher())
    assert lives(scribe, 0, 7, 2) == lives(Scribe(words, Teacher()), 0, 7, 2) != lives(scribe, 0, 8, 2)


def test_a_drill_is_a_task_whose_note_has_the_answer(more_words):
    for sample in drills(Scribe(more_words, Teacher()), Random(0), 20, MIXED.worlds):
        asked, _, answer = more_words.decode(sample.ids).partition(ASSISTANT)
        said = [message("user", ("environment", asked.removeprefix("<|user|>")))]
        assert course_of("alchemy:tiny").choices(said) == [answer.removesuffix("<|end|>")]
        assert [weight for *_, weight in sample.targets] == [1.0, 1.0]
    assert drills(Scribe(more_words, Teacher()), Random(0), 0, LAKES.worlds) == []


def test_induction_asks_for_the_second_of_a_pair_seen_before(words):
    for sample in induction(words, Random(0), 8):
        half = len(sample.ids) // 2
        pairs = dict(zip(sample.ids[:half:2], sample.ids[1:half:2], strict=True))
        assert all(pairs[sample.ids[place]] == token for place, token, _ in sample.targets)
        assert len(sample.targets) == len(pairs)


# Training


def test_groups_hold_samples_of_like_length_within_the_budget():
    samples = [Sample([0] * length, []) for length in (5, 900, 30, 31, 900, 900, 900, 900, 6)]
    groups = supervised.bucketed(samples)
    assert sorted(len(s.ids) for group in groups for s in group) == sorted(len(s.ids) for s in samples)
    assert all(len(group) * max(len(s.ids) for s in group) <= supervised.BUDGET for group in groups)


def test_the_loss_is_the_weighted_surprise_at_the_targets(words):
    model = cloning.new_model(words, 0)
    samples = [Sample([5, 6, 7, 8], [(0, 9, 0.25), (0, 10, 0.75), (2, 8, 1.0)]), Sample([5, 6], [(0, 6, 1.0)])]
    loss, tokens = supervised.summed_loss(model, samples)
    logs = model(torch.tensor([[5, 6, 7, 8]])).logits[0].log_softmax(-1)
    expected = -(0.25 * logs[0, 9] + 0.75 * logs[0, 10] + logs[2, 8] + logs[0, 6])
    assert tokens == 8
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_a_short_run_learns_and_its_files_say_what_it_says(words, tmp_path: Path):
    seen: list[supervised.Progress] = []
    model, end = cloning.clone(SHORT, words, tmp_path / "run.pt", report=seen.append)
    clean = [progress.loss for progress in seen if progress.step > SHORT.induction]
    assert sum(clean[-4:]) < 0.85 * sum(clean[:4])
    assert (end.step, end.tokens > 10_000) == (SHORT.steps, True)

    save_policy(model, words, tmp_path / "hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert len(tokenizer) == again.config.vocab_size
    ids = torch.tensor([tokenizer("@.#*\n....", add_special_tokens=False).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0.05, rtol=0.02)
    first = (tmp_path / "hf" / "model.gguf").read_bytes()
    write_gguf(tmp_path / "hf", tmp_path / "again.gguf", name="hf")
    assert first[:4] == b"GGUF" and (tmp_path / "again.gguf").read_bytes() == first


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(words, tmp_path: Path):
    recipe = replace(SHORT, steps=6, packs=1, induction=0)

    class Stopped(Exception):
        pass

    def stop(progress: supervised.Progress) -> None:
        if progress.step == 5:
            raise Stopped

    whole, _ = cloning.clone(recipe, words, tmp_path / "whole.pt")
    with pytest.raises(Stopped):
        cloning.clone(recipe, words, tmp_path / "halves.pt", report=stop, every=3)
    halves, end = cloning.clone(recipe, words, tmp_path / "halves.pt")
    assert end.step == 6
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_recipe_that_stops_in_the_middle_is_the_beginning_of_the_whole(words, tmp_path: Path):
    recipe, seen = replace(SHORT, steps=4, packs=1, induction=0), []
    model = cloning.new_model(words, 0)

    def look(progress: supervised.Progress) -> None:
        if progress.step == 2:
            seen.append([weight.detach().clone() for weight in model.parameters()])

    cloning.clone(recipe, words, tmp_path / "whole.pt", model=model, report=look)
    stopped, end = cloning.clone(replace(recipe, stop=2), words, tmp_path / "stopped.pt")
    assert (end.step, end.steps) == (2, 2)
    for one, other in zip(seen[0], stopped.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_run_is_refused(words, tmp_path: Path):
    recipe = replace(SHORT, steps=1, packs=1, induction=0)
    cloning.clone(recipe, words, tmp_path / "run.pt")
    with pytest.raises(UsageError, match="another recipe or seed"):
        cloning.clone(recipe, words, tmp_path / "run.pt", seed=1)
    with pytest.raises(UsageError, match="another recipe or seed"):
        cloning.clone(replace(recipe, rate=1.0), words, tmp_path / "run.pt")


# Measuring


def test_batched_answers_do_not_depend_on_their_neighbours(words):
    speaker = Speaker(cloning.new_model(words, 0), words, 0)
    short, long = [message("user", ("environment", "@.*"))], [message("user", ("environment", "@.*\n" * 40))]
    with torch.no_grad():
        speaker._model.model.norm.weight.mul_(1e4)  # so sure of itself that sampling draws the most likely token
    alone = speaker.answers([short], 4)[0]
    assert speaker.answers([short, long], 4)[0] == alone


@pytest.mark.parametrize("world", MIXED.worlds)
def test_rewards_and_their_intervals(more_words, world):
    table = rewards(cloning.new_model(more_words, 0), more_words, world=world, packs=3, size=2, batch=2)
    assert [len(row) for row in table] == [2, 2, 2]
    assert [p.n for p in by_position(table)] == [3, 3]
    low, high = interval(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)


def test_a_card_tells_how_and_how_well(words):
    row = by_position([[0.0, 1.0], [1.0, 1.0]])
    progress = supervised.Progress(10, 10, 0.5, 2_000_000, 60.0)
    recipe = cloning.RECIPES["embedded-base"]
    made = cloned("embedded-base", recipe, progress, seed=4)
    model, worlds = cloning.new_model(words, 0), LAKES.worlds
    text = card(
        "embedded-base", made, model=model, worlds=worlds, measured=[Measured("frozen-lake:small", 0, row, row, row)]
    )
    assert "--policy embedded-base --out DIR --seed 4" in text and "made weak on purpose" in text
    assert "| with notes, 2 packs | 0.500" in text and "2.0 million" in text
    assert "frozen-lake:small (3 of 4), frozen-lake:tiny (1 of 4)" in text and "width 64, 4 layers, 2 heads" in text


# The command


def test_the_command_makes_measures_and_exports_a_policy(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(cloning.RECIPES, "cloned", replace(SHORT, packs=1))
    out = tmp_path / "mine"
    made = CliRunner().invoke(app, ["clone", "--out", str(out), "--steps", "2", "--packs", "2"])
    assert made.exit_code == 0, made.output
    assert "Reward by position" in (out / "CARD.md").read_text()
    (out / "model.gguf").unlink()
    assert CliRunner().invoke(app, ["export", str(out)]).exit_code == 0
    assert (out / "model.gguf").is_file()
    measured = CliRunner().invoke(app, ["evaluate", str(out), "--packs", "2"])
    assert measured.exit_code == 0 and "no-context" in measured.output


def test_mistakes_on_the_command_line_are_named(tmp_path: Path):
    unknown = CliRunner().invoke(app, ["clone", "--policy", "embeded", "--out", str(tmp_path)])
    assert isinstance(unknown.exception, UnknownName) and "did you mean embedded" in str(unknown.exception)
    nothing = CliRunner().invoke(app, ["evaluate", str(tmp_path)])
    assert isinstance(nothing.exception, UsageError) and "holds no policy" in str(nothing.exception)
