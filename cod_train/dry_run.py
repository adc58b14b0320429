"""`python -m cod_train.verl_main --dry-run ...`: whether a config holds together, what it costs, and what it would launch.

Nothing is started and nothing downloaded; neither a GPU nor the weights are needed. Where the model's folder is there, its
tokenizer and its config.json are looked at; else the prompts are counted in words and the shape is what `cod.model_shape` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cod_agent.errors import UsageError
from cod_train.checks import CPUS_PER_RANK, longest_conversation, memory_problems, problems, ray_address, refuse
from cod_train.estimate import GIB, Layout, Memory, Seconds, Shape, memory_of, seconds_of
from cod_train.rehearsal import ANSWERS, Rehearsal, rehearse
from cod_train.settings import Settings


@dataclass(frozen=True, slots=True)
class Plan:
    """What a config comes to."""

    settings: Settings
    shape: Shape
    layout: Layout
    rollouts: int
    """Of a step."""
    rehearsal: Rehearsal
    memory: Memory | None
    """None on the CPU, where there is one memory for all."""
    seconds: Seconds | None
    notes: tuple[str, ...]


def show(config: Any) -> None:
    """Check a composed config and print what it comes to.

    Raises:
        UsageError: it does not hold together; the message has every reason.
    """
    from cod_agent.cli.output import console

    planned = plan(config)
    console().print(_table(config, planned))
    for note in planned.notes:
        console().print(f"Note: {note}", markup=False)


def plan(config: Any) -> Plan:
    """Check a composed config and reckon.

    Raises:
        UsageError: it does not hold together; the message has every reason.
        UnknownName: no such world.
    """
    settings, tokenizer = Settings.of(config), _tokenizer(config)
    shape, layout = _shape(config, settings), _layout(config)
    rollouts = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    rehearsal = rehearse(settings, tokenizer)
    wrong = problems(config, settings, shape, layout, rehearsal)
    if rehearsal.rows * rollouts < settings.mini_batches:
        wrong.append(("cod.mini_batches", f"a step has about {rehearsal.rows * rollouts:.0f} rows to divide"))
    memory = seconds = None
    if config.trainer.device != "cpu" and not wrong:
        memory = memory_of(shape, layout, settings.gpu)
        seconds = seconds_of(
            shape,
            layout,
            settings.gpu,
            rollouts=rollouts,
            sampled=rehearsal.sampled,
            tokens=rehearsal.tokens * rollouts,
            longest=rehearsal.longest,
            cache_tokens=memory.cache_tokens,
        )
        wrong += memory_problems(config, settings, memory)
    refuse(wrong)
    notes = tuple(_notes(config, settings, tokenizer, layout, rehearsal, rollouts))
    return Plan(settings, shape, layout, rollouts, rehearsal, memory, seconds, notes)


# ---- what is read ----


def _tokenizer(config: Any) -> Any:
    """Of the model's folder; None where there is no folder."""
    folder = Path(config.actor_rollout_ref.model.path)
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=1_000_000)
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} has no tokenizer that can be read: {error}") from None
    if not tokenizer.chat_template:
        raise UsageError(f"the tokenizer in {folder} has no chat template: take the model's chat (instruct) variant")
    return tokenizer


def _shape(config: Any, settings: Settings) -> Shape:
    path = Path(config.actor_rollout_ref.model.path)
    if path.is_dir():
        return Shape.of_folder(path)
    if settings.model_shape is None:
        raise UsageError(f"actor_rollout_ref.model.path: {path} is no folder here; give cod.model_shape to reckon with")
    return settings.model_shape


def _layout(config: Any) -> Layout:
    actor, rollout, model = (config.actor_rollout_ref[part] for part in ("actor", "rollout", "model"))
    fsdp = actor.fsdp_config
    return Layout(
        ranks=config.trainer.nnodes * config.trainer.n_gpus_per_node,
        tensor_parallel=rollout.tensor_model_parallel_size * rollout.data_parallel_size,
        sequence_parallel=actor.ulysses_sequence_parallel_size,
        micro_tokens=actor.ppo_max_token_len_per_gpu,
        checkpointing=model.enable_gradient_checkpointing,
        weight_bytes=4 if fsdp.model_dtype in ("fp32", "float32") else 2,
        weights_offloaded=fsdp.param_offload,
        adam_offloaded=fsdp.optimizer_offload,
        rollout_share=rollout.gpu_memory_utilization,
        sleeps=rollout.free_cache_engine,
        most_at_once=rollout.max_num_seqs,
    )


# ---- what is said ----


def _notes(
    config: Any, settings: Settings, tokenizer: Any, layout: Layout, seen: Rehearsal, rollouts: int
) -> Iterator[str]:
    """What holds, and is better known."""
    if tokenizer is None:
        yield f"no folder {config.actor_rollout_ref.model.path} here: tokens are counted as words, and calls taken to merge"
    else:
        from cod_train.prompts import prefix_property

        if why := prefix_property(tokenizer, **settings.template):
            yield f"calls of a conversation train apart, with more tokens: {why}"
    if settings.form == "natural":
        yield f"answers are reckoned to be of {settings.max_tokens * ANSWERS:.0f} words, a quarter of the most allowed"
    if settings.solver:
        yield f"what {settings.solver} asks is not known here: calls and lengths are those of the runtime's own solver"
    even = layout.ranks * settings.mini_batches * (settings.micro_batches or 1)
    if even > seen.rows * rollouts:
        yield f"rows are dealt in lots of {even}, and a step has about {seen.rows * rollouts:.0f}: the rest is padding"
    if config.actor_rollout_ref.rollout.n == 1 and settings.source == "live":
        yield "groups of one rollout have no baseline of their own: packs of the same world are compared with one another"
    if config.trainer.nnodes > 1:
        yield f"every node must see {config.trainer.default_local_dir}, and the model's folder if it is one"


# ---- what is shown ----


def _table(config: Any, planned: Plan) -> Any:
    from rich.table import Table

    table = Table(title=f"{config.trainer.experiment_name}: it holds together", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    sections = [_model(config, planned), _step(config, planned), _costs(planned), _launched(config, planned)]
    for rows in sections:
        for name, said in rows:
            table.add_row(name, said)
        table.add_section()
    return table


def _model(config: Any, planned: Plan) -> Iterator[tuple[str, str]]:
    shape = planned.shape
    size = (
        f"{shape.parameters / 1e9:.2f} B parameters" if shape.parameters > 5e7 else f"{shape.parameters:,} parameters"
    )
    yield (
        "model",
        f"{config.actor_rollout_ref.model.path}\n{size}, {shape.num_hidden_layers} layers of {shape.hidden_size}",
    )


def _step(config: Any, planned: Plan) -> Iterator[tuple[str, str]]:
    settings, seen, rollouts = planned.settings, planned.rehearsal, planned.rollouts
    packs, group = config.data.train_batch_size, config.actor_rollout_ref.rollout.n
    yield (
        "a step",
        f"{packs} packs of {settings.pack_size} tasks x {group} rollouts = {rollouts} rollouts ({settings.source})",
    )
    yield (
        "calls",
        f"{seen.calls * rollouts:,.0f}, {seen.calls:.1f} a rollout, {seen.sampled:,.0f} tokens sampled in each",
    )
    yield (
        "rows",
        f"{seen.rows * rollouts:,.0f} of {seen.tokens * rollouts:,.0f} tokens"
        f" ({seen.apart * rollouts:,.0f} were every call a row of its own); optimizer steps: {settings.mini_batches}",
    )
    most = longest_conversation(config, settings)
    yield "lengths", f"longest conversation {seen.longest:,} of {most:,} tokens, answers up to {settings.max_tokens:,}"


def _costs(planned: Plan) -> Iterator[tuple[str, str]]:
    memory, seconds, gpu, layout = planned.memory, planned.seconds, planned.settings.gpu, planned.layout
    if memory is None or seconds is None:
        states = 4 * layout.weight_bytes * planned.shape.parameters / layout.ranks
        yield "memory", f"{states / 2**20:,.1f} MiB a rank for weights, gradients and Adam; and the activations"
        return
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "Adam": memory.adam,
        "gathered": memory.gathered,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    yield "a GPU, training", f"{memory.training / GIB:.1f} of {gpu.memory_gib:g} GiB: {told}, the rest reserve"
    yield (
        "a GPU, living",
        f"{memory.rollout / GIB:.1f} of {gpu.memory_gib:g} GiB; vLLM keeps {memory.cache_tokens:,.0f} tokens a replica",
    )
    whole = seconds.sampling + seconds.training
    yield (
        "time",
        f"about {whole:.0f} s a step: {seconds.sampling:.0f} living, {seconds.training:.0f} training, assuming {gpu.tflops:g} TFLOPS"
        f" and {gpu.gb_per_s:g} GB/s got of each GPU; without moving weights, validation, saving",
    )


def _launched(config: Any, planned: Plan) -> Iterator[tuple[str, str]]:
    trainer, rollout, layout = config.trainer, config.actor_rollout_ref.rollout, planned.layout
    address = ray_address(config)
    yield "Ray", f"the one at {address}" if address else "one of its own, on this machine"
    kind = "CPU" if trainer.device == "cpu" else "GPU"
    yield (
        "trainer",
        f"ranks: {layout.ranks} (nodes: {trainer.nnodes}, {kind}s of each: {trainer.n_gpus_per_node}), FSDP over all",
    )
    where = "Ray actors" if trainer.device == "cpu" else f"on the same GPUs, {layout.tensor_parallel} for each"
    yield "rollout", f"{rollout.name} replicas: {layout.replicas}, {where}"
    workers, units = rollout.agent.num_workers, config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    yield (
        "helpers",
        f"agent-loop workers: {workers}, storage units: {units}, reward workers: {config.reward.num_workers}",
    )
    gpus = "" if trainer.device == "cpu" else f"GPUs: {trainer.n_gpus_per_node}, "
    yield "a node needs", f"{gpus}CPUs for Ray: {trainer.n_gpus_per_node * CPUS_PER_RANK + 1}"
