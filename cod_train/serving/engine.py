"""What serves checkpoints, and the command that starts it for one of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cod_agent.errors import UsageError
from cod_train.checkpoint_files import chat_template, speaks

if TYPE_CHECKING:
    from cod_train.checkpoints import Checkpoint


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a model server."""

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    """Beside this process's own environment."""
    what: str = "the model server"
    """As messages call it."""
    key: str = ""
    """What it asks for (`Authorization: Bearer KEY`); "" lets in whoever is on this machine."""


@dataclass(frozen=True, slots=True)
class Engine:
    """How checkpoints are served.

    Args:
        kind: `vllm`, or `embedded`: our own engine, for any Hugging Face folder on the CPU.
        python: the interpreter that has vLLM; None looks for one (`cod_train.serving.vllm`).
        dtype: of the computation; `auto` is 32-bit floats on a CPU, else what the checkpoint says.
        max_model_len: longest conversation in tokens, its answer included; None for what the model takes.
        gpu_memory_utilization: share of a GPU's memory, 0 to 1; two servers stand side by side during a switch.
        tensor_parallel: GPUs that one model is spread over.
        lora: whether adapters can be added to a running server.
        threads: of the computation on a CPU; None leaves it to vLLM, and is one for the embedded engine.
        extra: further words of the server's command line.
    """

    kind: Literal["vllm", "embedded"] = "vllm"
    python: Path | None = None
    dtype: str = "auto"
    max_model_len: int | None = None
    gpu_memory_utilization: float | None = None
    tensor_parallel: int = 1
    lora: bool = False
    threads: int | None = None
    extra: tuple[str, ...] = ()

    def launch(self, checkpoint: Checkpoint, port: int) -> Launch:
        """How to start a server of `checkpoint` at `port` of loopback. May take seconds: vLLM is asked what it knows.

        Raises:
            UsageError: this engine cannot serve the checkpoint, or is not installed.
        """
        _check_words(checkpoint)
        if self.kind == "vllm":
            from cod_train.serving.vllm import vllm_launch

            return vllm_launch(checkpoint, self, port)
        return self._embedded(checkpoint, port)

    def _embedded(self, checkpoint: Checkpoint, port: int) -> Launch:
        if checkpoint.kind == "adapter" or self.lora:
            raise UsageError(
                f"the embedded engine serves no adapters ({checkpoint.name}): merge it into its base with "
                "`cod checkpoint export`, or serve it with --engine vllm"
            )
        if self.dtype not in ("auto", "float32"):
            raise UsageError(f"the embedded engine computes in 32-bit floats, not {self.dtype}: leave --dtype out")
        threads = str(self.threads or 1)
        command = [sys.executable, "-m", "cod_train.serving.embedded", str(checkpoint.folder), "--threads", threads]
        command += ["--name", checkpoint.weights, "--port", str(port)]
        if self.max_model_len is not None:
            command += ["--length", str(self.max_model_len)]
        # numpy reads its number of threads when it is imported.
        return Launch([*command, *self.extra], {"OMP_NUM_THREADS": threads}, "the embedded engine")


def _check_words(checkpoint: Checkpoint) -> None:
    """A tokenizer and a chat template are there."""
    folder = speaks(checkpoint.folder, checkpoint.base)
    chat_template(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UsageError(
            f"no tokenizer in {folder}: copy tokenizer.json and tokenizer_config.json of the model's base there"
        )
