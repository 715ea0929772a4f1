"""O10: with nothing to gain, the KL term alone must bring a displaced policy back to the reference.

k1 in the reward does, and so do k2 of the sequence and the whole vocabulary in the loss. k2, k3 and |k1| in the reward
do not: they push the policy away. k1 in the loss is noise.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lab import Ppo, train
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, Task, random_table
from kedge.ops.kl import absolute, k2, k3

SPACE = Space(3, 3)
TASK = Task(SPACE, random_table(SPACE, 0), torch.zeros(1, len(SPACE.sequences), dtype=torch.float64), beta=1.0)
DISPLACED = TASK.reference + random_table(SPACE, 9, scale=0.5)


def kl_of(table: Tensor) -> float:
    return float(TASK.kl(SPACE.sequence_logprobs(table)))


@pytest.mark.parametrize("ppo", [Ppo(), Ppo(lam=0.95, heads=4)], ids=["lambda 1", "lambda .95"])
def test_k1_in_the_reward_restores_the_reference(ppo: Ppo) -> None:
    assert kl_of(DISPLACED) > 0.1
    assert kl_of(train(TASK, ppo, DISPLACED)) < 1e-6


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_k2_of_the_sequence_and_the_whole_vocabulary_in_the_loss_restore_it(estimator: str) -> None:
    assert kl_of(train(TASK, Ppo(kl_loss=estimator), DISPLACED)) < 1e-6


def test_k1_in_the_loss_does_not() -> None:
    end = kl_of(train(TASK, Ppo(steps=80, kl_loss="k1"), DISPLACED))
    assert not end < kl_of(DISPLACED)


@pytest.mark.parametrize("estimator", [k2, k3, absolute], ids=["k2", "k3", "absolute k1"])
def test_other_estimators_in_the_reward_do_not(estimator: Callable[[Tensor, Tensor], Tensor]) -> None:
    end = kl_of(train(TASK, Ppo(steps=80, kl_reward=estimator), DISPLACED))
    assert not end < kl_of(DISPLACED)


def test_without_a_kl_channel_nothing_restores() -> None:
    end = kl_of(train(TASK, Ppo(steps=60, beta=0.0), DISPLACED))
    assert end == pytest.approx(kl_of(DISPLACED))
