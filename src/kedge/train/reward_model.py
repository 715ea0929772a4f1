"""Reward modelling: a scalar head at the last real token, trained on comparisons by Bradley–Terry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.ops.losses import bradley_terry, preference_probability
from kedge.rollout.score import by_length, last_token_logits
from kedge.structs import Rollouts
from kedge.train.descent import Descent
from kedge.train.schedule import batches, seeded


@dataclass(frozen=True)
class Comparisons:
    """Row i of `chosen` was preferred to row i of `rejected`; `strength` [N] is the share of votes for it."""

    chosen: Rollouts
    rejected: Rollouts
    strength: Tensor

    def __len__(self) -> int:
        return len(self.strength)


@dataclass(frozen=True)
class RewardReport:
    """Held-out quality. Lengths in tokens, calibration in probability, ties left out."""

    accuracy: float
    calibration_error: float  # mean |predicted - observed| over ten equal-mass bins of predicted probability
    length_correlation: float  # Pearson, score against response length over all held-out responses
    length_only_accuracy: float  # accuracy of a judge that prefers the longer response


def train_reward_model(
    model: Any,
    comparisons: Comparisons,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place; the loss is -(s log P + (1 - s) log(1 - P)) with s the share of votes for the chosen.

    `on_step(step, loss)` is called after every optimiser step.
    """
    model.eval()  # dropout stays off, as in every stage
    steps = epochs * -(-len(comparisons) // batch_size)
    descent = Descent(model, lr=lr, steps=steps, warmup=max(1, steps // 20), weight_decay=0.01)
    longest = torch.maximum(comparisons.chosen.lengths, comparisons.rejected.lengths)
    for step, index in enumerate(batches(longest, batch_size, steps, seeded(seed, "reward", 0))):
        margin = _raw(model, comparisons.chosen, index) - _raw(model, comparisons.rejected, index)
        share = comparisons.strength[index]
        loss = (share * bradley_terry(margin, 0 * margin) + (1 - share) * bradley_terry(0 * margin, margin)).mean()
        descent.step(loss, f"reward step {step}", "lower reward.lr")
        on_step(step, loss.item())


def _raw(model: Any, rollouts: Rollouts, index: Tensor) -> Tensor:
    return last_token_logits(model, rollouts.rows(index))


@torch.no_grad()
def raw_scores(model: Any, rollouts: Rollouts, *, microbatch: int = 512) -> Tensor:
    """[B] unnormalised scores."""
    return by_length(rollouts, lambda part: last_token_logits(model, part).unsqueeze(1), microbatch).squeeze(1)


def examine(model: Any, comparisons: Comparisons) -> RewardReport:
    """Held-out accuracy, calibration and length bias of a reward model."""
    chosen, rejected = raw_scores(model, comparisons.chosen), raw_scores(model, comparisons.rejected)
    decided = comparisons.strength != 0.5
    margin, sign = (chosen - rejected)[decided], (comparisons.strength[decided] > 0.5).float() * 2 - 1
    lengths = comparisons.chosen.lengths.float(), comparisons.rejected.lengths.float()
    length_margin = (lengths[0] - lengths[1])[decided]
    scores = torch.stack([torch.cat([chosen, rejected]), torch.cat(lengths)])
    return RewardReport(
        accuracy=_agreement(margin, sign),
        calibration_error=_calibration_error(margin, sign > 0),
        length_correlation=float(torch.corrcoef(scores)[0, 1]),
        length_only_accuracy=_agreement(length_margin, sign),
    )


def _agreement(margin: Tensor, sign: Tensor) -> float:
    """Share of pairs in which the margin has the label's sign; a margin of zero counts half."""
    return float(((margin * sign > 0).float() + 0.5 * (margin == 0).float()).mean())


def _calibration_error(margin: Tensor, won: Tensor, bins: int = 10) -> float:
    """Expected calibration error, both orders of each pair counted so that the base rate is one half.

    Equal predictions share their mean outcome; a bin that ends among them would else hold whichever came first.
    """
    both = torch.cat([margin, -margin])
    _, group = both.unique(return_inverse=True)
    outcome = (torch.bincount(group, torch.cat([won, ~won]).float()) / torch.bincount(group))[group]
    gap = preference_probability(both, torch.zeros_like(both)) - outcome
    parts = both.argsort().tensor_split(bins)
    return sum(abs(float(gap[part].sum())) for part in parts) / len(both) if len(both) else math.nan
