"""Statistics over the true entries of a mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""A sum or count of this process to that of all processes."""


def itself(partial: Tensor) -> Tensor:
    """The `Reduce` of a single process."""
    return partial


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `values` where `mask` is true. NaN under a false mask does not leak in."""
    kept = values.masked_fill(~mask, 0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None, *, reduce: Reduce = itself) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where nothing is true. Sum and count go through `reduce`."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return reduce(masked_sum(values, mask, dim)) / reduce(count).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, *, reduce: Reduce = itself) -> Tensor:
    """Population variance (divided by the count) of `values` where `mask` is true."""
    return masked_mean((values - masked_mean(values, mask, reduce=reduce)) ** 2, mask, reduce=reduce)


def whitening(values: Tensor, mask: Tensor, *, epsilon: float = 1e-8, reduce: Reduce = itself) -> tuple[Tensor, Tensor]:
    """Shift and scale that whiten `values` over `mask`: `(values - shift) / scale` has mean 0, variance 1.

    Every true entry weighs the same, so with responses of unequal length the statistics are token-weighted. With
    `reduce` they are those of the batches of all ranks together.
    """
    variance = masked_variance(values, mask, reduce=reduce)
    return masked_mean(values, mask, reduce=reduce), torch.sqrt(variance + epsilon)
