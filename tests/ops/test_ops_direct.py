"""Direct losses: closed-form values and gradients, and the policy that each is least at, found over all answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples
from torch import Tensor

from kedge.ops.direct import dpo, ipo

margins = st.floats(-12, 12)
ANSWERS = 6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def at(loss: Callable[[Tensor], Tensor], h: float) -> tuple[float, float]:
    """Value and slope."""
    point = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    value = loss(point)
    (slope,) = torch.autograd.grad(value, point)
    return value.item(), slope.item()


@examples
@given(h=margins, beta=st.floats(0.01, 2), rate=st.floats(0, 0.45))
def test_dpo_and_its_slope(h: float, beta: float, rate: float) -> None:
    won = sigmoid(beta * h)
    expected = -(1 - rate) * math.log(won) - rate * math.log(sigmoid(-beta * h))
    value, slope = at(lambda x: dpo(x, beta, rate), h)
    assert value == pytest.approx(expected, abs=1e-8)
    assert slope == pytest.approx(beta * (won - (1 - rate)), abs=1e-8)


def test_dpo_at_the_reference_is_log_2_and_pulls_with_half_of_beta() -> None:
    assert at(lambda x: dpo(x, 0.3), 0.0) == pytest.approx((math.log(2), -0.15))


def test_smoothed_dpo_is_least_where_the_labels_are_as_unsure_as_they_are_said_to_be() -> None:
    best = math.log(0.9 / 0.1) / 0.5
    assert at(lambda x: dpo(x, 0.5, 0.1), best)[1] == pytest.approx(0, abs=1e-12)
    assert at(lambda x: dpo(x, 0.5, 0.1), best + 1)[1] > 0 > at(lambda x: dpo(x, 0.5, 0.1), best - 1)[1]
    assert at(lambda x: dpo(x, 0.5), best + 1)[1] < 0, "without smoothing it falls for ever"


@pytest.mark.parametrize("h", [-5000.0, 5000.0])
def test_dpo_does_not_overflow(h: float) -> None:
    value, slope = at(lambda x: dpo(x, 0.5, 0.1), h)
    assert math.isfinite(value) and math.isfinite(slope)


@examples
@given(h=margins, tau=st.floats(0.02, 3))
def test_ipo_and_its_slope(h: float, tau: float) -> None:
    value, slope = at(lambda x: ipo(x, tau), h)
    assert value == pytest.approx((h - 0.5 / tau) ** 2, rel=1e-9, abs=1e-12)
    assert slope == pytest.approx(2 * h - 1 / tau, rel=1e-9, abs=1e-9)


# The policy each is least at, over all pairs of answers with the exact share of labels


def population(seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a reference [K] and rewards [K]."""
    generator = torch.Generator().manual_seed(seed)
    logits, reward = torch.randn(2, ANSWERS, generator=generator, dtype=torch.float64)
    return logits.log_softmax(dim=0), reward


def least(
    reference: Tensor, wins: Tensor, sampled: Tensor, loss: Callable[[Tensor], Tensor], lengths: Tensor | float = 1.0
) -> Tensor:
    """Probabilities [K] at which the expected loss of pairs is least; `wins[i, j]` is P(i is preferred to j).

    Log-ratios are divided by `lengths`.
    """
    logits = reference.clone().requires_grad_()
    exactly = {"max_iter": 2000, "tolerance_grad": 1e-13, "tolerance_change": 1e-18}
    descent = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **exactly)
    weights = sampled.outer(sampled) * wins

    def closure() -> Tensor:
        descent.zero_grad()
        ratio = (logits.log_softmax(dim=0) - reference) / lengths
        expected = (weights * loss(ratio[:, None] - ratio[None, :])).sum()
        expected.backward()
        return expected

    descent.step(closure)
    return logits.detach().softmax(dim=0)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().sum() / 2)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_leads_to_the_optimum_of_the_reward(seed: int, beta: float) -> None:
    reference, reward = population(seed)
    wins = torch.sigmoid(reward[:, None] - reward[None, :])
    found = least(reference, wins, reference.exp(), lambda h: dpo(h, beta))
    assert distance(found, (reference + reward / beta).softmax(dim=0)) < 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_whoever_sampled_the_pairs_dpo_leads_to_the_same(seed: int) -> None:
    reference, reward = population(seed)
    wins = torch.sigmoid(reward[:, None] - reward[None, :])
    sampled = population(seed + 100)[0].exp()
    assert distance(least(reference, wins, sampled, lambda h: dpo(h, 1.0)), (reference + reward).softmax(dim=0)) < 1e-4


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_ipo_leads_to_the_share_of_answers_beaten(seed: int, tau: float) -> None:
    """Preferences that no reward explains, and a sampler that is not the reference."""
    reference, _ = population(seed)
    sampled = population(seed + 100)[0].exp()
    above = torch.rand(ANSWERS, ANSWERS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    wins = above.triu(1) + (1 - above).T.tril(-1) + torch.eye(ANSWERS, dtype=torch.float64) / 2
    torch.testing.assert_close(wins + wins.T, torch.ones_like(wins))
    beaten = wins @ sampled
    found = least(reference, wins, sampled, lambda h: ipo(h, tau))
    assert distance(found, (reference + beaten / tau).softmax(dim=0)) < 1e-6


def test_smoothing_mixes_the_shares_of_labels() -> None:
    """Two answers: the policy is least at the share of labels once a fifth of them is taken to be flipped."""
    reference, won, rate, beta = torch.tensor([0.6, 0.4], dtype=torch.float64).log(), 0.8, 0.2, 0.7
    wins = torch.tensor([[0.5, won], [1 - won, 0.5]], dtype=torch.float64)
    found = least(reference, wins, reference.exp(), lambda h: dpo(h, beta, rate))
    seen = (1 - rate) * won + rate * (1 - won)
    expected = reference + torch.tensor([math.log(seen / (1 - seen)) / beta, 0.0], dtype=torch.float64)
    assert distance(found, expected.softmax(dim=0)) < 1e-6


def test_a_mean_over_tokens_pays_for_length() -> None:
    """Why the sums: with log-ratios per token the least is at exp(length x share / tau), another policy."""
    reference, _ = population(0)
    sampled, tau = reference.exp(), 1.0
    lengths = torch.arange(1, ANSWERS + 1, dtype=torch.float64)
    wins = torch.full((ANSWERS, ANSWERS), 0.5, dtype=torch.float64)  # nobody prefers anything
    assert distance(least(reference, wins, sampled, lambda h: ipo(h, tau)), sampled) < 1e-6
    better = wins + 0.3 * torch.eye(ANSWERS, dtype=torch.float64)[0][:, None] - 0.3 * torch.eye(ANSWERS)[0][None, :]
    summed, moved = (
        least(reference, better, sampled, lambda h: ipo(h, tau), per).log() - reference for per in (1.0, lengths)
    )
    others = slice(1, None)  # beaten alike, so their log-ratio should be the same
    assert summed[others].std() < 1e-6 < 0.01 < moved[others].std()
