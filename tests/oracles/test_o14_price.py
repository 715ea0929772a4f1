"""O14: a small natural-gradient step moves the mean of any feature by the step times its covariance with the advantage.

Price's identity, with the advantages that training uses. It is why a channel's covariance with the length is its push
on the length, and why these shares add up.
"""

from __future__ import annotations

import pytest
import torch
from lab import all_rollouts, score, weights_for
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, TableModel, random_table, random_task
from kedge.structs import Experience
from kedge.train.experience import make_experience
from kedge.train.methods import METHODS

SPACE = Space(3, 4)
TASK = random_task(SPACE, seed=5)
POLICY = TASK.reference + random_table(SPACE, 6, scale=0.5)
PROBABILITY = SPACE.sequence_logprobs(POLICY)[0].exp()
FEATURES = {
    "length": SPACE.lengths.double(),
    "ended": SPACE.ended.double(),
    "first letter": SPACE.path[1][:, 0].double(),
}
STEP = 1e-5


def experience(method: str) -> Experience:
    scored = score(all_rollouts(SPACE), TableModel(SPACE, POLICY), TASK)
    return make_experience(scored, weights={**weights_for(TASK.beta), "length": 0.02}, method=METHODS[method])


def covariance(left: Tensor, right: Tensor) -> float:
    mean = (PROBABILITY * left).sum()
    return float((PROBABILITY * (left - mean) * right).sum())


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("method", ["dr_grpo", "rloo", "grpo"])
def test_a_small_step_moves_a_feature_by_its_covariance(method: str, feature: str) -> None:
    phi, advantage = FEATURES[feature], experience(method).advantage()[:, 0]
    tilted = PROBABILITY * torch.exp(STEP * advantage)
    moved = float((tilted / tilted.sum() * phi).sum() - (PROBABILITY * phi).sum())
    assert moved == pytest.approx(STEP * covariance(phi, advantage), rel=1e-3)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_channels_shares_add_up(feature: str) -> None:
    found = experience("dr_grpo")
    phi = FEATURES[feature]
    shares = [covariance(phi, found.weights[0, c] * found.advantages[:, 0, c]) for c in range(len(found.channels))]
    assert sum(shares) == pytest.approx(covariance(phi, found.advantage()[:, 0]), rel=1e-9)
    assert all(abs(share) > 1e-6 for share in shares[:3])


def test_between_any_two_policies_the_covariance_with_the_ratio_is_exact() -> None:
    ratio = SPACE.sequence_logprobs(TASK.reference)[0].exp() / PROBABILITY
    for phi in FEATURES.values():
        moved = float((PROBABILITY * ratio * phi).sum() - (PROBABILITY * phi).sum())
        assert moved == pytest.approx(covariance(phi, ratio), abs=1e-12)
