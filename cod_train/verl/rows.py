"""A row as TransferQueue holds it: key, tensors, tags. The label of a row stands in its tags, so that credit needs no fetch."""

from __future__ import annotations

from typing import Any

import torch

from cod_train.batch import Label, Row
from cod_train.settings import Settings

Stored = tuple[str, dict[str, Any], dict[str, Any]]
"""Key, fields, tags."""

UPDATE_READS = (
    "prompts",
    "responses",
    "input_ids",
    "position_ids",
    "response_mask",
    "loss_mask",
    "old_log_probs",
    "advantages",
)
"""The columns an update reads. A worker would fetch, index and copy all of them, row by row."""


def update_options(config: Any, settings: Settings, rows: int, ranks: int) -> dict[str, Any]:
    """How verl's worker goes through `rows` rows that stand in the order of `cod_train.batch.layout`."""
    actor, mini_batch = config.actor_rollout_ref.actor, rows // settings.mini_batches
    out = {
        "calculate_entropy": actor.calculate_entropy or actor.entropy_coeff != 0.0,
        "distillation_use_topk": False,
        "distillation_only": False,
        "global_batch_size": mini_batch,
        "mini_batch_size": mini_batch,
        "epochs": actor.ppo_epochs,
        "seed": actor.data_loader_seed,
        "dataloader_kwargs": {"shuffle": False},  # the layout is a shuffle already
        "temperature": config.actor_rollout_ref.rollout.temperature,
    }
    if settings.micro_batches is not None:
        size = mini_batch // ranks // settings.micro_batches
        out |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": size}
    return out


def computes_advantages_only(config: Any) -> bool:
    """Whether a row of no advantage has no gradient: neither entropy, nor a reference, nor the loss's own regulariser."""
    actor = config.actor_rollout_ref.actor
    return not (actor.entropy_coeff or actor.use_kl_loss or actor.policy_loss.get("k2", 0.0))


def row_name(label: Label, key: str) -> tuple[Any, ...]:
    """Of a row, the same wherever and whenever its rollout was lived: verl's keys are random, and files move."""
    _, in_file, run = str(label["rollout"]).partition(".db:")
    run = run if in_file else str(label["rollout"])
    return label["environment"], run, label["position"], label["kind"], int(key.rpartition("_")[2])


def stored(key: str, row: Row, step: int, version: int) -> Stored:
    """A sequence to train on.

    Args:
        step: that it is for.
        version: of the weights that sampled it, in steps.
    """
    made, label = row.tokens, dict(row.label)
    logprobs = torch.tensor(made.logprobs, dtype=torch.float32)
    score = torch.zeros(len(made.response))
    finite = [reward for reward in label["successes"] if reward is not None]
    score[-1] = sum(finite) / len(finite) if finite else 0.0
    fields = _fields(made.prompt, made.response, torch.tensor(made.mask), logprobs, score, made.calls)
    return key, fields, _tags(len(made.prompt), len(made.response), step, version, label)


def padding(key: str, end: int, step: int, *, lost: str = "") -> Stored:
    """A row of zero weight: to make numbers even, or in place of a rollout that was lost, with the reason."""
    none = torch.zeros(1)
    fields = _fields([end], [end], torch.zeros(1, dtype=torch.int64), none, none, 0)
    fields |= {"advantages": none, "returns": none}
    return key, fields, {**_tags(1, 1, step, step - 1, None), "is_padding": True, "lost": lost}


def _fields(
    prompt: list[int], response: list[int], mask: torch.Tensor, logprobs: torch.Tensor, score: torch.Tensor, calls: int
) -> dict[str, Any]:
    ids = torch.tensor(prompt + response)
    return {
        "prompts": ids[: len(prompt)],
        "responses": ids[len(prompt) :],
        "input_ids": ids,
        "position_ids": torch.arange(len(ids)),
        "response_mask": mask,
        "loss_mask": mask,
        "old_log_probs": logprobs,
        "rm_scores": score,
        "num_turns": calls,
    }


def _tags(prompt: int, response: int, step: int, version: int, label: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "status": "success",
        "prompt_len": prompt,
        "response_len": response,
        "seq_len": prompt + response,
        # verl's names for the step a row is for, and for the versions of the weights that sampled it.
        "global_steps": step,
        "min_global_steps": version,
        "max_global_steps": version,
        "label": label,
    }
