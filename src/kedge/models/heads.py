"""The critic, one head per reward channel on a trunk of its own, and the normalisation of the reward model's score."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedge.errors import DivergenceError, InputError, Problem

if TYPE_CHECKING:
    from kedge.models.reward import RewardModel


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
    def from_reward_model(cls, reward_model: RewardModel, heads: tuple[str, ...], score_index: int | None) -> Critic:
        """A critic on a copy of the first trunk of a reward model.

        The head at `score_index` starts as the mean of the normalised scores that members read off this trunk, in the
        unit of the final score; that is the score itself where there is one member and no correction. The others
        predict `shift`, whatever the state, until they are trained.
        """
        if score_index is not None and not 0 <= score_index < len(heads):
            raise ValueError(f"score_index {score_index} is outside the {len(heads)} heads")
        model = reward_model.models[0]
        critic = cls(copy.deepcopy(model.base_model), model.score.in_features, heads, score_index)
        critic.to(device=model.score.weight.device, dtype=model.score.weight.dtype)
        if score_index is not None:
            critic._start(score_index, reward_model)
        return critic.requires_grad_(True)

    @torch.no_grad()
    def _start(self, index: int, reward_model: RewardModel) -> None:
        """Let one head say mean_m (w_m x + b_m - mean_m) / scale_m, shifted and scaled as the final score is."""
        head, unit = reward_model.models[0].score, reward_model.scales[0]
        rows = range(head.out_features)
        shares = head.weight.new_tensor([unit / reward_model.scales[row] for row in rows])
        self.heads.weight[index] = (shares.unsqueeze(1) * head.weight).mean(dim=0)
        if head.bias is not None:
            self.heads.bias[index] = (shares * head.bias).mean()
        mean = sum(reward_model.means[row] / reward_model.scales[row] for row in rows) / len(rows)
        self.shift[index] = -(mean + reward_model.shift) / reward_model.scale
        self.scale[index] = 1 / (unit * reward_model.scale)

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

    Raises as `require_spread` does.
    """
    require_spread(mean, scale)
    model.config.kedge_score_mean = float(mean)
    model.config.kedge_score_scale = float(scale)


def require_spread(mean: float, scale: float) -> None:
    """Raise `DivergenceError` if scores are not finite and `InputError` if they do not vary."""
    if not (math.isfinite(mean) and math.isfinite(scale)):
        raise DivergenceError(f"the reward model's scores are not finite (mean {mean}, scale {scale})")
    if scale <= 0:
        what = f"the scores of the reference's samples do not vary (standard deviation {scale})"
        raise InputError(Problem("reward model", what, "train it longer or give it pairs that differ"))
