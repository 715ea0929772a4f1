"""Generalised advantage estimation, for every channel at once."""

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
