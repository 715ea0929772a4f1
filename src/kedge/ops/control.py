"""Rules that move the KL coefficient towards a target, and the KL of a policy that moved since its batch was sampled.

Units throughout: KL, target and limit in nats per sequence (summed over a response, averaged over responses), beta in
reward per nat. The relative error is KL / target - 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kedge.ops.masked import masked_sum

_LARGEST_EXPONENT = 700.0  # e^700 is a double, e^710 is not


def adapted_coefficient(beta: float, measured: float, target: float, *, episodes: int, horizon: float) -> float:
    """Ziegler et al. (2019), section 2.2: beta * (1 + clip(measured / target - 1, -0.2, 0.2) * episodes / horizon).

    `episodes` is the number of responses behind `measured`, `horizon` the number of episodes over which a saturated
    error moves beta by 20%.
    """
    error = min(0.2, max(-0.2, measured / target - 1))
    return beta * (1 + error * episodes / horizon)


def lagrangian_coefficient(beta: float, measured: float, target: float, *, rate: float) -> float:
    """Dual ascent on log beta, one step: log beta + rate * (measured / target - 1).

    The multiplier of the constraint KL <= target, kept positive by its logarithm. A KL of twice the target multiplies
    beta by e^rate, one of zero divides it by as much. Overflow of a run that has blown up stays finite.
    """
    return beta * math.exp(min(_LARGEST_EXPONENT, rate * (measured / target - 1)))


def pid_coefficient(
    measured: float,
    target: float,
    *,
    total: float,
    previous: float,
    proportional: float,
    integral: float,
    derivative: float,
) -> tuple[float, float]:
    """Stooke et al. (2020), algorithm 2: beta = (K_P e + K_I sum e + K_D (rise of e)_+)_+, e = measured / target - 1.

    Returns beta and the new sum of errors. `total` is the sum before; it is held at 0 or more, so that a long time
    below the target leaves no debt that delays the answer to passing it (no windup). `previous` is the KL one step
    earlier; only its rise counts, so that a falling KL is not held up.
    """
    error = measured / target - 1
    total = max(0.0, total + error)
    rise = max(0.0, (measured - previous) / target)
    return max(0.0, proportional * error + integral * total + derivative * rise), total


def kl_estimate(
    new_logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(new || reference) in nats per sequence from responses of the old policy, its standard error, what it rests on.

    Self-normalised importance sampling, sum_b s_b K_b with s_b = w_b / sum w, w_b = exp(sum_t new - old) the weight of
    response b and K_b = sum_t new - reference its k1. The effective sample size 1 / sum s^2 lies between 1 and B (Kong,
    1992). The variance is sum s^2 (K - KL)^2 / (1 - sum s^2): that of a mean where weights are equal, and not a number
    where one response has them all. All [B, T] in nats; the results are scalars. No weight overflows.
    """
    log_weight = masked_sum(new_logprobs - old_logprobs, mask, dim=1)
    share = torch.softmax(log_weight, dim=0)
    k = masked_sum(new_logprobs - ref_logprobs, mask, dim=1)
    kl, crowding = (share * k).sum(), (share**2).sum()
    variance = (share**2 * (k - kl) ** 2).sum() / (1 - crowding)
    return kl, variance.sqrt(), 1 / crowding
