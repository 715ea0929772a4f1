"""The on-policy optimisers: one loop, and for each where its baseline comes from and how its advantages are scaled.

All of them maximise E[sum of weighted rewards] with a likelihood-ratio gradient. A baseline without a critic is written
as values V_t = b - (rewards before t), so that GAE at gamma = lam = 1 is the method's advantage, R - b, per channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kedge.ops.advantages import group_mean, whole_response_values

Baseline = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From rewards [B, T, C], the mask [B, T] and groups [B] to values [B, T, C]."""


def others_in_batch(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The mean reward of the batch's other responses."""
    return _leave_one_out(rewards, mask, torch.zeros_like(group))


def others_in_group(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The mean reward of the other responses to the same prompt."""
    return _leave_one_out(rewards, mask, group)


def mean_of_group(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """The mean reward of all responses to the same prompt."""
    return whole_response_values(rewards, mask, group_mean(rewards.sum(dim=1), group))


def no_baseline(rewards: Tensor, _mask: Tensor, _group: Tensor) -> Tensor:
    """None: the advantage of a token is the reward from there on."""
    return torch.zeros_like(rewards)


def _leave_one_out(rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    return whole_response_values(rewards, mask, group_mean(rewards.sum(dim=1), group, leave_one_out=True))


@dataclass(frozen=True)
class Method:
    """What makes an on-policy optimiser.

    `baseline` None asks a critic, and gamma, lambda and whitening are the user's. `normalise` divides advantages by
    nothing, by the batch's deviation after centring, or by that of the prompt's group.
    """

    source: str
    baseline: Baseline | None = None
    normalise: Literal["none", "batch", "group"] = "none"
    clipped: bool = True
    aggregation: Literal["token_mean", "sequence_sum", "sequence_mean", "constant"] = "token_mean"
    groups: bool = False  # compares responses to the same prompt, so that it needs several


METHODS = {
    "ppo": Method("Schulman et al. 2017", normalise="batch"),
    "a2c": Method("Mnih et al. 2016; Huang et al. 2022", normalise="batch", clipped=False),
    "reinforce": Method("Williams 1992", others_in_batch, clipped=False),
    "rloo": Method("Ahmadian et al. 2024", others_in_group, aggregation="sequence_sum", groups=True),
    "grpo": Method("Shao et al. 2024", mean_of_group, "group", aggregation="sequence_mean", groups=True),
    "dr_grpo": Method("Liu et al. 2025", mean_of_group, aggregation="constant", groups=True),
    "reinforce_pp": Method("Hu 2025", no_baseline, "batch"),
}
PPO = METHODS["ppo"]
