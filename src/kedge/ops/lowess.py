"""Locally weighted straight lines (Cleveland, 1979) in float64, and their part that varies within groups."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lowess(
    x: NDArray[np.float64], y: NDArray[np.float64], at: NDArray[np.float64], *, fraction: float
) -> NDArray[np.float64]:
    """[G] at each point of `at` the straight line through the nearest `fraction` of the points, tricube weights.

    One pass, without Cleveland's reweighting of outliers. The cost is G windows, not one for each point of `x`.
    """
    order = np.argsort(x, kind="stable")
    return np.array([weights @ y[order[window]] for window, weights in _smoother(x[order], at, fraction)])


def within_groups(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    groups: NDArray[np.int64],
    knots: NDArray[np.float64],
    *,
    fraction: float,
) -> NDArray[np.float64]:
    """[G] values at `knots` of f in y = level of the group + f(x), f the lowess of y less the levels; f's mean is 0.

    Between knots f is straight. Backfitting (Buja, Hastie and Tibshirani, 1989) takes turns between levels and f; what
    it converges to solves a linear system of the size of the knots, which is solved here. Directions of f of which
    groups say nothing, such as any f at all where every group has one point, stay 0.
    """
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    _, group, sizes = np.unique(groups[order], return_inverse=True, return_counts=True)
    hats = _hats(x, knots)
    inside = _centred(np.column_stack([y, hats]), group, sizes)
    lines = _smoother(x, knots, fraction)
    smoothed = np.array([weights @ inside[window] for window, weights in lines])
    plain = np.array([weights @ hats[window] for window, weights in lines])
    free = np.ones((len(knots), 1))  # lowess does not keep the mean, so a constant is taken off in every turn
    system = np.block([[np.eye(len(knots)) - plain + smoothed[:, 1:], free], [hats.mean(axis=0), np.zeros(1)]])
    values, *_ = np.linalg.lstsq(system, np.append(smoothed[:, 0], 0), rcond=1e-6)
    return np.asarray(values[:-1], dtype=np.float64)


def _smoother(
    x: NDArray[np.float64], at: NDArray[np.float64], fraction: float
) -> list[tuple[slice, NDArray[np.float64]]]:
    """For each point of `at` the window of `x` (sorted) that it sees, and the weight of each y there in the fit."""
    count = min(len(x), max(2, int(fraction * len(x) + 1e-10)))
    return [_line(x, point, count) for point in at]


def _line(x: NDArray[np.float64], point: float, count: int) -> tuple[slice, NDArray[np.float64]]:
    """The `count` points nearest to `point`, and the weights of a local straight line's value there."""
    starts = np.searchsorted(x[: len(x) - count] + x[count:], 2 * point) if len(x) > count else 0
    window = slice(int(starts), int(starts) + count)
    distance = np.abs(x[window] - point)
    radius = distance.max()
    weight = (1 - np.minimum(distance / radius, 1) ** 3) ** 3 if radius > 0 else np.ones(count)
    weight = weight / weight.sum() if weight.sum() > 0 else np.full(count, 1 / count)
    mean = weight @ x[window]
    centred = x[window] - mean
    spread = weight @ centred**2
    if spread > 1e-12 * max(radius, 1e-300) ** 2:
        weight = weight * (1 + (point - mean) * centred / spread)
    return window, weight


def _hats(x: NDArray[np.float64], knots: NDArray[np.float64]) -> NDArray[np.float64]:
    """[M, G] the share of each knot's value in a piecewise straight line at `x`."""
    return np.column_stack([np.interp(x, knots, unit) for unit in np.eye(len(knots))])


def _centred(columns: NDArray[np.float64], group: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """`columns` [M, C] less the mean of the row's group."""
    means = np.column_stack([np.bincount(group, column) / sizes for column in columns.T])
    return np.asarray(columns - means[group], dtype=np.float64)
