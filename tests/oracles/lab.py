"""Training on an enumerable task as `kedge.experiment.verify.training` does it, whole or with something made wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kedge.experiment.verify import training
from kedge.experiment.verify.enumerable import Space, TableModel, Task
from kedge.experiment.verify.training import (
    FREE,
    OnPolicy,
    every_response,
    generate,
    prompts_of,
    score,
    score_of,
    variance_of,
    weights_for,
)
from kedge.ops.advantages import gae
from kedge.ops.masked import whitening
from kedge.structs import Experience, Rollouts, ScoredRollouts
from kedge.train.experience import make_experience
from kedge.train.update import Learner, UpdateSettings, update

__all__ = ["FREE", "generate", "prompts_of", "score", "score_of", "variance_of", "weights_for"]
Tamper: TypeAlias = "Callable[[Experience, Ppo], Experience]"


@dataclass(frozen=True)
class Ppo(OnPolicy):
    """The settings of a training run; `tamper` turns the right experience into a wrong one."""

    tamper: Tamper | None = None


def train(task: Task, ppo: OnPolicy, start: Tensor | None = None) -> Tensor:
    """The policy's table after training from `start`, or from the reference."""
    tamper = getattr(ppo, "tamper", None)
    if tamper is None:
        return training.train(task, ppo, start)

    def tampered(scored: ScoredRollouts, **named: Any) -> Experience:
        return tamper(make_experience(scored, **named), ppo)

    return training.train(task, ppo, start, experience_of=tampered)


def all_rollouts(space: Space, prompt: int = 0) -> Rollouts:
    """Every sequence of the space once, as rollouts."""
    return every_response(space, [prompt])


def with_advantage(experience: Experience, advantage: Tensor) -> Experience:
    """The experience with another advantage [B, T] in place of the weighted sum of its channels."""
    zeros = torch.zeros_like(experience.advantages)
    advantages = torch.cat([advantage.unsqueeze(-1), zeros[..., 1:]], dim=-1)
    weights = torch.cat([torch.ones_like(experience.weights[:, :1]), experience.weights[:, 1:]], dim=-1)
    return replace(
        experience,
        advantages=advantages,
        weights=weights,
        shift=torch.zeros_like(experience.shift),
        scale=torch.ones_like(experience.scale),
    )


def with_rewards(experience: Experience, rewards: Tensor, ppo: Ppo) -> Experience:
    """The experience that follows from other token rewards [B, T, C]; the critic learns their returns."""
    mask = experience.scored.rollouts.response_mask
    advantages, returns = gae(rewards, experience.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    total = (experience.weights[:, None, :] * advantages).sum(dim=-1)
    shift, scale = whitening(total, mask) if ppo.whiten else (total.new_zeros(()), total.new_ones(()))
    return replace(
        experience,
        rewards=rewards,
        advantages=advantages,
        returns=returns,
        shift=shift.expand(len(mask)),
        scale=scale.expand(len(mask)),
    )


def with_kl_in_loss(coefficient: Callable[[Tensor], Tensor], beta: float) -> Tamper:
    """No KL in the reward; instead the gradient of a per-token KL loss, `coefficient(k1)` grad log policy.

    On the policy's own samples a sampled KL loss has just this gradient, token by token: no token is charged for the
    KL that follows from it.
    """

    def tamper(experience: Experience, ppo: Ppo) -> Experience:
        scored = experience.scored
        k = scored.old.logprobs - scored.reference.logprobs
        score_part = experience.advantages[..., experience.channels.index("score")]
        return with_advantage(experience, (score_part - beta * coefficient(k)) * scored.rollouts.response_mask)

    return tamper


def with_whitened_rewards(experience: Experience, ppo: Ppo) -> Experience:
    """Token rewards divided by their standard deviation with the mean put back: a constant on every token.

    R' = R / sigma + mu (1 - 1 / sigma), as `whiten(rewards, shift_mean=False)` in several trainers.
    """
    mask = experience.scored.rollouts.response_mask
    total = (experience.weights[:, None, :] * experience.rewards).sum(dim=-1)
    mean, deviation = total[mask].mean(), total[mask].std()
    whitened = (total / deviation + mean * (1 - 1 / deviation)) * mask
    rewards = torch.cat([whitened.unsqueeze(-1), torch.zeros_like(experience.rewards[..., 1:])], dim=-1)
    return with_rewards(experience, rewards, ppo)


def ascent_per_response(scored: ScoredRollouts, policy: TableModel, weights: Mapping[str, float]) -> Tensor:
    """The direction in which `update` would move the table, summed over tokens, per response: at lambda 1, unwhitened.

    `update` divides by the number of tokens in the batch, which is random; undone, the mean is the policy gradient.
    """
    experience = make_experience(scored, weights=weights, gamma=1.0, lam=1.0, whiten=False)
    settings = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=FREE, microbatch=100_000)
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.0))
    update(learner, experience, settings, torch.Generator(), return_variance=variance_of(experience))
    assert policy.table.grad is not None
    return -policy.table.grad * scored.rollouts.response_mask.sum() / len(scored.rollouts)


def z_scores(draw: Callable[[], Tensor], exact: Tensor, batches: int = 50) -> Tensor:
    """How many standard errors each coordinate's mean over batches is away from the exact gradient."""
    samples = torch.stack([draw() for _ in range(batches)])
    error = samples.std(dim=0).clamp(min=1e-12) / batches**0.5
    return ((samples.mean(dim=0) - exact) / error).abs()
