"""The optimiser steps of every on-policy method over one batch of experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.ops.kl import full_kl, full_kl_loss, k1, k3, sequence_k2, token_sum
from kedge.ops.logprobs import entropy as entropy_of
from kedge.ops.logprobs import taken
from kedge.ops.losses import importance_weights, ppo_objective, token_weights, value_loss
from kedge.rollout.score import response_logprobs, token_scores, token_values
from kedge.structs import Experience, Rollouts, UpdateStats
from kedge.train.mix import mix_backward
from kedge.train.snapshot import restore, snapshot

# Sampled KL losses of a response, [B] nats, by the name of their estimator. Of these k2 alone has the KL's gradient.
KL_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "k1": lambda logprobs, usual, mask: token_sum(k1(logprobs, usual), mask),
    "k2": sequence_k2,
    "k3": lambda logprobs, usual, mask: token_sum(k3(logprobs, usual), mask),
}


@dataclass(frozen=True)
class UpdateSettings:
    """`clip`, `clip_high` and `dual_clip` are on the ratio; `value_clip` counts standard deviations of the return;
    `budget` is the tokens a response may have, by which the aggregation "constant" divides."""

    epochs: int
    minibatches: int
    clip: float
    clip_high: float | None = None
    dual_clip: float | None = None
    aggregation: str = "token_mean"
    budget: int = 0
    importance_cap: float | None = None
    kl_loss: str | None = None
    value_clip: float = 1.0
    entropy_bonus: float = 0.0
    mix_weight: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    microbatch: int = 256


@dataclass(frozen=True)
class Learner:
    """What training changes in place: two models and their optimisers. Without a critic only the policy learns.

    `reference` is one that moves; a frozen one is nothing that is learnt.
    """

    policy: Any
    optimizer: torch.optim.Optimizer
    critic: Any | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    reference: Any | None = None


@dataclass(frozen=True)
class _Batch:
    """The rows of one micro-batch, trimmed to their longest response.

    `weights` [B, T] make the token losses of a minibatch its loss, `share` [B, T] makes their token mean.
    """

    rollouts: Rollouts
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    old_values: Tensor
    returns: Tensor
    loss_beta: Tensor
    weights: Tensor
    share: Tensor


Mix = Callable[[int, int], Rollouts]
"""The demonstrations whose likelihood is part of the loss, by epoch and minibatch."""
Stop = Callable[[Tensor, Tensor, Tensor, Tensor], bool]
"""Whether the policy has gone far enough: of a minibatch the log-probabilities [b, T] now, when sampled, under the
reference, and the mask."""


def update(
    learner: Learner,
    experience: Experience,
    settings: UpdateSettings,
    generator: torch.Generator,
    *,
    return_variance: Tensor,
    train_policy: bool = True,
    reference: Any | None = None,
    mix: Mix | None = None,
    stop: Stop | None = None,
) -> UpdateStats:
    """Several epochs of policy and value steps; learner is changed in place.

    Losses are sums over the whole minibatch with the weights of the aggregation, however it is cut into micro-batches.
    `return_variance` [heads] divides each head's loss. With `train_policy` false only the critic learns (warm-up).
    `reference` is asked for its whole distribution by the KL loss "full" alone. Once `stop` says so the policy's last
    step is taken back and only the critic goes on; it is asked before each step and after the last.
    """
    rollouts = experience.scored.rollouts
    advantages = experience.advantage()
    new_logprobs = experience.scored.old.logprobs * rollouts.response_mask
    active = rollouts.response_mask.clone()
    rows: list[list[dict[str, Tensor]]] = []
    left_out = 0.0
    policy = replace(learner, critic=None, critic_optimizer=None)
    before: dict[str, Tensor] = {}  # the policy before its last step
    for epoch in range(settings.epochs):
        order = torch.randperm(len(rollouts), generator=generator)
        rows.append([])
        for number, minibatch in enumerate(order.tensor_split(settings.minibatches)):
            totals: dict[str, Tensor] = {}
            _zero_grad(learner)
            for index, batch in _micro_batches(experience, advantages, minibatch, settings):
                figures, logprobs, went = _losses(learner, batch, settings, return_variance, train_policy, reference)
                for name, value in figures.items():
                    combine = torch.maximum if name == "ratio_max" else torch.add
                    totals[name] = combine(totals[name], value) if name in totals else value
                width = logprobs.shape[1]
                new_logprobs[index, :width], active[index, :width] = logprobs, went
            if train_policy and stop is not None:
                if stop(*_seen(experience, new_logprobs, minibatch)):
                    train_policy, left_out = False, 1.0
                    _take_back(policy, before)
                else:
                    before = snapshot(policy)
            totals["left_out"] = torch.tensor(left_out)
            if train_policy and mix is not None:
                shown = mix(epoch, number)
                totals["mix_loss"] = mix_backward(learner.policy, shown, settings.mix_weight, settings.microbatch)
            _step(learner, settings.max_grad_norm, totals, train_policy)
            rows[-1].append(totals)
    if train_policy and stop is not None:
        # The log-probability of ending is not looked at, so any token will do for it.
        now = token_scores(
            learner.policy, rollouts, temperature=settings.temperature, eos_id=0, microbatch=settings.microbatch
        )
        if stop(*_seen(experience, now.logprobs, torch.arange(len(rollouts)))):
            _take_back(policy, before)
    stacked = {name: torch.stack([torch.stack([m[name] for m in row]) for row in rows]) for name in rows[0][0]}
    return UpdateStats(**stacked, new_logprobs=new_logprobs, active=active)


def _take_back(policy: Learner, before: dict[str, Tensor]) -> None:
    """Undo the policy's last step; nothing if this update took none."""
    if before:
        restore(policy, before)


def _seen(experience: Experience, new_logprobs: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scored = experience.scored
    seen = (new_logprobs, scored.old.logprobs, scored.reference.logprobs, scored.rollouts.response_mask)
    return tuple(tensor[index] for tensor in seen)  # type: ignore[return-value]


def _losses(
    learner: Learner,
    batch: _Batch,
    settings: UpdateSettings,
    return_variance: Tensor,
    train_policy: bool,
    reference: Any | None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Backward through one micro-batch; its share of the minibatch's figures, new log-probabilities, active flags."""
    mask, weights, share = batch.rollouts.response_mask, batch.weights, batch.share
    distribution = response_logprobs(learner.policy, batch.rollouts, settings.temperature)
    logprobs = torch.where(mask, taken(distribution, batch.rollouts.response_ids), batch.old_logprobs)
    objective, went = _objective(batch, logprobs, settings)
    policy_loss = -(objective * weights).sum()
    entropies = entropy_of(distribution)
    kl_loss = _kl_loss(batch, distribution, logprobs, settings, reference)
    if train_policy:
        (policy_loss + kl_loss - settings.entropy_bonus * (entropies * weights).sum()).backward()
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
        "kl_loss": kl_loss.detach(),
        "mix_loss": torch.zeros(()),
        "value_loss": value_losses.detach(),
        "approx_kl": (k3(batch.old_logprobs, logprobs) * share).sum(),
        "clip_fraction": (~went * share).sum(),
        "ratio_max": ratio.masked_fill(~mask, 1).max(),
        "ratio_error": ((ratio - 1).abs() * share).sum(),
        "entropy": (entropies.detach() * share).sum(),
    }
    return figures, logprobs * mask, went & mask


def _objective(batch: _Batch, logprobs: Tensor, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
    """[B, T] the surrogate to maximise, and where its gradient is active."""
    objective, active = ppo_objective(
        logprobs,
        batch.old_logprobs,
        batch.advantages,
        clip=settings.clip,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    if settings.importance_cap is None:
        return objective, active
    sampled = batch.rollouts.behaviour_logprobs
    return objective * importance_weights(batch.old_logprobs, sampled, cap=settings.importance_cap), active


def _kl_loss(
    batch: _Batch, distribution: Tensor, logprobs: Tensor, settings: UpdateSettings, reference: Any | None
) -> Tensor:
    """The KL term of the loss, in the advantage's unit; each response weighs what its tokens do."""
    if settings.kl_loss is None:
        return torch.zeros(())
    mask = batch.rollouts.response_mask
    if settings.kl_loss == "full":
        assert reference is not None
        with torch.no_grad():
            usual = response_logprobs(reference, batch.rollouts, settings.temperature)
        each = full_kl_loss(full_kl(distribution, usual), logprobs, mask)
    else:
        each = KL_LOSSES[settings.kl_loss](logprobs, batch.ref_logprobs, mask)
    return (each * batch.loss_beta * batch.weights.amax(dim=1)).sum()


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


def _micro_batches(
    experience: Experience, advantages: Tensor, minibatch: Tensor, settings: UpdateSettings
) -> Iterator[tuple[Tensor, _Batch]]:
    """Rows of a minibatch in micro-batches of similar length, so that short ones do not pay for the longest."""
    rollouts, scored = experience.scored.rollouts, experience.scored
    heads = experience.returns.shape[-1]
    tokens = rollouts.response_mask[minibatch].sum()
    for index in minibatch[rollouts.last[minibatch].argsort(stable=True)].split(settings.microbatch):
        rows = rollouts.rows(index)
        width, mask = rows.response_ids.shape[1], rows.response_mask
        weights = token_weights(
            mask, settings.aggregation, tokens=tokens, responses=len(minibatch), budget=settings.budget
        )
        yield (
            index,
            _Batch(
                rollouts=rows,
                old_logprobs=scored.old.logprobs[index, :width],
                ref_logprobs=scored.reference.logprobs[index, :width],
                advantages=advantages[index, :width],
                old_values=experience.values[index, :width, -heads:],
                returns=experience.returns[index, :width],
                loss_beta=experience.loss_beta[index],
                weights=weights,
                share=mask / tokens,
            ),
        )
