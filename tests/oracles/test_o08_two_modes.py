"""O8: a reference that is verbose with probability p0, and a reward that pays being verbose.

At the optimum logit p = logit p0 + pay / beta, at a KL of at most -log p0; on the way there the advantage of verbose
responses is positive exactly until their log-odds have risen by pay / beta.
"""

from __future__ import annotations

import math

import pytest
import torch
from lab import Ppo, all_rollouts, score, train, weights_for
from torch import Tensor

from kedge.experiment.verify.enumerable import Space, TableModel, Task
from kedge.train.experience import make_experience
from kedge.train.methods import METHODS

SPACE = Space(letters=1, budget=3)
VERBOSE = SPACE.lengths == 3
P0, BETA = 0.1, 0.2


def task(pay: float) -> Task:
    """Two letters in a row have probability P0."""
    letter = P0**0.5
    table = torch.tensor([1 - letter, letter], dtype=torch.float64).log().expand(1, 3, 2).clone()
    table[0, 2] = 0  # how a verbose response ends does not matter
    return Task(SPACE, table, pay * VERBOSE.double().unsqueeze(0), BETA)


def verbose(logprobs: Tensor) -> float:
    return float(logprobs.exp()[0, VERBOSE].sum())


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("ratio", [-2.0, 0.5, 5.0, 10.0])
def test_the_log_odds_rise_by_pay_over_beta(ratio: float) -> None:
    found = task(ratio * BETA)
    p = verbose(found.optimum)
    assert verbose(found.reference_logprobs) == pytest.approx(P0, abs=1e-12)
    assert logit(p) == pytest.approx(logit(P0) + ratio, abs=1e-8)
    by_hand = p * math.log(p / P0) + (1 - p) * math.log((1 - p) / (1 - P0))
    assert float(found.kl(found.optimum)) == pytest.approx(by_hand, abs=1e-8)
    assert float(found.kl(found.optimum)) <= -math.log(P0)


def test_published_figures() -> None:
    found = task(5 * BETA)
    assert verbose(found.optimum) == pytest.approx(0.943, abs=5e-4)
    assert float(found.kl(found.optimum)) == pytest.approx(1.958, abs=5e-4)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_training_reaches_those_log_odds(method: str) -> None:
    found = task(3 * BETA)
    ppo = Ppo(METHODS[method], heads=4 if method == "ppo" else None, group=4, batch=1024)
    assert verbose(SPACE.sequence_logprobs(train(found, ppo))) == pytest.approx(verbose(found.optimum), abs=0.01)


@pytest.mark.parametrize("rise", [0.0, 2.0, 2.999, 3.001, 4.0])
def test_the_verbose_advantage_changes_sign_where_the_log_odds_have_risen_enough(rise: float) -> None:
    """Of a policy part of the way, through `make_experience`: verbose less concise is pay - beta rise."""
    found = task(3 * BETA)
    table = Task(SPACE, found.reference, rise * VERBOSE.double().unsqueeze(0), beta=1.0).soft_bellman()
    assert logit(verbose(SPACE.sequence_logprobs(table))) == pytest.approx(logit(P0) + rise, abs=1e-9)
    scored = score(all_rollouts(SPACE), TableModel(SPACE, table), found)
    advantage = make_experience(scored, weights=weights_for(BETA), method=METHODS["dr_grpo"]).advantage()[:, 0]
    for longer in advantage[VERBOSE]:
        for shorter in advantage[~VERBOSE]:
            assert float(longer - shorter) == pytest.approx((3 - rise) * BETA, abs=1e-8)
    assert bool((advantage[VERBOSE] > advantage[~VERBOSE].max()).all()) == (rise < 3)
