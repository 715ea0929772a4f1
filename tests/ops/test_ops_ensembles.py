"""Aggregation, centring and disagreement of reward-model members, against loops in plain Python."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.ops.ensembles import centred_on_prompt, disagreement, mean_minus_variance, worst


def members_of(rows: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(0, 99))


@given(SHAPES, st.floats(0, 2))
def test_aggregates_are_those_of_a_loop(shape: tuple[int, int, int], weight: float) -> None:
    members = members_of(*shape)
    lowest, uncertain = worst(members).tolist(), mean_minus_variance(members, weight).tolist()
    for row, scores in enumerate(members.tolist()):
        variance = statistics.variance(scores) if len(scores) > 1 else 0.0
        assert lowest[row] == min(scores)
        assert uncertain[row] == pytest.approx(statistics.fmean(scores) - weight * variance, abs=1e-12)


def test_the_variance_is_over_one_less_than_the_members() -> None:
    assert mean_minus_variance(torch.tensor([[1.0, 3.0]]), 0.5).item() == 1.0, "mean 2, variance 2"


def loop(members: list[list[float]], group: list[int]) -> list[float]:
    """Disagreement of each response, one at a time."""
    found = []
    for row, own in enumerate(members):
        others = [scores for scores, other in zip(members, group, strict=True) if other == group[row]]
        n = len(others)
        if n == 1:
            found.append(math.nan)
            continue
        left = [own[m] - statistics.fmean(scores[m] for scores in others) for m in range(len(own))]
        found.append(math.sqrt(n / (n - 1)) * statistics.stdev(left))
    return found


@given(st.lists(st.integers(0, 4), min_size=1, max_size=14), st.integers(2, 5), st.integers(0, 99))
def test_disagreement_is_that_of_a_loop(group: list[int], count: int, seed: int) -> None:
    members = members_of(len(group), count, seed)
    found = disagreement(centred_on_prompt(members, torch.tensor(group)))
    assert found.tolist() == pytest.approx(loop(members.tolist(), group), abs=1e-12, nan_ok=True)


def test_members_that_differ_by_a_constant_per_prompt_agree() -> None:
    group = torch.tensor([7, 7, 3, 3, 3, 7])
    base, constants = members_of(6, 1, 0), members_of(8, 4, 1)
    found = disagreement(centred_on_prompt(base + constants[group], group))
    torch.testing.assert_close(found, torch.zeros(6, dtype=torch.float64), atol=1e-12, rtol=0)


def test_centring_keeps_the_variance_of_what_is_left() -> None:
    """Independent errors of deviation 1 show as a variance of 1, however many responses share a prompt."""
    for n in (2, 8):
        members = torch.randn(40_000, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        centred = centred_on_prompt(members, torch.arange(40_000) // n)
        assert float(disagreement(centred).square().mean()) == pytest.approx(1, abs=0.02)
