"""95% intervals: of a share, and of any figure made of sums, by resampling whole prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DRAWS = 2000
MIN_PROMPTS = 10  # with fewer clusters a percentile interval is too narrow to be worth printing
_CHUNK = 2**22


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; `low` and `high` are None where there are too few prompts for one."""

    value: float
    low: float | None
    high: float | None

    def above(self, limit: float) -> bool:
        """Whether the whole interval lies above `limit`."""
        return self.low is not None and self.low > limit


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share among `count` trials; a tie counted half is taken as half a success."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - spread), min(1.0, centre + spread)


def clustered(parts: Floats, prompt: Integers, figure: Callable[[Floats], Floats], *, draws: int = DRAWS) -> Estimate:
    """`figure` of the column sums of `parts` [N, C], with a percentile interval over resampled prompts.

    `prompt` [N] says which rows belong together. `figure` turns sums [D, C] into [D] and must not depend on their
    scale. The draws are the same every time; those in which the figure is not finite are left out.
    """
    names, number = np.unique(prompt, return_inverse=True)
    sums = np.zeros((len(names), parts.shape[1]))
    np.add.at(sums, number, parts)
    value = float(figure(sums.sum(axis=0, keepdims=True))[0])
    if len(names) < MIN_PROMPTS:
        return Estimate(value, None, None)
    rng = np.random.default_rng(0)
    share = np.full(len(names), 1 / len(names))
    step = max(1, _CHUNK // len(names))
    found = [figure(rng.multinomial(len(names), share, size=min(step, draws - at)) @ sums)
             for at in range(0, draws, step)]  # fmt: skip
    drawn = np.concatenate(found)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn) or not math.isfinite(value):
        return Estimate(value, None, None)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def ratio(sums: Floats) -> Floats:
    """The first column over the second, as a figure for `clustered`; NaN where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1], np.nan)


def mean_over_prompts(values: Floats, prompt: Integers) -> tuple[Estimate, float]:
    """The mean over prompts of each prompt's mean, with Student's interval and two-sided p against 0.

    Values that never differ have an interval of no width, and p 1 if they are 0, else 0.
    """
    from scipy import stats

    names, number = np.unique(prompt, return_inverse=True)
    means = np.bincount(number, weights=values) / np.bincount(number)
    mean = float(means.mean())
    if len(names) < MIN_PROMPTS:
        return Estimate(mean, None, None), math.nan
    spread = float(means.std(ddof=1)) / math.sqrt(len(names))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return Estimate(mean, mean, mean), 1.0 if abs(mean) <= 1e-12 else 0.0
    half = float(stats.t.ppf(0.975, len(names) - 1)) * spread
    p = 2 * float(stats.t.sf(abs(mean) / spread, len(names) - 1))
    return Estimate(mean, mean - half, mean + half), p


def resampled(prompt: Integers, figure: Callable[[Integers], float], *, draws: int) -> Estimate:
    """`figure` of row numbers, with a percentile interval over resampled prompts, for figures that are not sums."""
    names, number = np.unique(prompt, return_inverse=True)
    value = figure(np.arange(len(prompt)))
    if len(names) < MIN_PROMPTS or not math.isfinite(value):
        return Estimate(value, None, None)
    order = np.argsort(number, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(number))[:-1])
    rng = np.random.default_rng(0)
    found = [figure(np.concatenate([rows[one] for one in rng.integers(len(rows), size=len(rows))]))
             for _ in range(draws)]  # fmt: skip
    finite = [one for one in found if math.isfinite(one)]
    if not finite:
        return Estimate(value, None, None)
    low, high = np.percentile(finite, (2.5, 97.5))
    return Estimate(value, float(low), float(high))
