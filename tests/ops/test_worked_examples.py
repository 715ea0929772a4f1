"""The examples that courses on RLHF work through, number by number.

`docs/math.md` and `docs/ppo-sign.md` quote them.
"""

from __future__ import annotations

import math

import pytest
import torch

from kedge.ops.advantages import gae
from kedge.ops.losses import ppo_objective
from kedge.ops.preferences import bradley_terry, preference_probability
from kedge.ops.rewards import at_last_token, kl_rewards

# Prompt "Is my order refundable?". Log-probabilities in nats per token.
#   Yes.                     "Yes"   "."
#   Affirmative, it is.      "Affirmative"   ","   " it is"   "."
POLICY = torch.tensor([[-0.40, -0.10, 0.0, 0.0], [-0.70, -0.10, -0.30, -0.10]], dtype=torch.float64)
REFERENCE = torch.tensor([[-0.50, -0.05, 0.0, 0.0], [-3.50, -0.20, -1.10, -0.20]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False, False], [True, True, True, True]])
SCORES = torch.tensor([1.0, 1.3], dtype=torch.float64)
BETA = 0.1


def test_probability_of_006_against_002_at_advantage_4_is_clipped_to_4_8() -> None:
    new = torch.tensor(math.log(0.06), dtype=torch.float64, requires_grad=True)
    old, advantage = torch.tensor(math.log(0.02), dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    objective, active = ppo_objective(new, old, advantage, clip=0.2)
    assert torch.exp(new - old).item() == pytest.approx(3.0)
    assert objective.item() == pytest.approx(4.8)
    assert not active
    assert torch.autograd.grad(objective, new)[0].item() == 0


def test_a_bad_token_that_became_likelier_costs_3_9_and_is_pulled_back() -> None:
    new = torch.tensor(math.log(1.3), dtype=torch.float64, requires_grad=True)
    old, advantage = torch.tensor(0.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    objective, active = ppo_objective(new, old, advantage, clip=0.2)
    assert objective.item() == pytest.approx(-3.9)
    assert active
    (gradient,) = torch.autograd.grad(objective, new)
    assert gradient.item() == pytest.approx(-3.9)  # ascent lowers the log-probability


def test_scores_1_0_against_1_5_give_probability_03775_and_loss_09741() -> None:
    chosen, rejected = torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    assert preference_probability(chosen - rejected).item() == pytest.approx(0.3775, abs=5e-5)
    assert bradley_terry(chosen - rejected).item() == pytest.approx(0.9741, abs=5e-5)


def test_yes_against_affirmative_penalty_per_token() -> None:
    penalty = -BETA * kl_rewards(POLICY, REFERENCE, MASK)
    expected = torch.tensor([[-0.010, 0.005, 0, 0], [-0.280, -0.010, -0.080, -0.010]], dtype=torch.float64)
    assert torch.allclose(penalty, expected, atol=1e-12)


def test_yes_against_affirmative_penalty_summed_turns_the_preference_round() -> None:
    nats = kl_rewards(POLICY, REFERENCE, MASK).sum(dim=1)
    assert nats.tolist() == pytest.approx([0.05, 3.80])
    rewards = at_last_token(SCORES, MASK) - BETA * kl_rewards(POLICY, REFERENCE, MASK)
    assert rewards.sum(dim=1).tolist() == pytest.approx([0.995, 0.920])
    assert SCORES[1] > SCORES[0] and rewards[0].sum() > rewards[1].sum()


def test_yes_against_affirmative_score_and_last_penalty_share_the_last_token() -> None:
    rewards = at_last_token(SCORES, MASK) - BETA * kl_rewards(POLICY, REFERENCE, MASK)
    assert rewards[0].tolist() == pytest.approx([-0.010, 1.005, 0, 0])
    assert rewards[1].tolist() == pytest.approx([-0.280, -0.010, -0.080, 1.290])


def test_yes_against_affirmative_advantages_split_into_score_and_kl() -> None:
    channels = torch.stack([at_last_token(SCORES, MASK), kl_rewards(POLICY, REFERENCE, MASK)], dim=-1)
    advantages, _ = gae(channels, torch.zeros_like(channels), MASK, gamma=1.0, lam=1.0)
    score, kl = advantages.unbind(dim=-1)
    assert score[1].tolist() == pytest.approx([1.3, 1.3, 1.3, 1.3])
    assert kl[1].tolist() == pytest.approx([3.8, 1.0, 0.9, 0.1])
    assert (score - BETA * kl)[1, 0].item() == pytest.approx(0.920)
