"""The REC losses: hand values, gradients by finite differences, PPO's as a special case, and verl that really uses them."""

from __future__ import annotations

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cod_agent.errors import UnknownName, UsageError  # noqa: E402
from cod_train.policy_loss import Rec, rec_loss, register, verl_options  # noqa: E402

RATIOS = [0.3, 0.5, 0.8, 1.0, 1.2, 1.5, 3.5]
"""Below 1 - far_low, outside, on the edge, equal, on the edge, outside, above 1 + far_high."""

KEPT = {
    # clip: (kept where A = 2, kept where A = -2), for each of RATIOS
    "none": ([1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]),
    "one-side": ([1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]),
    "two-side": ([0, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0]),
    "ring": ([1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1]),
}
WEIGHTS = {"none": [1.0] * 7, "importance": RATIOS, "truncated": [0.4, 0.5, 0.8, 1.0, 1.2, 1.5, 3.0]}


def tokens(gain: float) -> tuple[Any, ...]:
    """(log_prob, old_log_prob, advantages, mask) of one row whose ratios are RATIOS, in doubles."""
    new = torch.linspace(-2.0, -0.5, len(RATIOS), dtype=torch.float64)[None]
    # A hair inside, so that the edges belong to their side in spite of rounding.
    inside = torch.tensor([r * (1 + 1e-9 * (1 - r)) for r in RATIOS], dtype=torch.float64)
    return new.requires_grad_(), new.detach() - inside.log(), torch.full_like(new, gain), torch.ones(1, len(RATIOS))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("clip", KEPT)
@pytest.mark.parametrize("gain", [2.0, -2.0])
def test_losses_and_gradients_by_hand(clip, weight, gain):
    new, old, gains, mask = tokens(gain)
    loss, found = rec_loss(new, old, gains, mask, clip=clip, weight=weight)
    kept = KEPT[clip][gain < 0]
    scale = [-gain * k * w for k, w in zip(kept, WEIGHTS[weight], strict=True)]
    expected = [s * x for s, x in zip(scale, new[0].tolist(), strict=True)]
    assert loss[0].tolist() == pytest.approx(expected, abs=1e-6)
    (slope,) = torch.autograd.grad(loss.sum(), new)
    assert slope[0].tolist() == pytest.approx(scale, abs=1e-6)
    assert found["clipped"] == pytest.approx(1 - sum(kept) / len(kept))


@pytest.mark.parametrize("clip", KEPT)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradients_by_finite_differences_with_ratio_and_clip_held(clip, weight):
    """The loss is linear in log pi once rho and K are numbers; the regulariser is not, and is differentiated whole."""
    torch.manual_seed(0)
    new = torch.randn(3, 5, dtype=torch.float64).requires_grad_()
    old, gains = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.rand(3, 5) < 0.7
    loss, _ = rec_loss(new, old, gains, mask, clip=clip, weight=weight, k2=0.3)
    (slope,) = torch.autograd.grad(loss.sum(), new)
    plain, _ = rec_loss(new, old, gains, mask, clip=clip, weight=weight)
    held = (plain / new).detach()  # -A w K

    def value(x):
        return (held * x + 0.3 * ((x - old) ** 2).masked_fill(~mask, 0.0)).sum().item()

    for at in range(new.numel()):
        step = torch.zeros(new.numel(), dtype=torch.float64)
        step[at] = 1e-6
        up, down = value(new.detach() + step.view_as(new)), value(new.detach() - step.view_as(new))
        assert slope.flatten()[at].item() == pytest.approx((up - down) / 2e-6, abs=1e-6)


def test_one_side_with_importance_weights_has_the_gradient_of_ppo():
    torch.manual_seed(1)
    new = (torch.randn(8, 16) * 0.3 - 2).requires_grad_()
    old, gains, mask = new.detach() + torch.randn(8, 16) * 0.3, torch.randn(8, 16), torch.rand(8, 16) < 0.8
    ratio = (new - old).exp()
    ppo = -torch.minimum(gains * ratio, gains * ratio.clamp(0.8, 1.2))
    (expected,) = torch.autograd.grad((ppo * mask).sum(), new)
    loss, found = rec_loss(new, old, gains, mask, weight="importance")
    (slope,) = torch.autograd.grad(loss.sum(), new)
    assert 0.05 < found["clipped"] < 0.5
    torch.testing.assert_close(slope, expected)


def test_on_policy_every_member_has_the_same_gradient():
    torch.manual_seed(2)
    new, gains, mask = torch.randn(4, 6).requires_grad_(), torch.randn(4, 6), torch.rand(4, 6) < 0.8
    for clip in KEPT:
        for weight in WEIGHTS:
            loss, _ = rec_loss(new, new.detach(), gains, mask, clip=clip, weight=weight, k2=1.0)
            (slope,) = torch.autograd.grad(loss.sum(), new)
            torch.testing.assert_close(slope, -gains * mask)


def test_what_is_masked_may_be_anything():
    new = torch.tensor([[-1.0, math.nan, -math.inf, -2.0]]).requires_grad_()
    old = torch.tensor([[-1.0, -math.inf, math.nan, -2.0]])
    gains, mask = torch.tensor([[1.0, math.nan, math.inf, -3.0]]), torch.tensor([[1, 0, 0, 1]])
    for k2 in (0.0, 0.5):
        loss, found = rec_loss(new, old, gains, mask, weight="importance", k2=k2)
        (slope,) = torch.autograd.grad(loss.sum(), new)
        assert loss.tolist() == [[1.0, 0.0, 0.0, -6.0]]
        assert slope.tolist() == [[-1.0, 0.0, 0.0, 3.0]]
        assert found == {"clipped": 0.0, "ratio": 1.0, "kl": 0.0, "advantage": -1.0}


def test_a_row_of_padding_costs_nothing_and_a_wild_ratio_stays_finite():
    new, old = torch.zeros(1, 2).requires_grad_(), torch.full((1, 2), -1000.0)
    loss, found = rec_loss(new, old, torch.ones(1, 2), torch.zeros(1, 2))
    assert loss.tolist() == [[0.0, 0.0]] and found == {"clipped": 0.0, "ratio": 1.0, "kl": 0.0, "advantage": 0.0}
    loss, _ = rec_loss(new, old, -torch.ones(1, 2), torch.ones(1, 2), weight="importance")
    assert torch.isfinite(torch.autograd.grad(loss.sum(), new)[0]).all()


def test_metrics_are_means_over_the_masked_tokens():
    new, old = torch.tensor([[-1.0, -1.0, -1.0, 5.0]]), torch.tensor([[-1.0, -1.5, -0.5, 0.0]])
    _, found = rec_loss(new, old, torch.tensor([[1.0, 1.0, -3.0, 9.0]]), torch.tensor([[1, 1, 1, 0]]))
    assert found["clipped"] == pytest.approx(2 / 3)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)
    assert found["ratio"] == pytest.approx((1 + math.exp(0.5) + math.exp(-0.5)) / 3)
    assert found["advantage"] == pytest.approx(-1 / 3)


def test_mistakes_are_named():
    with pytest.raises(UnknownName, match="did you mean one-side"):
        Rec(clip="oneside")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match="weight"):
        Rec(weight="is")  # type: ignore[arg-type]
    for amount in (-0.1, math.nan):
        with pytest.raises(UsageError, match="k2"):
            rec_loss(*tokens(1.0), k2=amount)


# Through verl


@pytest.fixture(scope="module")
def verl_losses():
    pytest.importorskip("verl")
    from verl.workers.utils import losses

    register()
    return losses


def actor(*overrides: str) -> Any:
    """verl's actor configuration, composed from its own files and made as its workers make it."""
    from hydra import compose, initialize_config_module
    from verl.utils.config import omega_conf_to_dataclass

    section = "actor_rollout_ref.actor"
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose(
            "ppo_trainer",
            [f"++{section}.{override}" for override in ("use_dynamic_bsz=true", *overrides)],
        )
    return omega_conf_to_dataclass(config.actor_rollout_ref.actor)


REC = ("policy_loss._target_=cod_train.policy_loss.verl_options", "policy_loss.loss_mode=rec")


def batch() -> tuple[Any, Any]:
    """Model output and data as an engine hands them to `ppo_loss`: one packed row of log-probabilities, ragged responses."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    torch.manual_seed(3)
    sizes = [(2, 4), (3, 2), (1, 3)]

    def ragged(make, which):
        return torch.nested.as_nested_tensor([make(size[which]) for size in sizes], layout=torch.jagged)

    total = sum(map(sum, sizes))
    output = {"log_probs": (torch.randn(total) * 0.4 - 1).requires_grad_()}
    data = TensorDict(
        {
            "prompts": ragged(lambda n: torch.zeros(n, dtype=torch.long), 0),
            "responses": ragged(lambda n: torch.zeros(n, dtype=torch.long), 1),
            "response_mask": ragged(lambda n: (torch.arange(n) != 1).long(), 1),
            "old_log_probs": ragged(lambda n: torch.randn(n) * 0.4 - 1, 1),
            "advantages": ragged(torch.randn, 1),
        },
        batch_size=[3],
    )
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=6, global_batch_size=3)
    return output, data


def gradient(losses: Any, config: Any) -> tuple[Any, dict[str, Any]]:
    output, data = batch()
    loss, metrics = losses.ppo_loss(config, output, data)
    loss.backward()
    return output["log_probs"].grad, metrics


def test_verl_trains_with_the_loss_its_configuration_names(verl_losses):
    config = actor(*REC, "policy_loss.clip=ring", "policy_loss.weight=truncated", "policy_loss.k2=0.1")
    slope, metrics = gradient(verl_losses, config)
    output, data = batch()
    rows = {name: data[name].to_padded_tensor(0) for name in ("old_log_probs", "advantages", "response_mask")}
    flat = output["log_probs"]
    picked = torch.zeros(3, 4)
    for row, (start, size) in enumerate([(1, 4), (8, 2), (11, 3)]):
        picked[row, :size] = flat[start : start + size]
    loss, found = rec_loss(
        picked,
        rows["old_log_probs"],
        rows["advantages"],
        rows["response_mask"],
        clip="ring",
        weight="truncated",
        k2=0.1,
    )
    (expected,) = torch.autograd.grad(loss.sum() / 6, flat)
    torch.testing.assert_close(slope, expected)
    assert {f"actor/rec_{name}" for name in found} <= metrics.keys()
    assert metrics["actor/rec_ratio"].aggregate() == pytest.approx(found["ratio"], rel=1e-5)


def test_the_default_is_one_side_without_weights_and_takes_verls_bounds(verl_losses):
    plain, _ = gradient(verl_losses, actor("policy_loss.loss_mode=rec"))
    said, _ = gradient(verl_losses, actor(*REC, "policy_loss.clip=one-side", "policy_loss.weight=none"))
    wide, metrics = gradient(verl_losses, actor(*REC, "clip_ratio_low=0.999", "clip_ratio_high=99"))
    assert torch.equal(plain, said) and not torch.equal(plain, wide)
    assert metrics["actor/rec_clipped"].aggregate() == 0.0


def test_with_importance_weights_verl_computes_its_own_ppo_gradient(verl_losses):
    ours, _ = gradient(verl_losses, actor(*REC, "policy_loss.weight=importance"))
    verls, _ = gradient(verl_losses, actor("policy_loss.loss_mode=vanilla", "clip_ratio_c=1e9"))
    torch.testing.assert_close(ours, verls)


def test_a_mistake_in_the_configuration_is_named_when_it_is_read(verl_losses):
    with pytest.raises(Exception, match="did you mean ring"):
        actor(*REC, "policy_loss.clip=rings")
    assert verl_options().rec == Rec()
