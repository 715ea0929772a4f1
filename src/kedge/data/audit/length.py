"""Length bias: does the longer response win, how steeply, and how far would a judge get that only counts characters?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.data.audit.clusters import Clusters, clustered, interval, resampled, sums
from kedge.data.audit.fit import fit_logistic, slope
from kedge.data.audit.tables import Array, log_ratio, longer, outcome

BINS = 512


@dataclass(frozen=True)
class LengthBias:
    """Ties are left out. All intervals are 95% and resample prompts, `wide` alone is 99%.

    `longer_wins`: share among decided pairs of unequal length. `slope`: log-odds per unit of log(length ratio), no
    intercept. `length_only_accuracy`: of a judge that prefers the longer side of decided pairs and tosses a coin where
    both are as long. `curve`: of bins of log(longer/shorter), the mean, the share that the longer side won, pairs.
    """

    pairs: int
    prompts: int
    by_prompt: bool
    longer_wins: float
    longer_wins_ci: tuple[float, float] | None
    slope: float | None
    slope_ci: tuple[float, float] | None
    wide: tuple[float, float] | None
    length_only_accuracy: float
    curve: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class LabelLength:
    """How the label of single responses goes with their length.

    For verdicts `slope` is the change in log-odds of good per unit of log length; for ratings that of the rating, in
    its own standard deviations. 95% interval clustered by prompt; `wide` is 99%.
    """

    rows: int
    kind: str
    slope: float
    slope_ci: tuple[float, float]
    wide: tuple[float, float]


def length_bias(pairs: Array) -> LengthBias | None:
    """None where no decided pair has sides of unequal length."""
    who = longer(pairs)
    decided = int(np.count_nonzero(outcome(pairs)))
    unequal = pairs[who != 0]
    if len(unequal) == 0:
        return None
    won, ratio = who[who != 0] > 0, log_ratio(unequal)
    clusters = clustered(unequal["prompt"])
    draws = _slope_draws(ratio, clusters)
    shares = resampled(sums(clusters, np.column_stack([won, np.ones(len(won))])))
    with np.errstate(invalid="ignore"):
        won_draws = shares[:, 0] / shares[:, 1]
    return LengthBias(
        pairs=len(unequal),
        prompts=clusters.count if not clusters.by_prompt else len(np.unique(unequal["prompt"])),
        by_prompt=clusters.by_prompt,
        longer_wins=float(won.mean()),
        longer_wins_ci=interval(won_draws),
        slope=pair_slope(unequal),
        slope_ci=interval(draws),
        wide=interval(draws, 0.99),
        length_only_accuracy=float((won.sum() + 0.5 * (decided - len(unequal))) / decided),
        curve=_curve(np.abs(ratio), won),
    )


def pair_slope(pairs: Array) -> float | None:
    """The slope alone, without interval; None where no decided pair has sides of unequal length."""
    found = float(slope(log_ratio(pairs), np.ones(len(pairs)))[0])
    return found if np.isfinite(found) else None


def label_length(singles: Array, kind: str) -> LabelLength | None:
    """None where lengths or labels do not vary."""
    size = np.log(np.maximum(singles["length"], 1).astype(np.float64))
    label = singles["label"].astype(np.float64)
    if len(singles) < 3 or np.ptp(size) == 0 or np.ptp(label) == 0:
        return None
    clusters = clustered(singles["prompt"])
    if kind == "verdict":
        fitted = fit_logistic(np.column_stack([np.ones(len(size)), size - size.mean()]), label, clusters)
        found, error = float(fitted.coefficients[1]), float(fitted.errors[1])
    else:
        found, error = _regression(size, (label - label.mean()) / label.std(), clusters)
    return LabelLength(
        len(singles),
        kind,
        found,
        (found - 1.960 * error, found + 1.960 * error),
        (found - 2.576 * error, found + 2.576 * error),
    )


def _regression(x: Array, y: Array, clusters: Clusters) -> tuple[float, float]:
    """Least-squares slope of y on x and its cluster-robust standard error."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    found = float(centred @ y) / spread
    residual = y - y.mean() - found * centred
    scores = sums(clusters, (centred * residual)[:, None])[:, 0]
    correction = clusters.count / max(1, clusters.count - 1)
    return found, float(np.sqrt(correction * (scores @ scores)) / spread)


def _slope_draws(ratio: Array, clusters: Clusters) -> Array:
    """Slopes of resampled prompts; ratios are put into `BINS` bins, each at the mean of its members."""
    edges = np.unique(np.quantile(ratio, np.linspace(0, 1, BINS + 1)))
    code = np.clip(np.searchsorted(edges, ratio, side="right") - 1, 0, max(0, len(edges) - 2))
    bins = int(code.max()) + 1
    counts = np.bincount(code, minlength=bins)
    centre = np.bincount(code, ratio, bins) / np.maximum(counts, 1)
    table = np.bincount(clusters.code.astype(np.int64) * bins + code, minlength=clusters.count * bins)
    return slope(centre, resampled(table.reshape(clusters.count, bins).astype(np.float32)))


def _curve(ratio: Array, won: Array) -> tuple[tuple[float, float, int], ...]:
    """Up to 12 bins of equal counts, at least 20 pairs in each."""
    parts = np.array_split(np.argsort(ratio, kind="stable"), max(1, min(12, len(ratio) // 20)))
    return tuple((float(ratio[part].mean()), float(won[part].mean()), len(part)) for part in parts)
