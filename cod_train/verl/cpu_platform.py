"""The CPU as an accelerator of verl's, for machines without a GPU.

It is only used where `COD_TRAIN_DEVICE=cpu` says so (`cod_train.verl_main` sets it for all processes of a run); a worker that merely
sees no GPU because Ray gave it none does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase


class _CpuModule:
    """Looks like `torch.cuda` to whom asks a CPU for its memory, streams and seeds."""

    _ANSWERS = {"mem_get_info": (1, 1), "is_available": False, "get_device_name": "CPU"}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if hasattr(torch.cpu, name):
            return getattr(torch.cpu, name)
        if name == "get_rng_state":
            return torch.get_rng_state
        if name == "set_rng_state":
            return lambda state, *device: torch.set_rng_state(state)
        answer = 0 if name.startswith(("memory_", "max_memory_")) else self._ANSWERS.get(name)
        return lambda *args, **kwargs: answer


class CpuPlatform(PlatformBase):
    """The CPU as verl's accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _CpuModule()  # type: ignore[assignment]

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self) -> Any:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        # A logical resource: ray.init(num_gpus=N) says how many trainers there may be.
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
