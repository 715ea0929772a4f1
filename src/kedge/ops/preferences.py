"""Losses of what annotators say, one function each, per pair or item in nats; callers average them.

`margin` is the score of the one response minus that of the other, and a loss of a margin is that of the first having
been preferred. Where an item has several responses they are the last dimension, [..., N, K], with the same mask [N, K].
Comparisons say nothing of a prompt's level: a constant added to all scores of an item changes no loss of theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def preference_probability(margin: Tensor) -> Tensor:
    """Bradley–Terry probability that the first is preferred: sigmoid(margin)."""
    return torch.sigmoid(margin)


def bradley_terry(margin: Tensor) -> Tensor:
    """-log sigmoid(margin). Bradley and Terry (1952)."""
    return softplus(-margin)


def required_margin(margin: Tensor, required: Tensor) -> Tensor:
    """-log sigmoid(margin - required): the better the first was said to be, the further ahead it has to come.

    Touvron et al. (2023, Llama 2), equation 2.
    """
    return softplus(required - margin)


def smoothed(margin: Tensor, flip_rate: float) -> Tensor:
    """(1 - e) l(margin) + e l(-margin), l that of Bradley–Terry; least at margin = ln((1 - e) / e).

    Mitchell (2023, conservative DPO).
    """
    return (1 - flip_rate) * softplus(-margin) + flip_rate * softplus(margin)


def robust(margin: Tensor, flip_rate: float, limit: float = 5.0) -> Tensor:
    """((1 - e) l(m) - e l(-m)) / (1 - 2 e) at m = min(margin, limit).

    Its mean over labels flipped with probability e is the loss of the true label, wherever |margin| <= limit.
    Chowdhury et al. (2024, robust DPO). Without the limit it falls for ever, and a flipped pair learnt by heart pays
    without end. Held there it is bounded below, and beyond the limit only the other label's pull back is left.
    """
    held = margin.clamp(max=limit)
    return ((1 - flip_rate) * softplus(-held) - flip_rate * softplus(held)) / (1 - 2 * flip_rate)


def flip_aware(margin: Tensor, flip_rate: float) -> Tensor:
    """-log(e + (1 - 2 e) sigmoid(margin)): the likelihood of a label that was flipped with probability e < 1/2.

    A pair far on the wrong side is taken for flipped: its pull vanishes and its loss stays below -log e. A judge right
    in the share a of pairs agrees with such labels in the share e + (1 - 2 e) a.
    """
    flipped = margin.new_tensor(flip_rate).log()
    return -torch.logaddexp(flipped, math.log1p(-2 * flip_rate) + logsigmoid(margin))


def davidson(margin: Tensor, log_tie: Tensor) -> Tensor:
    """[..., 3] log-probabilities that the first is preferred, that neither is, and that the second is.

    Proportional to e^(margin / 2), nu and e^(-margin / 2) with nu = e^log_tie. Davidson (1970). Without ties,
    nu -> 0, it is Bradley–Terry.
    """
    half = margin / 2
    return torch.stack([half, log_tie.expand_as(half), -half], dim=-1).log_softmax(dim=-1)


def plackett_luce(scores: Tensor, grades: Tensor, mask: Tensor) -> Tensor:
    """[..., N] -sum_i log(e^(r_i) / sum_j e^(r_j)), j the responses not graded above i; `grades`, `mask` [N, K].

    Plackett (1975): the best is chosen first, then the best of the rest. Tied responses are each chosen from among all
    that were left when the first of them was (Breslow, 1974); of two tied alone that is twice Bradley–Terry at a half.
    """
    rivals = mask.unsqueeze(-2) & (grades.unsqueeze(-2) <= grades.unsqueeze(-1))
    rivals = rivals | torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)  # padding is its own rival
    pool = scores.unsqueeze(-2).masked_fill(~rivals, float("-inf")).logsumexp(dim=-1)
    return torch.where(mask, pool - scores, 0).sum(dim=-1)


def all_pairs(mask: Tensor) -> Tensor:
    """[N, K, K] bool: every two responses of an item, once in each order. Ouyang et al. (2022, InstructGPT)."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)


def tournament(grades: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    """[N, K, K] bool, symmetric: which responses meet in a single-elimination bracket drawn for each item.

    The higher grade goes on, of equal ones either: k responses meet k - 1 times, where all pairs are k (k - 1) / 2.
    """
    items, width = grades.shape
    size = 1 << (width - 1).bit_length()
    slots = torch.rand(items, size, generator=generator).argsort(dim=1).to(grades.device)  # past the width: nobody
    padded = torch.cat([grades.masked_fill(~mask, float("-inf")), grades.new_full((items, size - width), -math.inf)], 1)
    met = torch.zeros(items, size, size, dtype=torch.bool, device=grades.device)
    row = torch.arange(items, device=grades.device).unsqueeze(1)
    while slots.shape[1] > 1:
        one, other = slots[:, 0::2], slots[:, 1::2]
        met[row, one, other] = True
        slots = torch.where(padded.gather(1, one) >= padded.gather(1, other), one, other)
    met = met[:, :width, :width]
    return (met | met.transpose(1, 2)) & all_pairs(mask)


def centring(scores: Tensor, mask: Tensor) -> Tensor:
    """[..., N] (2 x mean score of the item)^2: of a pair (r_1 + r_2)^2. Eisenstein et al. (2023).

    The only one here that depends on the level of an item's scores, which comparisons leave free.
    """
    return (2 * torch.where(mask, scores, 0).sum(dim=-1) / mask.sum(dim=-1)) ** 2


def regression(scores: Tensor, ratings: Tensor) -> Tensor:
    """(score - rating)^2, the ratings in standard deviations from their mean."""
    return (scores - ratings) ** 2


def ordinal(scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """-log P(level) with P(level <= c) = sigmoid(threshold_c - score). McCullagh (1980).

    `levels` int64 counts from 0; `thresholds` [..., C - 1] increase, C the number of levels. Written with
    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^(b - a)), it loses no digits in the tails.
    """
    edge = thresholds.new_full((*thresholds.shape[:-1], 1), math.inf)
    edges = torch.cat([-edge, thresholds, edge], dim=-1)
    below, above = edges[..., levels], edges[..., levels + 1]
    return softplus(scores - above) + softplus(below - scores) - torch.log(-torch.expm1(below - above))


def verdict(scores: Tensor, good: Tensor, base_rate: float) -> Tensor:
    """-log P(good), or of bad where `good` is 0, with log-odds P(good) = score + log-odds of the base rate.

    The offset is no parameter but the share called good in training: a score of 0 is then a response like the average
    one, and the score's level means something. Ethayarajh et al. (2024, KTO) measure from such a point too.
    """
    margin = scores + math.log(base_rate / (1 - base_rate))
    return good * softplus(-margin) + (1 - good) * softplus(margin)
