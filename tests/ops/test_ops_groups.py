"""Baselines without a critic: group statistics against loops, and GAE over them as the advantage of whole responses."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples, ragged_mask

from kedge.ops.advantages import gae, group_deviation, group_mean, whole_response_values

seeds = st.integers(0, 2**32 - 1)


@examples
@given(seed=seeds, rows=st.integers(1, 12), kinds=st.integers(1, 4))
def test_group_statistics_are_those_of_a_loop(seed: int, rows: int, kinds: int) -> None:
    rng = np.random.default_rng(seed)
    values, group = rng.normal(size=rows), rng.integers(0, kinds, rows) * 7 - 3
    whole = group_mean(torch.from_numpy(values), torch.from_numpy(group))
    others = group_mean(torch.from_numpy(values), torch.from_numpy(group), leave_one_out=True)
    spread = group_deviation(torch.from_numpy(values), torch.from_numpy(group))
    for row in range(rows):
        mine = [float(v) for v, g in zip(values, group, strict=True) if g == group[row]]
        rest = [float(v) for j, v in enumerate(values) if group[j] == group[row] and j != row]
        assert whole[row].item() == pytest.approx(statistics.fmean(mine), abs=1e-12)
        assert others[row].item() == pytest.approx(statistics.fmean(rest) if rest else 0.0, abs=1e-12)
        assert spread[row].item() == pytest.approx(statistics.stdev(mine) if rest else 0.0, abs=1e-9)


def test_columns_are_kept_apart() -> None:
    values = torch.tensor([[1.0, 10.0], [3.0, 30.0], [5.0, 50.0]])
    group = torch.tensor([4, 4, 9])
    assert group_mean(values, group).tolist() == [[2, 20], [2, 20], [5, 50]]
    assert group_mean(values, group, leave_one_out=True).tolist() == [[3, 30], [1, 10], [0, 0]]


@examples
@given(seed=seeds, batch=st.integers(1, 5), length=st.integers(1, 6), channels=st.integers(1, 3))
def test_gae_over_them_is_reward_of_the_response_less_the_baseline(
    seed: int, batch: int, length: int, channels: int
) -> None:
    """On every token of the policy, whatever the token rewards are and wherever the mask has holes."""
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    rewards = torch.from_numpy(rng.normal(size=(batch, length, channels))) * mask.unsqueeze(-1)
    baseline = torch.from_numpy(rng.normal(size=(batch, channels)))
    values = whole_response_values(rewards, mask, baseline)
    assert not values[~mask].any()
    advantages, _ = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    for b in range(batch):
        for c in range(channels):
            expected = math.fsum(rewards[b, :, c].tolist()) - float(baseline[b, c])
            for t in range(length):
                wanted = expected if mask[b, t] else 0.0
                assert float(advantages[b, t, c]) == pytest.approx(wanted, abs=1e-12)
