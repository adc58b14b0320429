"""Every name of verl 0.9.1 that it does not promise to keep, in one place: what to look at when its version moves.

Classes that are made to be derived from (`PPOTrainerSync`, `AgentLoopManagerTQ`, `RolloutReplica`, `BaseRollout`) and the
registry of policy losses are imported where they are used.
"""

from __future__ import annotations

import os
from typing import Any

VERSION = "0.9.1"


def check_version() -> None:
    """Raises: UsageError, if another verl is installed than the one this was written for."""
    from importlib.metadata import PackageNotFoundError, version

    from cod_agent.errors import MissingExtra, UsageError

    try:
        found = version("verl")
    except PackageNotFoundError:
        raise MissingExtra("training with verl", "train") from None
    if found != VERSION:
        raise UsageError(
            f"verl {found} is installed, {VERSION} is what this was written for: pip install 'connect-the-dots[train]'"
        )


def worker_class() -> type:
    """The class inside verl's Ray actor of agent-loop workers (V1, TransferQueue)."""
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    return _inside(AgentLoopWorkerTQ)


def task_runner_class() -> type:
    from verl.trainer.main_ppo import TaskRunnerV1

    return _inside(TaskRunnerV1)


def _inside(actor: Any) -> type:
    """The class that `ray.remote` was put around."""
    inside: type = actor.__ray_metadata__.modified_class
    return inside


def use_trainer(trainer: type) -> None:
    """Have trainer_mode=sync make `trainer`: the mode's name selects other parts, too, so a new one will not do."""
    import verl.trainer.ppo.v1  # noqa: F401  (registers verl's own first)
    from verl.trainer.ppo.v1 import trainer_base

    trainer_base.TRAINER_REGISTRY["sync"] = trainer


def dispatch_ranks(worker_group: Any) -> int:
    """Data-parallel ranks of the actor."""
    known = worker_group._dispatch_info
    if "actor" not in known:
        known["actor"] = worker_group._query_dispatch_info("actor")
    return max(known["actor"]) + 1


def use_cpu_platform(platform: Any) -> None:
    """Have verl compute on CPU: its platform, process groups on gloo, the FSDP engine registered for cuda."""
    import verl.utils.distributed as distributed
    import verl.utils.torch_functional as functional
    from verl.plugin.platform.platform_manager import set_platform

    set_platform(platform)
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    grouped = distributed.initialize_global_process_group_ray

    def on_gloo(timeout_second: int | None = None, backend: str | None = None) -> Any:
        return grouped(timeout_second, backend or "gloo")

    distributed.initialize_global_process_group_ray = on_gloo
    # Without flash-attention verl's own loops over the tokens to save memory that a small vocabulary never takes.
    functional.logprobs_from_logits_v2 = functional.logprobs_from_logits_naive


def use_token_logprobs() -> None:
    """On a GPU without flash-attn, have log-probabilities computed many tokens at a time: verl's own takes them one by one."""
    import verl.utils.torch_functional as functional

    from cod_train.verl.token_logprobs import token_logprobs

    if not functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE:
        functional.logprobs_from_logits_v2 = token_logprobs


def register_rollout_backend(name: str, adapter: str, replica: Any) -> None:
    """Make `rollout.name=NAME` known: the adapter's dotted path, and what gives the replica class."""
    from verl.workers.rollout import base
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    base._ROLLOUT_REGISTRY[(name, "async")] = adapter
    RolloutReplicaRegistry.register(name, replica)
