"""Token rewards against loops over rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, poisoned, ragged_mask

from kedge.ops.rewards import at_last_token, clip_scores, kl_rewards, length_rewards, missing_eos_rewards

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 7)


@examples
@given(seed=seeds, batch=sizes, length=sizes)
def test_the_score_lands_on_the_last_true_position(seed: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    scores = torch.from_numpy(rng.normal(size=batch))
    expected = np.zeros((batch, length))
    for b in range(batch):
        last = max(t for t in range(length) if mask[b, t])
        expected[b, last] = scores[b].item()
    rewards = at_last_token(scores, mask)
    assert rewards.dtype == scores.dtype
    np.testing.assert_array_equal(rewards.numpy(), expected)


def test_the_score_lands_after_a_hole_and_before_the_padding() -> None:
    mask = torch.tensor(
        [[True, False, True, False, False], [True, True, True, True, True], [False, True, False] + [False] * 2]
    )
    rewards = at_last_token(torch.tensor([2.0, 3.0, 5.0]), mask)
    assert rewards.tolist() == [[0, 0, 2, 0, 0], [0, 0, 0, 0, 3], [0, 5, 0, 0, 0]]


@examples
@given(seed=seeds, batch=sizes, length=sizes)
def test_the_kl_channel_is_k1_on_the_policys_tokens(seed: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    policy, reference = (torch.from_numpy(-rng.exponential(size=(batch, length))) for _ in range(2))
    rewards = kl_rewards(poisoned(policy, mask), poisoned(reference, mask, -math.inf), mask)
    for b in range(batch):
        for t in range(length):
            expected = policy[b, t].item() - reference[b, t].item() if mask[b, t] else 0.0
            assert rewards[b, t].item() == expected


def test_the_length_channel_counts_the_policys_tokens() -> None:
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    assert length_rewards(mask).tolist() == [[1, 0, 1, 1], [1, 0, 0, 0]]


def test_missing_eos_marks_the_last_token_of_responses_that_never_ended() -> None:
    mask = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    rewards = missing_eos_rewards(torch.tensor([True, False, False]), mask)
    assert rewards.tolist() == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize(("score", "expected"), [(-11.0, -10.0), (-10.0, -10.0), (3.5, 3.5), (12.0, 10.0)])
def test_scores_are_clipped_on_both_sides(score: float, expected: float) -> None:
    assert clip_scores(torch.tensor([score]), 10.0).item() == expected


def test_a_nan_score_is_not_hidden_by_clipping() -> None:
    assert clip_scores(torch.tensor([math.nan]), 10.0).isnan().all()
