"""Oracles in plain Python: each equation written out as a sum over the true positions, in double precision.

Nothing here calls the package, and the forms differ from the package's on purpose: advantages are double sums, not a
recursion; statistics come from lists, not from masked tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import settings
from torch import Tensor

examples = settings(max_examples=60, deadline=None, derandomize=True)


def gae(
    rewards: Sequence[float], values: Sequence[float], mask: Sequence[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one row and one channel: A_t = sum_l (gamma lam)^l delta_{t+l} over true positions."""
    kept = [t for t, true in enumerate(mask) if true]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for start, t in enumerate(kept):
        total = 0.0
        for steps, u in enumerate(kept[start:]):
            following = kept[start + steps + 1 : start + steps + 2]
            next_value = values[following[0]] if following else 0.0
            total += (gamma * lam) ** steps * (rewards[u] + gamma * next_value - values[u])
        advantages[t], returns[t] = total, total + values[t]
    return advantages, returns


def gae_channels(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """`gae` for each row and channel of [B, T, C] tensors."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(rewards.shape[0]):
        for c in range(rewards.shape[2]):
            row = gae(rewards[b, :, c].tolist(), values[b, :, c].tolist(), mask[b].tolist(), gamma, lam)
            advantages[b, :, c], returns[b, :, c] = row
    return advantages, returns


def kept(values: Tensor, mask: Tensor) -> list[float]:
    """The true entries, one by one."""
    flat = zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return [value for value, true in flat if true]


def mean_and_variance(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance, by exact summation."""
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.fsum((x - mean) ** 2 for x in numbers) / len(numbers)


def log_softmax(logits: Sequence[float]) -> list[float]:
    """Log-probabilities of one distribution."""
    top = max(logits)
    total = math.log(math.fsum(math.exp(x - top) for x in logits))
    return [x - top - total for x in logits]


def ragged_mask(rng: np.random.Generator, batch: int, length: int, *, holes: bool = True) -> Tensor:
    """[batch, length] bool: true somewhere in each row, false after a random end, with holes before it."""
    mask = np.zeros((batch, length), dtype=bool)
    for b in range(batch):
        end = int(rng.integers(1, length + 1))
        mask[b, :end] = rng.random(end) < 0.7 if holes else True
        mask[b, end - 1] = True
    return torch.from_numpy(mask)


def poisoned(values: Tensor, mask: Tensor, poison: float = float("nan")) -> Tensor:
    """`values` with `poison` under every false entry of `mask`, which has as many leading dimensions as it needs."""
    while mask.dim() < values.dim():
        mask = mask.unsqueeze(-1)
    return torch.where(mask, values, poison)
