"""Warm start: what a teacher said becomes sequences in a student's tokens, and the student learns it, whatever it is made of."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from forgetful import PLANTED, house, lived, tasks  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner  # noqa: E402

from cod_agent import CoDAgent  # noqa: E402
from cod_agent.context import COMPACT, Trajectory, Turn  # noqa: E402
from cod_agent.environments.frozen_lake import PLAYERS, FrozenLake  # noqa: E402
from cod_agent.errors import UsageError  # noqa: E402
from cod_agent.models.scripted import ScriptedModel  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_agent.tasks import Feedback, Observation  # noqa: E402
from cod_train.supervised import Progress, Sample, summed_loss  # noqa: E402
from cod_train.tiny.evaluate import Speaker, rewards  # noqa: E402
from cod_train.tiny.tokenizer import build_tokenizer  # noqa: E402
from cod_train.transcripts import Chat, Spoken, Transcript, read_transcripts  # noqa: E402
from cod_train.warm_start import REPORT, Lesson, app, main, warm_start  # noqa: E402

FAST = Lesson(epochs=1, batch=32, rate=1e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words():
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat(words):
    return Chat(words, {words.eos_token_id})


def record(path: Path, packs: int, player: Any = "scripted:perfect", size: int = 3) -> Path:
    """A teacher's lives through packs of the train split."""
    lake = FrozenLake("tiny", 0, split="train", form="compact")
    with CoDAgent("teacher", model=player, memory=path, environment=lake) as teacher:
        for pack in range(packs):
            list(teacher.run_sync(lake.pack(size, pack)))
    return path


@pytest.fixture(scope="module")
def perfect(tmp_path_factory) -> Path:
    return record(tmp_path_factory.mktemp("teacher") / "perfect.db", 96)


# Transcripts


def test_what_the_perfect_player_says_is_what_the_compact_form_wants(perfect, chat, words):
    transcripts, left_out = read_transcripts([perfect])
    assert not left_out and Counter(t.kind for t in transcripts) == {"solve": 3 * 96, "update": 2 * 96}
    for transcript in transcripts[:100]:
        (sample,) = chat.samples(transcript, left_out)  # one sequence an episode: the template keeps its prefixes
        said = [words.decode(run) for run in _runs(sample)]
        assert said == [f"{call.answer['content']}<|end|>" for call in transcript.calls]
        shown = [*transcript.calls[-1].messages, transcript.calls[-1].answer]
        assert words.decode(sample.ids) == words.apply_chat_template(shown, tokenize=False)
        if transcript.kind == "solve":
            assert all(len(words(answer).input_ids) == 3 for answer in said)  # `Left?`, ` Direction 3`, the end
    assert not left_out


def _runs(sample: Sample) -> list[list[int]]:
    """The targets, in pieces that follow each other; each says what the sequence says."""
    runs: list[list[int]] = []
    before = -2
    for place, token, weight in sample.targets:
        assert sample.ids[place + 1] == token and weight == 1.0
        runs = runs if place == before + 1 else [*runs, []]
        runs[-1].append(token)
        before = place
    return runs


def test_a_template_that_rewrites_its_history_makes_a_sequence_of_each_call(perfect):
    words = build_tokenizer()
    # Earlier answers lose their first two words, as earlier reasoning does elsewhere.
    words.chat_template = words.chat_template.replace(
        "<|assistant|>{{ m['content'] }}<|end|>",
        "<|assistant|>{{ m['content'] if loop.last else m['content'][5:] }}<|end|>",
    )
    left_out: Counter[str] = Counter()
    episodes = [t for t in read_transcripts([perfect])[0] if len(t.calls) > 1][:20]
    for transcript in episodes:
        samples = Chat(words, {words.eos_token_id}).samples(transcript, left_out)
        assert len(samples) == len(transcript.calls)
        for sample, call in zip(samples, transcript.calls, strict=True):
            assert [words.decode(run) for run in _runs(sample)] == [f"{call.answer['content']}<|end|>"]
    assert episodes and not left_out


def test_tools_reach_the_template_and_arguments_are_objects(tmp_path):
    path = record(tmp_path / "tools.db", 1, size=1)
    ask = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    said = {"role": "assistant", "content": "look", "tool_calls": [{"type": "function", "function": ask}]}
    asked = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    head = {"model": "m", "messages": None, "tools": [{"type": "function", "function": {"name": "weather"}}]}
    head["chat_template_kwargs"] = {"greeting": "hello"}
    conn = sqlite3.connect(path)  # as an application with tools of its own leaves it
    conn.execute("DELETE FROM calls WHERE id > 1")
    conn.execute("UPDATE heads SET body = ?", (json.dumps(head),))
    for column, body in {"prompt_id": asked, "answer_id": said}.items():
        changed = f"UPDATE messages SET body = ? WHERE id = (SELECT {column} FROM calls)"
        conn.execute(changed, (json.dumps(body),))
    conn.commit()
    words = build_tokenizer()
    words.chat_template = (
        "{{ greeting }}{{ tools[0].function.name }}{% for m in messages %}<|user|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}<|end|>{% endfor %}"
    )
    (transcript,), _ = read_transcripts([path])
    (sample,) = Chat(words, {words.eos_token_id}).samples(transcript, Counter())
    assert words.decode(sample.ids) == "helloweather<|user|>a\nb<|end|><|user|>lookOslo<|end|>"


def test_an_answer_ends_where_the_model_would_stop_sampling(words):
    talk = Transcript(
        "solve", (Spoken([{"role": "user", "content": "Up"}], {"role": "assistant", "content": "Up"}, {}),)
    )
    for end, expected in {"<|end|>\n": "Up<|end|>", "": "Up<|end|>"}.items():
        loose = build_tokenizer()
        loose.chat_template = words.chat_template.replace("<|end|>", end)
        (sample,) = Chat(loose, {loose.eos_token_id}).samples(talk, Counter())
        assert [loose.decode(run) for run in _runs(sample)] == [expected]


def test_the_prompt_keeps_its_own_tokens_where_written_text_would_share_one_with_the_answer():
    words = build_tokenizer()
    words.chat_template = (
        "{% for m in messages %}{{ 'U' if m.role == 'assistant' else '<|user|>' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}U{% endif %}"
    )
    talk = Transcript("solve", (Spoken([{"role": "user", "content": "#"}], {"role": "assistant", "content": "p"}, {}),))
    (sample,) = Chat(words, {words.eos_token_id}).samples(talk, Counter())
    assert len(words("Up").input_ids) == 1
    assert [words.decode([token]) for token in sample.ids] == ["<|user|>", "#", "U", "p", "<|end|>"]


def test_rejection_sampling_looks_at_the_tasks_an_update_served(tmp_path):
    path = record(tmp_path / "memoryless.db", 12, "scripted:memoryless", size=2)
    kept, left_out = read_transcripts([path], min_reward=1.0)
    conn = sqlite3.connect(path)
    won = {
        position: conn.execute("SELECT count(*) FROM tasks WHERE position = ? AND reward = 1", (position,)).fetchone()[
            0
        ]
        for position in (0, 1)
    }
    assert 0 < won[0] < 12 and 0 < won[1] < 12
    assert Counter(t.kind for t in kept) == {"solve": won[0] + won[1], "update": won[1]}
    assert sum(left_out.values()) == 36 - len(kept)
    assert {t.kind for t in read_transcripts([path], kinds=["update"])[0]} == {"update"}


@pytest.mark.parametrize(
    ("accepted", "left_out"),
    [(False, {"update episodes that are held back": 2}), (True, {"update episodes that are held back": 1})],
)
def test_an_update_that_was_held_back_teaches_only_if_it_was_adopted(tmp_path, accepted, left_out):
    lake = FrozenLake("tiny", seed=3, form="compact")

    async def live():
        path, player = tmp_path / "held.db", ScriptedModel("player", PLAYERS["perfect"](Random(0)))
        async with CoDAgent("a", model=player, memory=path, environment=lake, gate="review") as agent:
            async for outcome in agent.run(lake.pack(3)):
                if accepted and outcome.position == 0:
                    await agent.review(run=outcome.run).accept(1)
        return path

    _, counted = read_transcripts([asyncio.run(live())], kinds=("update",))
    assert counted == left_out


def test_what_cannot_be_learnt_from_is_counted_by_reason(tmp_path):
    play = PLAYERS["perfect"](Random(0))

    def careless(messages):
        said = play(messages)
        return said.replace("</context>", "") if messages[0].content.startswith("Update") else said

    path = record(tmp_path / "damaged.db", 3, ScriptedModel("careless", careless), size=2)
    conn = sqlite3.connect(path)
    cut, pruned = conn.execute("SELECT min(id), max(id) FROM calls").fetchone()
    conn.execute("UPDATE calls SET finish_reason = 'length' WHERE id = ?", (cut,))
    conn.execute("UPDATE messages SET body = NULL WHERE id = (SELECT answer_id FROM calls WHERE id = ?)", (pruned,))
    conn.execute("UPDATE calls SET style = 'raw' WHERE id = ?", (cut + 1,))
    conn.commit()
    _, left_out = read_transcripts([path])
    assert left_out == {
        "update episodes that are refused": 3,
        "calls whose answer was cut off": 1,
        "calls whose text was pruned": 1,
        "calls that are not stored as a conversation": 1,
    }


def test_a_template_that_refuses_is_counted_with_its_words(perfect):
    words = build_tokenizer()
    words.chat_template = "{{ raise_exception('no user messages here') }}"
    left_out: Counter[str] = Counter()
    transcript = read_transcripts([perfect])[0][0]
    assert Chat(words, {3}).samples(transcript, left_out) == []
    assert left_out == {"calls that the chat template refuses (no user messages here)": len(transcript.calls)}


# Learning


def test_a_weak_base_learns_from_the_perfect_player_to_use_notes(perfect, tmp_path):
    seen: list[Progress] = []
    taught = warm_start("embedded-base", [perfect], tmp_path / "out", lesson=FAST, report=seen.append)
    assert taught.steps == len(seen) == 15 and taught.sequences == 5 * 96
    assert sum(p.loss for p in seen[-5:]) < 0.75 * sum(p.loss for p in seen[:5])

    def by_position(folder: Path) -> list[float]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        table = rewards(model, tokenizer, world="frozen-lake:tiny", packs=64, size=2)
        return [sum(column) / len(column) for column in zip(*table, strict=True)]

    before, after = by_position(folder_of("embedded-base")), by_position(tmp_path / "out")
    assert after[1] > before[1] + 0.25 and after[1] > after[0]
    assert (tmp_path / "out" / "model.gguf").is_file()
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert (report["base"], report["sequences"], report["left_out"]) == ("embedded-base", 480, {})


def test_a_base_that_never_wrote_a_note_learns_to(perfect, tmp_path):
    lake = FrozenLake("tiny", 5, form="compact")
    turn = Turn("Up? Direction 3", Observation("@..\n...\n..*", "Up: Direction 3"))
    asked = COMPACT.update(lake.pack(1)[0], "", Trajectory(None, (turn,)), Feedback(reward=0.0, text="hole"))

    def answer(folder: Path) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return Speaker(model, tokenizer, 0, temperature=0.01).answers([asked], 12)[0]

    assert answer(folder_of("naive-base")) == "<context>\nnull\n</context>"
    warm_start("naive-base", [perfect], tmp_path / "out", lesson=replace(FAST, epochs=4), kinds=["update"])
    assert answer(tmp_path / "out") == "<context>\nUp: Direction 3\n</context>"


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(perfect, tmp_path):
    lesson = Lesson(epochs=0.1, batch=8, rate=1e-3)

    class Stopped(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 5:
            raise Stopped

    whole = warm_start("embedded-base", [perfect], tmp_path / "whole", lesson=lesson)
    with pytest.raises(Stopped):
        warm_start("embedded-base", [perfect], tmp_path / "halves", lesson=lesson, report=stop)
    steps: list[int] = []
    halves = warm_start(
        "embedded-base", [perfect], tmp_path / "halves", lesson=lesson, report=lambda p: steps.append(p.step)
    )
    assert whole == halves and steps == [4, 5, 6]
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "halves"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(UsageError, match="another recipe or seed"):
        warm_start("embedded-base", [perfect], tmp_path / "halves", lesson=lesson, kinds=["solve"])


@pytest.fixture(scope="module")
def stranger(tmp_path_factory, words) -> Path:
    """A base of another architecture, in bfloat16, whose turns end in a newline."""
    folder = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=160,
        eos_token_id=words.eos_token_id,
    )
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = words.chat_template.replace("<|end|>", "<|end|>\n")
    tokenizer.save_pretrained(folder)
    return folder


def test_another_architecture_learns_too_and_keeps_its_precision(perfect, stranger, tmp_path):
    seen: list[Progress] = []
    taught = warm_start(stranger, [perfect], tmp_path / "out", lesson=replace(FAST, rate=1e-2), report=seen.append)
    assert seen[-1].loss < 0.7 * seen[0].loss
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template.count("\n") == 1
    assert not (tmp_path / "out" / "model.gguf").exists()
    assert set(taught.left_out) <= {"sequences over the base's 160 tokens"}


def test_the_loss_of_an_architecture_that_caps_its_logits_is_its_own(words):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=len(words), **sizes, **heads, final_logit_softcapping=0.5)
    model = Gemma2ForCausalLM(config)
    group = [Sample([5, 6, 7, 8], [(0, 6, 1.0), (2, 8, 1.0)]), Sample([9, 10], [(0, 10, 0.5)])]
    loss, tokens = summed_loss(model, group)
    logs = [model(torch.tensor([s.ids])).logits[0].log_softmax(-1) for s in group]
    expected = -(logs[0][0, 6] + logs[0][2, 8] + 0.5 * logs[1][0, 10])
    assert tokens == 8
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


# Mistakes


def test_mistakes_are_named(perfect, stranger, tmp_path):
    with pytest.raises(UsageError, match="is no base"):
        warm_start("embeded-base", [perfect], tmp_path / "out")
    with pytest.raises(UsageError, match="is the base itself"):
        warm_start(stranger, [perfect], stranger)
    with pytest.raises(UsageError, match="there is no file"):
        warm_start(stranger, [tmp_path / "none.db"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"nothing to learn from in .*288 solve episodes below the reward asked for"):
        warm_start(stranger, [perfect], tmp_path / "out", kinds=["solve"], min_reward=2.0)
    with pytest.raises(UsageError, match="epochs is 0"):
        Lesson(epochs=0)
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_not_for_chat_is_refused(perfect, stranger, tmp_path):
    shutil.copytree(stranger, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        warm_start(tmp_path / "mute", [perfect], tmp_path / "out")
    endless = build_tokenizer()
    with pytest.raises(UsageError, match="no token that ends an answer"):
        Chat(endless, set())


def test_the_command_teaches_and_tells(perfect, stranger, tmp_path):
    out = tmp_path / "out"
    said = [str(perfect), "--base", str(stranger), "--out", str(out), "--epochs", "0.1", "--min-reward", "1"]
    told = CliRunner().invoke(app, said)
    assert told.exit_code == 0, told.output
    assert "below the reward asked for" in told.output and str(out / REPORT) in told.output
    assert CliRunner().invoke(app, [*said, "--kind", "solv"]).exception.args[0].startswith("--kind is 'solv'")


def test_what_was_forgotten_is_no_transcript_though_another_run_said_the_same(tmp_path):
    async def live():
        async with house(tmp_path / "a.db") as agent:
            await lived(agent, tasks(4, {1: "feedback"}))
            await lived(agent, tasks(2), run="other")
            await agent.forget("room1", run="life")

    asyncio.run(live())
    found, left_out = read_transcripts([tmp_path / "a.db"])
    assert len(found) == 4 + 2 and PLANTED not in str(found), "the other run, and the first task of the life"
    assert left_out["update episodes of runs lived for another purpose (forget)"] == 2


def test_the_command_line_says_a_mistake_in_one_sentence(perfect, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["warm_start", str(perfect), "--base", "nobody", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and capsys.readouterr().err.startswith("Error: nobody is no base")
