"""Log-probabilities where there is no flash-attn: those of a plain softmax, and put where verl looks for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from cod_train.dry_run import plan  # noqa: E402
from cod_train.verl import token_logprobs as module  # noqa: E402
from cod_train.verl.token_logprobs import token_logprobs  # noqa: E402
from cod_train.verl_main import composed  # noqa: E402

ROOT = Path(__file__).parent.parent

WHERE_VERL_LOOKS = """
import verl.workers.engine.fsdp
from verl.utils import torch_functional as functional
print(functional.logprobs_from_logits_v2.__module__, functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE)
"""


def plain(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


@pytest.mark.parametrize("shape", [(37,), (3, 11), (1,)])
def test_values_and_slopes_are_those_of_a_plain_softmax(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 16)
    torch.manual_seed(0)
    logits = (4 * torch.randn(*shape, 50)).requires_grad_()
    tokens, weights = torch.randint(0, 50, shape), torch.randn(shape)
    found, slopes = [], []
    for function in (token_logprobs, plain):
        found.append(function(logits, tokens))
        slopes.append(torch.autograd.grad((found[-1] * weights).sum(), logits)[0])
    assert found[0].shape == shape and torch.allclose(*found, atol=1e-6) and torch.allclose(*slopes, atol=1e-6)


def test_sixteen_bit_logits_give_thirty_two_bit_values() -> None:
    torch.manual_seed(0)
    logits, tokens = (4 * torch.randn(40, 50)).bfloat16(), torch.randint(0, 50, (40,))
    exact = plain(logits.double(), tokens)
    said = token_logprobs(logits.requires_grad_(), tokens)
    assert said.dtype == torch.float32 and torch.allclose(said.double(), exact, atol=1e-5)
    assert (plain(logits, tokens).double() - exact).abs().max() > 1e-3  # what rounding to 16 bits would cost
    assert torch.autograd.grad(said.sum(), logits)[0].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "where"), [("gpu", "cod_train.verl.token_logprobs"), ("", "verl.utils.torch_functional")]
)
def test_a_run_on_gpus_takes_them_wherever_verl_is_imported(device: str, where: str) -> None:
    told = {"COD_TRAIN_DEVICE": device, "VERL_USE_EXTERNAL_MODULES": "cod_train.verl.plugin", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", WHERE_VERL_LOOKS],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] in (f"{where} False", "verl.utils.torch_functional True")


def test_the_tiny_config_for_a_gpu_holds_together() -> None:
    config = composed(["--config-name=gpu_tiny"])
    planned = plan(config)
    assert config.actor_rollout_ref.rollout.name == "vllm" and planned.settings.form == "compact"
    assert planned.shape.num_hidden_layers == 4 and planned.memory is not None
