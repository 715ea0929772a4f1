"""The critic, one head per reward channel on a trunk of its own, and the normalisation of the reward model's score."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from kedge.errors import DivergenceError, InputError, Problem


class Critic(nn.Module):
    """Values of each position in channel units: `shift + scale * linear(hidden state)`, one column per head.

    The trunk is its own, so that KL-sized returns cannot move the policy. `shift` and `scale` are buffers that put a
    head in the unit of its channel's returns; the state dict holds them beside trunk and heads.
    """

    shift: Tensor  # [heads]
    scale: Tensor  # [heads]

    def __init__(self, trunk: nn.Module, width: int, heads: tuple[str, ...], score_index: int | None = None) -> None:
        super().__init__()
        self.names = heads
        self.score_index = score_index
        self.trunk = trunk
        self.heads = nn.Linear(width, len(heads))
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        self.register_buffer("shift", torch.zeros(len(heads)))
        self.register_buffer("scale", torch.ones(len(heads)))

    @classmethod
    def from_reward_model(cls, reward_model: Any, heads: tuple[str, ...], score_index: int | None) -> Critic:
        """A critic on a copy of the reward model's trunk.

        The head at `score_index` starts as the reward model's normalised score; the others predict `shift`, whatever
        the state, until they are trained.
        """
        if score_index is not None and not 0 <= score_index < len(heads):
            raise ValueError(f"score_index {score_index} is outside the {len(heads)} heads")
        head = reward_model.score
        critic = cls(copy.deepcopy(reward_model.base_model), head.in_features, heads, score_index)
        critic.to(device=head.weight.device, dtype=head.weight.dtype)
        if score_index is not None:
            mean, scale = score_normalisation(reward_model)
            with torch.no_grad():
                critic.heads.weight[score_index] = head.weight[0]
                if head.bias is not None:
                    critic.heads.bias[score_index] = head.bias[0]
                critic.shift[score_index] = -mean / scale
                critic.scale[score_index] = 1 / scale
        return critic.requires_grad_(True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Values [B, S, heads] after reading each position of `input_ids` [B, S]."""
        hidden = self.trunk(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        values: Tensor = self.shift + self.scale * self.heads(hidden)
        return values

    @torch.no_grad()
    def calibrate(self, returns_mean: Tensor, returns_std: Tensor) -> None:
        """Put the heads, [heads] each, in the unit of the returns first seen; call before training.

        The score head keeps the reward model's normalisation. A return that does not vary keeps scale 1.
        """
        for index in range(len(self.names)):
            if index != self.score_index:
                spread = float(returns_std[index])
                self.shift[index] = returns_mean[index]
                self.scale[index] = spread if spread > 0 and math.isfinite(spread) else 1.0


def score_normalisation(model: Any) -> tuple[float, float]:
    """Mean and scale of the raw score on the reference's samples; 0 and 1 for a model that was never normalised."""
    return float(getattr(model.config, "kedge_score_mean", 0.0)), float(getattr(model.config, "kedge_score_scale", 1.0))


def set_score_normalisation(model: Any, mean: float, scale: float) -> None:
    """Keep the raw score's mean and standard deviation on reference samples in the model's config, to be saved with it.

    Raises `DivergenceError` if they are not finite and `InputError` if the scores do not vary.
    """
    if not (math.isfinite(mean) and math.isfinite(scale)):
        raise DivergenceError(f"the reward model's scores are not finite (mean {mean}, scale {scale})")
    if scale <= 0:
        what = f"the scores of the reference's samples do not vary (standard deviation {scale})"
        raise InputError(Problem("reward model", what, "train it longer or give it pairs that differ"))
    model.config.kedge_score_mean = float(mean)
    model.config.kedge_score_scale = float(scale)


def normalised_score(model: Any, raw: Tensor) -> Tensor:
    """`(raw - mean) / scale` with the model's own normalisation: 0 mean and unit variance on reference samples."""
    mean, scale = score_normalisation(model)
    return (raw - mean) / scale
