"""`update` on a model of an ordinary family: how a batch is cut does not show, holes and other samplers do no harm."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_learner import BUDGET, EOS, drawn, experience, learner, policy, weights_of

from kedge.errors import DivergenceError
from kedge.rollout.score import token_scores
from kedge.structs import Experience, Rollouts, Sampling
from kedge.train.policy import running_variance
from kedge.train.update import Learner, UpdateSettings, update

SETTINGS = UpdateSettings(epochs=2, minibatches=2, clip=0.2)


def carried_out(of: Learner, batch: Experience, settings: UpdateSettings = SETTINGS, **named):
    generator = torch.Generator().manual_seed(2)
    return update(of, batch, settings, generator, return_variance=running_variance(None, batch), **named)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=tolerance, rtol=0, msg=name)


@pytest.mark.parametrize("scalar", [False, True])
def test_gradients_are_gathered_over_micro_batches(scalar: bool) -> None:
    found = []
    for microbatch in (256, 5, 1):
        of = learner(scalar)
        batch = experience(of)
        stats = carried_out(of, batch, replace(SETTINGS, microbatch=microbatch))
        found.append((weights_of(of.policy), weights_of(of.critic), stats))
    (policy_weights, critic_weights, stats), *others = found
    for other_policy, other_critic, other_stats in others:
        close(policy_weights, other_policy, 2e-5)
        close(critic_weights, other_critic, 2e-5)
        for name, values in stats.scalars().items():
            torch.testing.assert_close(getattr(other_stats, name), values, atol=1e-4, rtol=1e-4, msg=name)
        torch.testing.assert_close(other_stats.new_logprobs, stats.new_logprobs, atol=1e-4, rtol=0)


def test_the_gradient_itself_does_not_depend_on_the_cut() -> None:
    """One plain gradient step: nothing that Adam divides by hides a difference in scale."""
    moved = []
    for microbatch in (256, 3):
        of = learner()
        plain = replace(of, optimizer=torch.optim.SGD(of.policy.parameters(), lr=1.0))
        before = weights_of(of.policy)
        settings = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=1e9, microbatch=microbatch)
        carried_out(plain, experience(of), settings)
        moved.append({name: weight - before[name] for name, weight in weights_of(of.policy).items()})
    close(moved[0], moved[1], 1e-6)
    assert max(float(step.abs().max()) for step in moved[0].values()) > 1e-3


def test_the_first_minibatch_finds_ratio_one_and_later_ones_do_not() -> None:
    of = learner(lr=1e-2)
    stats = carried_out(of, experience(of))
    assert stats.ratio_error.shape == (2, 2)
    assert float(stats.ratio_error[0, 0]) < 1e-5
    assert float(stats.ratio_error[0, 1]) > 1e-3
    assert float(stats.clip_fraction[0, 0]) == 0


def test_steps_raise_what_is_liked() -> None:
    of = learner(lr=1e-2)
    before = experience(of).channel("score").mean()
    for _ in range(15):
        carried_out(of, experience(of))
    assert experience(of).channel("score").mean() > before + 0.5


def test_during_the_critics_warm_up_the_policy_stands_still() -> None:
    of = learner()
    policy_weights, critic_weights = weights_of(of.policy), weights_of(of.critic)
    stats = carried_out(of, experience(of), train_policy=False)
    close(weights_of(of.policy), policy_weights, 0)
    assert any((critic_weights[name] != weight).any() for name, weight in weights_of(of.critic).items())
    assert float(stats.policy_grad_norm.max()) == 0 < float(stats.critic_grad_norm.max())


def test_without_a_critic() -> None:
    of = Learner(policy(), torch.optim.Adam(policy().parameters()))
    of = replace(of, optimizer=torch.optim.Adam(of.policy.parameters(), lr=1e-2))
    before = weights_of(of.policy)
    carried_out(of, experience(of))
    assert any((before[name] != weight).any() for name, weight in weights_of(of.policy).items())


@pytest.mark.parametrize("where", ["policy", "critic"])
def test_what_is_not_finite_is_refused_before_it_reaches_the_weights(where: str) -> None:
    of = learner()
    batch = experience(of)
    if where == "policy":
        batch = replace(batch, weights=batch.weights * float("nan"))
    else:
        batch = replace(batch, returns=batch.returns * float("inf"))
    policy_weights, critic_weights = weights_of(of.policy), weights_of(of.critic)
    with pytest.raises(DivergenceError, match="not finite"):
        generator = torch.Generator().manual_seed(0)
        update(of, batch, SETTINGS, generator, return_variance=torch.ones(batch.returns.shape[-1]))
    close(weights_of(of.policy), policy_weights, 0)
    close(weights_of(of.critic), critic_weights, 0)


# Turns of someone else


def holed(rollouts: Rollouts) -> Rollouts:
    """The second token of every response of three tokens or more is someone else's."""
    mask = rollouts.response_mask.clone()
    mask[rollouts.lengths >= 3, 1] = False
    return replace(rollouts, response_mask=mask, behaviour_logprobs=rollouts.behaviour_logprobs * mask)


def test_a_masked_multi_turn_batch_passes_through() -> None:
    of = learner()
    rollouts = holed(drawn(of.policy))
    hole = rollouts.context_mask & ~rollouts.response_mask
    assert hole.sum() > 10
    batch = experience(of, rollouts)
    for field in (batch.rewards, batch.advantages, batch.returns):
        assert (field[hole] == 0).all()
    assert (batch.advantage()[hole] == 0).all()
    assert torch.equal(batch.channel("length"), rollouts.lengths.float())
    stats = carried_out(of, batch)
    assert float(stats.ratio_error[0, 0]) < 1e-5
    assert (stats.new_logprobs[hole] == 0).all() and not stats.active[hole].any()


def test_no_gradient_enters_at_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    from kedge.train import update as module

    held, logprobs = [], module.response_logprobs

    def watched(model: Any, rollouts: Rollouts, temperature: float) -> torch.Tensor:
        found = logprobs(model, rollouts, temperature)
        found.retain_grad()
        held.append((found, rollouts))
        return found

    monkeypatch.setattr(module, "response_logprobs", watched)
    of = learner()
    settings = UpdateSettings(epochs=1, minibatches=1, clip=0.2, entropy_bonus=0.01)
    carried_out(of, experience(of, holed(drawn(of.policy))), settings)
    ((distribution, rollouts),) = held
    pulled = (distribution.grad != 0).any(dim=-1)
    assert not pulled[~rollouts.response_mask].any()
    assert pulled[rollouts.response_mask].all()


def test_a_sampler_that_differs_from_the_learner() -> None:
    """Answers of another policy, truncated and hotter: ratios start from the learner's own probabilities."""
    of = learner()
    other = policy(seed=4)
    rollouts = drawn(other, sampling=Sampling(BUDGET, temperature=1.3, top_p=0.8))
    batch = experience(of, rollouts)
    own = token_scores(of.policy, rollouts, temperature=1.0, eos_id=EOS).logprobs
    torch.testing.assert_close(batch.scored.old.logprobs, own)
    gap = (rollouts.behaviour_logprobs - own)[rollouts.response_mask].abs().mean()
    assert float(gap) > 0.1
    stats = carried_out(of, batch)
    assert float(stats.ratio_error[0, 0]) < 1e-5
