"""The weight with which an update pushes each token's log-probability, as the loss of training gives it.

d(objective) / d(log pi) per token: advantage x ratio x active x importance weight x aggregation, and the terms of the
loss beside it. The step is taken as one minibatch. Dimensions: B responses, T response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.experiment.replay.setting import Setting
from kedge.ops.kl import k1
from kedge.ops.losses import importance_weights, ppo_objective, token_weights
from kedge.ops.masked import masked_sum
from kedge.structs import Experience
from kedge.trace.reader import StepTrace

Array = NDArray[Any]


@dataclass(frozen=True)
class Push:
    """[B, T] weights of tokens in the gradient; zero outside the response mask.

    `first` holds before anything moved: every ratio is 1 and every token active. `last` holds in the last epoch, with
    the ratios that were logged; what another setting would have moved by then is not known.
    """

    first: Array
    last: Array
    active: Array  # [B, T] bool: the clip lets the last epoch's gradient through


def push_of(step: StepTrace, experience: Experience, setting: Setting) -> Push:
    """The push of one step under `setting`, whose experience is `experience`."""
    mask = torch.from_numpy(step.response_mask)
    old, new = (torch.from_numpy(step.tokens[f"{which}_logprob"]) for which in ("old", "new"))
    advantages = experience.advantage()
    weights = token_weights(
        mask, setting.aggregation, tokens=mask.sum(), responses=len(step), budget=max(1, setting.budget)
    )
    sampled = torch.from_numpy(step.tokens["behaviour_logprob"])
    importance = (
        torch.ones_like(old)
        if setting.importance_cap is None
        else importance_weights(old, sampled, cap=setting.importance_cap)
    )
    _, active = ppo_objective(
        new, old, advantages, clip=setting.clip, clip_high=setting.clip_high, dual_clip=setting.dual_clip
    )
    active = active & mask
    last = advantages * torch.exp(new - old) * active
    beside = [_beside(step, experience, setting, logprobs, weights) for logprobs in (old, new)]
    first, last = advantages * importance * weights + beside[0], last * importance * weights + beside[1]
    zero = torch.zeros_like(first)
    return Push(
        torch.where(mask, first, zero).double().numpy(),
        torch.where(mask, last, zero).double().numpy(),
        active.numpy(),
    )


def _beside(step: StepTrace, experience: Experience, setting: Setting, logprobs: Tensor, weights: Tensor) -> Tensor:
    """[B, T] what a KL term and an entropy bonus in the loss add.

    Of the KL over the whole vocabulary the trace holds the token taken, whose k1 from there on has the same mean. The
    bonus has on it the weight -log pi - entropy, whose mean over the vocabulary is the gradient of the entropy.
    """
    mask = torch.from_numpy(step.response_mask)
    beside = torch.zeros_like(logprobs)
    if setting.place == "loss":
        usual = torch.from_numpy(step.tokens["reference_logprob"])
        gap = k1(logprobs, usual).masked_fill(~mask, 0)
        slope = {
            "k1": torch.ones_like(gap),
            "k2": masked_sum(gap, mask, dim=1).unsqueeze(1).expand_as(gap),
            "k3": -torch.expm1(-gap),
            "full": gap.flip(1).cumsum(dim=1).flip(1),
        }[setting.estimator]
        beside = beside - slope * (experience.loss_beta * weights.amax(dim=1)).unsqueeze(1)
    if setting.entropy_bonus:
        entropy = torch.from_numpy(step.tokens["entropy"])
        beside = beside - setting.entropy_bonus * (logprobs + entropy) * weights
    return beside
