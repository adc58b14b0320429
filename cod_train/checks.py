"""Whether a composed config holds together: what is sampled can train, what is divided can be, what is long fits.

Each check yields every problem it finds, as the key of the config and what is wrong with it, so that a person hears of all at once.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from cod_agent.errors import UsageError
from cod_train.estimate import GIB, Layout, Memory, Shape
from cod_train.rehearsal import Rehearsal
from cod_train.settings import CPU_BACKEND, Settings

CPUS_PER_RANK = 3
"""What verl reserves beside each GPU; without them Ray waits for ever."""

Problem = tuple[str, str]
"""A key of the config, and what is wrong with it."""


def problems(config: Any, settings: Settings, shape: Shape, layout: Layout, seen: Rehearsal) -> list[Problem]:
    """All that is wrong with a config, but for memory. `seen` is what a few of its packs were like."""
    return [
        *_sampling(config),
        *_sizes(config, settings, shape, layout),
        *_lengths(config, settings, shape, layout, seen),
        *_files(settings),
        *_verl(config),
    ]


def refuse(wrong: Sequence[Problem]) -> None:
    """Raises: UsageError, with every reason, if there is any."""
    if wrong:
        lines = [f"  {key}: {reason}" for key, reason in wrong]
        raise UsageError("the training config does not hold together:\n" + "\n".join(lines))


def check_before_training(config: Any, settings: Settings) -> None:
    """What can be told at once, without living packs. Raises: UsageError."""
    ranks, parallel = config.trainer.nnodes * config.trainer.n_gpus_per_node, config.actor_rollout_ref.rollout
    uneven = [
        ("actor_rollout_ref.rollout.tensor_model_parallel_size", f"{ranks} GPUs do not divide by it")
        for size in [parallel.tensor_model_parallel_size]
        if size < 1 or ranks % size
    ]
    refuse([*_sampling(config), *_files(settings), *uneven])


def _sampling(config: Any) -> Iterator[Problem]:
    """That what is sampled can train."""
    rollout, actor = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor
    for key, on_policy in (("temperature", (1,)), ("top_p", (1,)), ("top_k", (-1, 0))):
        if rollout[key] not in on_policy:
            why = "calls are then not drawn from the policy itself and none of them trains"
            yield f"actor_rollout_ref.rollout.{key}", f"{rollout[key]}: {why}; set {on_policy[0]}"
    if not rollout.calculate_log_probs:
        yield "actor_rollout_ref.rollout.calculate_log_probs", "without log-probabilities nothing trains; set true"
    if not config.algorithm.rollout_correction.bypass_mode:
        yield (
            "algorithm.rollout_correction.bypass_mode",
            "the old log-probabilities are those of the sampling; set true",
        )
    if actor.loss_agg_mode != "token-mean":
        yield (
            "actor_rollout_ref.actor.loss_agg_mode",
            f"{actor.loss_agg_mode}: rows are parts of episodes and some are left out, so only a mean over tokens makes sense; "
            "set token-mean",
        )
    for key, plain in (("temperature", 1), ("top_p", 1)):
        if rollout.val_kwargs[key] != plain:
            yield (
                f"actor_rollout_ref.rollout.val_kwargs.{key}",
                f"{rollout.val_kwargs[key]}: measure the policy itself; set 1",
            )
    if actor.use_kl_loss or config.algorithm.use_kl_in_reward:
        yield "actor_rollout_ref.actor.use_kl_loss", "there is no reference model here; set policy_loss.k2 instead"
    if config.trainer.v1.trainer_mode != "sync":
        yield "trainer.v1.trainer_mode", f"{config.trainer.v1.trainer_mode}: segment credit knows sync only"
    if (config.trainer.device == "cpu") != (rollout.name == CPU_BACKEND):
        yield (
            "actor_rollout_ref.rollout.name",
            f"{rollout.name} does not go with trainer.device={config.trainer.device}",
        )


def _sizes(config: Any, settings: Settings, shape: Shape, layout: Layout) -> Iterator[Problem]:
    """That what is divided can be."""
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    parallel, sequence = rollout.tensor_model_parallel_size, layout.sequence_parallel
    for key, number in (
        ("trainer.nnodes", trainer.nnodes),
        ("trainer.n_gpus_per_node", trainer.n_gpus_per_node),
        ("data.train_batch_size", config.data.train_batch_size),
        ("actor_rollout_ref.rollout.n", rollout.n),
    ):
        if number < 1:
            yield key, f"{number}: at least 1"
    if layout.ranks % layout.tensor_parallel:
        yield (
            "actor_rollout_ref.rollout.tensor_model_parallel_size",
            f"{layout.ranks} GPUs are no multiple of {layout.tensor_parallel}",
        )
    if shape.num_attention_heads % parallel or (
        shape.num_key_value_heads % parallel and parallel % shape.num_key_value_heads
    ):
        heads = f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} of keys and values)"
        yield "actor_rollout_ref.rollout.tensor_model_parallel_size", f"{heads} cannot be dealt to {parallel} GPUs"
    if layout.ranks % sequence or shape.num_attention_heads % sequence:
        key = "actor_rollout_ref.actor.ulysses_sequence_parallel_size"
        yield key, f"{layout.ranks} GPUs and {shape.num_attention_heads} heads are not both multiples of {sequence}"
    if settings.source == "live" and settings.train_packs < config.data.train_batch_size:
        yield (
            "data.train_packs",
            f"a step takes {config.data.train_batch_size} packs and there are {settings.train_packs}",
        )
    ray = config.ray_kwargs.ray_init
    if not ray_address(config):
        cpus = trainer.n_gpus_per_node * CPUS_PER_RANK + 1
        if ray.get("num_cpus") is not None and ray.num_cpus < cpus:
            yield (
                "ray_kwargs.ray_init.num_cpus",
                f"{ray.num_cpus}: {trainer.n_gpus_per_node} ranks and the rest want {cpus}",
            )
        if trainer.nnodes > 1:
            yield "trainer.nnodes", f"{trainer.nnodes} nodes are a cluster: set ray_kwargs.ray_init.address"


def _lengths(config: Any, settings: Settings, shape: Shape, layout: Layout, seen: Rehearsal) -> Iterator[Problem]:
    """That a pack fits into the conversation, and the conversation everywhere else."""
    most = longest_conversation(config, settings)
    if settings.max_tokens >= most:
        yield (
            "cod.max_tokens",
            f"an answer of {settings.max_tokens} tokens in a conversation of {most} leaves none for the prompt",
        )
    if seen.longest > most:
        key = "cod.context_length" if settings.context_length else "data.max_prompt_length"
        needs = f"a pack of {', '.join(settings.worlds)} takes {seen.longest} tokens ({seen.longest_prompt} of prompt)"
        yield key, f"{most} in all, and {needs}: raise it, or lower data.max_response_length"
    if seen.longest_answer > settings.max_tokens:
        yield "cod.max_tokens", f"{settings.max_tokens}: answers in this world take {seen.longest_answer} tokens"
    served = config.actor_rollout_ref.rollout.max_model_len
    if served and settings.context_length and settings.context_length > served:
        yield "cod.context_length", f"{settings.context_length}, and the server takes {served} (rollout.max_model_len)"
    if shape.max_position_embeddings and most > shape.max_position_embeddings:
        yield (
            "actor_rollout_ref.rollout.max_model_len",
            f"{most}, and the model knows {shape.max_position_embeddings} positions",
        )
    if settings.micro_batches is None and most > layout.micro_tokens * layout.sequence_parallel:
        key = "actor_rollout_ref.actor.ppo_max_token_len_per_gpu"
        yield key, f"{layout.micro_tokens}: a row of {most} tokens does not fit; raise it, or shard rows (ulysses)"


def ray_address(config: Any) -> str | None:
    """Of a running Ray."""
    return config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")


def longest_conversation(config: Any, settings: Settings) -> int:
    """Tokens of the longest conversation with its answer."""
    return int(settings.context_length or config.data.max_prompt_length + config.data.max_response_length)


def _files(settings: Settings) -> Iterator[Problem]:
    for file in settings.files:
        if not file.is_file():
            yield "data.recorded", f"no such file: {file}"


def memory_problems(config: Any, settings: Settings, memory: Memory) -> Iterator[Problem]:
    has = settings.gpu.memory_gib * GIB
    if memory.training > has:
        yield (
            "actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
            f"training takes {memory.training / GIB:.0f} GiB of a GPU's {has / GIB:.0f}: lower it, or train on more GPUs",
        )
    if memory.rollout > has:
        yield (
            "actor_rollout_ref.rollout.gpu_memory_utilization",
            f"living packs takes {memory.rollout / GIB:.0f} GiB of a GPU's {has / GIB:.0f}: lower it, or offload the optimizer",
        )
    most = longest_conversation(config, settings)
    if memory.cache_tokens < most:
        yield (
            "actor_rollout_ref.rollout.gpu_memory_utilization",
            f"vLLM has room for the keys and values of {memory.cache_tokens:.0f} tokens, less than one conversation of {most}",
        )


def _verl(config: Any) -> Iterator[Problem]:
    """What verl itself has against it."""
    from cod_train.verl.compat import check_version

    check_version()
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(config, need_reference_policy(config), need_critic(config))
            for part in (config.actor_rollout_ref.rollout, config.algorithm, config.actor_rollout_ref.actor.optim):
                omega_conf_to_dataclass(part)
    except Exception as error:  # assertions, ValueErrors, and whatever hydra wraps them in
        yield "verl", str(error.__cause__ or error).strip() or type(error).__name__
