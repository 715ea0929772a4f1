"""Keeping length out of the score: while it is learnt, or afterwards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kedge.models.correction import LengthCorrection
from kedge.ops.length import centred, disentangling, length_balance, orthogonality
from kedge.ops.lowess import within_groups

ODIN_LENGTH, ODIN_ORTHOGONAL = 0.3, 0.1  # weights of the two penalties; at 1 they outweigh quality early on
RESIDUAL_FRACTION = 0.5  # share of the responses that each local line of the residual sees
RESIDUAL_KNOTS = 33
WINS_PER_BIN = 50
MOST_BINS = 10


class Unteachable(ValueError):
    """Judgments that cannot teach what the settings ask for."""


class LengthExpert(nn.Module):
    """A judge of length alone, per member: straight lines in the logarithm of length with bends at its quartiles.

    Product of experts (Shen et al., 2023): training adds it to the score, which need not learn what it explains. It is
    dropped afterwards. Theirs reads the text, through noise so that it does no more than count; this one has counts.
    """

    centre: Tensor
    scale: Tensor
    bends: Tensor  # [3]

    def __init__(self, lengths: Tensor, members: int) -> None:
        super().__init__()
        size = _log(lengths[lengths > 0])
        self.register_buffer("centre", size.mean())
        self.register_buffer("scale", size.std(correction=0).clamp(min=1e-6))
        self.register_buffer("bends", torch.quantile(self._standard(size), size.new_tensor([0.25, 0.5, 0.75])))
        self.weight = nn.Parameter(size.new_zeros(members, 4))

    def forward(self, lengths: Tensor) -> Tensor:
        """[H, n, K] what each member's expert adds for `lengths` [n, K] in tokens."""
        return (self._features(lengths) @ self.weight.T).movedim(-1, 0)

    def unexplained(self, scores: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """[H, n, K] `scores` less what an expert could say of them, by least squares within items."""
        features = self._features(lengths)
        columns = centred(features.movedim(-1, 0), mask)[:, mask].T
        weight = torch.linalg.lstsq(columns, centred(scores, mask)[:, mask].T, driver="gelsd").solution
        explained: Tensor = (features @ weight).movedim(-1, 0)
        return scores - explained

    def _features(self, lengths: Tensor) -> Tensor:
        """[n, K, 4]"""
        size = self._standard(_log(lengths)).unsqueeze(-1)
        return torch.cat([size, (size - self.bends).clamp(min=0)], dim=-1)

    def _standard(self, size: Tensor) -> Tensor:
        return (size - self.centre) / self.scale


def _log(lengths: Tensor) -> Tensor:
    return lengths.clamp(min=1).float().log()


def balanced(wins: Tensor, lengths: Tensor) -> Tensor:
    """`wins` [N, K, K] with longer and shorter winners weighing alike, and 1 an item on average.

    Raises `Unteachable` where only the longer responses win, or only the shorter.
    """
    decided = int((wins > 0).sum())
    weighed = length_balance(wins, lengths, bins=max(1, min(MOST_BINS, decided // WINS_PER_BIN)))
    if not weighed.sum() > 0:
        raise Unteachable("the longer response always wins, or the shorter does: there is nothing to balance with")
    return weighed * (wins.sum() / weighed.sum())


def two_head_penalty(scores: Tensor, lengths: Tensor, mask: Tensor, head: nn.Linear) -> Tensor:
    """[] what ODIN adds to the loss of the summed scores; `scores` [2, n, K] of the quality and the length head."""
    apart = orthogonality(head.weight)
    return ODIN_LENGTH * disentangling(scores[0], scores[1], lengths, mask) + ODIN_ORTHOGONAL * apart


def fit_length_residual(scores: Tensor, lengths: Tensor, prompts: Tensor) -> LengthCorrection:
    """What length adds to scores [M] of responses of `lengths` [M] tokens to the prompts numbered by `prompts` [M].

    score = level of the prompt + f(length), f by lowess: only differences between answers to one prompt count, so that
    prompts that ask for more do not look like a bias. Huang et al. (2024) do it without the levels. True quality that
    goes with length is in f as well as bias. Prompts with one response add nothing; where all have one, f is 0.
    """
    size = lengths.cpu().double().numpy()
    knots = np.unique(np.quantile(size, np.linspace(0, 1, RESIDUAL_KNOTS)))
    columns = scores.detach().cpu().double().numpy(), prompts.cpu().numpy()
    values = within_groups(size, *columns, knots, fraction=RESIDUAL_FRACTION)
    return LengthCorrection(tuple(knots.tolist()), tuple(values.tolist()))
