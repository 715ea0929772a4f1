"""KL divergence of the policy from its reference, in nats, and what holds it.

Direction throughout: KL(policy || reference), sampled from the policy. Estimators are named as in Schulman's note
"Approximating KL divergence" (2020): with d = log policy - log reference on a sampled token,
k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k1 = log policy - log reference. Unbiased; as a reward its gradient is that of the KL."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k2 = k1^2 / 2. Non-negative, biased. Not for the reward: there it has no restoring force."""
    return (logprobs - ref_logprobs) ** 2 / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Per-token k3 = exp(-k1) - 1 + k1. Non-negative, unbiased, for reporting only (never in the reward)."""
    return torch.expm1(ref_logprobs - logprobs) - (ref_logprobs - logprobs)


def adapted_coefficient(beta: float, measured: float, target: float, *, episodes: int, horizon: float) -> float:
    """Ziegler et al. (2019), section 2.2: beta * (1 + clip(measured / target - 1, -0.2, 0.2) * episodes / horizon).

    `measured` and `target` are nats per sequence (summed over the response, averaged over responses); `episodes` is
    the number of responses behind `measured`, `horizon` the number of episodes over which a saturated error moves
    beta by 20%.
    """
    error = min(0.2, max(-0.2, measured / target - 1))
    return beta * (1 + error * episodes / horizon)
