"""What a response pays beside its score: for coming near the token budget, for going on, for saying it again.

Each is a number per response in its own unit, never negative; its weight is minus the penalty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_overlong(lengths: Tensor, ended: Tensor, *, budget: int, buffer: int) -> Tensor:
    """[B] in 0 to 1: 0 up to `budget` - `buffer` tokens, then linear up to 1 at the budget; 1 if it never `ended`.

    The "soft overlong punishment" of Yu et al. (2025, DAPO) with the opposite sign. `lengths` [B] in tokens, `ended`
    [B] bool.
    """
    share = (lengths - (budget - buffer)).float() / buffer
    return torch.where(ended, share.clamp(0, 1), 1)


def beyond_target(lengths: Tensor, targets: Tensor) -> Tensor:
    """[B] tokens of a response beyond its own target; 0 below it. Both [B] in tokens."""
    return (lengths - targets).clamp(min=0).float()


def repeated_share(ids: Tensor, mask: Tensor, *, n: int = 4) -> Tensor:
    """[B] share of a response's n-grams that occurred before in it; 0 where there are no n tokens in a row.

    1 - distinct / all, as Welleck et al. (2020) count repetition. `ids` [B, T] tokens; an n-gram counts where `mask`
    [B, T] is true throughout.
    """
    batch, length = ids.shape
    if length < n:
        return torch.zeros(batch, device=ids.device)
    grams, whole = ids.unfold(1, n, 1), mask.unfold(1, n, 1).all(dim=-1)
    row = torch.arange(batch, device=ids.device).unsqueeze(1).expand_as(whole)
    found = torch.cat([row[whole].unsqueeze(1), grams[whole]], dim=1).unique(dim=0)
    distinct, count = found[:, 0].bincount(minlength=batch), whole.sum(dim=1)
    return torch.where(count > 0, 1 - distinct / count.clamp(min=1), 0)
