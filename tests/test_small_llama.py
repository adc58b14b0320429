"""The numpy engine against llama.cpp on the same weights, and against itself in other company."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cod_agent.context import Message, message
from cod_agent.models import Completion, Sampling
from cod_agent.models.batching import draw
from cod_agent.models.gguf import read_metadata
from cod_agent.models.small_llama import SmallEngine, SmallLlama, fits
from cod_agent.policies import folder_of

pytest.importorskip("xllamacpp")

from cod_agent.models.embedded import GgufModel  # noqa: E402

FILE = folder_of("embedded") / "model.gguf"
METADATA = read_metadata(FILE)
LENGTH = 256


def conversations(count: int) -> list[list[Message]]:
    """Of one to five turns, half of them about lakes, half nonsense in several scripts."""
    source = random.Random(5)
    made = []
    for number in range(count):
        said = []
        for _ in range(source.randint(1, 5)):
            letters = "@.#*\n" if number % 2 else "aé漢\U0001f600 \n:?Direction"
            text = "".join(source.choice(letters) for _ in range(source.randint(1, 25)))
            said += [message("user", ("environment", text)), message("assistant", ("model", "Left? Direction 3"))]
        made.append(said[:-1])
    return made


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[GgufModel]:
    model = GgufModel(FILE, sampling=Sampling(max_tokens=12, seed=1), parallel=4, small=False)
    yield model
    model.close()


def scored(model: SmallLlama, prompt: list[int], sampled: list[int]) -> list[float]:
    """Log-probability of each sampled token, one forward pass for each."""
    out = []
    for at, token in enumerate(sampled):
        tokens = np.array([[*prompt, *sampled[:at]]])
        zero = np.zeros(1, np.int64)
        logits = model.step(tokens, zero, zero, np.array([tokens.shape[1] - 1]))[0]
        out.append(float(logits[token] - np.logaddexp.reduce(logits)))
    return out


def test_log_probabilities_are_those_of_llama_cpp(llama_cpp: GgufModel) -> None:
    async def ask() -> list[Completion]:
        return await asyncio.gather(*(llama_cpp.complete(said) for said in conversations(30)))

    model, compared = SmallLlama.of_file(FILE, METADATA, 1, LENGTH), 0
    for answer in asyncio.run(ask()):
        if answer.tokens is not None:
            ours = scored(model, list(answer.tokens.prompt), list(answer.tokens.sampled))
            assert np.abs(np.array(ours) - np.array(answer.tokens.logprobs)).max() < 1e-4
            compared += len(ours)
    assert compared > 60


def test_company_and_kept_turns_do_not_change_log_probabilities() -> None:
    engine, source = SmallEngine(FILE, METADATA, 3, LENGTH), random.Random(1)
    prompts = [[source.randrange(4, 504) for _ in range(source.randint(1, 40))] for _ in range(12)]
    sampling = Sampling(max_tokens=6, temperature=1.5)
    turns = []
    for _ in range(4):
        asked = [engine.ask(prompt, sampling, lambda: False) for prompt in prompts]
        for at, drawn in enumerate(asked):
            sampled, logprobs, finish = drawn.result(timeout=30)
            assert (sampled[-1] == METADATA["tokenizer.ggml.eos_token_id"]) == (finish == "stop")
            turns.append((prompts[at], sampled, logprobs))
            prompts[at] = [*prompts[at], *sampled, *(source.randrange(4, 504) for _ in range(source.randint(1, 9)))]
    engine.close()
    alone = SmallLlama.of_file(FILE, METADATA, 1, LENGTH)
    for prompt, sampled, logprobs in turns:
        assert np.abs(np.array(scored(alone, prompt, sampled)) - np.array(logprobs)).max() < 1e-4


def test_a_conversation_may_fill_the_window_to_its_last_token_beside_a_short_one() -> None:
    engine = SmallEngine(FILE, METADATA, 2, 64)
    asked = [engine.ask([7] * size, Sampling(temperature=2.0), lambda: False) for size in (63, 1, 60, 40)]
    for drawn, size in zip(asked, (63, 1, 60, 40), strict=True):
        sampled, logprobs, finish = drawn.result(timeout=30)
        assert len(sampled) == len(logprobs) <= 64 - size and (finish == "stop" or len(sampled) == 64 - size)
    engine.close()


def test_nobody_waits_for_an_answer_that_was_given_up() -> None:
    engine = SmallEngine(FILE, METADATA, 1, LENGTH)
    given_up = engine.ask([7] * 5, Sampling(temperature=50.0), lambda: True)
    assert len(given_up.result(timeout=30)[0]) == 1
    engine.close()


def test_a_seed_makes_an_answer_a_function_of_its_prompt() -> None:
    engine = SmallEngine(FILE, METADATA, 4, LENGTH)
    asked = [engine.ask([9, 8, 7], Sampling(temperature=5.0, seed=3, max_tokens=20), lambda: False) for _ in range(6)]
    answers = [drawn.result(timeout=30)[0] for drawn in asked]
    engine.close()
    assert all(answer == answers[0] for answer in answers)


def test_draws_follow_the_distribution_and_its_truncation() -> None:
    logprobs = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    source = np.random.default_rng(0)

    def shares(sampling: Sampling) -> list[float]:
        drawn, own = draw(np.tile(logprobs + 7, (20_000, 1)), [sampling] * 20_000, [source] * 20_000)
        assert np.abs(own - logprobs[drawn]).max() < 1e-6
        return list(np.bincount(drawn, minlength=4) / len(drawn))

    assert shares(Sampling()) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(Sampling(top_p=0.7)) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)
    hot = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert shares(Sampling(temperature=2.0)) == pytest.approx(list(hot / hot.sum()), abs=0.015)
    assert shares(Sampling(temperature=0.0)) == [1.0, 0, 0, 0]


def test_only_small_plain_llamas_are_computed_here(tmp_path: Path) -> None:
    assert fits(FILE, METADATA)
    assert not fits(FILE, {**METADATA, "general.file_type": 1})
    assert not fits(FILE, {**METADATA, "general.architecture": "qwen3"})
    assert not fits(FILE, {**METADATA, "llama.attention.head_count_kv": 1})
    large = tmp_path / "large.gguf"
    with large.open("wb") as file:
        file.truncate(17 << 20)
    assert not fits(large, METADATA)
