"""Masked statistics against sums over lists."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import examples, kept, mean_and_variance, poisoned, ragged_mask
from torch import Tensor

from kedge.ops.masked import masked_mean, masked_sum, masked_variance, whitening

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 7)


@examples
@given(seed=seeds, batch=sizes, length=sizes)
def test_statistics_equal_those_of_the_true_entries(seed: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    values = torch.from_numpy(rng.normal(3, 2, (batch, length)))
    mean, variance = mean_and_variance(kept(values, mask))
    for given_values in (values, poisoned(values, mask), poisoned(values, mask, math.inf)):
        assert masked_sum(given_values, mask).item() == pytest.approx(math.fsum(kept(values, mask)), abs=1e-12)
        assert masked_mean(given_values, mask).item() == pytest.approx(mean, abs=1e-12)
        assert masked_variance(given_values, mask).item() == pytest.approx(variance, abs=1e-12)
        shift, scale = whitening(given_values, mask, epsilon=1e-8)
        assert shift.item() == pytest.approx(mean, abs=1e-12)
        assert scale.item() == pytest.approx(math.sqrt(variance + 1e-8), abs=1e-12)


@examples
@given(seed=seeds, batch=sizes, length=sizes)
def test_statistics_along_a_dimension(seed: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    values = torch.from_numpy(rng.normal(size=(batch, length)))
    sums, means = masked_sum(values, mask, dim=1).tolist(), masked_mean(values, mask, dim=1).tolist()
    for b in range(batch):
        row = kept(values[b], mask[b])
        assert sums[b] == pytest.approx(math.fsum(row), abs=1e-12)
        assert means[b] == pytest.approx(math.fsum(row) / len(row), abs=1e-12)


def test_nothing_true_gives_zero_not_nan() -> None:
    values, mask = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(values, mask) == 0
    assert masked_mean(values, mask) == 0
    assert masked_mean(values, mask, dim=1).tolist() == [0, 0]
    assert masked_variance(values, mask) == 0


@examples
@given(seed=seeds, batch=st.integers(2, 7), length=sizes, scale=st.floats(0.01, 100), shift=st.floats(-50, 50))
def test_whitened_values_have_mean_zero_and_variance_one(
    seed: int, batch: int, length: int, scale: float, shift: float
) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    values = torch.from_numpy(shift + scale * rng.normal(size=(batch, length)))
    move, divide = whitening(values, mask)
    mean, variance = mean_and_variance(kept((values - move) / divide, mask))
    assert mean == pytest.approx(0, abs=1e-6)
    spread = mean_and_variance(kept(values, mask))[1]
    assert variance == pytest.approx(spread / (spread + 1e-8), abs=1e-6)


@pytest.mark.parametrize("constant", [0.0, 1.0, -7.3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 3)])
def test_whitening_equal_values_gives_zeros(constant: float, shape: tuple[int, int]) -> None:
    values, mask = torch.full(shape, constant), torch.ones(shape, dtype=torch.bool)
    shift, scale = whitening(values, mask)
    assert ((values - shift) / scale).abs().max() < 0.01
    assert math.isfinite(scale.item()) and scale > 0


def test_whitening_weighs_tokens_not_responses() -> None:
    values = torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0]], dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, False, False, False]])
    shift, scale = whitening(values, mask, epsilon=0)
    assert shift.item() == pytest.approx(9 / 5)
    assert scale.item() == pytest.approx(math.sqrt((4 * 0.8**2 + 3.2**2) / 5))


def test_gradient_reaches_true_entries_only_even_beside_nan() -> None:
    mask = torch.tensor([[True, False, True]])
    values = torch.tensor([[1.0, float("nan"), 2.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_mean(values, mask), values)
    assert gradient.tolist() == [[0.5, 0.0, 0.5]]


def on_two_ranks(work: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> list[Tensor]:
    """`work(rank, reduce)` in two threads, where `reduce` adds what both hand in."""
    meeting, handed, found = threading.Barrier(2, timeout=5), [torch.zeros(())] * 2, [torch.zeros(())] * 2

    def run(rank: int) -> None:
        def reduce(partial: Tensor) -> Tensor:
            handed[rank] = partial
            meeting.wait()
            total = handed[0] + handed[1]
            meeting.wait()
            return total

        found[rank] = work(rank, reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@settings(max_examples=20)
@given(seed=seeds, batch=st.integers(2, 7), length=sizes)
def test_over_ranks_the_statistics_are_those_of_the_whole_batch(seed: int, batch: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    mask = ragged_mask(rng, batch, length)
    values = poisoned(torch.from_numpy(rng.normal(3, 2, (batch, length))), mask)
    cut = int(rng.integers(1, batch))
    rows = (slice(0, cut), slice(cut, batch))

    def work(rank: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        part, true = values[rows[rank]], mask[rows[rank]]
        shift, scale = whitening(part, true, reduce=reduce)
        mean, variance = (f(part, true, reduce=reduce) for f in (masked_mean, masked_variance))
        return torch.stack([shift, scale, mean, variance])

    mean, variance = mean_and_variance(kept(values, mask))
    for found in on_two_ranks(work):
        assert found.tolist() == pytest.approx([mean, math.sqrt(variance + 1e-8), mean, variance], abs=1e-12)


def test_a_rank_without_a_true_entry_takes_part() -> None:
    values, mask = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[True, True], [False, False]])
    found = on_two_ranks(lambda rank, reduce: masked_mean(values[rank], mask[rank], reduce=reduce))
    assert [mean.item() for mean in found] == [2.0, 2.0]
