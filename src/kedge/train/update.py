"""PPO's optimiser steps over one batch of experience."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.ops.kl import k3
from kedge.ops.logprobs import entropy as entropy_of
from kedge.ops.logprobs import taken
from kedge.ops.losses import ppo_objective, value_loss
from kedge.rollout.score import response_logprobs, token_values
from kedge.structs import Experience, Rollouts, UpdateStats


@dataclass(frozen=True)
class PpoSettings:
    """`clip` is on the ratio; `value_clip` counts standard deviations of the return; the rest as in the recipe."""

    epochs: int
    minibatches: int
    clip: float
    value_clip: float = 1.0
    entropy_bonus: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    microbatch: int = 256


@dataclass(frozen=True)
class Learner:
    """What `update` changes in place: two models, their optimisers. Without a critic only the policy learns."""

    policy: Any
    optimizer: torch.optim.Optimizer
    critic: Any | None = None
    critic_optimizer: torch.optim.Optimizer | None = None


@dataclass(frozen=True)
class _Batch:
    """The rows of one micro-batch, trimmed to their longest response."""

    rollouts: Rollouts
    old_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor


def update(
    learner: Learner,
    experience: Experience,
    settings: PpoSettings,
    generator: torch.Generator,
    *,
    return_variance: Tensor,
    train_policy: bool = True,
) -> UpdateStats:
    """Several epochs of clipped policy and value steps; learner is changed in place.

    Losses are token means over the whole minibatch, however it is cut into micro-batches. `return_variance` [heads]
    divides each head's loss. With `train_policy` false only the critic learns (warm-up).
    """
    rollouts = experience.scored.rollouts
    advantages = experience.advantage()
    heads = experience.returns.shape[-1]
    old_values = experience.values[..., -heads:]
    new_logprobs = torch.zeros_like(advantages)
    active = torch.zeros_like(rollouts.response_mask)
    rows: list[list[dict[str, Tensor]]] = []
    for epoch in range(settings.epochs):
        order = torch.randperm(len(rollouts), generator=generator)
        rows.append([])
        for minibatch in order.tensor_split(settings.minibatches):
            tokens = rollouts.response_mask[minibatch].sum()
            totals: dict[str, Tensor] = {}
            _zero_grad(learner)
            for index in _by_length(rollouts, minibatch, settings.microbatch):
                batch = _take(experience, advantages, old_values, index)
                figures, logprobs, went = _losses(learner, batch, settings, tokens, return_variance, train_policy)
                for name, value in figures.items():
                    combine = torch.maximum if name == "ratio_max" else torch.add
                    totals[name] = combine(totals[name], value) if name in totals else value
                if epoch == settings.epochs - 1:
                    width = logprobs.shape[1]
                    new_logprobs[index, :width], active[index, :width] = logprobs, went
            _step(learner, settings.max_grad_norm, totals, train_policy)
            rows[-1].append(totals)
    stacked = {name: torch.stack([torch.stack([m[name] for m in row]) for row in rows]) for name in rows[0][0]}
    return UpdateStats(**stacked, new_logprobs=new_logprobs, active=active)


def _losses(
    learner: Learner,
    batch: _Batch,
    settings: PpoSettings,
    tokens: Tensor,
    return_variance: Tensor,
    train_policy: bool,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Backward through one micro-batch; its share of the minibatch's figures, new log-probabilities, active flags."""
    mask = batch.rollouts.response_mask
    share = mask / tokens  # a sum with these weights over micro-batches is the minibatch's token mean
    distribution = response_logprobs(learner.policy, batch.rollouts, settings.temperature)
    logprobs = torch.where(mask, taken(distribution, batch.rollouts.response_ids), batch.old_logprobs)
    objective, went = ppo_objective(logprobs, batch.old_logprobs, batch.advantages, clip=settings.clip)
    entropy = (entropy_of(distribution) * share).sum()
    policy_loss = -(objective * share).sum()
    if train_policy:
        (policy_loss - settings.entropy_bonus * entropy).backward()
    value_losses = torch.zeros(batch.returns.shape[-1], dtype=share.dtype)
    if learner.critic is not None:
        values = token_values(learner.critic, batch.rollouts)
        error = value_loss(values, batch.old_values, batch.returns, return_variance, clip=settings.value_clip)
        value_losses = (error * share.unsqueeze(-1)).sum(dim=(0, 1))
        value_losses.sum().backward()
    logprobs = logprobs.detach()
    ratio = torch.exp(logprobs - batch.old_logprobs)
    figures = {
        "policy_loss": policy_loss.detach(),
        "value_loss": value_losses.detach(),
        "approx_kl": (k3(batch.old_logprobs, logprobs) * share).sum(),
        "clip_fraction": (~went * share).sum(),
        "ratio_max": ratio.masked_fill(~mask, 1).max(),
        "ratio_error": ((ratio - 1).abs() * share).sum(),
        "entropy": entropy.detach(),
    }
    return figures, logprobs * mask, went & mask


def _step(learner: Learner, max_norm: float, totals: dict[str, Tensor], train_policy: bool) -> None:
    """Clip the gradients, refuse a loss or gradient that is not finite, step both optimisers."""
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), max_norm) if train_policy else torch.zeros(())
    critic_norm = torch.zeros(())
    if learner.critic is not None:
        critic_norm = torch.nn.utils.clip_grad_norm_(learner.critic.parameters(), max_norm)
    totals["policy_grad_norm"], totals["critic_grad_norm"] = norm.detach(), critic_norm.detach()
    if not math.isfinite(float(norm) + float(critic_norm) + float(totals["policy_loss"])):
        raise DivergenceError(
            f"the update is not finite: policy loss {float(totals['policy_loss'])}, gradient norms {float(norm)} "
            f"(policy), {float(critic_norm)} (critic) -> lower policy.lr or policy.critic_lr and --resume"
        )
    if train_policy:
        learner.optimizer.step()
    if learner.critic_optimizer is not None:
        learner.critic_optimizer.step()


def _zero_grad(learner: Learner) -> None:
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.critic_optimizer is not None:
        learner.critic_optimizer.zero_grad(set_to_none=True)


def _by_length(rollouts: Rollouts, index: Tensor, microbatch: int) -> tuple[Tensor, ...]:
    """Rows of a minibatch in micro-batches of similar length, so that short ones do not pay for the longest."""
    ordered: Tensor = index[rollouts.last[index].argsort(stable=True)]
    return tuple(ordered.split(microbatch))


def _take(experience: Experience, advantages: Tensor, old_values: Tensor, index: Tensor) -> _Batch:
    rollouts = experience.scored.rollouts.rows(index)
    width = rollouts.response_ids.shape[1]
    return _Batch(
        rollouts=rollouts,
        old_logprobs=experience.scored.old.logprobs[index, :width],
        advantages=advantages[index, :width],
        old_values=old_values[index, :width],
        returns=experience.returns[index, :width],
    )
