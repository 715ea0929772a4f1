"""O6: adding a constant to every score must not change the trained policy.

A Bradley–Terry reward model leaves the constant undetermined. Whitened rewards fail: with responses of unequal length
the constant turns into a reward per token.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from lab import Ppo, train, with_whitened_rewards

from kedge.experiment.verify.enumerable import Space, random_task
from kedge.train.methods import METHODS

TASK = random_task(Space(3, 3))
PPO = Ppo(lam=0.95, whiten=True, heads=4)


@pytest.mark.parametrize("constant", [-2.0, 3.0])
def test_a_constant_added_to_every_score_changes_nothing(constant: float) -> None:
    shifted = replace(TASK, reward=TASK.reward + constant)
    assert TASK.distance(train(shifted, PPO)) < 0.01


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo", "reinforce_pp"])
def test_nor_for_methods_without_a_critic(method: str) -> None:
    ppo = Ppo(METHODS[method], group=4, batch=2048, steps=80, epochs=1, lr=0.15)
    assert TASK.distance(train(replace(TASK, reward=TASK.reward + 3), ppo)) < 0.015


def test_whitened_rewards_fail_it_and_turn_the_constant_into_length() -> None:
    lengths = []
    for constant in (-2.0, 3.0):
        shifted = replace(TASK, reward=TASK.reward + constant)
        table = train(shifted, replace(PPO, tamper=with_whitened_rewards))
        assert TASK.distance(table) > 0.03
        lengths.append(float((TASK.space.sequence_logprobs(table).exp() * TASK.space.lengths).sum()))
    assert abs(lengths[0] - lengths[1]) > 0.03
