"""Statistics of series over steps, which checks share. Nothing here knows what a series means.

What a check says of step t may use nothing later than t: `before`, `surprises` and `cusum` look back only, while
`mann_kendall` and `change_point` look at a whole series.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import Series

Array = NDArray[Any]
LATE = 1 / 3  # of the steps: they stand for how a run ended
NORMAL = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


def late(series: Series, share: float = LATE) -> float:
    """Mean over the last `share` of the steps."""
    return float(np.mean(series.values[-max(1, round(len(series.values) * share)) :]))


def first_where(series: Series, here: Array) -> int | None:
    """The first step at which `here` is true."""
    return int(series.steps[np.argmax(here)]) if here.any() else None


def aligned(series: Series | None, steps: Array) -> Array:
    """The series' values at `steps`, nan where it has none; the last one where a step occurs twice."""
    found = {} if series is None else dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    return np.array([found.get(int(step), np.nan) for step in steps], dtype=np.float64)


def lasting(here: Array, times: int) -> Array:
    """Where `here` has been true for at least `times` entries in a row, this one included."""
    run = np.zeros(len(here), dtype=np.int64)
    for index, value in enumerate(here):
        run[index] = (run[index - 1] if index else 0) + 1 if value else 0
    return run >= times


def lowest_of(values: Array, times: int) -> Array:
    """The smallest of the last `times` entries, this one included; -inf before there are as many.

    It passes a threshold exactly where the entries have passed it `times` in a row.
    """
    return np.array([values[i - times + 1 : i + 1].min() if i + 1 >= times else -np.inf for i in range(len(values))])


class Baseline(NamedTuple):
    """Median and robust deviation of what came before each entry; nan where too little did."""

    median: Array
    deviation: Array


def before(values: Array, *, window: int, least: int, lag: int = 0) -> Baseline:
    """The baseline of each entry: the `window` entries that end `lag` entries before it, if there are `least`.

    The deviation is the median absolute one times 1.4826, which for normal values estimates the standard deviation and
    which no minority of outliers moves far.
    """
    median, deviation = np.full(len(values), np.nan), np.full(len(values), np.nan)
    for index in range(len(values)):
        past = values[max(0, index - lag - window) : max(0, index - lag)]
        if len(past) >= least:
            median[index] = np.median(past)
            deviation[index] = NORMAL * np.median(np.abs(past - median[index]))
    return Baseline(median, deviation)


def step_noise(values: Array) -> float:
    """Standard deviation of the noise about a slow trend, from differences of neighbours; nan below three entries."""
    if len(values) < 3:
        return math.nan
    return float(NORMAL * np.median(np.abs(np.diff(values))) / math.sqrt(2))


def surprises(values: Array, *, window: int, least: int, lag: int = 0, floor: float = 0.0) -> Array:
    """How many robust deviations each entry lies above its baseline; nan where there is none. `floor` bounds the
    deviation from below, so that a quiet stretch does not make every small change a surprise."""
    found = before(values, window=window, least=least, lag=lag)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((values - found.median) / np.maximum(found.deviation, floor))


def cusum(surprise: Array, *, slack: float = 0.5) -> Array:
    """Page's one-sided cumulative sum, S = max(0, S + z - slack), of standardised entries; nan counts as zero.

    Page (1954). With slack 0.5 and the alarm at 5 a normal series gives a false alarm once in about 930 entries, and a
    shift by one standard deviation is found after about 10.
    """
    total, found = 0.0, np.zeros(len(surprise))
    for index, value in enumerate(surprise):
        total = max(0.0, total + (0.0 if math.isnan(value) else float(value)) - slack)
        found[index] = total
    return found


class Trend(NamedTuple):
    """Kendall's tau of a series with time, and the two-sided p value of there being no trend."""

    tau: float
    p: float


def mann_kendall(values: Array) -> Trend:
    """Mann's test for a monotone trend, normal approximation with the correction for ties and continuity.

    Mann (1945), Kendall (1975). Entries are taken as independent; a series that remembers has smaller p than it should.
    """
    found = trends(values)
    return found[-1] if found else Trend(math.nan, math.nan)


def trends(values: Array) -> list[Trend]:
    """The same of every beginning of a series, the first entry alone to all; each new entry is compared with those
    before it once, so that all together cost what the last would."""
    found, s, tied_pairs, tied = [], 0.0, 0, 0
    seen: dict[float, int] = {}
    for index, value in enumerate(values.tolist()):
        s += float(np.sign(value - values[:index]).sum())
        before = seen.get(value, 0)
        seen[value] = before + 1
        tied_pairs += before
        tied += _tied(before + 1) - _tied(before)
        found.append(_trend(index + 1, s, tied_pairs, tied))
    return found


def _tied(count: int) -> int:
    return count * (count - 1) * (2 * count + 5)


def _trend(count: int, s: float, tied_pairs: int, tied: int) -> Trend:
    if count < 3:
        return Trend(math.nan, math.nan)
    variance = (_tied(count) - tied) / 18
    pairs = count * (count - 1) / 2
    untied = math.sqrt(pairs * (pairs - tied_pairs))
    if variance <= 0:
        return Trend(0.0, 1.0)
    z = (s - math.copysign(1.0, s)) / math.sqrt(variance) if s else 0.0
    return Trend(s / untied, math.erfc(abs(z) / math.sqrt(2)))


class Change(NamedTuple):
    """Where a series changed its level most: the first entry of what came after, and both means."""

    at: int
    earlier: float
    later: float


def change_point(values: Array, *, least: int = 2) -> Change | None:
    """The split in two that leaves the smallest sum of squares about two means; None below 2 * `least` entries.

    Least squares is the maximum-likelihood split for normal noise of one variance. There is always a best split:
    whether it means anything is for the caller to test.
    """
    count = len(values)
    if count < 2 * least:
        return None
    total = np.cumsum(values)
    left = np.arange(least, count - least + 1)
    # The between-groups sum of squares is what a split explains.
    means = total[left - 1] / left, (total[-1] - total[left - 1]) / (count - left)
    explained = left * (count - left) / count * (means[0] - means[1]) ** 2
    best = int(np.argmax(explained))
    return Change(int(left[best]), float(means[0][best]), float(means[1][best]))
