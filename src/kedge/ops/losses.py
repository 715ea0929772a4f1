"""Losses per token; callers average them."""

from __future__ import annotations

import torch
from torch import Tensor

from kedge.ops.masked import masked_sum


def ppo_objective(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate to *maximise*, per token, and whether its gradient is active.

    Schulman et al. (2017), equation 7: min(r A, clip(r, 1 - clip, 1 + clip) A) with r = exp(logprobs - old_logprobs).
    It is the minimum of the two products for either sign of A: A = -3, r = 1.3, clip = 0.2 gives -3.9, with a
    gradient that pulls the probability back down. `clip_high` widens the upper bound alone (Yu et al. 2025,
    "clip-higher"); `dual_clip` c > 1 bounds the product from below by c A where A < 0 (Ye et al. 2020). An infinite
    `clip` leaves the ratio free.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    free, held = ratio * advantages, ratio.clamp(1 - clip, 1 + (clip_high or clip)) * advantages
    objective, active = torch.minimum(free, held), free <= held
    if dual_clip is None:
        return objective, active
    floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
    return torch.maximum(objective, floor), active & (objective >= floor)


def importance_weights(logprobs: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights min(learner / sampler, cap) per token, for a sampler that differs from the learner.

    Both are log-probabilities under the weights that sampled; the ratio of the surrogate takes it from there.
    """
    return torch.exp(logprobs - behaviour_logprobs).clamp(max=cap)


def token_weights(mask: Tensor, aggregation: str, *, tokens: Tensor, responses: int, budget: int) -> Tensor:
    """[B, T] what each token's loss weighs in the loss of a minibatch of `responses` responses and `tokens` tokens.

    token_mean: 1 / tokens. sequence_sum: 1 / responses, the mean over responses of their token sums. sequence_mean:
    the mean over responses of their token means. constant: 1 / (responses * budget), the token budget (Liu et al.
    2025, Dr. GRPO). Zero outside the mask.
    """
    if aggregation == "token_mean":
        return mask / tokens
    if aggregation == "sequence_sum":
        return mask / responses
    if aggregation == "sequence_mean":
        return mask / (mask.sum(dim=1, keepdim=True) * responses)
    return mask / (responses * budget)


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
