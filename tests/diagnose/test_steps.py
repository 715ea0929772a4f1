"""Statistics of series against SciPy, loops and enumeration, and that none looks ahead."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kedge.diagnose.steps import (
    aligned,
    before,
    change_point,
    cusum,
    first_where,
    lasting,
    late,
    lowest_of,
    mann_kendall,
    step_noise,
    surprises,
    trends,
)
from kedge.trace.reader import Series

numbers = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=3, max_size=30).map(np.array)


def test_small_helpers() -> None:
    series = Series(np.array([2, 4, 6, 8, 10, 12]), np.array([0.0, 1, 2, 3, 4, 8]))
    assert late(series) == 6.0
    assert first_where(series, series.values > 1) == 6 and first_where(series, series.values > 99) is None
    assert aligned(series, np.array([4, 5, 12])).tolist()[::2] == [1.0, 8.0]
    assert np.isnan(aligned(series, np.array([5]))).all() and np.isnan(aligned(None, np.array([5]))).all()
    assert lasting(np.array([1, 1, 0, 1, 1, 1], dtype=bool), 2).tolist() == [False, True, False, False, True, True]


@given(numbers, st.integers(1, 4), st.floats(-5, 5))
def test_the_lowest_of_several_passes_where_all_of_them_do(values: np.ndarray, times: int, limit: float) -> None:
    assert np.array_equal(lowest_of(values, times) >= limit, lasting(values >= limit, times))


@given(numbers, st.integers(2, 8), st.integers(1, 4), st.integers(0, 3))
def test_a_baseline_is_that_of_loops(values: np.ndarray, window: int, least: int, lag: int) -> None:
    found = before(values, window=window, least=least, lag=lag)
    for index in range(len(values)):
        past = [values[i] for i in range(index - lag - window, index - lag) if i >= 0]
        if len(past) < least:
            assert np.isnan(found.median[index])
            continue
        assert found.median[index] == pytest.approx(sorted_middle(past))
        spread = stats.median_abs_deviation(past, scale="normal") if past else np.nan
        assert found.deviation[index] == pytest.approx(spread, rel=1e-4, abs=1e-12)


def sorted_middle(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


@given(numbers, st.integers(0, 29))
def test_nothing_that_looks_back_looks_ahead(values: np.ndarray, cut: int) -> None:
    cut = min(cut, len(values))
    options: dict[str, Any] = {"window": 5, "least": 2, "lag": 1}
    for function in (
        lambda x: before(x, **options).median,
        lambda x: surprises(x, floor=0.1, **options),
        lambda x: cusum(surprises(x, floor=0.1, **options)),
        lambda x: lowest_of(x, 3),
    ):
        np.testing.assert_array_equal(function(values)[:cut], function(values[:cut]))


def test_surprises_count_robust_deviations() -> None:
    rng = np.random.default_rng(0)
    quiet = rng.normal(5, 2, 4000)
    found = surprises(quiet, window=200, least=200)[200:]
    assert found.mean() == pytest.approx(0, abs=0.05) and found.std() == pytest.approx(1, abs=0.05)
    assert np.isnan(surprises(quiet, window=200, least=200)[:200]).all()
    flat = np.array([1.0] * 10 + [1.5])
    assert surprises(flat, window=10, least=5, floor=0.25)[-1] == 2.0


def test_noise_about_a_trend() -> None:
    rng = np.random.default_rng(0)
    assert step_noise(np.arange(5000) * 0.01 + rng.normal(0, 2, 5000)) == pytest.approx(2, rel=0.05)
    assert np.isnan(step_noise(np.array([1.0, 2.0])))


def test_cusum_is_that_of_loops_and_has_the_known_run_length() -> None:
    rng = np.random.default_rng(1)
    z = rng.normal(0, 1, 50)
    total, expected = 0.0, []
    for value in z:
        total = max(0.0, total + value - 0.5)
        expected.append(total)
    np.testing.assert_allclose(cusum(z), expected)
    assert cusum(np.array([np.nan, 1.0, np.nan])).tolist() == [0.0, 0.5, 0.0]
    # Average run length of a one-sided chart with slack 0.5 and limit 5: 931 when quiet, 10.4 after one deviation
    # (Montgomery, Statistical Quality Control, table 9.3).
    delays = [int(np.argmax(cusum(rng.normal(1, 1, 200)) > 5)) + 1 for _ in range(2000)]
    assert np.mean(delays) == pytest.approx(10.4, rel=0.05)
    quiet = [int(np.argmax(cusum(rng.normal(0, 1, 12000)) > 5)) + 1 for _ in range(300)]
    assert np.mean(quiet) == pytest.approx(931, rel=0.2)


@given(numbers)
def test_mann_kendall_has_scipys_tau(values: np.ndarray) -> None:
    found = mann_kendall(values)
    expected = stats.kendalltau(np.arange(len(values)), values).statistic
    assert found.tau == pytest.approx(0.0 if np.isnan(expected) else expected)
    assert 0 <= found.p <= 1


@given(numbers)
def test_trends_of_every_beginning_are_those_of_the_beginning_alone(values: np.ndarray) -> None:
    """By Mann's sum over pairs and Kendall's variance with ties, written out."""
    for n, found in enumerate(trends(values), 1):
        part = values[:n].tolist()
        s = sum((b > a) - (b < a) for a, b in itertools.combinations(part, 2))
        ties = Counter(part).values()
        variance = (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18
        if n < 3:
            assert math.isnan(found.tau) and math.isnan(found.p)
            continue
        z = (abs(s) - 1) / math.sqrt(variance) if s else 0.0
        assert found.p == pytest.approx(2 * stats.norm.sf(z))
        pairs = n * (n - 1) / 2
        tied = sum(t * (t - 1) / 2 for t in ties)
        assert found.tau == pytest.approx(s / math.sqrt(pairs * (pairs - tied)) if s else 0.0)


def test_mann_kendall_p_is_near_the_enumerated_one() -> None:
    """All orders of eight numbers are as likely: the exact two-sided p of each tau, against the approximation."""
    taus = np.array([stats.kendalltau(np.arange(6), order).statistic for order in itertools.permutations(range(6))])
    for order in ([0, 1, 2, 3, 4, 5], [0, 2, 1, 3, 5, 4], [2, 0, 1, 5, 3, 4]):
        found = mann_kendall(np.array(order, dtype=float))
        exact = float((np.abs(taus) >= abs(found.tau) - 1e-9).mean())
        assert found.p == pytest.approx(exact, abs=0.03)
    assert np.isnan(mann_kendall(np.array([1.0, 2.0])).tau)
    assert mann_kendall(np.ones(9)) == (0.0, 1.0)


def test_mann_kendall_is_calibrated() -> None:
    rng = np.random.default_rng(2)
    ps = [mann_kendall(rng.normal(size=40)).p for _ in range(2000)]
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.015)


@given(numbers)
def test_the_change_point_leaves_the_smallest_squares(values: np.ndarray) -> None:
    found = change_point(values, least=1)
    assert found is not None

    def left(cut: int) -> float:
        return float(sum(((part - part.mean()) ** 2).sum() for part in (values[:cut], values[cut:])))

    best = min(left(cut) for cut in range(1, len(values)))
    assert left(found.at) == pytest.approx(best, abs=1e-9)
    assert found.earlier == pytest.approx(values[: found.at].mean())
    assert found.later == pytest.approx(values[found.at :].mean())


def test_a_change_point_needs_both_sides() -> None:
    assert change_point(np.array([1.0, 2.0, 3.0])) is None
    found = change_point(np.array([0.0, 0.1, 0.0, 5.0, 5.1]))
    assert found is not None and found.at == 3
