"""KL divergence of the policy from its reference, in nats, as a reward and as a loss.

Direction throughout: KL(policy || reference), sampled from the policy. Estimators are named as in Schulman's note
"Approximating KL divergence" (2020): with d = log policy - log reference on a sampled token,
k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kedge.ops.masked import masked_sum


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k1 = log policy - log reference. Unbiased; as a reward its gradient is that of the KL."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k2 = k1^2 / 2. Non-negative, biased. Not for the reward: there it has no restoring force."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k3 = exp(-k1) - 1 + k1. Non-negative, unbiased, for reporting only (never in the reward)."""
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token |k1|. Offered by some trainers; it pushes back a token that became less likely, too."""
    return (logprobs - ref_logprobs).abs()


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}


def sequence_k2(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B] k2 of whole responses, (sum_t k1)^2 / 2: a loss whose gradient on the policy's own samples is that of the KL.

    The gradient is K(y) grad log pi(y), the score function of the KL; Liu et al. (2025), 2510.01555. Summed token by
    token instead, k2 forgets the KL that follows from a token.
    """
    return masked_sum(k1(logprobs, ref_logprobs), mask, dim=1) ** 2 / 2


def token_sum(estimate: Tensor, mask: Tensor) -> Tensor:
    """[B] a per-token estimate summed over the response: as a loss it lacks the KL that follows from each token."""
    return masked_sum(estimate, mask, dim=1)


def full_kl(distribution: Tensor, ref_distribution: Tensor) -> Tensor:
    """[B, T] exact KL of the next-token distributions, from [B, T, V] log-probabilities; differentiable."""
    gap = (distribution - ref_distribution).masked_fill(distribution == float("-inf"), 0)
    return (distribution.exp() * gap).sum(dim=-1)


def full_kl_loss(token_kl: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """[B] sum over the response of exact token KLs, with the gradient of the KL of whole responses.

    sum_t KL_t + sg(sum_{s > t} KL_s) log pi(a_t): the second term charges a token for the KL that follows from it;
    Tang and Munos (2025), 2506.09477. Its value is left out, so that the result is the KL itself. `token_kl` [B, T]
    from `full_kl`, `logprobs` [B, T] of the tokens taken.
    """
    kept = token_kl.masked_fill(~mask, 0)
    following = (kept.flip(1).cumsum(dim=1).flip(1) - kept).detach()
    return (kept + following * (logprobs - logprobs.detach()).masked_fill(~mask, 0)).sum(dim=1)
