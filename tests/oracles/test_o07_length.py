"""O7: a reward of s per token against a reference that ends with probability h at every token.

The optimum has E[L] = 1 / (1 - (1 - h) exp(s / beta)) tokens, and where (1 - h) exp(s / beta) >= 1 there is none: it
is the budget that ends the responses.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from lab import Ppo, train
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, Task
from kedge.train.methods import METHODS

END, BETA = 0.5, 0.5


def chain(budget: int, per_token: float) -> Task:
    """One letter, repeated until the end; the reward counts tokens."""
    space = Space(letters=1, budget=budget)
    table = torch.tensor([END, 1 - END], dtype=torch.float64).log().expand(1, budget, 2)
    return Task(space, table, per_token * space.lengths.double().unsqueeze(0), BETA)


def expected_length(task: Task, logprobs: Tensor) -> float:
    return float((logprobs.exp() * task.space.lengths).sum())


def in_closed_form(end: float, pull: float) -> float:
    return 1 / (1 - (1 - end) * math.exp(pull))


@pytest.mark.parametrize(("runaway", "figure"), [(0.4, 165.78), (2 / 3, 296.04), (10 / 11, 1042.79)])
def test_published_figures_by_summing_the_tilted_chain(runaway: float, figure: float) -> None:
    """L0 = 100; runaway number s L0 / beta."""
    pull, end = runaway / 100, 0.01
    weights = [math.exp((pull + math.log1p(-end)) * length) for length in range(1, 40_000)]
    mean = sum(length * weight for length, weight in enumerate(weights, 1)) / sum(weights)
    assert mean == pytest.approx(figure, rel=1e-3)
    assert mean == pytest.approx(in_closed_form(end, pull), rel=1e-3)


@pytest.mark.parametrize("pull", [-0.4, 0.2, 0.45])
def test_the_enumerated_optimum_has_the_length_of_the_closed_form(pull: float) -> None:
    task = chain(150, pull * BETA)
    assert expected_length(task, task.optimum) == pytest.approx(in_closed_form(END, pull), rel=1e-6)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("rloo", "reinforce_pp")]


@pytest.mark.parametrize("method", ["ppo", *SLOW])
def test_training_reaches_that_length(method: str) -> None:
    """The pay is the `length` channel's, not the score's."""
    pull = 0.2
    task = chain(16, pull * BETA)
    ppo = Ppo(METHODS[method], heads=4 if method == "ppo" else None, length=pull * BETA, batch=1024)
    table = train(replace(task, reward=torch.zeros_like(task.reward)), ppo)
    assert task.distance(table) < 0.015
    reached = expected_length(task, task.space.sequence_logprobs(table))
    assert reached == pytest.approx(in_closed_form(END, pull), rel=0.015)


def test_beyond_the_threshold_the_budget_is_the_length() -> None:
    pull, reached = 1.0, {}
    assert (1 - END) * math.exp(pull) > 1
    for budget in (6, 12):
        task = chain(budget, pull * BETA)
        table = train(replace(task, reward=torch.zeros_like(task.reward)), Ppo(METHODS["rloo"], length=pull * BETA))
        reached[budget] = expected_length(task, task.space.sequence_logprobs(table))
        assert reached[budget] == pytest.approx(expected_length(task, task.optimum), rel=0.01)
    assert reached[12] > 1.6 * reached[6]
