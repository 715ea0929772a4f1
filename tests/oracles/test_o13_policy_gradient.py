"""O13: the mean gradient of the production update is the exact gradient of J, coordinate by coordinate."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from lab import ascent_per_response, generate, score, weights_for, z_scores
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, TableCritic, TableModel, Task, random_table, random_task

SPACE = Space(3, 3, prompts=2)
TASK = random_task(SPACE, seed=6)
POLICY = TASK.reference + random_table(SPACE, 21, scale=0.6)


def exact_gradient(task: Task) -> Tensor:
    table = POLICY.clone().requires_grad_()
    return torch.autograd.grad(task.objective(SPACE.sequence_logprobs(table)), table)[0]


def z_of(weights: Mapping[str, float], exact: Tensor, critic: TableCritic | None = None) -> float:
    """The worst coordinate over 100,000 responses in 50 batches from `generate`."""
    policy, generator = TableModel(SPACE, POLICY), torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        rollouts = generate(SPACE, policy, 2000, generator)
        return ascent_per_response(score(rollouts, policy, TASK, critic), policy, weights)

    return float(z_scores(draw, exact).max())


@pytest.mark.parametrize("heads", [None, 1, 4])
def test_mean_gradient_is_the_gradient_of_the_objective(heads: int | None) -> None:
    """Any critic is a valid baseline at lambda 1, since it values what comes before the token."""
    critic = None if heads is None else TableCritic(SPACE, random_table(SPACE, 8, width=heads))
    assert z_of(weights_for(TASK.beta), exact_gradient(TASK), critic) < 4


def test_length_and_missing_eos_penalties_have_their_exact_gradient() -> None:
    penalised = TASK.reward - 0.3 * SPACE.lengths - 0.8 * (~SPACE.ended).double()
    exact = exact_gradient(Task(SPACE, TASK.reference, penalised, TASK.beta))
    assert z_of({"score": 1.0, "kl": -TASK.beta, "length": -0.3, "missing_eos": -0.8}, exact) < 4


class LateCritic(TableCritic):
    """Wrong on purpose: it values what follows the token."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None, **_: object
    ) -> Tensor:
        return super().forward(input_ids, attention_mask).roll(-1, dims=1)


WRONG: dict[str, tuple[Mapping[str, float], TableCritic | None]] = {
    "KL dropped": (weights_for(0.0), None),
    "KL of the wrong sign": (weights_for(-TASK.beta), None),
    "a stray length penalty": ({**weights_for(TASK.beta), "length": -0.3}, None),
    "values after the token": (weights_for(TASK.beta), LateCritic(SPACE, random_table(SPACE, 8, width=4))),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_gradients_are_seen(name: str) -> None:
    weights, critic = WRONG[name]
    assert z_of(weights, exact_gradient(TASK), critic) > 6
