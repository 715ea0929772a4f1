"""What the notices of `kedge.recipe.length_rewards` say happens: the length that training ends at, on a task whose
optimum is known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from lab import train
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, Task, random_task
from kedge.experiment.verify.training import OnPolicy
from kedge.ops.kl import absolute
from kedge.train.methods import METHODS
from kedge.train.update import UpdateSettings

TASK = random_task(Space(2, 4), seed=1)
PLAIN = OnPolicy(steps=80, batch=1024, epochs=1, method=METHODS["reinforce"])
CLEARLY = 0.04  # tokens; training without a mistake ends within 0.01 of the optimum


def length(table: Tensor, task: Task = TASK) -> float:
    """Expected tokens of a response under the policy with these logits."""
    return float((task.space.sequence_logprobs(table).exp() * task.space.lengths).sum())


def optimum(task: Task = TASK) -> float:
    return float((task.optimum.exp() * task.space.lengths).sum())


@dataclass(frozen=True)
class WithBonus(OnPolicy):
    """With an entropy bonus in the loss."""

    bonus: float = 0.0

    def update_settings(self, space: Space) -> UpdateSettings:
        return replace(super().update_settings(space), entropy_bonus=self.bonus)


def by_response(settings: OnPolicy) -> OnPolicy:
    return replace(settings, method=replace(settings.method, aggregation="sequence_mean"))


@pytest.mark.parametrize("settings", [PLAIN, replace(PLAIN, kl_loss="k2"), by_response(PLAIN)])
def test_a_recipe_without_notices_ends_at_the_length_of_the_optimum(settings: OnPolicy) -> None:
    """Division by length included, as long as the KL is in the reward."""
    assert length(train(TASK, settings)) == pytest.approx(optimum(), abs=CLEARLY / 2)


def test_a_discount_pays_for_length_where_scores_are_below_0_and_takes_it_where_they_are_above() -> None:
    settings = replace(PLAIN, method=METHODS["ppo"], gamma=0.8)
    below, above = (train(replace(TASK, reward=TASK.reward + offset), settings) for offset in (-2.0, 2.0))
    assert length(below) == pytest.approx(3.32, abs=CLEARLY), "as docs/shaping.md has it"
    assert length(above) == pytest.approx(1.80, abs=CLEARLY)


@pytest.mark.parametrize(("estimator", "tokens"), [("k2", 2.74), ("full", 2.94)])
def test_division_by_length_pays_for_length_where_the_kl_is_in_the_loss(estimator: str, tokens: float) -> None:
    found = length(train(TASK, by_response(replace(PLAIN, kl_loss=estimator))))
    assert found > optimum() + CLEARLY
    assert found == pytest.approx(tokens, abs=CLEARLY)


def test_k3_in_the_loss_pays_for_length() -> None:
    found = length(train(TASK, replace(PLAIN, kl_loss="k3")))
    assert found > optimum() + CLEARLY
    assert found == pytest.approx(2.64, abs=CLEARLY)


def test_absolute_values_in_the_reward_take_for_length() -> None:
    assert length(train(TASK, replace(PLAIN, kl_reward=absolute))) == pytest.approx(2.01, abs=CLEARLY)


def test_an_entropy_bonus_pays_for_length_where_the_reference_is_sure_to_end() -> None:
    reference = torch.zeros_like(TASK.reference)
    reference[..., 0] = 3.0  # ends with probability 0.91; one in three is undecided
    task = replace(TASK, reference=reference, reward=0 * TASK.reward)
    common = {"steps": PLAIN.steps, "batch": PLAIN.batch, "epochs": 1, "method": PLAIN.method}
    without, paid = (train(task, WithBonus(**common, bonus=bonus)) for bonus in (0.0, 0.2))
    assert length(without, task) == pytest.approx(optimum(task), abs=CLEARLY / 2)
    assert length(paid, task) > optimum(task) + CLEARLY
