"""The trainer's engines: numpy and transformers say what a plain forward pass says, whatever company and weights come and go."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config  # noqa: E402

from cod_agent.errors import ModelError, ModelRefused, UsageError  # noqa: E402
from cod_agent.models import Sampling, batching  # noqa: E402
from cod_agent.models.batching import BatchEngine, Drawn, Floats, Ints  # noqa: E402
from cod_agent.models.gguf import read_metadata  # noqa: E402
from cod_agent.models.small_llama import Shape, SmallLlama  # noqa: E402
from cod_agent.policies import folder_of  # noqa: E402
from cod_train.engines import engine_for  # noqa: E402

SMALL = folder_of("embedded")
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128
)
KINDS = {
    "numpy": LlamaConfig(vocab_size=97, eos_token_id=5, tie_word_embeddings=False, **SIZES),
    "grouped llama": LlamaConfig(vocab_size=97, eos_token_id=[5, 9], num_key_value_heads=2, **SIZES),
    "qwen2": Qwen2Config(vocab_size=97, eos_token_id=5, num_key_value_heads=2, tie_word_embeddings=True, **SIZES),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(config: PreTrainedConfig, folder: Path, seed: int = 0) -> AutoModelForCausalLM:
    """A random model whose distributions are far from flat, saved to `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(torch.rand_like(weight) + 0.5) if weight.dim() == 1 else weight.mul_(8)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """(folder, the model, the same kind with other weights)"""
    folder = tmp_path_factory.mktemp("model")
    other = made(KINDS[request.param], folder / "other", seed=1)
    return folder, made(KINDS[request.param], folder), other


def weights_of(model) -> dict[str, Floats]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def plain(model, prompt: list[int], drawn: Drawn) -> list[float]:
    with torch.no_grad():
        scored = model(torch.tensor([prompt + drawn.ids])).logits[0].log_softmax(-1)
    return [float(scored[len(prompt) - 1 + at, token]) for at, token in enumerate(drawn.ids)]


def nonsense(source: random.Random, least: int, most: int) -> list[int]:
    return [source.randrange(10, 97) for _ in range(source.randint(least, most))]


def talk(engine, model, prompts: list[list[int]], turns: int) -> int:
    """Conversations that go on turn by turn; how many tokens were compared."""
    source, compared = random.Random(3), 0
    for _ in range(turns):
        asked = [(prompt, engine.ask(prompt, temperature=1.3, max_tokens=source.randint(1, 6))) for prompt in prompts]
        for prompt, future in asked:
            drawn = future.result(timeout=30)
            assert (drawn.finish == "stop") == (drawn.ids[-1] in engine.end)
            assert plain(model, prompt, drawn) == pytest.approx(drawn.logprobs, abs=1e-4)
            compared += len(drawn.ids)
            prompt += [*drawn.ids, *nonsense(source, 1, 9)]
    return compared


def test_log_probabilities_are_those_of_a_plain_forward_pass_in_any_company(kind) -> None:
    folder, model, _ = kind
    engine, source = engine_for(folder, slots=4, seed=1), random.Random(1)
    assert talk(engine, model, [nonsense(source, 1, 40) for _ in range(7)], turns=4) > 60
    engine.close()


def test_a_prompt_longer_than_a_step_is_read_in_pieces(kind, monkeypatch) -> None:
    folder, model, _ = kind
    monkeypatch.setattr(batching, "AT_ONCE", 16)
    engine, source = engine_for(folder, slots=3), random.Random(2)
    assert talk(engine, model, [nonsense(source, 1, 80) for _ in range(5)], turns=2) > 15
    engine.close()


def test_new_weights_answer_what_is_asked_after_them_and_know_nothing_of_the_old_ones(kind) -> None:
    folder, model, other = kind
    engine, prompt = engine_for(folder, slots=2, seed=0), [20, 30, 40]
    before = [engine.ask(prompt, max_tokens=9) for _ in range(5)]
    loading = threading.Thread(target=engine.load, args=(weights_of(other),))
    loading.start()
    loading.join(timeout=30)
    assert all(future.done() for future in before)
    for future in before:
        assert plain(model, prompt, future.result()) == pytest.approx(future.result().logprobs, abs=1e-4)
    kept = [*prompt, *before[0].result().ids, 50]
    after = engine.ask(kept, max_tokens=9).result(timeout=30)
    assert plain(other, kept, after) == pytest.approx(after.logprobs, abs=1e-4)
    fresh = engine_for(folder / "other", slots=2)
    seeded = [one.ask(prompt, max_tokens=20, seed=7).result(timeout=30).ids for one in (engine, fresh)]
    assert seeded[0] == seeded[1]
    engine.close()
    fresh.close()


def test_weights_of_another_model_are_refused_and_the_old_ones_stay(kind) -> None:
    folder, model, other = kind
    engine = engine_for(folder, slots=2)
    name = "model.layers.1.mlp.up_proj.weight"
    for damaged in ({}, {name: weights_of(other)[name][:, :-1]}):
        with pytest.raises(UsageError, match="another model"):
            engine.load({key: tensor for key, tensor in weights_of(other).items() if key != name} | damaged)
    assert talk(engine, model, [[20, 30]], turns=1)
    engine.close()


def test_damaged_weights_fail_answers_until_good_ones_come(kind) -> None:
    folder, model, _ = kind
    engine = engine_for(folder, slots=2)
    good = weights_of(model)
    engine.load({name: tensor * np.float32("nan") for name, tensor in good.items()})
    with pytest.raises(ModelError, match="not numbers"):
        engine.ask([20] * 60).result(timeout=30)
    engine.load(good)
    assert talk(engine, model, [[20, 30], [40]], turns=2)
    engine.close()


def test_a_turn_reads_only_what_is_new() -> None:
    read: list[int] = []

    class Counting(SmallLlama):
        def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
            read.append(tokens_B_N.size)
            return super().step(tokens_B_N, start_B, slots_B, last_B)

    metadata = read_metadata(SMALL / "model.gguf")
    engine = BatchEngine(Counting.of_file(SMALL / "model.gguf", metadata, 3, 256), 3, 256, frozenset())
    said = [[begin] * 40 for begin in (7, 8, 9)]
    for _ in range(3):
        read.clear()
        for prompt in said:
            prompt += engine.ask(prompt, Sampling(max_tokens=2)).result(timeout=30).ids
            prompt.append(11)
        seen = read[::2]  # each answer is one step of reading and one of drawing
    assert seen == [2, 2, 2]
    engine.close()


def test_weights_from_a_gguf_file_and_from_its_folder_are_the_same_model() -> None:
    metadata = read_metadata(SMALL / "model.gguf")
    config = json.loads((SMALL / "config.json").read_text())
    from safetensors.numpy import load_file

    shape = Shape.of_config(config)
    assert shape is not None
    models = [SmallLlama.of_file(SMALL / "model.gguf", metadata, 2, 64), SmallLlama(shape, 2, 64)]
    models[1].load(load_file(SMALL / "model.safetensors"))
    tokens = np.random.default_rng(0).integers(4, 504, (2, 40))
    arguments = tokens, np.zeros(2, np.int64), np.arange(2), np.array([39, 20])
    one, two = (model.step(*arguments) for model in models)
    assert np.abs(one - two).max() < 1e-5


class Failing(SmallLlama):
    """Fails where a token 13 is read."""

    def step(self, tokens_B_N: Ints, start_B: Ints, slots_B: Ints, last_B: Ints) -> Floats:
        if (tokens_B_N == 13).any():
            raise MemoryError("thirteen")
        return super().step(tokens_B_N, start_B, slots_B, last_B)

    def load(self, weights: Mapping[str, Floats]) -> None:
        if not weights:
            raise MemoryError("nothing")
        super().load(weights)


@pytest.fixture
def failing():
    metadata = read_metadata(SMALL / "model.gguf")
    engine = BatchEngine(Failing.of_file(SMALL / "model.gguf", metadata, 4, 256), 4, 256, frozenset())
    yield engine
    engine.close()


def test_a_failure_fails_what_is_under_way_and_the_engine_lives_on(failing) -> None:
    long = failing.ask([7] * 5, Sampling(max_tokens=200))
    with pytest.raises(ModelError, match="MemoryError: thirteen"):
        failing.ask([9, 13], Sampling()).result(timeout=30)
    with pytest.raises(ModelError):
        long.result(timeout=30)
    with pytest.raises(MemoryError):
        failing.load({})
    answers = [failing.ask([7] * 5, Sampling(max_tokens=20, seed=1)).result(timeout=30) for _ in range(3)]
    assert answers[0].ids == answers[1].ids == answers[2].ids


def test_an_answer_given_up_harms_none_beside_it(failing) -> None:
    given_up: list[Future[Drawn]] = [failing.ask([7] * 5, Sampling(max_tokens=200)) for _ in range(9)]
    kept = failing.ask([8] * 5, Sampling(max_tokens=30))
    for future in given_up:
        future.cancel()  # those that have begun go on: nobody looks at them
    assert len(kept.result(timeout=30).ids) == 30


def test_what_cannot_be_answered_is_refused_before_it_is_asked(failing) -> None:
    for prompt in ([], [7] * 256, [504], [-1]):
        with pytest.raises(ModelRefused, match="prompt"):
            failing.ask(prompt, Sampling())
    with pytest.raises(ModelRefused, match="at least one"):
        failing.ask([7], Sampling(max_tokens=0))
    failing.close()
    for asked in (lambda: failing.ask([7], Sampling()), lambda: failing.load({})):
        with pytest.raises(ModelError, match="closed"):
            asked()


def test_the_engine_is_chosen_by_the_config() -> None:
    config = json.loads((SMALL / "config.json").read_text())
    assert Shape.of_config(config) == Shape(layers=4, vocabulary=504, heads=2, size=32, eps=1e-5, theta=10000.0)
    for other in (
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 1},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
        {"hidden_size": 1024},
    ):
        assert Shape.of_config({**config, **other}) is None, other


def test_an_engine_says_what_it_is_and_what_it_cannot_be(tmp_path: Path) -> None:
    engine = engine_for(SMALL, slots=2)
    assert (engine.vocabulary, engine.end, engine.context_length) == (504, frozenset([3]), 1024)
    engine.close()
    with pytest.raises(UsageError, match="takes 1024"):
        engine_for(SMALL, length=2000)
    with pytest.raises(UsageError, match="config.json"):
        engine_for(tmp_path)
    (tmp_path / "config.json").write_text((SMALL / "config.json").read_text())
    with pytest.raises(UsageError, match="safetensors"):
        engine_for(tmp_path)
    made(Qwen2Config(vocab_size=97, use_sliding_window=True, sliding_window=16, max_window_layers=1, **SIZES), tmp_path)
    with pytest.raises(UsageError, match="shorten"):
        engine_for(tmp_path)
    engine_for(tmp_path, length=16, slots=1).close()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        engine_for(tmp_path)
