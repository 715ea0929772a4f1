"""Weights that balance length, and the correlations of two heads, against numpy and numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import examples
from torch import Tensor

from kedge.ops.length import correlation, disentangling, length_balance, orthogonality

seeds = st.integers(0, 2**32 - 1)


def pairs(won: list[float], lengths: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Evidence [N, 2, 2] with the share `won` for the first, and lengths [N, 2]."""
    wins = torch.zeros(len(won), 2, 2, dtype=torch.float64)
    wins[:, 0, 1], wins[:, 1, 0] = torch.tensor(won), 1 - torch.tensor(won)
    return wins, torch.tensor(lengths)


def test_three_longer_winners_and_one_shorter_one_weigh_two_thirds_and_two() -> None:
    wins, lengths = pairs([1, 1, 1, 1, 1], [(20, 10), (30, 10), (40, 20), (10, 20), (7, 7)])
    found = length_balance(wins, lengths, bins=1)
    assert found[:, 0, 1].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2, 1])
    assert found[:, 1, 0].tolist() == [0] * 5


def test_a_divided_vote_is_evidence_for_either_side() -> None:
    """Longer wins 1 + 0.75, shorter 0.25: of 2 in all each side is to have 1."""
    wins, lengths = pairs([1.0, 0.25], [(20, 10), (10, 20)])
    found = length_balance(wins, lengths, bins=1)
    assert found[0, 0, 1].item() == pytest.approx(1 / 1.75)
    assert found[1].tolist() == [[0, pytest.approx(0.25 / 0.25)], [pytest.approx(0.75 / 1.75), 0]]


def test_bins_are_of_the_ratio_and_one_sided_ones_weigh_nothing() -> None:
    """Ratios of 1.1 are balanced already; of those of 8 only the longer ever wins."""
    wins, lengths = pairs([1.0] * 4, [(11, 10), (10, 11), (80, 10), (80, 10)])
    assert length_balance(wins, lengths, bins=2)[:, 0, 1].tolist() == pytest.approx([1, 1, 0, 0])


@examples
@given(seed=seeds, items=st.integers(1, 40), width=st.integers(2, 4), bins=st.integers(1, 4))
def test_both_sides_weigh_alike_in_every_bin(seed: int, items: int, width: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    grades, lengths = rng.normal(size=(items, width)), rng.integers(0, 30, size=(items, width))
    wins = (grades[:, :, None] > grades[:, None, :]).astype(float)
    found = length_balance(torch.from_numpy(wins), torch.from_numpy(lengths), bins=bins).numpy()
    size = np.log(np.maximum(lengths, 1))
    ratio = size[:, :, None] - size[:, None, :]
    there = (wins > 0) & (ratio != 0)
    assert (found[~there] == wins[~there]).all() and (found >= 0).all()
    if not there.any():
        return
    edges = np.quantile(np.abs(ratio[there]), np.arange(1, bins) / bins)
    which = np.searchsorted(edges, np.abs(ratio))
    for number in range(bins):
        inside = there & (which == number)
        longer, shorter = found[inside & (ratio > 0)].sum(), found[inside & (ratio < 0)].sum()
        assert longer == pytest.approx(shorter)
        assert longer + shorter == pytest.approx(wins[inside].sum()) or longer == 0


def test_nothing_to_balance_stays_as_it_was() -> None:
    wins, lengths = pairs([1.0, 0.3], [(5, 5), (9, 9)])
    assert torch.equal(length_balance(wins, lengths, bins=3), wins)


@examples
@given(seed=seeds, items=st.integers(2, 8), width=st.integers(2, 4))
def test_correlation_is_pearsons_of_what_differs_within_items(seed: int, items: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, items, width))
    counts = rng.integers(2, width + 1, size=items)
    mask = np.arange(width) < counts[:, None]
    parts = [np.concatenate([v[i, :c] - v[i, :c].mean() for i, c in enumerate(counts)]) for v in (one, other)]
    level = 100 * rng.normal(size=(items, 1))
    found = correlation(
        torch.from_numpy(np.where(mask, one + level, 9.0)), torch.from_numpy(other), torch.from_numpy(mask)
    )
    assert found.item() == pytest.approx(np.corrcoef(*parts)[0, 1], abs=1e-9)


def test_a_single_response_an_item_is_centred_over_the_batch() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 50, 1))
    found = correlation(torch.from_numpy(one + 5), torch.from_numpy(other), torch.ones(50, 1, dtype=torch.bool))
    assert found.item() == pytest.approx(np.corrcoef(one[:, 0], other[:, 0])[0, 1], abs=1e-9)


def test_correlation_with_a_constant_is_0_and_its_gradient_finite() -> None:
    one = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    found = correlation(one, torch.tensor([[1.0, 2.0]] * 3, dtype=torch.float64), torch.ones(3, 2, dtype=torch.bool))
    assert found.item() == 0
    assert torch.autograd.grad(found, one)[0].isfinite().all()


def test_gradient_of_the_correlation() -> None:
    """d rho / d a = (b / |b| - rho a / |a|) / |a| for centred a and b."""
    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(2, 6, 2))
    a, b = (v - v.mean(axis=1, keepdims=True) for v in (one, other))
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    rho = (a * b).sum() / (norm_a * norm_b)
    point = torch.from_numpy(one).requires_grad_()
    (found,) = torch.autograd.grad(
        correlation(point, torch.from_numpy(other), torch.ones(6, 2, dtype=torch.bool)), point
    )
    np.testing.assert_allclose(found.numpy(), (b / norm_b - rho * a / norm_a) / norm_a, atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_disentangling_wants_length_in_the_one_head_alone(sign: float) -> None:
    lengths, mask = torch.tensor([[10, 20], [30, 15], [8, 9]]), torch.ones(3, 2, dtype=torch.bool)
    about_length = lengths.double()
    unrelated = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], dtype=torch.float64)
    assert disentangling(unrelated, about_length, lengths, mask).item() == pytest.approx(-1)
    assert disentangling(sign * about_length, unrelated, lengths, mask).item() == pytest.approx(1)
    assert disentangling(unrelated, -about_length, lengths, mask).item() == pytest.approx(1)


def test_orthogonality_is_the_size_of_the_cosine() -> None:
    assert orthogonality(torch.tensor([[3.0, 4.0], [-30.0, -40.0]])).item() == pytest.approx(1)
    assert orthogonality(torch.tensor([[3.0, 4.0], [4.0, -3.0]])).item() == pytest.approx(0, abs=1e-6)
    assert orthogonality(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).item() == pytest.approx(0.5**0.5)
