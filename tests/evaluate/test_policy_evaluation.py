"""Figures of an evaluation against hand values, with answers, scores and log-probabilities given."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from kedge.evaluate.intervals import wilson
from kedge.evaluate.policy import EvaluationSet, Judge, evaluate, prepare, terciles
from kedge.rollout.given import as_prompts, as_rollouts
from kedge.structs import Prompts, Rollouts, Sampling, TokenScores

LENGTHS = [2, 4, 6, 8, 10, 12]  # of the policy's answers
USUAL = [3, 1, 5, 2, 9, 4]  # of the reference's
TERCILES = [1, 0, 2, 0, 2, 1]
SCORES = [1.0, 0.0, 3.0, 2.0, 5.0, 4.0]
SCORES_REFERENCE = [0.0, 0.0, 4.0, 1.0, 5.0, 0.0]


def answers(lengths: list[int]) -> Rollouts:
    return as_rollouts([[3]] * len(lengths), [[5] * length for length in lengths], 0)


class Given:
    """An engine that hands out answers of the lengths it was given, in turn."""

    def __init__(self, *lengths: list[int]) -> None:
        self.left = list(lengths)

    def generate(self, policy: Any, prompts: Prompts, sampling: Sampling, generator: Any, version: int = 0) -> Rollouts:
        return answers(self.left.pop(0))


@pytest.fixture
def fixed() -> EvaluationSet:
    return EvaluationSet(
        texts=tuple(f"prompt {index}" for index in range(6)),
        prompts=as_prompts([[3]] * 6, 0),
        usual_length=torch.tensor(USUAL).float(),
        tercile=torch.tensor(TERCILES),
        answers=answers(USUAL),
        answer_scores=torch.tensor(SCORES_REFERENCE),
        answer_texts=["reference"] * 6,
        answer_logprobs=-1.5 * torch.tensor(USUAL).float(),
        within=0.7,
    )


@pytest.fixture
def found(fixed: EvaluationSet, monkeypatch: pytest.MonkeyPatch):
    """An evaluation in which the policy gives each token 0.5 nats more than the reference."""

    def scores(model: str, rollouts: Rollouts, **named: Any) -> TokenScores:
        mask = rollouts.response_mask
        level = -1.0 if model == "policy" else -1.5
        return TokenScores(level * mask, -9.0 * mask, 0.25 * mask)

    monkeypatch.setattr("kedge.evaluate.policy.token_scores", scores)

    def truth(prompt: str, text: str) -> dict[str, float]:
        return {"gold": -1.0 if text == "reference" else float(prompt[-1]), "correct": 1.0, "answered": 0.5}

    judge = Judge(
        engine=Given(LENGTHS),
        sampling=Sampling(12),
        score=lambda rollouts: torch.tensor(SCORES),
        decode=lambda rollouts: ["policy"] * 6,
        eos_id=1,
        truth=truth,
    )
    return evaluate("policy", "reference", judge, fixed, torch.Generator())


def test_means(found) -> None:
    metrics = found.metrics
    assert metrics["evaluation/score"] == pytest.approx(2.5)
    assert metrics["evaluation/score_reference"] == pytest.approx(10 / 6)
    assert metrics["evaluation/length"] == pytest.approx(7)
    assert metrics["evaluation/length_reference"] == pytest.approx(4)
    assert metrics["evaluation/entropy"] == pytest.approx(0.25)
    assert metrics["evaluation/ended"] == 1
    assert metrics["evaluation/length_p50"] == pytest.approx(7)
    assert metrics["evaluation/length_p10"] == pytest.approx(3)
    assert metrics["evaluation/length_p90"] == pytest.approx(11)


def test_kl_per_sequence_is_a_sum_over_the_response_and_per_token_a_mean(found) -> None:
    assert found.metrics["evaluation/kl_per_sequence"] == pytest.approx(0.5 * 7)
    assert found.metrics["evaluation/kl_per_token"] == pytest.approx(0.5)
    assert (found.token_kl[0, 2:] == 0).all()


def test_kl_on_the_references_own_answers(found, fixed: EvaluationSet) -> None:
    assert found.reference_kl.tolist() == pytest.approx([0.5 * length for length in USUAL])
    assert found.metrics["evaluation/kl_reference"] == pytest.approx(0.5 * sum(USUAL) / 6)
    assert found.metrics["evaluation/score_reference_within"] == fixed.within


def test_wins_by_score_with_ties_half(found) -> None:
    won = (1 + 0.5 + 0 + 1 + 0.5 + 1) / 6
    assert found.metrics["evaluation/win_rate"] == pytest.approx(won)
    low, high = wilson(won, 6)
    assert found.metrics["evaluation/win_rate_low"] == pytest.approx(low)
    assert found.metrics["evaluation/win_rate_high"] == pytest.approx(high)


def test_terciles_of_the_references_length(found) -> None:
    metrics = found.metrics
    briefest, longest = ([1, 3], [2, 4])
    for index, rows in ((0, briefest), (2, longest)):
        ratio = sum(LENGTHS[row] for row in rows) / sum(USUAL[row] for row in rows)
        assert metrics[f"evaluation/tercile{index}/length_ratio"] == pytest.approx(ratio)
        kl = sum(0.5 * LENGTHS[row] for row in rows) / 2
        assert metrics[f"evaluation/tercile{index}/kl_per_sequence"] == pytest.approx(kl)
        score = sum(SCORES[row] for row in rows) / 2
        assert metrics[f"evaluation/tercile{index}/score"] == pytest.approx(score)


def test_the_truth_is_kept_apart(found) -> None:
    assert found.truth["gold"] == pytest.approx(2.5)
    assert found.truth["gold_reference"] == -1
    assert found.truth["tercile0/gold"] == pytest.approx((1 + 3) / 2)
    assert found.truth["tercile2/answered"] == 0.5
    assert not [name for name in found.metrics if "gold" in name or "correct" in name]


def test_terciles_are_equal_in_size_and_ordered() -> None:
    values = torch.tensor(USUAL).float()
    assert terciles(values).tolist() == TERCILES
    for count in (3, 7, 64, 100):
        found = terciles(torch.rand(count, generator=torch.Generator().manual_seed(count)))
        sizes = [int((found == index).sum()) for index in range(3)]
        assert max(sizes) - min(sizes) <= 1
    assert terciles(torch.ones(6)).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("won", "count"), [(0, 10), (3, 10), (10, 10), (256, 512), (1, 512)])
def test_wilsons_interval(won: int, count: int) -> None:
    expected = binomtest(won, count).proportion_ci(0.95, method="wilson")
    assert wilson(won / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_terciles_come_from_other_samples_than_the_answers_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped by the very answers it is compared with, a policy would look brief where those happened to be long."""
    monkeypatch.setattr(
        "kedge.evaluate.policy.token_scores",
        lambda _, given, **__: TokenScores(
            -1.0 * given.response_mask, -9.0 * given.response_mask, 0.25 * given.response_mask
        ),
    )
    samples = [4, 6, 1, 1, 9, 11]  # two for each of three prompts
    judge = Judge(
        engine=Given(samples, [7, 7, 7]),
        sampling=Sampling(12),
        score=lambda rollouts: rollouts.lengths.float(),
        decode=lambda rollouts: [str(int(length)) for length in rollouts.lengths],
        eos_id=1,
    )
    fixed = prepare("reference", judge, ["a", "b", "c"], as_prompts([[3]] * 3, 0), 2, torch.Generator())
    assert fixed.usual_length.tolist() == [5, 1, 10]
    assert fixed.tercile.tolist() == [1, 0, 2]
    assert fixed.answer_texts == ["7", "7", "7"] and fixed.answer_scores.tolist() == [7, 7, 7]
    assert math.isclose(float(fixed.answers.lengths.float().mean()), 7)
    assert fixed.answer_logprobs.tolist() == [-7, -7, -7]
    spread = [np.std([7, 4, 6], ddof=1), np.std([7, 1, 1], ddof=1), np.std([7, 9, 11], ddof=1)]
    assert fixed.within == pytest.approx(np.sqrt(np.mean(np.square(spread))))
