"""Local lines against statsmodels, and the within-group part against backfitting taken one turn at a time."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.nonparametric.smoothers_lowess import lowess as oracle

from kedge.ops.lowess import lowess, within_groups


def points(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.gamma(3.0, 20.0, count)
    return x, np.sin(x / 25) + 0.01 * x + 0.2 * rng.normal(size=count)


@pytest.mark.parametrize("fraction", [0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("count", [20, 333])
def test_agrees_with_statsmodels(fraction: float, count: int) -> None:
    x, y = points(count)
    at = np.quantile(x, np.linspace(0, 1, 9))
    expected = oracle(y, x, frac=fraction, it=0, xvals=at)
    np.testing.assert_allclose(lowess(x, y, at, fraction=fraction), expected, atol=1e-6)


def test_agrees_with_statsmodels_on_whole_numbers() -> None:
    """Token counts repeat."""
    x, y = points(400)
    x = np.round(x)
    at = np.unique(np.quantile(x, np.linspace(0, 1, 9)))
    np.testing.assert_allclose(lowess(x, y, at, fraction=0.3), oracle(y, x, frac=0.3, it=0, xvals=at), atol=1e-6)


def test_a_straight_line_comes_back() -> None:
    x, _ = points(50)
    np.testing.assert_allclose(lowess(x, 3 - 2 * x, np.sort(x), fraction=0.3), 3 - 2 * np.sort(x), rtol=1e-9)


@pytest.mark.parametrize(("x", "y"), [([5.0], [2.0]), ([5.0, 5.0, 5.0], [1.0, 2.0, 3.0]), ([4.0, 6.0], [1.0, 3.0])])
def test_hardly_any_points_give_their_mean(x: list[float], y: list[float]) -> None:
    assert lowess(np.array(x), np.array(y), np.array([5.0]), fraction=1.0) == pytest.approx([2.0])


def grouped(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lengths and scores whose level goes against length between groups, with slope 0.05 and a bend within them."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(count), 4)
    usual = rng.uniform(20, 60, count)[group]
    x = usual + rng.uniform(-15, 15, 4 * count)
    return x, -0.2 * usual + bias(x) + 0.1 * rng.normal(size=4 * count), group


def bias(x: np.ndarray) -> np.ndarray:
    return 0.05 * np.minimum(x, 45)


def test_within_groups_is_what_backfitting_converges_to() -> None:
    x, y, group = grouped(60)
    knots = np.quantile(x, np.linspace(0, 1, 7))
    values = np.zeros(7)
    for _ in range(3000):
        left = y - np.interp(x, knots, values)
        level = np.array([left[group == g].mean() for g in range(60)])
        values = oracle(y - level[group], x, frac=0.4, it=0, xvals=knots)
        values -= np.interp(x, knots, values).mean()
    np.testing.assert_allclose(within_groups(x, y, group, knots, fraction=0.4), values, atol=1e-5)


def test_within_groups_finds_the_slope_that_levels_hide() -> None:
    x, y, group = grouped(500)
    knots = np.quantile(x, np.linspace(0, 1, 17))
    inner = (knots > 10) & (knots < 70)
    found = within_groups(x, y, group, knots, fraction=0.3)
    expected = bias(knots) - bias(x).mean()
    np.testing.assert_allclose(found[inner], expected[inner], atol=0.1)
    pooled = lowess(x, y, knots, fraction=0.3)
    assert pooled[-1] < pooled[0]  # without the levels, longer looks worse


def test_order_and_levels_of_the_groups_do_not_matter() -> None:
    x, y, group = grouped(50)
    knots = np.quantile(x, np.linspace(0, 1, 9))
    plain = within_groups(x, y, group, knots, fraction=0.5)
    shuffled = np.random.default_rng(1).permutation(len(x))
    moved = y + 100 * np.cos(np.arange(50))[group]
    again = within_groups(x[shuffled], moved[shuffled], 7 * group[shuffled] - 3, knots, fraction=0.5)
    np.testing.assert_allclose(again, plain, atol=1e-6)


def test_one_group_is_plain_lowess() -> None:
    x, y = points(200)
    knots = np.quantile(x, np.linspace(0, 1, 9))
    found = within_groups(x, y, np.zeros(200, dtype=int), knots, fraction=0.3)
    expected = lowess(x, y, knots, fraction=0.3)
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-6)


def test_groups_of_one_say_nothing() -> None:
    x, y = points(100)
    knots = np.quantile(x, np.linspace(0, 1, 9))
    np.testing.assert_allclose(within_groups(x, y, np.arange(100), knots, fraction=0.5), 0, atol=1e-9)


def test_groups_that_do_not_vary_in_x_say_nothing_however_their_scores_vary() -> None:
    rng = np.random.default_rng(0)
    x, group = np.repeat(rng.uniform(10, 60, 80), 3), np.repeat(np.arange(80), 3)
    knots = np.quantile(x, np.linspace(0, 1, 9))
    np.testing.assert_allclose(within_groups(x, rng.normal(size=240), group, knots, fraction=0.5), 0, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_hardly_any_responses(count: int) -> None:
    x, y = np.array([5.0, 9.0])[:count], np.array([1.0, 3.0])[:count]
    found = within_groups(x, y, np.zeros(count, dtype=int), np.unique(x), fraction=0.5)
    assert found.shape == (count,) and np.isfinite(found).all()
