"""What one policy step leaves behind: its metrics and its trace rows."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.ops.kl import k1, k3
from kedge.ops.masked import masked_mean, masked_sum, masked_variance
from kedge.rollout.uncertainty import Uncertainty
from kedge.structs import Experience
from kedge.trace.writer import StepRecord
from kedge.train.experience import SCALAR_CRITIC
from kedge.train.policy import Step
from kedge.train.update import UpdateSettings


def heads_of(channels: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the critic's heads: one per channel, or the scalar critic alone."""
    return (SCALAR_CRITIC,) if SCALAR_CRITIC in channels else channels


def step_metrics(step: Step, doubt: Uncertainty) -> dict[str, float]:
    """The metrics of stage "policy", named and defined in `kedge.trace.schema`."""
    experience, stats = step.experience, step.stats
    scored, mask = experience.scored, experience.scored.rollouts.response_mask
    rollouts, old, reference = scored.rollouts, scored.old, scored.reference
    kl, score = experience.kl_per_response(), experience.channel("score")
    total = (experience.weights[:, None, :] * experience.advantages).sum(dim=-1)
    reward = (experience.weights * experience.rewards.sum(dim=1)).sum(dim=1)
    figures: dict[str, Tensor | float] = {
        "score/mean": score.mean(),
        "score/std": score.std(correction=0),
        "kl/reference_per_sequence": kl.mean(),
        "kl/reference_per_token": masked_mean(k1(old.logprobs, reference.logprobs), mask),
        "kl/reference_per_sequence_k3": masked_sum(k3(old.logprobs, reference.logprobs), mask, dim=1).mean(),
        "kl/beta": step.beta,
        "kl/sampler_gap": masked_mean((rollouts.behaviour_logprobs - old.logprobs).abs(), mask),
        "entropy/per_token": masked_mean(old.entropy, mask),
        "length/mean": rollouts.lengths.float().mean(),
        "length/ended": rollouts.ended.float().mean(),
        "reward/mean": reward.mean(),
        "advantage/mean": masked_mean(total, mask),
        "advantage/std": masked_variance(total, mask).sqrt(),
        "policy/loss": stats.policy_loss.mean(),
        "policy/kl_loss": stats.kl_loss.mean(),
        "policy/mix_loss": stats.mix_loss.mean(),
        "policy/left_out": stats.left_out.sum(),
        "policy/approx_kl": stats.approx_kl.mean(),
        "policy/clip_fraction": stats.clip_fraction.mean(),
        "policy/ratio_max": stats.ratio_max.max(),
        "policy/first_ratio_error": stats.ratio_error[0, 0],
        "policy/grad_norm": stats.policy_grad_norm.mean(),
        "critic/grad_norm": stats.critic_grad_norm.mean(),
    }
    for rule in (name for name in scored.scores if name != "score"):
        rewards = experience.channel(rule)
        figures[f"rewards/{rule}/mean"], figures[f"rewards/{rule}/std"] = rewards.mean(), rewards.std(correction=0)
    heads = heads_of(experience.channels)
    values = experience.values[..., -len(heads) :]
    for index, head in enumerate(heads):
        returns = experience.returns[..., index]
        spread = masked_variance(returns, mask)
        figures[f"value/loss.{head}"] = stats.value_loss[..., index].mean()
        if spread > 1e-8:  # a return that does not vary has no variance to explain
            explained = 1 - masked_variance(returns - values[..., index], mask) / spread
            figures[f"value/explained_variance.{head}"] = explained
    for index, channel in enumerate(experience.channels):
        figures[f"weight/{channel}"] = experience.weights[:, index].mean()
    if step.verdict is not None:
        figures |= step.verdict.figures()
    if step.state.score is not None:
        figures["score/running_deviation"] = step.state.score.deviation
    figures |= dict(step.figures)
    figures |= {f"uncertainty/{name}": mean for name, mean in _means(doubt).items()}
    return {name: float(value) for name, value in figures.items()}


def _means(doubt: Uncertainty) -> dict[str, Tensor]:
    """Over responses, of what is known; a response that has nothing to be compared with does not count."""
    known = {
        "disagreement": doubt.disagreement,
        "beyond_support": doubt.beyond_support,
        "longer_than_training": doubt.longer_than_training,
    }
    return {name: values.float().nanmean() for name, values in known.items() if values is not None}


def step_record(
    step: Step,
    doubt: Uncertainty,
    *,
    learning: UpdateSettings,
    prompts: list[str] | None,
    responses: list[str] | None,
) -> StepRecord:
    """The trace rows of a step, as arrays for the writer's thread; `learning` is what the optimiser was told."""
    experience, stats = step.experience, step.stats
    scored, rollouts = experience.scored, experience.scored.rollouts
    return StepRecord(
        step=step.number,
        policy_version=rollouts.policy_version,
        channels=experience.channels,
        gamma=experience.gamma,
        lam=experience.lam,
        critic=_critic(experience),
        group=_array(rollouts.group_id),
        prompt_ids=_array(rollouts.prompt_ids),
        prompt_mask=_array(rollouts.prompt_mask),
        response_ids=_array(rollouts.response_ids),
        response_mask=_array(rollouts.response_mask),
        ended=_array(rollouts.ended),
        behaviour_logprob=_array(rollouts.behaviour_logprobs),
        old_logprob=_array(scored.old.logprobs),
        reference_logprob=_array(scored.reference.logprobs),
        new_logprob=_array(stats.new_logprobs),
        active=_array(stats.active),
        old_eos_logprob=_array(scored.old.eos_logprobs),
        reference_eos_logprob=_array(scored.reference.eos_logprobs),
        entropy=_array(scored.old.entropy),
        rewards=_array(experience.rewards),
        values=_array(experience.values),
        weights=_array(experience.weights),
        shift=_array(experience.shift),
        scale=_array(experience.scale),
        advantage=_array(experience.advantage()),
        loss_beta=_array(experience.loss_beta),
        learning=_finite(asdict(learning)),
        members=_optional(doubt.members),
        disagreement=_optional(doubt.disagreement),
        support_distance=_optional(doubt.distance),
        prompts=prompts,
        responses=responses,
    )


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
    """For JSON, which has no infinity: a clip that never holds is null."""
    return {name: None if number == math.inf else number for name, number in numbers.items()}


def _critic(experience: Experience) -> str:
    """What predicts the channels: a head each, one for their sum, or no critic at all but a baseline."""
    if experience.scored.values is None:
        return "none"
    return "scalar" if SCALAR_CRITIC in experience.channels else "channels"


def _optional(tensor: Tensor | None) -> NDArray[np.generic] | None:
    return None if tensor is None else _array(tensor)


@torch.no_grad()
def _array(tensor: Tensor) -> NDArray[np.generic]:
    array: NDArray[np.generic] = tensor.detach().cpu().numpy()
    return array
