"""O1 and O2: the closed form of the KL-regularised optimum, and exact optimisers that reach it.

These hold the oracle itself to account: three independent routes to pi* must meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, Task, random_task

SPACES = [Space(2, 2), Space(3, 4), Space(3, 3, prompts=3)]


def test_the_largest_space_has_121_sequences() -> None:
    assert len(Space(3, 4).sequences) == 121


@pytest.mark.parametrize("space", SPACES)
def test_probabilities_sum_to_one(space: Space) -> None:
    task = random_task(space)
    for logprobs in (task.reference_logprobs, task.optimum):
        assert (logprobs.exp().sum(dim=-1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("space", SPACES)
def test_best_objective_is_beta_log_z(space: Space) -> None:
    task = random_task(space)
    assert abs(float(task.objective(task.optimum) - task.beta * task.log_z.mean())) < 1e-10
    expected_kl = ((task.optimum.exp() * task.reward).sum(dim=-1) - task.beta * task.log_z) / task.beta
    assert (task.kl(task.optimum) - expected_kl).abs().max() < 1e-10


@pytest.mark.parametrize("space", SPACES)
def test_derivatives_in_beta(space: Space) -> None:
    task, step = random_task(space), 1e-5

    def at(beta: float, quantity: Callable[[Task], Tensor]) -> float:
        return float(quantity(replace(task, beta=beta)))

    def slope(quantity: Callable[[Task], Tensor]) -> float:
        return (at(task.beta + step, quantity) - at(task.beta - step, quantity)) / (2 * step)

    probability = task.optimum.exp()
    variance = (probability * task.reward**2).sum(dim=-1) - (probability * task.reward).sum(dim=-1) ** 2
    best_slope = slope(lambda t: t.objective(t.optimum))
    assert best_slope == pytest.approx(-float(task.kl(task.optimum).mean()), rel=1e-6)
    kl_slope = slope(lambda t: t.kl(t.optimum).mean())
    assert kl_slope == pytest.approx(-float(variance.mean()) / task.beta**3, rel=1e-6)


@pytest.mark.parametrize("space", SPACES)
def test_soft_bellman_policy_is_the_tilted_reference(space: Space) -> None:
    task = random_task(space)
    gap = task.space.sequence_logprobs(task.soft_bellman()) - task.optimum
    assert gap.abs().max() < 1e-10


def test_penalised_reward_is_constant_at_the_optimum() -> None:
    task = random_task(Space(3, 3, prompts=2))
    penalised = task.reward - task.beta * (task.optimum - task.reference_logprobs)
    assert penalised.std(dim=-1).max() < 1e-12


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The table at which `loss` has its minimum, by L-BFGS in double precision."""
    table = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimizer.step(closure)
    return table.detach()


def test_exact_gradient_ascent_reaches_the_optimum() -> None:
    task = random_task(Space(3, 3, prompts=2))
    table = minimise(lambda t: -task.objective(task.space.sequence_logprobs(t)), task.reference)
    assert task.distance(table) < 1e-3
    assert float(task.objective(task.optimum) - task.objective(task.space.sequence_logprobs(table))) < 1e-5


def test_direct_preference_optimisation_with_population_labels_reaches_the_optimum() -> None:
    task = random_task(Space(3, 2, prompts=2))
    wins = torch.sigmoid(task.reward[:, :, None] - task.reward[:, None, :])  # [prompts, N, N]
    pairs = task.reference_logprobs.exp()[:, :, None] * task.reference_logprobs.exp()[:, None, :]

    def loss(table: Tensor) -> Tensor:
        implicit = task.beta * (task.space.sequence_logprobs(table) - task.reference_logprobs)
        return -(pairs * wins * (implicit[:, :, None] - implicit[:, None, :]).sigmoid().log()).sum()

    table = minimise(loss, task.reference)
    assert task.distance(table) < 1e-3
    assert float(task.objective(task.optimum) - task.objective(task.space.sequence_logprobs(table))) < 1e-5


def test_the_reference_is_far_from_the_optimum() -> None:
    task = random_task(Space(3, 3, prompts=2))
    assert task.distance(task.reference) > 0.2
