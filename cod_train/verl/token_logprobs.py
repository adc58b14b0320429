"""Log-probabilities of tokens from their logits, where flash-attn's kernel is not there to do it.

What verl falls back to takes one token after the other, each with kernels of its own, and rounds 16-bit results to 16 bits. This takes
a few thousand tokens at a time in 32 bits and keeps nothing for the way back but the logits themselves.
"""

from __future__ import annotations

from typing import Any

import torch

AT_ONCE = 2048
"""Tokens whose logits are widened to 32 bits at once: 0.4 GB each with a vocabulary of 50,000."""


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_T_V: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        whole_T = torch.empty(len(tokens_T), dtype=torch.float32, device=logits_T_V.device)
        for at in range(0, len(tokens_T), AT_ONCE):
            torch.logsumexp(logits_T_V[at : at + AT_ONCE].float(), -1, out=whole_T[at : at + AT_ONCE])
        ctx.save_for_backward(logits_T_V, tokens_T, whole_T)
        return logits_T_V.gather(1, tokens_T[:, None])[:, 0].float() - whole_T

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_T_V, tokens_T, whole_T = ctx.saved_tensors
        (slope_T,) = given
        out_T_V = torch.empty_like(logits_T_V)
        for at in range(0, len(tokens_T), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            slope_t_V = (logits_T_V[part].float() - whole_T[part, None]).exp_().neg_()
            slope_t_V.scatter_add_(1, tokens_T[part, None], torch.ones_like(slope_t_V[:, :1]))
            out_T_V[part] = slope_t_V.mul_(slope_T[part, None])
        return out_T_V, None


def token_logprobs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The log-probability of each token, in 32 bits.

    Args:
        logits: (..., vocabulary), of any floating type.
        labels: (...), ids of the tokens.
    """
    flat: torch.Tensor = _TokenLogprobs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return flat.view(labels.shape)
