"""O2: the pair losses with the population's labels reach their optima, and every optimum in closed form is one.

`ops.direct` is minimised over all pairs of a space, each label weighed by its probability; nothing is sampled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from test_o01_closed_form import minimise
from torch import Tensor

from kedge.experiment.verify import optima
from kedge.experiment.verify.enumerable import Space, random_task
from kedge.ops.advantages import group_deviation, group_mean
from kedge.ops.direct import dpo, ipo
from kedge.train.experience import GROUP_EPSILON

TASK = random_task(Space(2, 2, prompts=2), seed=3, spread=1.5, beta=1.5)
SPACE = TASK.space
WINS = torch.sigmoid(TASK.reward[:, :, None] - TASK.reward[:, None, :])
TAU = 0.15


def log_ratio(table: Tensor) -> Tensor:
    """[prompts, N, N] difference of log(pi / reference) of every two responses."""
    ratio = SPACE.sequence_logprobs(table) - TASK.reference_logprobs
    return ratio[:, :, None] - ratio[:, None, :]


def at_least(loss: Callable[[Tensor], Tensor], sampler: Tensor) -> Tensor:
    """[prompts, N] the policy at which the mean `loss` over pairs from `sampler` is least, judged by annotators."""
    pairs = sampler.exp()[:, :, None] * sampler.exp()[:, None, :]
    table = minimise(lambda t: (pairs * WINS * loss(log_ratio(t))).sum(), TASK.reference)
    return SPACE.sequence_logprobs(table)


@pytest.mark.parametrize("sampler", ["reference", "uniform"])
def test_dpo_with_the_population_s_labels_ends_at_the_tilt_whoever_sampled(sampler: str) -> None:
    drawn = TASK.reference_logprobs if sampler == "reference" else torch.zeros_like(TASK.reward).log_softmax(-1)
    reached = at_least(lambda h: dpo(h, TASK.beta), drawn)
    assert optima.variation(reached, TASK.optimum) < 1e-3
    assert float(TASK.objective(TASK.optimum) - TASK.objective(reached)) < 1e-5


@pytest.mark.parametrize("sampler", ["reference", "uniform"])
def test_ipo_with_the_population_s_labels_ends_where_its_sampler_says(sampler: str) -> None:
    uniform = torch.zeros_like(TASK.reward).log_softmax(-1)
    drawn, other = (TASK.reference_logprobs, uniform) if sampler == "reference" else (uniform, TASK.reference_logprobs)
    reached = at_least(lambda h: ipo(h, TAU), drawn)
    assert optima.variation(reached, optima.ipo(TASK, drawn, TAU)) < 1e-3
    assert optima.variation(reached, optima.ipo(TASK, other, TAU)) > 0.005
    assert optima.variation(reached, TASK.optimum) > 0.05


def test_smoothed_labels_by_rank_have_no_gradient_at_their_fixed_point() -> None:
    """By automatic differentiation of the mean loss over the policy's own pairs, the sampler held fixed."""
    smoothing = 0.2
    found = optima.ranked_pairs(TASK, smoothing)
    above = (TASK.reward[:, :, None] > TASK.reward[:, None, :]).double()
    ratio = (found - TASK.reference_logprobs).requires_grad_()
    own = found.exp()[:, :, None] * found.exp()[:, None, :]
    loss = (own * above * dpo(ratio[:, :, None] - ratio[:, None, :], TASK.beta, smoothing)).sum()
    (gradient,) = torch.autograd.grad(loss, ratio)
    assert gradient.abs().max() < 1e-10
    assert optima.variation(found, TASK.reference_logprobs) > 0.05


@pytest.mark.parametrize("group", [2, 4])
def test_grpo_s_fixed_point_by_listing_every_group(group: int) -> None:
    """The mean coefficient of each response, over all ordered groups, times 1 / L, has no gradient."""
    found = optima.grpo(TASK, group, GROUP_EPSILON)
    count = len(SPACE.sequences)
    rows = torch.tensor(list(itertools.product(range(count), repeat=group)))
    for prompt in range(SPACE.prompts):
        reward = TASK.reward[prompt, rows]  # [groups, group]
        number = torch.arange(len(rows)).repeat_interleave(group)
        flat = reward.flatten()
        advantage = (flat - group_mean(flat, number)) / (group_deviation(flat, number) + GROUP_EPSILON)
        chance = found[prompt][rows].sum(dim=1).exp()
        mass = torch.zeros(count, dtype=torch.float64)
        mean = mass.index_add(0, rows.flatten(), (advantage.view_as(rows) * chance[:, None]).flatten() / group)
        pull = mean - TASK.beta * found[prompt].exp() * (found[prompt] - TASK.reference_logprobs[prompt])
        coefficient = pull / SPACE.lengths  # of grad log pi(y), its probability included
        probability = found[prompt].exp()
        assert float(probability.sum()) == pytest.approx(1)
        assert (coefficient - probability * coefficient.sum()).abs().max() < 1e-9
    assert optima.variation(found, TASK.optimum) > 0.1
