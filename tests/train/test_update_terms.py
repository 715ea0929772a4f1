"""The terms of the policy loss beside the clipped surrogate, through `update` and one plain gradient step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_learner import drawn, experience, learner, policy, weights_of
from torch import Tensor

from kedge.rollout.score import response_logprobs
from kedge.structs import Experience, Rollouts
from kedge.train.policy import running_variance
from kedge.train.update import Learner, UpdateSettings, update

ONCE = UpdateSettings(epochs=1, minibatches=1, clip=0.2, max_grad_norm=1e9)
Loss = Callable[[Any, Experience], Tensor]


def moved_by(settings: UpdateSettings, batch: Experience, of: Learner, **named: Any) -> dict[str, Tensor]:
    """How one step of plain gradient descent at rate 1 changes the policy."""
    plain = replace(of, optimizer=torch.optim.SGD(of.policy.parameters(), lr=1.0))
    before = weights_of(of.policy)
    update(plain, batch, settings, torch.Generator(), return_variance=running_variance(None, batch), **named)
    return {name: weight - before[name] for name, weight in weights_of(of.policy).items()}


def descent(loss: Loss, batch: Experience) -> dict[str, Tensor]:
    """Minus the gradient of a loss written out by hand, on a fresh copy of the same policy."""
    model = policy(0)
    loss(model, batch).backward()
    return {name: -parameter.grad for name, parameter in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert any(step.abs().max() > 1e-4 for step in other.values())
    for name, step in other.items():
        torch.testing.assert_close(one[name], step, atol=2e-6, rtol=1e-3, msg=name)


def ready(**changes: Any) -> tuple[Learner, Experience]:
    of = learner()
    batch = experience(of)
    return of, replace(batch, **changes) if changes else batch


def per_response(model: Any, rollouts: Rollouts) -> list[tuple[int, Tensor, Tensor]]:
    """Row, log-probabilities of its tokens [t] and next-token distributions [t, V]."""
    distribution = response_logprobs(model, rollouts, 1.0)
    rows = []
    for b in range(len(rollouts)):
        kept = rollouts.response_mask[b].nonzero().squeeze(1)
        taken = distribution[b, kept].gather(1, rollouts.response_ids[b, kept].unsqueeze(1)).squeeze(1)
        rows.append((b, taken, distribution[b, kept]))
    return rows


def surrogate(model: Any, batch: Experience) -> Tensor:
    """- sum_t A_t log pi / tokens: at ratio 1 the gradient of the surrogate under the token mean."""
    rollouts = batch.scored.rollouts
    advantage = batch.advantage()
    total = sum((advantage[b, : len(lp)] * lp).sum() for b, lp, _ in per_response(model, rollouts))
    return -total / rollouts.response_mask.sum()


BETA = torch.linspace(0.0, 1.0, 32)


def with_sequence_kl(model: Any, batch: Experience) -> Tensor:
    rollouts, reference = batch.scored.rollouts, batch.scored.reference.logprobs
    kl = sum(BETA[b] * ((lp - reference[b, : len(lp)]).sum() ** 2) / 2 for b, lp, _ in per_response(model, rollouts))
    return surrogate(model, batch) + kl / rollouts.response_mask.sum()


def with_full_kl(model: Any, batch: Experience) -> Tensor:
    """Written as the score function of the whole: E[sum_t (KL_t's gradient + KL after t times grad log pi)]."""
    rollouts = batch.scored.rollouts
    usual = per_response(policy(seed=9), rollouts)
    total = torch.zeros(())
    for (b, lp, own), (_, _, ref) in zip(per_response(model, rollouts), usual, strict=True):
        each = (own.exp() * (own - ref.detach())).sum(dim=-1)
        after = torch.tensor([each[t + 1 :].sum().item() for t in range(len(each))])
        total = total + BETA[b] * (each + after * lp).sum()
    return surrogate(model, batch) + total / rollouts.response_mask.sum()


@pytest.mark.parametrize(("name", "loss"), [("k2", with_sequence_kl), ("full", with_full_kl)])
def test_the_kl_terms_move_the_policy_by_their_gradients(name: str, loss: Loss) -> None:
    of, batch = ready(loss_beta=BETA)
    settings = replace(ONCE, kl_loss=name, microbatch=7)
    same(moved_by(settings, batch, of, reference=policy(seed=9)), descent(loss, batch))


def test_no_kl_term_is_the_surrogate_alone() -> None:
    of, batch = ready(loss_beta=BETA)
    same(moved_by(ONCE, batch, of), descent(surrogate, batch))


def test_importance_weights_multiply_the_advantage() -> None:
    """The sampler found some tokens half as likely as the learner does, others four times as likely."""
    of, batch = ready()
    rollouts = batch.scored.rollouts
    factor = torch.where(torch.arange(rollouts.response_ids.shape[1]) % 2 == 0, 0.5, 4.0).log()
    other = replace(rollouts, behaviour_logprobs=batch.scored.old.logprobs + factor)
    sampled = replace(batch, scored=replace(batch.scored, rollouts=other))
    weights = torch.where(torch.arange(rollouts.response_ids.shape[1]) % 2 == 0, 1.5, 0.25)

    def weighted(model: Any, of: Experience) -> Tensor:
        advantage = of.advantage() * weights
        total = sum((advantage[b, : len(lp)] * lp).sum() for b, lp, _ in per_response(model, rollouts))
        return -total / rollouts.response_mask.sum()

    same(moved_by(replace(ONCE, importance_cap=1.5), sampled, of), descent(weighted, batch))


@pytest.mark.parametrize("aggregation", ["sequence_sum", "sequence_mean", "constant"])
def test_aggregations_through_update_whatever_the_cut(aggregation: str) -> None:
    of, batch = ready(loss_beta=BETA)

    def by_hand(model: Any, of: Experience) -> Tensor:
        rollouts, advantage = of.scored.rollouts, of.advantage()
        total = torch.zeros(())
        for b, lp, _ in per_response(model, rollouts):
            weight = {"sequence_sum": 1.0, "sequence_mean": 1 / len(lp), "constant": 1 / 10}[aggregation]
            gap = (lp - of.scored.reference.logprobs[b, : len(lp)]).sum()
            total = total + weight * (-(advantage[b, : len(lp)] * lp).sum() + BETA[b] * gap**2 / 2)
        return total / len(rollouts)

    settings = replace(ONCE, aggregation=aggregation, budget=10, kl_loss="k2", microbatch=5)
    same(moved_by(settings, batch, of), descent(by_hand, batch))


def test_demonstrations_add_their_mean_loss() -> None:
    of, batch = ready()
    shown = drawn(policy(seed=5), count=6)

    def mixed(model: Any, of: Experience) -> Tensor:
        nll = -sum(lp.sum() for _, lp, _ in per_response(model, shown)) / shown.response_mask.sum()
        return surrogate(model, of) + 0.3 * nll

    settings = replace(ONCE, mix_weight=0.3)
    same(moved_by(settings, batch, of, mix=lambda _epoch, _number: shown), descent(mixed, batch))


def test_past_its_limit_the_policy_rests_and_the_critic_goes_on() -> None:
    of, batch = ready()
    asked = []

    def stop(new: Tensor, old: Tensor, usual: Tensor, mask: Tensor) -> bool:
        asked.append((new.shape, old.shape, usual.shape, mask.shape))
        return len(asked) == 3

    settings = UpdateSettings(epochs=2, minibatches=2, clip=0.2)
    policies, critics = [], []
    step = of.optimizer.step
    of.optimizer.step = lambda *a, **k: (policies.append(1), step(*a, **k))  # type: ignore[method-assign]
    critic_step = of.critic_optimizer.step
    of.critic_optimizer.step = lambda *a, **k: (critics.append(1), critic_step(*a, **k))  # type: ignore[method-assign]
    stats = update(
        of, batch, settings, torch.Generator().manual_seed(0), return_variance=running_variance(None, batch), stop=stop
    )
    assert (len(policies), len(critics)) == (2, 4)
    assert stats.left_out.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert len(asked) == 3 and all(shape[0] == 16 for shapes in asked for shape in shapes)
