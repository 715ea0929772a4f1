"""A sampler that is not the learner: older weights, another temperature, a nucleus.

The struct carries both log-probabilities; the ratio of PPO is to the learner as it was when it scored the batch.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab import FREE, prompts_of, score, weights_for
from torch import Tensor

from kedge.experiment.verify.enumerable import EOS, PAD, Space, TableModel, random_table, random_task
from kedge.rollout.engine import TorchEngine
from kedge.structs import Rollouts, Sampling
from kedge.train.experience import make_experience
from kedge.train.update import Learner, UpdateSettings, update

SPACE = Space(3, 3, prompts=2)
TASK = random_task(SPACE, seed=3)
PLAIN = Sampling(3)
LEARNER = TASK.reference + random_table(SPACE, 31, scale=0.5)
STALE = TASK.reference + random_table(SPACE, 32, scale=0.5)


def stale_rollouts(batch: int, sampling: Sampling = PLAIN) -> Rollouts:
    engine = TorchEngine(eos_id=EOS, pad_id=PAD)
    generator = torch.Generator().manual_seed(0)
    return engine.generate(TableModel(SPACE, STALE), prompts_of(SPACE, batch), sampling, generator, policy_version=4)


def index_of(rollouts: Rollouts) -> Tensor:
    return SPACE.index_of(rollouts.response_ids, rollouts.response_mask)


def test_each_log_probability_is_of_its_own_model() -> None:
    rollouts = stale_rollouts(300, Sampling(3, temperature=0.8))
    scored = score(rollouts, TableModel(SPACE, LEARNER), TASK)
    where = rollouts.group_id, index_of(rollouts)
    assert torch.allclose(rollouts.behaviour_logprobs, SPACE.token_logprobs(STALE / 0.8)[where], atol=1e-12)
    assert torch.allclose(scored.old.logprobs, SPACE.token_logprobs(LEARNER)[where], atol=1e-12)
    assert torch.allclose(scored.reference.logprobs, SPACE.token_logprobs(TASK.reference)[where], atol=1e-12)


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(3, top_p=0.7)], ids=["stale weights", "nucleus"])
def test_update_measures_the_ratio_from_the_scored_policy_not_from_the_sampler(sampling: Sampling) -> None:
    rollouts = stale_rollouts(300, sampling)
    policy = TableModel(SPACE, LEARNER)
    experience = make_experience(
        score(rollouts, policy, TASK), weights=weights_for(TASK.beta), gamma=1.0, lam=0.95, whiten=True
    )
    settings = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=FREE)
    learner = Learner(policy, torch.optim.SGD(policy.parameters(), lr=0.1))
    stats = update(learner, experience, settings, torch.Generator(), return_variance=torch.ones(4))
    assert stats.ratio_error.max() < 1e-12
    assert stats.clip_fraction.max() == 0
    gap = (rollouts.behaviour_logprobs - experience.scored.old.logprobs)[rollouts.response_mask]
    assert gap.abs().mean() > 0.05


def test_rewards_charge_the_learners_divergence_not_the_samplers() -> None:
    rollouts = stale_rollouts(300)
    scored = score(rollouts, TableModel(SPACE, LEARNER), TASK)
    experience = make_experience(scored, weights=weights_for(TASK.beta), gamma=1.0, lam=1.0, whiten=False)
    where = rollouts.group_id, index_of(rollouts)
    expected = (SPACE.sequence_logprobs(LEARNER) - TASK.reference_logprobs)[where]
    assert torch.allclose(experience.channel("kl"), expected, atol=1e-12)
    moved = replace(rollouts, behaviour_logprobs=rollouts.behaviour_logprobs - 1)
    again = make_experience(
        replace(scored, rollouts=moved), weights=weights_for(TASK.beta), gamma=1.0, lam=1.0, whiten=False
    )
    assert torch.equal(again.advantage(), experience.advantage())


def test_mean_k1_under_the_sampler_is_a_difference_of_two_divergences() -> None:
    """E_q[log pi / ref] = KL(q || ref) - KL(q || pi): negative where the sampler is closer to the reference."""
    sampler, learner = SPACE.sequence_logprobs(STALE), SPACE.sequence_logprobs(LEARNER)
    to_learner = (sampler.exp() * (sampler - learner)).sum(-1)
    exact = float((TASK.kl(sampler) - to_learner).mean())
    rollouts = stale_rollouts(20_000)
    scored = score(rollouts, TableModel(SPACE, LEARNER), TASK)
    per_response = (scored.old.logprobs - scored.reference.logprobs).sum(dim=1)
    standard_error = float(per_response.std()) / len(rollouts) ** 0.5
    assert float(per_response.mean()) == pytest.approx(exact, abs=4 * standard_error)
