"""Running statistics of the score against those of all scores at once."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_learner import experience, learner

from kedge.train.normalise import RunningScore, in_running_unit

batches = st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), min_size=1, max_size=8)


def after(parts: list[list[float]]) -> RunningScore:
    running = RunningScore()
    for part in parts:
        running = running.observe(torch.tensor(part, dtype=torch.float64))
    return running


@given(parts=batches)
def test_however_the_scores_come_in_batches_the_statistics_are_those_of_them_all(parts: list[list[float]]) -> None:
    everything = [number for part in parts for number in part]
    mean = math.fsum(everything) / len(everything)
    variance = math.fsum((x - mean) ** 2 for x in everything) / len(everything)
    running = after(parts)
    assert running.count == len(everything)
    assert running.mean == pytest.approx(mean, abs=1e-9)
    assert running.deviation == pytest.approx(math.sqrt(variance + 1e-8), rel=1e-9, abs=1e-9)


def test_a_large_offset_does_not_eat_the_variance() -> None:
    """Sums of squares would lose all digits here."""
    scores = 1e8 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    running = RunningScore().observe(scores[:1]).observe(scores[1:])
    assert running.deviation == pytest.approx(np.std([0, 1, 2, 3]))


def test_the_first_batch_is_in_its_own_unit() -> None:
    scores = torch.tensor([3.0, 5.0, 10.0])
    found = RunningScore().observe(scores).normalised(scores)
    assert found.dtype == scores.dtype
    assert found.mean().item() == pytest.approx(0, abs=1e-6)
    assert found.std(correction=0).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scores", [[2.0], [4.0, 4.0, 4.0]])
def test_scores_that_are_all_the_same_become_0(scores: list[float]) -> None:
    given_ = torch.tensor(scores)
    assert RunningScore().observe(given_).normalised(given_).tolist() == [0] * len(scores)


def test_a_score_shifted_and_scaled_is_the_same_in_its_own_unit() -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, moved = (RunningScore().observe(s[:25]).observe(s[25:]).normalised(s) for s in (scores, 7 - 3 * scores))
    assert moved.tolist() == pytest.approx((-plain).tolist(), abs=1e-6)


@given(parts=batches)
def test_a_checkpoint_brings_it_back_bit_for_bit(parts: list[list[float]]) -> None:
    running = after(parts)
    assert RunningScore.from_record(json.loads(json.dumps(running.record()))) == running
    resumed = after(parts[:1])
    for part in parts[1:]:
        resumed = RunningScore.from_record(json.loads(json.dumps(resumed.record())))
        resumed = resumed.observe(torch.tensor(part, dtype=torch.float64))
    assert resumed == running


def test_only_the_score_changes_its_unit() -> None:
    scored = experience(learner()).scored
    running = RunningScore().observe(scored.scores["score"])
    found = in_running_unit(scored, running)
    assert list(found.scores) == list(scored.scores)
    assert found.scores["score"].tolist() == running.normalised(scored.scores["score"]).tolist()
    assert found.rollouts is scored.rollouts and found.opinions is scored.opinions


def test_beta_drifts_with_the_deviation() -> None:
    """M19: reward per nat in score units is beta times the deviation, so it moves when the policy's scores spread."""
    narrow, wide = torch.tensor([-1.0, 1.0]), torch.tensor([-4.0, 4.0])
    early = RunningScore().observe(narrow)
    late = early.observe(wide)
    assert late.deviation == pytest.approx(math.sqrt((1 + 16) / 2))
    assert (early.normalised(wide) / late.normalised(wide)).tolist() == pytest.approx([late.deviation] * 2)
