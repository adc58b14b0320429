"""What every process of a run loads when it imports verl: the policy losses, and what this run computes with.

verl finds it by the entry-point group `verl.plugins`, and by `VERL_USE_EXTERNAL_MODULES`, which `cod_train.verl_main` sets so that an
error here is seen.
"""

from __future__ import annotations

import os

from cod_train import policy_loss
from cod_train.settings import CPU_BACKEND, DEVICE
from cod_train.verl import compat


def use_cpu() -> None:
    """Have verl compute on the CPU in this process, from now on."""
    from cod_train.verl.cpu_platform import CpuPlatform

    compat.use_cpu_platform(CpuPlatform())

    def replica() -> type:
        from cod_train.verl.cpu_rollout import Replica

        return Replica

    compat.register_rollout_backend(CPU_BACKEND, "cod_train.verl.cpu_rollout.ServerAdapter", replica)


if os.environ.get(DEVICE) == "cpu":
    use_cpu()  # before anything else of verl is imported: some of it takes names from there
elif os.environ.get(DEVICE) == "gpu":
    compat.use_token_logprobs()
policy_loss.register()
