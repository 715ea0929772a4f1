"""Shrunk covariance and Mahalanobis distance, against loops in plain Python and a solver of another library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kedge.ops.distance import _LEAST_SHRINKAGE, mahalanobis, shrunk_covariance


def rows_of(count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(width, width, generator=generator, dtype=torch.float64) + 3


def ledoit_wolf(rows: list[list[float]]) -> tuple[list[list[float]], float]:
    """Equations 14 to 18 of Ledoit and Wolf (2004), one entry at a time."""
    n, p = len(rows), len(rows[0])
    means = [sum(row[i] for row in rows) / n for i in range(p)]
    centred = [[row[i] - means[i] for i in range(p)] for row in rows]
    sample = [[sum(x[i] * x[j] for x in centred) / n for j in range(p)] for i in range(p)]
    size = sum(sample[i][i] for i in range(p)) / p
    target = [[size if i == j else 0.0 for j in range(p)] for i in range(p)]
    dispersion = sum((sample[i][j] - target[i][j]) ** 2 for i in range(p) for j in range(p)) / p
    error = sum((x[i] * x[j] - sample[i][j]) ** 2 for x in centred for i in range(p) for j in range(p)) / p / n**2
    share = max(_LEAST_SHRINKAGE, min(error, dispersion) / dispersion)
    return [[share * target[i][j] + (1 - share) * sample[i][j] for j in range(p)] for i in range(p)], share


@given(st.integers(3, 30), st.integers(2, 5), st.integers(0, 99))
def test_shrinkage_is_that_of_a_loop(count: int, width: int, seed: int) -> None:
    rows = rows_of(count, width, seed)
    found, share = shrunk_covariance(rows)
    expected, wanted = ledoit_wolf(rows.tolist())
    assert share == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    np.testing.assert_allclose(found.numpy(), np.array(expected), rtol=1e-6, atol=1e-9 * float(found.trace()))


def test_many_rows_need_little_shrinkage_and_few_need_much() -> None:
    assert shrunk_covariance(rows_of(5000, 4, 0))[1] < 0.01
    assert shrunk_covariance(torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).double())[1] > 0.5


@pytest.mark.parametrize("rows", [torch.ones(5, 3), torch.zeros(1, 3), torch.tensor([[1.0, 2, 3], [-1, -2, -3]])])
def test_rows_that_leave_a_direction_out_still_have_a_definite_covariance(rows: torch.Tensor) -> None:
    """All the same, one only, or on a line: nothing is nan, and what varies at all can be inverted."""
    covariance, share = shrunk_covariance(rows.double())
    assert covariance.isfinite().all() and 0 < share <= 1
    if covariance.trace() > 0:
        assert (torch.linalg.eigvalsh(covariance) > 0).all()


@given(st.integers(4, 30), st.integers(1, 5), st.integers(0, 99))
def test_distances_are_those_of_the_inverse(count: int, width: int, seed: int) -> None:
    rows = rows_of(count, width, seed)
    covariance, mean = shrunk_covariance(rows)[0], rows.mean(dim=0)
    found = mahalanobis(rows, mean, torch.linalg.cholesky(covariance))
    inverse = np.linalg.inv(covariance.numpy())
    for row, distance in zip((rows - mean).numpy(), found.tolist(), strict=True):
        total = sum(row[i] * inverse[i, j] * row[j] for i in range(width) for j in range(width))
        assert distance**2 == pytest.approx(total, rel=1e-5, abs=1e-9)


def test_an_axis_by_hand() -> None:
    covariance = torch.diag(torch.tensor([4.0, 0.25]))
    rows, mean = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, 1.0])
    assert mahalanobis(rows, mean, torch.linalg.cholesky(covariance)).tolist() == [1.0, 2.0]
