"""PPO on an enumerable task through the production functions: `generate`, `score`, `make_experience`, `update`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from enumerable import EOS, PAD, Space, TableCritic, TableModel, Task
from torch import Tensor

from kedge.ops.advantages import gae
from kedge.ops.masked import masked_variance, whitening
from kedge.rollout.engine import TorchEngine
from kedge.rollout.score import score_rollouts
from kedge.structs import Experience, Prompts, Rollouts, Sampling, ScoredRollouts
from kedge.train.experience import make_experience
from kedge.train.update import Learner, PpoSettings, update

FREE = 1e9  # a gradient norm that nothing exceeds
Tamper: TypeAlias = "Callable[[Experience, Ppo], Experience]"


@dataclass(frozen=True)
class Ppo:
    """The settings of a training run; `tamper` turns the right experience into a wrong one."""

    steps: int = 120
    batch: int = 512
    lr: float = 0.1
    epochs: int = 2
    minibatches: int = 1
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = False
    heads: int | None = None  # None trains without a critic
    seed: int = 0
    beta: float | None = None  # None takes the task's
    double: bool = True
    tamper: Tamper | None = None


def prompts_of(space: Space, batch: int) -> Prompts:
    """`batch` prompts in turn; the group is the prompt's number in the space."""
    number = torch.arange(batch) % space.prompts
    ids, mask = space.prompt_ids(number)
    return Prompts(ids, mask, number)


def all_rollouts(space: Space, prompt: int = 0) -> Rollouts:
    """Every sequence of the space once, as rollouts."""
    count = len(space.sequences)
    number = torch.full((count,), prompt)
    ids, mask = space.prompt_ids(number)
    everything = torch.arange(count)
    return Rollouts(
        prompt_ids=ids,
        prompt_mask=mask,
        response_ids=space.response_ids(everything),
        response_mask=space.mask,
        ended=space.ended,
        group_id=number,
        behaviour_logprobs=torch.zeros(count, space.budget, dtype=torch.float64),
    )


def score_of(task: Task) -> Callable[[Rollouts], Tensor]:
    """The task's reward as a terminal score."""
    return lambda r: task.reward[r.group_id, task.space.index_of(r.response_ids, r.response_mask)]


def weights_for(beta: float) -> Mapping[str, float]:
    return {"score": 1.0, "kl": -beta, "length": 0.0, "missing_eos": 0.0}


def score(rollouts: Rollouts, policy: TableModel, task: Task, critic: TableCritic | None = None) -> ScoredRollouts:
    reference = TableModel(task.space, task.reference.to(policy.table.dtype))
    rewarders = {"score": score_of(task)}
    return score_rollouts(
        rollouts, policy, reference, critic, rewarders, temperature=1.0, eos_id=EOS, microbatch=len(rollouts)
    )


def generate(space: Space, policy: TableModel, batch: int, generator: torch.Generator) -> Rollouts:
    engine = TorchEngine(eos_id=EOS, pad_id=PAD, batch=batch)
    return engine.generate(policy, prompts_of(space, batch), Sampling(space.budget), generator)


def train(task: Task, ppo: Ppo, start: Tensor | None = None) -> Tensor:
    """The policy's table after training from `start`, or from the reference; learning rates fall to zero."""
    policy = TableModel(task.space, task.reference if start is None else start)
    if not ppo.double:
        policy = policy.float()
    optimizer = torch.optim.Adam(policy.parameters(), lr=ppo.lr)
    critic, critic_optimizer = None, None
    if ppo.heads is not None:
        shape = (task.space.prompts, len(task.space.prefixes), ppo.heads)
        critic = TableCritic(task.space, torch.zeros(shape, dtype=policy.table.dtype))
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=ppo.lr)
    learner = Learner(policy, optimizer, critic, critic_optimizer)
    settings = PpoSettings(ppo.epochs, ppo.minibatches, clip=0.2, max_grad_norm=FREE, microbatch=ppo.batch)
    generator = torch.Generator().manual_seed(ppo.seed)
    beta = task.beta if ppo.beta is None else ppo.beta
    for step in range(ppo.steps):
        for each in (optimizer, critic_optimizer):
            if each is not None:
                each.param_groups[0]["lr"] = ppo.lr * (1 + math.cos(math.pi * step / ppo.steps)) / 2
        scored = score(generate(task.space, policy, ppo.batch, generator), policy, task, critic)
        experience = make_experience(scored, weights=weights_for(beta), gamma=ppo.gamma, lam=ppo.lam, whiten=ppo.whiten)
        if ppo.tamper is not None:
            experience = ppo.tamper(experience, ppo)
        update(learner, experience, settings, generator, return_variance=variance_of(experience))
    return policy.table.detach()


def variance_of(experience: Experience) -> Tensor:
    """[heads] variance of the returns over the batch, with a floor for heads that never see a reward."""
    mask = experience.scored.rollouts.response_mask
    return torch.stack([masked_variance(head, mask) for head in experience.returns.unbind(-1)]).clamp(min=1e-4)


def with_advantage(experience: Experience, advantage: Tensor) -> Experience:
    """The experience with another advantage [B, T] in place of the weighted sum of its channels."""
    zeros = torch.zeros_like(experience.advantages)
    advantages = torch.cat([advantage.unsqueeze(-1), zeros[..., 1:]], dim=-1)
    weights = torch.cat([torch.ones_like(experience.weights[:, :1]), experience.weights[:, 1:]], dim=-1)
    return replace(
        experience,
        advantages=advantages,
        weights=weights,
        shift=experience.shift.new_zeros(()),
        scale=experience.scale.new_ones(()),
    )


def with_rewards(experience: Experience, rewards: Tensor, ppo: Ppo) -> Experience:
    """The experience that follows from other token rewards [B, T, C]; the critic learns their returns."""
    mask = experience.scored.rollouts.response_mask
    advantages, returns = gae(rewards, experience.values, mask, gamma=ppo.gamma, lam=ppo.lam)
    total = (experience.weights[:, None, :] * advantages).sum(dim=-1)
    shift, scale = whitening(total, mask) if ppo.whiten else (total.new_zeros(()), total.new_ones(()))
    return replace(experience, rewards=rewards, advantages=advantages, returns=returns, shift=shift, scale=scale)


def with_kl_estimator(estimator: Callable[[Tensor, Tensor], Tensor]) -> Tamper:
    """Another estimator than k1 in the `kl` channel of the reward."""

    def tamper(experience: Experience, ppo: Ppo) -> Experience:
        scored = experience.scored
        estimate = estimator(scored.old.logprobs, scored.reference.logprobs) * scored.rollouts.response_mask
        rewards = experience.rewards.clone()
        rewards[..., experience.channels.index("kl")] = estimate
        return with_rewards(experience, rewards, ppo)

    return tamper


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
    settings = PpoSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=FREE, microbatch=100_000)
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.0))
    update(learner, experience, settings, torch.Generator(), return_variance=variance_of(experience))
    assert policy.table.grad is not None
    return -policy.table.grad * scored.rollouts.response_mask.sum() / len(scored.rollouts)


def z_scores(draw: Callable[[], Tensor], exact: Tensor, batches: int = 50) -> Tensor:
    """How many standard errors each coordinate's mean over batches is away from the exact gradient."""
    samples = torch.stack([draw() for _ in range(batches)])
    error = samples.std(dim=0).clamp(min=1e-12) / batches**0.5
    return ((samples.mean(dim=0) - exact) / error).abs()
