"""How gold rises and falls with optimisation: the two laws of Gao, Schulman and Hilton (2022), fitted with intervals.

With d = sqrt(KL(policy || reference)), KL in nats per sequence, the gain in gold over the reference is

    best_of_n   R(d) = d (alpha - beta d)        highest at d = alpha / (2 beta)
    rl          R(d) = d (alpha - beta log d)    highest at d = exp(alpha / beta - 1)

Both are linear in alpha and beta, so least squares is exact. Dimensions: K points, U units, D draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kedge.evaluate.intervals import Estimate

Floats = NDArray[np.float64]
Form = Literal["best_of_n", "rl"]
Curve = tuple[ArrayLike, ArrayLike]
"""d [K] and gain [K] of one unit that is resampled whole: a run, or a prompt."""

LEAST_POINTS = 5  # different d; two parameters go through two points whatever they are
LEAST_SPAN = 2.0  # largest d over smallest: over less, the bend cannot be told from the slope
LEAST_UNITS = 3  # with fewer, an interval would say nothing
DRAWS = 2000


@dataclass(frozen=True)
class Law:
    """A fitted law; intervals are 95% percentiles over resampled groups and units."""

    form: Form
    alpha: Estimate
    beta: Estimate
    peak: Estimate  # d at which gold is highest; infinite where the law never turns
    points: int
    longest: float  # the largest d among the points: a peak beyond it is extrapolated

    @property
    def turns(self) -> bool:
        """Whether the peak is within the points."""
        return self.peak.value <= self.longest

    def at(self, d: ArrayLike) -> Floats:
        """[K] the law's gain at `d`."""
        return gain(self.form, self.alpha.value, self.beta.value, d)


def gain(form: Form, alpha: float, beta: float, d: ArrayLike) -> Floats:
    """[K] R(d); 0 at d = 0."""
    found: Floats = _columns(form, d) @ np.array([alpha, beta])
    return found


def least_squares(form: Form, d: ArrayLike, gains: ArrayLike) -> tuple[float, float]:
    """alpha and beta that leave the smallest sum of squares. Raises `ValueError` where the points cannot tell them."""
    d, gains = _points(d, gains)
    alpha, beta = np.linalg.lstsq(_columns(form, d), gains, rcond=None)[0]
    return float(alpha), float(beta)


def peak(form: Form, alpha: ArrayLike, beta: ArrayLike) -> Floats:
    """d at which the law is highest: infinite where it keeps rising, 0 where it falls from the start."""
    alpha, beta = np.asarray(alpha, dtype=float), np.asarray(beta, dtype=float)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        turn = np.maximum(alpha / (2 * beta), 0) if form == "best_of_n" else np.exp(alpha / beta - 1)
    # Without a bend downwards R rises for ever, or (best-of-n) falls first: then nothing but the start is highest.
    return np.where(beta > 0, turn, np.where((beta == 0) & (alpha <= 0), 0.0, np.inf))


def fit(form: Form, groups: Sequence[Sequence[Curve]], *, draws: int = DRAWS) -> Law:
    """The law of all points, with intervals from resampling `groups` (seeds) and the units in each (runs, prompts).

    A single group is not resampled itself. With fewer than three units there are no intervals. The draws are the same
    every time. Raises `ValueError` for too few points.
    """
    curves = [curve for group in groups for curve in group]
    if not curves:
        raise ValueError("no points to fit a law to")
    d, gains = (np.concatenate([np.asarray(curve[part], dtype=float) for curve in curves]) for part in (0, 1))
    alpha, beta = least_squares(form, d, gains)
    drawn = _resampled(form, groups, draws) if len(curves) >= LEAST_UNITS else None
    return Law(
        form=form,
        alpha=_estimate(alpha, None if drawn is None else drawn[:, 0]),
        beta=_estimate(beta, None if drawn is None else drawn[:, 1]),
        peak=_estimate(float(peak(form, alpha, beta)), None if drawn is None else peak(form, drawn[:, 0], drawn[:, 1])),
        points=len(d),
        longest=float(d.max()),
    )


def _resampled(form: Form, groups: Sequence[Sequence[Curve]], draws: int) -> Floats:
    """[D, 2] alpha and beta of resampled units, from sums of products that units add to the normal equations."""
    moments = np.array([_moments(form, *curve) for group in groups for curve in group])  # [U, 5]
    rng = np.random.default_rng(0)
    sizes = [len(group) for group in groups if len(group)]
    chosen = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    counts = np.concatenate(
        [rng.multinomial(chosen[:, i] * size, np.full(size, 1 / size)) for i, size in enumerate(sizes)], axis=1
    )
    aa, ab, bb, ay, by = (counts @ moments).T
    determinant = aa * bb - ab**2
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.stack([(ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant], axis=1)
    # A draw of a single d leaves the law open.
    kept: Floats = found[(determinant > 1e-9 * aa * bb) & np.isfinite(found).all(axis=1)]
    return kept


def _moments(form: Form, d: ArrayLike, gains: ArrayLike) -> list[float]:
    (a, b), y = _columns(form, d).T, np.asarray(gains, dtype=float)
    return [float(a @ a), float(a @ b), float(b @ b), float(a @ y), float(b @ y)]


def _columns(form: Form, d: ArrayLike) -> Floats:
    """[K, 2] what alpha and beta multiply."""
    d = np.asarray(d, dtype=float)
    bend = d**2 if form == "best_of_n" else d * np.log(np.where(d > 0, d, 1.0))
    return np.stack([d, -bend], axis=-1)


def _points(d: ArrayLike, gains: ArrayLike) -> tuple[Floats, Floats]:
    d, gains = np.asarray(d, dtype=float), np.asarray(gains, dtype=float)
    if not (np.isfinite(d).all() and np.isfinite(gains).all() and (d >= 0).all()):
        raise ValueError("points of a law must be finite, with d at least 0")
    apart = np.unique(d[d > 0].round(6))
    if len(apart) < LEAST_POINTS or apart[-1] < LEAST_SPAN * apart[0]:
        reach = f" from {apart[0]:.2f} to {apart[-1]:.2f}" if len(apart) else ""
        needed = f"a law needs {LEAST_POINTS}, the largest {LEAST_SPAN:g} times the smallest"
        raise ValueError(f"{len(apart)} different d{reach}: {needed}")
    return d, gains


def _estimate(value: float, drawn: NDArray[Any] | None) -> Estimate:
    if drawn is None or len(drawn) == 0:
        return Estimate(value, None, None)
    # No interpolation: a peak may be infinite.
    low, high = np.percentile(drawn, (2.5, 97.5), method="nearest")
    return Estimate(value, float(low), float(high))
