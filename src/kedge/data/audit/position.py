"""Position bias: does the response that was shown first win more often than not?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from kedge.data.audit.clusters import clustered, interval, resampled, sums
from kedge.data.audit.tables import Array, outcome


@dataclass(frozen=True)
class PositionBias:
    """`first_wins`: share of decided pairs of known order; `ci` 95% by prompts, `wilson` 95% taking pairs as alone."""

    pairs: int
    first_wins: float
    ci: tuple[float, float] | None
    wide: tuple[float, float] | None  # 99%
    wilson: tuple[float, float]


def position_bias(pairs: Array) -> PositionBias | None:
    """None where the order is not known of any decided pair."""
    known = pairs[(pairs["shown"] > 0) & (outcome(pairs) != 0)]
    if len(known) == 0:
        return None
    first = (known["shown"] == 1) == (outcome(known) > 0)
    clusters = clustered(known["prompt"])
    totals = resampled(sums(clusters, np.column_stack([first, np.ones(len(first))])))
    with np.errstate(invalid="ignore"):
        draws = totals[:, 0] / totals[:, 1]
    exact = binomtest(int(first.sum()), len(first)).proportion_ci(method="wilson")
    wilson = (float(exact.low), float(exact.high))
    return PositionBias(len(known), float(first.mean()), interval(draws), interval(draws, 0.99), wilson)
