"""From scored rollouts to advantages, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kedge.ops.advantages import gae, group_deviation
from kedge.ops.kl import k1
from kedge.ops.masked import whitening
from kedge.ops.rewards import Estimator, at_last_token, kl_rewards, length_rewards, missing_eos_rewards
from kedge.structs import Experience, ScoredRollouts
from kedge.train.methods import PPO, Method
from kedge.train.ranks import across_ranks

BUILT_IN = ("kl", "length", "missing_eos")
SCALAR_CRITIC = "critic"
GROUP_EPSILON = 1e-4  # as in GRPO's implementations: a group whose rewards are equal learns nothing


def channel_names(terminal: tuple[str, ...]) -> tuple[str, ...]:
    """All reward channels of a run: the terminal scores by name, then the built-in token rewards."""
    return (*terminal, *BUILT_IN)


def make_experience(
    scored: ScoredRollouts,
    *,
    weights: Mapping[str, float | Tensor] | Tensor,
    gamma: float = 1.0,
    lam: float = 1.0,
    whiten: bool = True,
    method: Method = PPO,
    kl_estimator: Estimator = k1,
    loss_beta: Tensor | float = 0.0,
) -> Experience:
    """Token rewards, advantages and returns per channel, in channel units, and the normalisation of their sum.

    `weights` turns channels into reward: a number or [B] per channel, or [B, C] for the channels in their order. A
    critic with one head per channel centres each channel; a critic with a single head becomes a channel of its own,
    `critic`, without reward and with weight 1: by linearity of GAE the weighted sum is the same PPO advantage.
    Methods without a critic put their baseline in its place; `gamma`, `lam` and `whiten` are for those with one.
    `loss_beta` is the coefficient of a KL term in the loss, in reward per nat, a number or [B].
    """
    names = channel_names(tuple(scored.scores))
    rewards = _token_rewards(scored, kl_estimator)
    weight = _weight_matrix(weights, names, rewards)
    mask, group = scored.rollouts.response_mask, scored.rollouts.group_id
    if method.baseline is not None:
        values, gamma, lam = method.baseline(rewards, mask, group), 1.0, 1.0
    else:
        values = torch.zeros_like(rewards) if scored.values is None else scored.values
    scalar = values.shape[-1] == 1 and len(names) > 1
    if scalar:
        names = (*names, SCALAR_CRITIC)
        values = torch.cat([torch.zeros_like(rewards), values], dim=-1)
        rewards = torch.cat([rewards, torch.zeros_like(rewards[..., :1])], dim=-1)
        weight = torch.cat([weight, torch.ones_like(weight[:, :1])], dim=-1)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    total = (weight[:, None, :] * advantages).sum(dim=-1)
    if scalar:
        returns = (total + values[..., -1]).unsqueeze(-1) * mask.unsqueeze(-1)
    normalise = method.normalise if whiten or method.baseline is not None else "none"
    shift, scale = _normalisation(normalise, total, weight, rewards, mask, group)
    # A whitened advantage is in another unit than the reward, and the KL beside it has to be in the same. GRPO's is
    # not: as published, beta stands beside advantages over the group's deviation.
    unit = scale if normalise == "batch" else torch.ones_like(scale)
    return Experience(
        scored=scored,
        channels=names,
        rewards=rewards,
        values=values,
        advantages=advantages,
        returns=returns,
        weights=weight,
        gamma=gamma,
        lam=lam,
        shift=shift,
        scale=scale,
        loss_beta=loss_beta / unit,
    )


def _normalisation(
    kind: str, total: Tensor, weights: Tensor, rewards: Tensor, mask: Tensor, group: Tensor
) -> tuple[Tensor, Tensor]:
    """[B] shift and scale of the weighted advantages `total` [B, T]."""
    shift, scale = total.new_zeros(len(total)), total.new_ones(len(total))
    if kind == "batch":
        shift, scale = (figure.expand(len(total)) for figure in whitening(total, mask, reduce=across_ranks()))
    elif kind == "group":
        outcome = (weights * rewards.sum(dim=1)).sum(dim=1)
        scale = group_deviation(outcome, group) + GROUP_EPSILON
    return shift, scale


def _token_rewards(scored: ScoredRollouts, kl_estimator: Estimator) -> Tensor:
    """[B, T, C] in the order of `channel_names`."""
    rollouts = scored.rollouts
    mask = rollouts.response_mask
    columns = [at_last_token(score.to(scored.old.logprobs.dtype), mask) for score in scored.scores.values()]
    columns.append(kl_rewards(scored.old.logprobs, scored.reference.logprobs, mask, kl_estimator))
    columns.append(length_rewards(mask))
    columns.append(missing_eos_rewards(rollouts.ended, mask))
    return torch.stack([column.to(scored.old.logprobs.dtype) for column in columns], dim=-1)


def _weight_matrix(weights: Mapping[str, float | Tensor] | Tensor, names: tuple[str, ...], rewards: Tensor) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.to(rewards.dtype)
    missing = set(names) - set(weights)
    if missing:
        raise ValueError(f"no weight for channel {', '.join(sorted(missing))}; have {', '.join(weights)}")
    columns = [torch.as_tensor(weights[name], dtype=rewards.dtype).expand(len(rewards)) for name in names]
    return torch.stack(columns, dim=1)
