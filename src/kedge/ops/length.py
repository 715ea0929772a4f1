"""Taking length out of what comparisons teach."""

from __future__ import annotations

import torch
from torch import Tensor


def length_balance(wins: Tensor, lengths: Tensor, *, bins: int) -> Tensor:
    """[N, K, K] `wins` so weighed that the longer and the shorter win alike in each bin of |log length ratio|.

    `wins[n, i, j]` >= 0 is the evidence that response i of item n beat j; `lengths` [N, K] in tokens. Bins hold equally
    many wins and keep their total: the weights are the expectation of drawing longer and shorter winners in equal
    number. Equal lengths keep their weight; a bin in which only one side ever wins cannot be balanced and weighs 0.
    """
    size = lengths.clamp(min=1).double().log()
    ratio = size.unsqueeze(2) - size.unsqueeze(1)
    there = (wins > 0) & (ratio != 0)
    if not there.any():
        return wins
    inner = torch.quantile(_thinned(ratio[there].abs()), torch.arange(1, bins, device=wins.device).double() / bins)
    which = torch.bucketize(ratio[there].abs(), inner) * 2 + (ratio[there] > 0)
    total = torch.bincount(which, wins[there].double(), minlength=2 * bins).reshape(bins, 2)
    weight = torch.where((total > 0).all(dim=1, keepdim=True), total.sum(dim=1, keepdim=True) / (2 * total), 0)
    balanced = wins.clone()
    balanced[there] *= weight.flatten()[which].to(wins.dtype)
    return balanced


def _thinned(values: Tensor, most: int = 1_000_000) -> Tensor:
    """`torch.quantile` takes 16 million values; evenly spaced ones of a sorted column have the same quantiles."""
    return values.sort().values[:: 1 + len(values) // most]


def centred(values: Tensor, mask: Tensor) -> Tensor:
    """[..., N, K] less the mean of the item, 0 outside `mask` [N, K]; items of one response share the mean of them all.

    What is left is what differs between answers to one prompt, which is all that comparisons speak of.
    """
    over = -1 if mask.shape[-1] > 1 else -2
    mean = torch.where(mask, values, 0).sum(dim=over, keepdim=True) / mask.sum(dim=over, keepdim=True)
    return torch.where(mask, values - mean, 0)


def correlation(one: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """[] Pearson correlation of what differs within items (see `centred`); 0 where either is constant."""
    a, b = centred(one, mask), centred(other, mask)
    return (a * b).sum() / torch.sqrt((a**2).sum() * (b**2).sum() + 1e-12)


def disentangling(quality: Tensor, length: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """[] |corr(quality, lengths)| - corr(length, lengths) of two heads' scores [N, K]; see `correlation`.

    The quality head is to forget length, the length head to learn it. Chen et al. (2024, ODIN).
    """
    size = lengths.to(quality.dtype)
    return correlation(quality, size, mask).abs() - correlation(length, size, mask)


def orthogonality(weights: Tensor) -> Tensor:
    """[] |cosine| of the two rows of `weights` [2, d]. Chen et al. (2024, ODIN)."""
    return torch.nn.functional.cosine_similarity(weights[0], weights[1], dim=0).abs()
