"""Reward modelling: a head at the last real token for each member, trained on what annotators said."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.ops.preferences import preference_probability
from kedge.rollout.score import by_length, head_scores
from kedge.structs import Judgments, Rollouts
from kedge.train.descent import Descent, cosine
from kedge.train.length import Unteachable as Unteachable
from kedge.train.objectives import Kind as Kind
from kedge.train.objectives import Lesson
from kedge.train.objectives import RewardSettings as RewardSettings
from kedge.train.schedule import batches, seeded

BESIDE_LR = 0.02  # for the few numbers beside the score, which every epoch fits anew: in between they follow it


def steps(judgments: Judgments, settings: RewardSettings) -> int:
    """Optimiser steps of a training."""
    return settings.epochs * -(-len(judgments) // settings.batch_size)


def train_reward_model(
    model: Any,
    judgments: Judgments,
    kind: Kind,
    settings: RewardSettings,
    *,
    on_step: Callable[[int, float], None],
) -> dict[str, list[Any]]:
    """Train `model` in place; returns the numbers learnt or fixed beside the score, such as thresholds between grades.

    Every head of `model` is a member with a loss of its own, their mean is trained on; under `two_head` the heads are
    quality and length. All responses of an item are scored in one batch, once. Parameters that require no gradient stay
    as they are. `on_step(step, loss)` is called after every optimiser step.
    Raises `Unteachable` where the judgments cannot teach what the settings ask for, `DivergenceError` on NaN.
    """
    lesson = Lesson(judgments, kind, settings, model.score.out_features)
    model.eval()  # dropout stays off, as in every stage
    count = steps(judgments, settings)
    descent = Descent(model, lr=settings.lr, steps=count, warmup=max(1, count // 20), weight_decay=0.01)
    beside = torch.optim.Adam([{"params": list(lesson.parameters())}], lr=BESIDE_LR)
    rate = cosine(beside, count, 1)
    longest = judgments.lengths.max(dim=1).values
    for step, items in enumerate(batches(longest, settings.batch_size, count, seeded(settings.seed, "reward", 0))):
        if step % (count // settings.epochs) == 0:
            lesson.settle()
        beside.zero_grad()
        loss = lesson(item_scores(model, judgments.rows(items)), items, model.score)
        descent.step(loss, f"reward step {step}", "lower reward.lr")
        beside.step()
        rate.step()
        on_step(step, loss.item())
    return lesson.numbers()


def item_scores(model: Any, judgments: Judgments) -> Tensor:
    """[H, N, K] raw scores of each item's responses, 0 on padding.

    The first responses go through the model together, then the second ones, and so on: each pass is as wide as its own
    longest response.
    """
    columns: list[Tensor] = []
    for rows, held in zip(judgments.index.T, judgments.mask.T, strict=True):
        if held.any():
            scores = head_scores(model, judgments.responses.rows(rows[held]))
            columns.append(scores.new_zeros(len(judgments), scores.shape[1]).index_put((held,), scores))
        else:  # only other batches have items as wide as this
            columns.append(torch.zeros_like(columns[0]))
    return torch.stack(columns).permute(2, 1, 0)


@torch.no_grad()
def raw_scores(model: Any, rollouts: Rollouts, *, microbatch: int = 512) -> Tensor:
    """[B, H] unnormalised scores."""
    return by_length(rollouts, lambda part: head_scores(model, part), microbatch)


@dataclass(frozen=True)
class RewardReport:
    """Held-out quality. Lengths in tokens, calibration in probability, ties left out."""

    accuracy: float
    calibration_error: float  # mean |predicted - observed| over ten equal-mass bins of predicted probability
    length_correlation: float  # Pearson, score against response length over all held-out responses
    length_only_accuracy: float  # accuracy of a judge that prefers the longer response


def examine(scores: Tensor, judgments: Judgments) -> RewardReport:
    """Held-out accuracy, calibration and length bias of scores [M], one for each of `judgments.responses`.

    Rankings count by their pairs. Items of one response are compared with one another, each with the next in a random
    order. Calibration is that of sigmoid(difference), so it needs scores in the unit in which they were trained.
    """
    better, worse = _decided_pairs(judgments)
    lengths = judgments.responses.lengths.double()
    scores = scores.double()
    margin = scores[better] - scores[worse]
    judged = judgments.index[judgments.mask]
    return RewardReport(
        accuracy=_agreement(margin),
        calibration_error=_calibration_error(margin),
        length_correlation=float(torch.corrcoef(torch.stack([scores[judged], lengths[judged]]))[0, 1]),
        length_only_accuracy=_agreement(lengths[better] - lengths[worse]),
    )


def _decided_pairs(judgments: Judgments) -> tuple[Tensor, Tensor]:
    """Rows of `judgments.responses`: of each decided pair the better and the worse one."""
    index, grades, mask = judgments.index, judgments.grades, judgments.mask
    if index.shape[1] == 1:
        order = torch.randperm(len(index), generator=seeded(0, "examine"))
        index, grades, mask = (torch.cat([x[order], x[order.roll(-1)]], dim=1) for x in (index, grades, mask))
    over = (grades.unsqueeze(2) > grades.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    item, better, worse = over.nonzero(as_tuple=True)
    return index[item, better], index[item, worse]


def _agreement(margin: Tensor) -> float:
    """Share of pairs whose better side is ahead; a margin of zero counts half."""
    return float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())


def _calibration_error(margin: Tensor, bins: int = 10) -> float:
    """Expected calibration error, both orders of each pair counted so that the base rate is one half.

    Equal predictions share their mean outcome; a bin that ends among them would else hold whichever came first.
    """
    both = torch.cat([margin, -margin])
    won = torch.cat([torch.ones_like(margin), torch.zeros_like(margin)])
    _, group = both.unique(return_inverse=True)
    outcome = (torch.bincount(group, won) / torch.bincount(group))[group]
    gap = preference_probability(both) - outcome
    parts = both.argsort().tensor_split(bins)
    return sum(abs(float(gap[part].sum())) for part in parts) / len(both) if len(both) else math.nan
