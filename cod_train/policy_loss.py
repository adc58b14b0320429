"""The REC family of policy losses: REINFORCE where clipping decides which tokens count, and a weight how much.

With rho = exp(log pi - log pi_old), neither rho nor K carrying a gradient, a token's loss is

    -A * w(rho) * log pi * K(A, rho)  [+ k2 * (log pi - log pi_old)^2]

    clip        K = 1 when                                                    weight       w
    none        always                                                        none         1
    one-side    (A >= 0 and rho <= 1 + high) or (A <= 0 and rho >= 1 - low)   importance   rho
    two-side    1 - low <= rho <= 1 + high                                    truncated    rho clamped to
    ring        two-side, or (A >= 0 and rho <= 1 - far_low),                              [1 - far_low, 1 + far_high]
                or (A <= 0 and rho >= 1 + far_high)

`one-side` with weight `none` is what Connect the Dots trains with; with weight `importance` its gradient is that of PPO and GRPO.
verl knows the family as the loss mode `rec` once `register` was called. It takes `low` and `high` from its own
`actor.clip_ratio_low` and `clip_ratio_high`; the other dials stand beside the loss mode, where `_target_` lets them:

    actor:
      policy_loss:
        _target_: cod_train.policy_loss.verl_options
        loss_mode: rec
        clip: one-side

Source: arXiv 2606.20002 and the REC losses of Trinity-RFT.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from cod_agent.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from verl.workers.config import PolicyLossConfig

Clip = Literal["none", "one-side", "two-side", "ring"]
Weight = Literal["none", "importance", "truncated"]
Tensor = torch.Tensor

_FARTHEST = 20.0
"""Log-ratios are clamped to this, as verl does: rho stays finite in 32 bits."""


@dataclass(frozen=True, slots=True)
class Rec:
    """The dials that verl's configuration has no field for.

    Raises:
        UnknownName: no such clip or weight.
        UsageError: a bound or coefficient below zero.
    """

    clip: Clip = "one-side"
    weight: Weight = "none"
    far_low: float = 0.6
    far_high: float = 2.0
    k2: float = 0.0

    def __post_init__(self) -> None:
        _check(self.clip, self.weight, far_low=self.far_low, far_high=self.far_high, k2=self.k2)


def rec_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: Clip = "one-side",
    weight: Weight = "none",
    low: float = 0.2,
    high: float = 0.2,
    far_low: float = 0.6,
    far_high: float = 2.0,
    k2: float = 0.0,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of each token, before any aggregation.

    Args:
        log_prob: [B, T] under the policy being trained, natural logarithm; the only one that gradients flow to.
        old_log_prob: [B, T] under the policy that sampled.
        advantages: [B, T].
        mask: [B, T], true (or 1) at sampled tokens. What stands elsewhere may be anything, NaN included.
        k2: coefficient of the squared log-ratio, which every token pays, clipped or not.

    Returns:
        Token losses [B, T], 0 outside of the mask, and means over the masked tokens: `clipped` (fraction with K = 0), `ratio` (rho),
        `kl` (log pi_old - log pi, an estimate of the divergence in nats) and `advantage`, which foretells trouble when it falls
        below 0.

    Raises:
        UnknownName: no such clip or weight.
        UsageError: a bound or coefficient below zero.
    """
    _check(clip, weight, low=low, high=high, far_low=far_low, far_high=far_high, k2=k2)
    here = mask.bool()
    log_prob, old_log_prob, gain = (x.masked_fill(~here, 0.0) for x in (log_prob, old_log_prob, advantages))
    drift = (log_prob.detach() - old_log_prob).clamp(-_FARTHEST, _FARTHEST)
    ratio = drift.exp()
    counts = _counts(clip, gain, ratio, low, high, far_low, far_high)
    # A token that does not count has coefficient 0, whatever its ratio.
    scale = torch.where(counts & here, gain * _weight(weight, ratio, far_low, far_high), 0.0)
    loss = -scale * log_prob
    if k2:
        loss = loss + k2 * (log_prob - old_log_prob).square()
    tokens = here.sum().clamp(min=1)
    # Of no tokens at all, as in padding, the mean ratio is 1: nothing has moved.
    sums = {"clipped": (~counts & here), "ratio": (ratio - 1) * here, "kl": -drift, "advantage": gain}
    means = {name: (values.sum() / tokens).item() for name, values in sums.items()}
    return loss, {**means, "ratio": 1 + means["ratio"]}


def _counts(
    clip: Clip, gain: Tensor, ratio: Tensor, low: float, high: float, far_low: float, far_high: float
) -> Tensor:
    """K: which tokens count."""
    if clip == "none":
        return torch.ones_like(ratio, dtype=torch.bool)
    if clip == "one-side":
        return _one_side(gain, ratio, 1 - low, 1 + high)
    near = (ratio >= 1 - low) & (ratio <= 1 + high)
    if clip == "two-side":
        return near
    # Far out on the side where the gradient leads back.
    return near | ((gain >= 0) & (ratio <= 1 - far_low)) | ((gain <= 0) & (ratio >= 1 + far_high))


def _one_side(gain: Tensor, ratio: Tensor, least: float, most: float) -> Tensor:
    return ((gain >= 0) & (ratio <= most)) | ((gain <= 0) & (ratio >= least))


def _weight(weight: Weight, ratio: Tensor, far_low: float, far_high: float) -> Tensor:
    if weight == "none":
        return torch.ones_like(ratio)
    return ratio if weight == "importance" else ratio.clamp(1 - far_low, 1 + far_high)


def _check(clip: str, weight: str, **amounts: float) -> None:
    if clip not in get_args(Clip):
        raise UnknownName.among("clip", clip, list(get_args(Clip)))
    if weight not in get_args(Weight):
        raise UnknownName.among("weight", weight, list(get_args(Weight)))
    for name, amount in amounts.items():
        if not amount >= 0:
            raise UsageError(f"{name} is {amount}: give 0 or more")


def verl_options(
    *,
    clip: Clip = "one-side",
    weight: Weight = "none",
    far_low: float = 0.6,
    far_high: float = 2.0,
    k2: float = 0.0,
    loss_mode: str = "rec",
    **rest: Any,
) -> PolicyLossConfig:
    """verl's `policy_loss` section with the dials of this family: what `_target_` there names.

    verl's own class takes no fields it does not know, but carries an attribute.

    Raises:
        UnknownName, UsageError: as `Rec`.
    """
    from verl.workers.config import PolicyLossConfig

    section = PolicyLossConfig(loss_mode=loss_mode, **rest)
    section.rec = Rec(clip, weight, far_low, far_high, k2)
    return section


def register() -> None:
    """Make `loss_mode: rec` known to verl, in this process. Calling it again changes nothing."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    register_policy_loss("rec")(_verl_loss)


def _verl_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """`rec_loss` as verl calls its losses (`config` is its actor's): aggregated over the mini-batch of all ranks, metrics named."""
    from verl.trainer.ppo.core_algos import agg_loss

    if config is None:
        raise UsageError("the loss `rec` needs verl's actor configuration: call it through verl's ppo_loss")
    rec = config.policy_loss.get("rec", Rec())
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    loss_B_T, found = rec_loss(log_prob, old_log_prob, advantages, response_mask, low=low, high=high, **asdict(rec))
    if rollout_is_weights is not None:
        loss_B_T = loss_B_T * rollout_is_weights
    loss = agg_loss(loss_mat=loss_B_T, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return loss, {f"actor/rec_{name}": value for name, value in found.items()}
