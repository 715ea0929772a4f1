"""Where terminal scores and per-token costs become token rewards, one column a channel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kedge.ops.kl import k1

Estimator = Callable[[Tensor, Tensor], Tensor]
"""A KL estimate per token, from log-probabilities under the policy and under the reference."""


def at_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: `scores` [B] placed on the last true position of `mask`, zero elsewhere."""
    last = mask.flip(1).cummax(dim=1).values.flip(1).sum(dim=1) - 1
    rewards = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter(1, last.unsqueeze(1), scores.unsqueeze(1))


def kl_rewards(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: Estimator = k1) -> Tensor:
    """[B, T] the `kl` channel: k1 = log policy - log reference per token, in nats. Its weight is -beta.

    Other estimators are there to be studied: only k1 has the gradient of the KL here.
    """
    return estimator(logprobs, ref_logprobs).masked_fill(~mask, 0)


def length_rewards(mask: Tensor) -> Tensor:
    """[B, T] the `length` channel: one per token the policy produced, in tokens. Its weight is minus the penalty."""
    return mask.float()


def missing_eos_rewards(ended: Tensor, mask: Tensor) -> Tensor:
    """[B, T] the `missing_eos` channel: one on the last token of a response that never ended, in responses."""
    return at_last_token((~ended).float(), mask)


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """[B] scores held within [-limit, limit], in normalised score units."""
    return scores.clamp(-limit, limit)
