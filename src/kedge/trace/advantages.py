"""Advantages derived from a trace: the NumPy twin of the equation that training uses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def gae(rewards: Array, values: Array, mask: Array, *, gamma: float, lam: float) -> Array:
    """Generalised advantage estimates of every channel, in float64; Schulman et al. (2016), equations 11 to 16.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lam * A_{t+1}, where t + 1 is the next true
    position of `mask`; V after the last true position is 0. Shapes: `rewards` and `values` [B, T, C], `mask` [B, T],
    result [B, T, C], zero where the mask is false.
    """
    rewards, values = rewards.astype(np.float64), values.astype(np.float64)
    running = np.zeros((len(rewards), rewards.shape[2]))
    next_value = np.zeros_like(running)
    advantages = np.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t, None]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = np.where(here, delta + gamma * lam * running, running)
        next_value = np.where(here, values[:, t], next_value)
        advantages[:, t] = np.where(here, running, 0.0)
    return advantages
