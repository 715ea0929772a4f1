"""Several reward models that judge together: one score from theirs, and where they disagree."""

from __future__ import annotations

import torch
from torch import Tensor


def worst(members: Tensor) -> Tensor:
    """min_m r_m, [B] from [B, M] (Coste et al. 2023, worst-case optimisation)."""
    return members.amin(dim=1)


def mean_minus_variance(members: Tensor, weight: float) -> Tensor:
    """mean_m r_m - weight * var_m r_m, [B] from [B, M]; variance over M - 1, 0 where M = 1.

    Uncertainty-weighted optimisation of Coste et al. (2023).
    """
    variance = members.var(dim=1) if members.shape[1] > 1 else torch.zeros_like(members[:, 0])
    return members.mean(dim=1) - weight * variance


def centred_on_prompt(members: Tensor, group: Tensor) -> Tensor:
    """sqrt(n / (n - 1)) * (r_m(x, y_i) - mean_j r_m(x, y_j)) over the n responses to the same prompt, [B, M].

    Comparisons leave a member's constant per prompt free, so members are compared after it is taken out. The factor
    keeps the variance of what is left as it was. `group` [B] numbers the prompts. nan where n = 1.
    """
    _, place, counts = group.unique(return_inverse=True, return_counts=True)
    sums = members.new_zeros(len(counts), members.shape[1]).index_add(0, place, members)
    count = counts[place].unsqueeze(1).to(members.dtype)
    centred = (members - sums[place] / count) * (count / (count - 1).clamp(min=1)).sqrt()
    return torch.where(count > 1, centred, torch.nan)


def disagreement(centred: Tensor) -> Tensor:
    """sqrt(sum_m (c_m - mean c)^2 / (M - 1)), [B] from members' centred scores [B, M], M > 1."""
    return centred.std(dim=1)
