"""Baselines that need no critic, and values that stand for what is not known: the NumPy side of a foreign trace.

Dimensions: B responses, T response tokens, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def group_mean(outcome: Array, group: Array, *, leave_one_out: bool = False) -> Array:
    """[B, C] mean of `outcome` [B, C] over the rows with the same `group` [B], or over the others among them.

    Alone in its group a row has no others; their mean is then 0 (Kool et al. 2019).
    """
    sums, counts, number = _by_group(outcome, group)
    if not leave_one_out:
        return np.asarray((sums / counts)[number])
    return np.asarray((sums[number] - outcome) / np.maximum(counts[number] - 1, 1))


def group_deviation(total: Array, group: Array, *, correction: int) -> Array:
    """[B] standard deviation over n - `correction` of `total` [B] within each row's group; 0 alone."""
    centred = total[:, None] - group_mean(total[:, None], group)
    sums, counts, number = _by_group(centred**2, group)
    return np.asarray(np.sqrt(sums / np.maximum(counts - correction, 1))[number, 0])


def group_sizes(group: Array) -> Array:
    """[B] how many rows share each row's group."""
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    return np.asarray(counts[number])


def _by_group(values: Array, group: Array) -> tuple[Array, Array, Array]:
    """[G, C] sums and [G, 1] counts of each group, and [B] the number of each row's group."""
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, number, values)
    return sums, counts[:, None].astype(np.float64), number


def whole_response_values(rewards: Array, baseline: Array, mask: Array) -> Array:
    """[B, T, C] values with which GAE at gamma = lam = 1 credits every token with the whole response's reward.

    A_t = sum_{s >= t} r_s - V_t with V_t = b - sum_{s < t} r_s is R - b. `baseline` [B, C] is b; `rewards` [B, T, C]
    are 0 where `mask` [B, T] is false.
    """
    past = np.cumsum(rewards, axis=1, dtype=np.float64) - rewards
    return np.asarray((baseline[:, None] - past) * mask[..., None])


def discounted_values(baseline: Array, mask: Array, *, gamma: float) -> Array:
    """[B, T, C] values that expect `baseline` [B, C] at the last token, discounted by the tokens until then."""
    ahead = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] - 1
    factor = np.where(mask, float(gamma) ** np.maximum(ahead, 0), 0.0)
    return np.asarray(baseline[:, None] * factor[..., None])


def values_giving(advantage: Array, mask: Array, *, gamma: float, lam: float) -> Array:
    """[B, T] float32 values with which GAE of no reward at all is `advantage` [B, T].

    From A_t = gamma V_{t+1} - V_t + gamma lam A_{t+1} backwards, where A_{t+1} is what the rounded values after t
    give: so rounding does not add up over the response.
    """
    values = np.zeros(mask.shape, dtype=np.float32)
    ahead, following = np.zeros(len(mask)), np.zeros(len(mask))
    for t in reversed(range(mask.shape[1])):
        here = mask[:, t]
        carried = gamma * following + gamma * lam * ahead
        value = (carried - advantage[:, t]).astype(np.float32).astype(np.float64)
        values[:, t] = np.where(here, value, 0.0)
        ahead = np.where(here, carried - value, ahead)
        following = np.where(here, value, following)
    return values
