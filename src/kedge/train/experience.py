"""From scored rollouts to advantages, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kedge.ops.advantages import gae
from kedge.ops.masked import whitening
from kedge.ops.rewards import at_last_token, kl_rewards, length_rewards, missing_eos_rewards
from kedge.structs import Experience, ScoredRollouts

BUILT_IN = ("kl", "length", "missing_eos")
SCALAR_CRITIC = "critic"


def channel_names(terminal: tuple[str, ...]) -> tuple[str, ...]:
    """All reward channels of a run: the terminal scores by name, then the built-in token rewards."""
    return (*terminal, *BUILT_IN)


def make_experience(
    scored: ScoredRollouts, *, weights: Mapping[str, float] | Tensor, gamma: float, lam: float, whiten: bool = True
) -> Experience:
    """Token rewards, advantages and returns per channel, in channel units, and the normalisation of their sum.

    `weights` turns channels into reward: a number per channel, or [B, C] when prompt groups have their own. A critic
    with one head per channel centres each channel; a critic with a single head becomes a channel of its own, `critic`,
    without reward and with weight 1: by linearity of GAE the weighted sum is the same PPO advantage.
    """
    names = channel_names(tuple(scored.scores))
    rewards = _token_rewards(scored)
    values = scored.values if scored.values is not None else torch.zeros_like(rewards)
    weight = _weight_matrix(weights, names, rewards)
    scalar = values.shape[-1] == 1 and len(names) > 1
    if scalar:
        names = (*names, SCALAR_CRITIC)
        values = torch.cat([torch.zeros_like(rewards), values], dim=-1)
        rewards = torch.cat([rewards, torch.zeros_like(rewards[..., :1])], dim=-1)
        weight = torch.cat([weight, torch.ones_like(weight[:, :1])], dim=-1)
    mask = scored.rollouts.response_mask
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    total = (weight[:, None, :] * advantages).sum(dim=-1)
    if scalar:
        returns = (total + values[..., -1]).unsqueeze(-1) * mask.unsqueeze(-1)
    shift, scale = whitening(total, mask) if whiten else (total.new_zeros(()), total.new_ones(()))
    return Experience(scored, names, rewards, values, advantages, returns, weight, shift, scale)


def _token_rewards(scored: ScoredRollouts) -> Tensor:
    """[B, T, C] in the order of `channel_names`."""
    rollouts = scored.rollouts
    mask = rollouts.response_mask
    columns = [at_last_token(score.to(scored.old.logprobs.dtype), mask) for score in scored.scores.values()]
    columns.append(kl_rewards(scored.old.logprobs, scored.reference.logprobs, mask))
    columns.append(length_rewards(mask))
    columns.append(missing_eos_rewards(rollouts.ended, mask))
    return torch.stack([column.to(scored.old.logprobs.dtype) for column in columns], dim=-1)


def _weight_matrix(weights: Mapping[str, float] | Tensor, names: tuple[str, ...], rewards: Tensor) -> Tensor:
    if isinstance(weights, Tensor):
        return weights.to(rewards.dtype)
    missing = set(names) - set(weights)
    if missing:
        raise ValueError(f"no weight for channel {', '.join(sorted(missing))}; have {', '.join(weights)}")
    return torch.tensor([weights[name] for name in names], dtype=rewards.dtype).expand(len(rewards), -1)
