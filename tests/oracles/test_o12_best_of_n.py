"""O12: the best of n answers on an enumerable space: its exact distribution, its KL, the bound and the estimate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kedge.experiment.verify.direct import kept
from kedge.experiment.verify.enumerable import Space, random_task
from kedge.experiment.verify.optima import best_of, divergence, variation
from kedge.ops.bestofn import bon_kl_bound, bon_kl_estimate

TASK = random_task(Space(2, 2, prompts=2), seed=3)


def by_listing(n: int) -> Tensor:
    """[prompts, N] the best of every n-tuple of responses, and whether all were the same."""
    found = torch.zeros_like(TASK.reward)
    for prompt in range(TASK.space.prompts):
        probability = TASK.reference_logprobs[prompt].exp().tolist()
        reward = TASK.reward[prompt].tolist()
        for drawn in itertools.product(range(len(reward)), repeat=n):
            found[prompt, max(drawn, key=reward.__getitem__)] += math.prod(probability[y] for y in drawn)
    return found


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_closed_form_is_what_listing_all_draws_gives(n: int) -> None:
    best = best_of(TASK.reference_logprobs, TASK.reward, n).exp()
    assert torch.allclose(best, by_listing(n), atol=1e-12)


def test_the_closed_form_given_that_the_answers_differ() -> None:
    same = TASK.reference_logprobs.exp() ** 3
    expected = (by_listing(3) - same) / (1 - same.sum(dim=-1, keepdim=True))
    assert torch.allclose(best_of(TASK.reference_logprobs, TASK.reward, 3, unlike=True).exp(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("space", [Space(2, 2, prompts=2), Space(3, 4)], ids=["7", "121"])
def test_kl_is_below_the_bound_and_near_the_estimate(space: Space, n: int) -> None:
    task = random_task(space, seed=3)
    best = best_of(task.reference_logprobs, task.reward, n)
    exact = divergence(best, task.reference_logprobs)
    estimate = (best.exp() * bon_kl_estimate(task.reference_logprobs, n)).sum(dim=-1).mean()
    assert exact <= bon_kl_bound(n) + 1e-12
    assert float(estimate) == pytest.approx(exact, abs=0.08)


def test_ten_answers_alike_are_far_below_the_bound() -> None:
    """The best of them is chosen nearly for certain: log 10 nats, where the usual formula says 3.175."""
    alike = torch.full((1, 10), 0.1, dtype=torch.float64).log()
    best = best_of(alike, torch.arange(10.0).unsqueeze(0), 64)
    assert divergence(best, alike) == pytest.approx(math.log(10), abs=0.02)
    assert bon_kl_bound(64) == pytest.approx(3.175, abs=1e-3)
    assert float((best.exp() * bon_kl_estimate(alike, 64)).sum()) == pytest.approx(divergence(best, alike), abs=0.03)


@pytest.mark.parametrize("n", [1, 3])
def test_the_sampler_follows_the_closed_form(n: int) -> None:
    best = best_of(TASK.reference_logprobs, TASK.reward, n)
    assert variation(kept(TASK, n, draws=40_000), best) < 0.02
    assert variation(kept(TASK, n, draws=40_000), best_of(TASK.reference_logprobs, TASK.reward, n + 1)) > 0.05
