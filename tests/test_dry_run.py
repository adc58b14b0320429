"""`--dry-run`: a config that does not hold together is refused with every reason, and what it costs is reckoned from real packs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cod_agent.errors import UsageError
from cod_agent.policies import folder_of
from cod_train.estimate import GIB, Gpu, Layout, Shape, memory_of, seconds_of
from cod_train.rehearsal import rehearse
from cod_train.settings import Settings

pytest.importorskip("verl")

from cod_train.dry_run import plan, show
from cod_train.verl_main import composed, main

QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151936)


def wrong(*arguments: str) -> str:
    with pytest.raises(UsageError) as caught:
        plan(composed([*arguments]))
    return str(caught.value)


# ---- what each config comes to ----


def test_the_papers_setting_is_checked_without_gpus_weights_or_network(capsys: pytest.CaptureFixture[str]) -> None:
    config = composed(["--config-name=cluster_8b"])
    planned = plan(config)
    assert (planned.layout.ranks, planned.layout.replicas, planned.rollouts) == (24, 24, 64)
    assert planned.memory is not None and planned.seconds is not None
    assert planned.memory.training < 80 * GIB and planned.memory.rollout < 80 * GIB
    # The paper trains on 1,440 calls a step, which were lived by weaker players than the one who rehearses.
    assert 700 < planned.rehearsal.calls * planned.rollouts < 1600
    show(config)
    said = capsys.readouterr().out
    assert "8.19 B parameters" in said and "ranks: 24 (nodes: 3, GPUs of each: 8)" in said and "330 TFLOPS" in said


def test_small_configs_hold_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(composed(["--config-name=gpu_small"])).memory is not None
    main(["--dry-run"])
    said = capsys.readouterr().out
    assert "245,248 parameters" in said and "448 of" in said


def test_a_config_of_ones_own_builds_on_any_other(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [gpu_small, _self_]\ndata: {train_batch_size: 2}\n")
    config = composed([f"--config-dir={tmp_path}", "--config-name=mine"])
    assert config.data.train_batch_size == 2 and config.actor_rollout_ref.rollout.name == "vllm"


# ---- what does not hold together ----


def test_calls_that_are_not_on_policy_are_an_error() -> None:
    said = wrong(
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.rollout.top_k=50",
        "algorithm.rollout_correction.bypass_mode=false",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "trainer.device=cuda",
        "ray_kwargs.ray_init.num_cpus=2",
    )
    for key in ("rollout.temperature: 0.7", "rollout.top_p: 0.9", "rollout.top_k: 50", "bypass_mode", "use_kl_loss"):
        assert key in said
    assert "cod_cpu does not go with trainer.device=cuda" in said and "num_cpus: 2: 1 ranks and the rest want 4" in said


def test_a_batch_that_cannot_be_divided_is_an_error() -> None:
    said = wrong(
        "--config-name=cluster_8b",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=6",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=5",
        "actor_rollout_ref.actor.ulysses_sequence_parallel_size=4",
        "cod.mini_batches=5000",
        "data.train_packs=4",
    )
    assert "6 GPUs are no multiple of 5" in said and "32 heads (8 of keys and values) cannot be dealt to 5" in said
    assert "not both multiples of 4" in said and "mini_batches: a step has about 448 rows" in said
    assert "a step takes 8 packs and there are 4" in said


def test_a_pack_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    said = wrong(
        "--config-name=cluster_8b",
        "actor_rollout_ref.rollout.max_model_len=3000",
        "cod.context_length=50000",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048",
        "data.source=recorded",
        f"data.recorded=[{tmp_path}/none.db]",
    )
    assert "50000, and the server takes 3000" in said and "the model knows 40960 positions" in said
    assert "a row of 50000 tokens does not fit" in said and "none.db" in said
    said = wrong("--config-name=gpu_small", "actor_rollout_ref.rollout.max_model_len=1500")
    assert "1500 in all, and a pack of frozen-lake:small takes" in said


def test_memory_that_is_not_there_is_an_error() -> None:
    said = wrong("--config-name=cluster_8b", "trainer.nnodes=1", "trainer.n_gpus_per_node=1")
    assert "training takes" in said and "living packs takes" in said
    said = wrong("--config-name=cluster_8b", "actor_rollout_ref.rollout.gpu_memory_utilization=0.23")
    assert "less than one conversation of 12000" in said


def test_what_verl_has_against_it_is_said() -> None:
    assert "verl: Invalid loss_agg_mode: mean" in wrong("actor_rollout_ref.actor.loss_agg_mode=mean")
    assert "no clip called 'sideways'" in wrong(
        "+actor_rollout_ref.actor.policy_loss.clip=sideways",
        "actor_rollout_ref.actor.policy_loss._target_=cod_train.policy_loss.verl_options",
    )


def test_a_model_nobody_knows_is_an_error(tmp_path: Path) -> None:
    assert "give cod.model_shape" in wrong("actor_rollout_ref.model.path=Some/Model")
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(UsageError, match="num_attention_heads"):
        Shape.of_folder(tmp_path)
    with pytest.raises(SystemExit, match="does not hold together"):
        main(["--dry-run", "data.pack_size=0"])


# ---- the arithmetic ----


def test_parameters_are_those_of_the_published_models() -> None:
    assert math.isclose(QWEN3_8B.parameters, 8_190_735_360, rel_tol=1e-4)
    smol = Shape(30, 576, 1536, 9, 3, 64, 49152, tie_word_embeddings=True)
    assert math.isclose(smol.parameters, 134_515_008, rel_tol=1e-3)
    assert QWEN3_8B.cache == 147_456


def test_a_folders_shape_is_that_of_its_weights() -> None:
    weights = next(folder_of("embedded-base").glob("*.safetensors"), None)
    if weights is None:
        pytest.skip("the policy ships in another form")
    from safetensors import safe_open

    with safe_open(weights, "pt") as held:
        there = sum(math.prod(held.get_slice(name).get_shape()) for name in held.keys())  # noqa: SIM118
    assert math.isclose(Shape.of_folder(folder_of("embedded-base")).parameters, there, rel_tol=0.01)


def layout(**changes: object) -> Layout:
    given = dict(
        ranks=24,
        tensor_parallel=1,
        sequence_parallel=1,
        micro_tokens=16384,
        checkpointing=True,
        weight_bytes=4,
        weights_offloaded=False,
        adam_offloaded=False,
        rollout_share=0.5,
        sleeps=True,
        most_at_once=256,
    )
    return Layout(**{**given, **changes})  # type: ignore[arg-type]


def test_memory_is_sharded_and_given_back() -> None:
    gpu = Gpu()
    wide, narrow = memory_of(QWEN3_8B, layout(), gpu), memory_of(QWEN3_8B, layout(ranks=8), gpu)
    states = wide.weights + wide.gradients + wide.adam
    assert math.isclose(states, 16 * QWEN3_8B.parameters / 24)
    assert math.isclose(narrow.weights + narrow.gradients + narrow.adam, 3 * states)
    assert wide.logits == 6 * 16384 * 151936
    assert memory_of(QWEN3_8B, layout(sleeps=False), gpu).training - wide.training == 39 * GIB
    offloaded = memory_of(QWEN3_8B, layout(adam_offloaded=True), gpu)
    assert math.isclose(wide.rollout - offloaded.rollout, wide.adam) and offloaded.training == wide.training
    everything = memory_of(QWEN3_8B, layout(checkpointing=False), gpu)
    assert everything.activations > 10 * wide.activations


def test_more_gpus_train_faster_and_do_not_talk_faster() -> None:
    asked = dict(rollouts=64, sampled=8000.0, tokens=1.3e6, longest=4500, cache_tokens=150_000.0)
    wide, narrow = (seconds_of(QWEN3_8B, layout(ranks=n), Gpu(), **asked) for n in (24, 12))  # type: ignore[arg-type]
    assert math.isclose(narrow.training, 2 * wide.training)
    assert wide.sampling < narrow.sampling < 1.3 * wide.sampling  # one token after the other takes what it takes
    assert math.isclose(wide.training, 8 * 8.19e9 * 1.3e6 / (24 * 330e12), rel_tol=0.01)


# ---- the rehearsal ----


def test_a_rehearsal_lives_real_packs() -> None:
    terse = rehearse(Settings(form="compact", max_tokens=40), packs=2)
    assert terse.rows == 7 and terse.calls > 7  # 4 solve and 3 update episodes, each one row
    assert terse.tokens < terse.apart and terse.longest_prompt < terse.longest
    long, short = (rehearse(Settings(max_tokens=most), packs=2) for most in (800, 200))
    assert long.rows == 7 and long.calls == short.calls
    assert 3 < long.sampled / short.sampled < 5 and long.longest_answer < 800
    apart = rehearse(Settings(max_tokens=200, merge=False), packs=2)
    assert apart.tokens == apart.apart == short.apart
