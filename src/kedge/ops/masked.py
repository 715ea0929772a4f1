"""Statistics over the true entries of a mask."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is true. NaN under a false mask does not leak in."""
    kept = values.masked_fill(~mask, 0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where nothing is true."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divided by the count) of `values` where `mask` is true."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whitening(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Shift and scale that whiten `values` over `mask`: `(values - shift) / scale` has mean 0, variance 1.

    Every true entry weighs the same, so with responses of unequal length the statistics are token-weighted.
    """
    return masked_mean(values, mask), torch.sqrt(masked_variance(values, mask) + epsilon)
