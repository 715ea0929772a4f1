"""Losses per token; callers average them."""

from __future__ import annotations

import torch
from torch import Tensor

from kedge.ops.masked import masked_sum


def ppo_objective(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate to *maximise*, per token, and whether its gradient is active.

    Schulman et al. (2017), equation 7: min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(logprobs - old_logprobs).
    It is the minimum of the two products for either sign of A: A = -3, r = 1.3, clip = 0.2 gives -3.9, with a
    gradient that pulls the probability back down.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return torch.minimum(free, held), free <= held


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, variance: Tensor, *, clip: float) -> Tensor:
    """Clipped squared error over the returns' variance, per token and head: max of the two, halved.

    All of [..., heads]; `variance` [heads] is each head's running variance of returns, so that heads in nats, tokens
    and score units weigh alike, and `clip` counts standard deviations of the return.
    """
    scale = variance.sqrt()
    held = old_values + (values - old_values).clamp(-clip * scale, clip * scale)
    return torch.maximum((values - returns) ** 2, (held - returns) ** 2) / (2 * variance)


def token_nll(logprobs: Tensor, mask: Tensor, tokens: float) -> Tensor:
    """Negative log-likelihood of the true tokens of `mask`, summed and divided by `tokens`, in nats: the loss of SFT.

    With `tokens` their number it is their mean. Batches of rows of similar length share the expected number instead:
    divided by its own count, a batch of long responses would weigh no more than one of short ones.
    """
    return -masked_sum(logprobs, mask) / tokens
