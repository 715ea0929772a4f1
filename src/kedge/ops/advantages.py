"""Generalised advantage estimation, for every channel at once, and baselines that need no critic."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each channel; Schulman et al. (2016), equations 11 to 16.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, where t + 1 is the next *true*
    position of `mask`: holes are carried over, not counted as time. V after the last true position is 0. The returns
    are A + V, the critic's target.

    Shapes: `rewards` and `values` [B, T, C], `mask` [B, T] -> both results [B, T, C], zero where the mask is false.
    The recursion is linear in rewards and values, so a weighted sum over channels of these advantages is the
    advantage of the weighted sum of rewards.
    """
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t].unsqueeze(-1)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = torch.where(here, running, 0)
    return advantages, torch.where(mask.unsqueeze(-1), advantages + values, 0)


def whole_response_values(rewards: Tensor, mask: Tensor, baseline: Tensor) -> Tensor:
    """[B, T, C] values with which GAE at gamma = lam = 1 gives every token the advantage of its whole response.

    A_t = sum_{s >= t} r_s - V_t with V_t = b - sum_{s < t} r_s is R - b: the response is one action, as in
    RLOO and GRPO. `rewards` [B, T, C] are zero where `mask` [B, T] is false; `baseline` [B, C] is b.
    """
    past = rewards.cumsum(dim=1) - rewards
    return (baseline.unsqueeze(1) - past) * mask.unsqueeze(-1)


def group_mean(values: Tensor, group: Tensor, *, leave_one_out: bool = False) -> Tensor:
    """[B, ...] the mean of `values` over the rows with the same `group` [B], or over the others among them.

    Kool et al. (2019): leaving a row's own value out keeps its baseline independent of it. Alone in its group a row has
    no others, and its baseline is 0.
    """
    sums, counts, number = _by_group(values, group)
    if not leave_one_out:
        return (sums / counts)[number]
    return (sums[number] - values) / (counts[number] - 1).clamp(min=1)


def group_deviation(values: Tensor, group: Tensor) -> Tensor:
    """[B] standard deviation (over n - 1, as GRPO's authors do) of `values` [B] within each row's group; 0 alone."""
    sums, counts, number = _by_group((values - group_mean(values, group)) ** 2, group)
    return (sums / (counts - 1).clamp(min=1)).sqrt()[number]


def _by_group(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[G, ...] sums and row counts of each group, and [B] the number of each row's group."""
    kinds, number = group.unique(return_inverse=True)
    sums = values.new_zeros(len(kinds), *values.shape[1:]).index_add(0, number, values)
    counts = values.new_zeros(len(kinds)).index_add(0, number, values.new_ones(len(group)))
    return sums, counts.view(-1, *[1] * (values.ndim - 1)), number
