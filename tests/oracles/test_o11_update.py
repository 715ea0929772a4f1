"""O11: the truth table of the clipped surrogate, and every other part of `update`, through the production function.

Gradients are read off the table after a step of size zero and compared with sums over tokens written out here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lab import FREE, all_rollouts, score, weights_for
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.experiment.verify.enumerable import EOS, Space, TableCritic, TableModel, Task, random_table, random_task
from kedge.rollout.score import token_scores
from kedge.structs import Experience, TokenScores, UpdateStats
from kedge.train.experience import make_experience
from kedge.train.update import Learner, UpdateSettings, update

SPACE = Space(3, 3)
TASK = random_task(SPACE)
# ratio, advantage -> coefficient of grad log pi: ratio * advantage where the clip lets it through
TRUTH = {
    (0.7, 3.0): (2.1, True),
    (1.0, 3.0): (3.0, True),
    (1.3, 3.0): (3.6, False),
    (0.7, -3.0): (-2.4, False),
    (1.0, -3.0): (-3.0, True),
    (1.3, -3.0): (-3.9, True),
}


def learner_of(policy: TableModel, critic: TableCritic | None = None, lr: float = 0.0) -> Learner:
    critic_optimizer = None if critic is None else torch.optim.SGD(critic.parameters(), lr=lr)
    return Learner(policy, torch.optim.SGD(policy.parameters(), lr=lr), critic, critic_optimizer)


def experience_with(policy: TableModel, task: Task, ratio: Tensor, advantage: Tensor) -> Experience:
    """Every sequence once, with this `ratio` of the policy to the old policy and this `advantage`, both [N, T]."""
    scored = score(all_rollouts(SPACE), policy, task)
    mask = scored.rollouts.response_mask
    old = TokenScores((scored.old.logprobs - ratio.log()) * mask, scored.old.eos_logprobs, scored.old.entropy)
    experience = make_experience(scored, weights=weights_for(task.beta), gamma=1.0, lam=1.0, whiten=False)
    advantages = torch.zeros_like(experience.advantages)
    advantages[..., 0] = advantage * mask
    return replace(experience, scored=replace(scored, old=old), advantages=advantages)


def once(
    learner: Learner,
    experience: Experience,
    *,
    entropy_bonus: float = 0.0,
    microbatch: int = 1000,
    train_policy: bool = True,
    variance: Tensor | None = None,
    max_grad_norm: float = FREE,
) -> UpdateStats:
    settings = UpdateSettings(
        epochs=1,
        minibatches=1,
        clip=0.2,
        value_clip=0.5,
        entropy_bonus=entropy_bonus,
        max_grad_norm=max_grad_norm,
        microbatch=microbatch,
    )
    variance = torch.ones(experience.returns.shape[-1], dtype=torch.float64) if variance is None else variance
    return update(
        learner,
        experience,
        settings,
        torch.Generator().manual_seed(0),
        return_variance=variance,
        train_policy=train_policy,
    )


def gradient_of(policy: TableModel, coefficients: Tensor) -> Tensor:
    """-grad of sum over tokens of coefficient * log pi, over the number of tokens: what descent should see."""
    table = policy.table.detach().clone().requires_grad_()
    logprobs = SPACE.token_logprobs(table)[0]
    total = (coefficients * logprobs * SPACE.mask).sum() / SPACE.mask.sum()
    return -torch.autograd.grad(total, table)[0]


@pytest.mark.parametrize(("ratio", "advantage"), TRUTH)
def test_truth_table_through_update(ratio: float, advantage: float) -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    shape = SPACE.mask.shape
    ratios, advantages = (torch.full(shape, x, dtype=torch.float64) for x in (ratio, advantage))
    stats = once(learner_of(policy), experience_with(policy, TASK, ratios, advantages))
    value, active = TRUTH[ratio, advantage]
    assert stats.policy_loss.item() == pytest.approx(-value, rel=1e-6)
    assert torch.equal(stats.active, SPACE.mask & active)
    assert stats.clip_fraction.item() == pytest.approx(0.0 if active else 1.0, abs=1e-6)
    assert stats.ratio_max.item() == pytest.approx(max(ratio, 1.0))
    assert stats.ratio_error.item() == pytest.approx(abs(ratio - 1), abs=1e-6)
    assert policy.table.grad is not None
    coefficients = torch.full(shape, ratio * advantage if active else 0.0, dtype=torch.float64)
    assert torch.allclose(policy.table.grad, gradient_of(policy, coefficients), atol=1e-6)


@pytest.mark.parametrize("microbatch", [1000, 7, 1])
def test_a_mixed_batch_is_a_token_mean_however_it_is_cut(microbatch: int) -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    generator = torch.Generator().manual_seed(5)
    choice = torch.randint(len(TRUTH), SPACE.mask.shape, generator=generator)
    table = torch.tensor([[r, a, value, active] for (r, a), (value, active) in TRUTH.items()], dtype=torch.float64)
    ratio, advantage, value, active = table[choice].unbind(-1)
    stats = once(learner_of(policy), experience_with(policy, TASK, ratio, advantage), microbatch=microbatch)
    tokens = SPACE.mask
    assert stats.policy_loss.item() == pytest.approx(-value[tokens].mean().item(), rel=1e-6)
    assert stats.clip_fraction.item() == pytest.approx(1 - active[tokens].mean().item(), abs=1e-6)
    assert stats.approx_kl.item() == pytest.approx((ratio - 1 - ratio.log())[tokens].mean().item(), rel=1e-6)
    assert torch.equal(stats.active, tokens & active.bool())
    assert policy.table.grad is not None
    assert torch.allclose(policy.table.grad, gradient_of(policy, ratio * advantage * active), atol=1e-6)
    expected = SPACE.token_logprobs(policy.table.detach())[0]
    assert torch.allclose(stats.new_logprobs, expected, atol=1e-12)


def test_entropy_bonus_climbs_the_mean_entropy_of_the_tokens() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    nothing = torch.zeros(SPACE.mask.shape, dtype=torch.float64)
    stats = once(learner_of(policy), experience_with(policy, TASK, nothing + 1, nothing), entropy_bonus=0.3)
    table = policy.table.detach().clone().requires_grad_()
    logprobs = table[0].log_softmax(-1)
    per_state = -(logprobs.exp() * logprobs).sum(-1)
    mean = (per_state[SPACE.path[0]] * SPACE.mask).sum() / SPACE.mask.sum()
    assert stats.entropy.item() == pytest.approx(mean.item(), rel=1e-6)
    assert policy.table.grad is not None
    assert torch.allclose(policy.table.grad, -0.3 * torch.autograd.grad(mean, table)[0], atol=1e-6)


def test_critic_gradient_is_the_clipped_error_over_the_variance() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    critic = TableCritic(SPACE, random_table(SPACE, 4, width=4))
    scored = score(all_rollouts(SPACE), policy, TASK, critic)
    experience = make_experience(scored, weights=weights_for(0.5), gamma=1.0, lam=0.9, whiten=True)
    generator = torch.Generator().manual_seed(1)
    old_values = experience.values + torch.randn(experience.values.shape, generator=generator, dtype=torch.float64)
    experience = replace(experience, values=old_values)
    variance = torch.tensor([0.5, 1.0, 4.0, 2.0], dtype=torch.float64)
    stats = once(learner_of(policy, critic), experience, train_policy=False, variance=variance)
    assert policy.table.grad is None
    table, states = critic.table.detach(), SPACE.path[0]
    expected, losses = torch.zeros_like(table), torch.zeros(4, dtype=torch.float64)
    for n, t in SPACE.mask.nonzero().tolist():
        for h in range(4):
            value, old = table[0, states[n, t], h].item(), old_values[n, t, h].item()
            target, limit = experience.returns[n, t, h].item(), 0.5 * variance[h].item() ** 0.5
            held = old + max(-limit, min(limit, value - old))
            free_error, held_error = (value - target) ** 2, (held - target) ** 2
            losses[h] += max(free_error, held_error) / 2 / variance[h]
            if free_error >= held_error:
                expected[0, states[n, t], h] += (value - target) / variance[h]
    tokens = SPACE.mask.sum()
    assert critic.table.grad is not None
    assert torch.allclose(critic.table.grad, expected / tokens, atol=1e-6)
    assert torch.allclose(stats.value_loss.flatten(), losses / tokens, rtol=1e-6)


def test_policy_and_critic_each_have_their_gradient_clipped() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    critic = TableCritic(SPACE, random_table(SPACE, 4, width=4))
    scored = score(all_rollouts(SPACE), policy, TASK, critic)
    experience = make_experience(scored, weights=weights_for(0.5), gamma=1.0, lam=0.9, whiten=True)
    before = policy.table.detach().clone(), critic.table.detach().clone()
    stats = once(learner_of(policy, critic, lr=1.0), experience, max_grad_norm=1e-3)
    for norm, module, start in zip(
        (stats.policy_grad_norm, stats.critic_grad_norm), (policy, critic), before, strict=True
    ):
        assert norm.item() > 1e-3
        assert (module.table.detach() - start).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_warm_up_leaves_the_policy_alone() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    critic = TableCritic(SPACE, random_table(SPACE, 4, width=4))
    scored = score(all_rollouts(SPACE), policy, TASK, critic)
    experience = make_experience(scored, weights=weights_for(0.5), gamma=1.0, lam=0.9, whiten=True)
    before = policy.table.detach().clone(), critic.table.detach().clone()
    once(learner_of(policy, critic, lr=0.1), experience, train_policy=False)
    assert torch.equal(policy.table, before[0])
    assert not torch.equal(critic.table, before[1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_ratio_is_one_at_the_sampling_temperature(temperature: float) -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    scored = score(all_rollouts(SPACE), policy, TASK)
    tempered = token_scores(policy, scored.rollouts, temperature=temperature, eos_id=EOS)
    scored = replace(scored, old=tempered)
    experience = make_experience(scored, weights=weights_for(0.5), gamma=1.0, lam=1.0, whiten=True)
    settings = UpdateSettings(epochs=2, minibatches=3, clip=0.2, max_grad_norm=FREE, temperature=temperature)
    learner = learner_of(policy, lr=1.0)
    stats = update(learner, experience, settings, torch.Generator(), return_variance=torch.ones(4))
    assert stats.ratio_error.shape == (2, 3)
    assert stats.ratio_error[0, 0] < 1e-12
    assert (stats.ratio_error.flatten()[1:] > 1e-4).all()


def test_every_response_is_used_once_an_epoch() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    ones = torch.ones(SPACE.mask.shape, dtype=torch.float64)
    experience = experience_with(policy, TASK, ones, ones)
    settings = UpdateSettings(epochs=1, minibatches=4, clip=0.2, max_grad_norm=FREE)
    stats = update(learner_of(policy), experience, settings, torch.Generator(), return_variance=torch.ones(4))
    assert torch.equal(stats.active, SPACE.mask)
    assert torch.allclose(stats.new_logprobs, SPACE.token_logprobs(policy.table.detach())[0])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    ones = torch.ones(SPACE.mask.shape, dtype=torch.float64)
    before = policy.table.detach().clone()
    with pytest.raises(DivergenceError):
        once(learner_of(policy, lr=0.1), experience_with(policy, TASK, ones, ones * float("nan")))
    assert torch.equal(policy.table, before)


def test_eos_logprob_is_the_models() -> None:
    policy = TableModel(SPACE, random_table(SPACE, 3))
    scored = score(all_rollouts(SPACE), policy, TASK)
    expected = policy.table.detach().log_softmax(-1)[0, SPACE.path[0], 0] * SPACE.mask
    assert SPACE.tokens[0] == EOS
    assert torch.allclose(scored.old.eos_logprobs, expected, atol=1e-12)
