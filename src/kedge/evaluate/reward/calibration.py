"""Whether a judge that says 70% is right 7 times in 10.

Equations: expected calibration error with equal-mass bins (Naeini et al. 2015), Brier score (1950), and the error that
a judge whose probabilities are right would show by chance alone (consistency resampling, Bröcker & Smith 2007).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.evaluate.intervals import Floats, Integers, wilson
from kedge.evaluate.reward.answers import Judged, NotChecked

MIN_PAIRS = 50
BINS = 15
PAIRS_PER_BIN = 20
DRAWS = 400


@dataclass(frozen=True)
class Bin:
    """Comparisons of similar confidence: how sure the judge was, and the share of votes for what it preferred."""

    confidence: float
    observed: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Calibration:
    """`ece` in probability; `ece_by_chance` is the 95th percentile for a judge that is calibrated.

    `sharpness` is the slope of the outcome's log-odds on the judge's: below 1 the judge is too sure of itself, above 1
    not sure enough. `brier_of_coin` is the Brier score of a judge that always says one half.
    """

    ece: float
    ece_by_chance: float
    brier: float
    brier_of_coin: float
    sharpness: float
    confidence: float
    accuracy: float
    bins: tuple[Bin, ...]
    pairs: int


def calibration(judged: Judged, scores: Floats, log_odds: float | None) -> Calibration | NotChecked:
    """Of P(first is preferred) = 1 / (1 + exp(-log_odds * score margin)) on decided comparisons, against vote shares.

    Each comparison counts once, from the side of the response that the judge prefers, so confidence is at least one
    half. Comparisons of equal confidence share their mean outcome.
    """
    if log_odds is None:
        return NotChecked("this judge's scores are not meant as probabilities")
    part = judged.where(judged.decided)
    margin = log_odds * (scores[part.first] - scores[part.second])
    if len(margin) < MIN_PAIRS:
        return NotChecked(f"{len(margin)} decided comparisons, {MIN_PAIRS} are needed")
    confidence = _sigmoid(np.abs(margin))
    observed = np.where(margin > 0, part.share, np.where(margin < 0, 1 - part.share, 0.5))
    order = np.argsort(confidence, kind="stable")
    sure, seen = confidence[order], _shared(confidence[order], observed[order])
    parts = np.array_split(np.arange(len(sure)), max(2, min(BINS, len(sure) // PAIRS_PER_BIN)))
    bins = tuple(
        Bin(float(sure[at].mean()), float(seen[at].mean()), *wilson(float(seen[at].mean()), len(at)), len(at))
        for at in parts
    )
    return Calibration(
        ece=_error(sure, seen, parts),
        ece_by_chance=_by_chance(sure, parts),
        brier=float(np.mean((_sigmoid(margin) - part.share) ** 2)),
        brier_of_coin=float(np.mean((0.5 - part.share) ** 2)),
        sharpness=_sharpness(margin, part.share),
        confidence=float(confidence.mean()),
        accuracy=float(observed.mean()),
        bins=bins,
        pairs=len(margin),
    )


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-values)))


def _shared(sorted_values: Floats, outcome: Floats) -> Floats:
    """Outcomes, each the mean of those with the same value; a bin ending among them would else hold whichever came."""
    _, group = np.unique(sorted_values, return_inverse=True)
    return np.asarray((np.bincount(group, outcome) / np.bincount(group))[group])


def _error(confidence: Floats, observed: Floats, parts: list[Integers]) -> float:
    gap = confidence - observed
    return float(sum(abs(gap[at].sum()) for at in parts) / len(gap))


def _by_chance(confidence: Floats, parts: list[Integers]) -> float:
    rng = np.random.default_rng(0)
    drawn = [
        _error(confidence, (rng.random(len(confidence)) < confidence).astype(np.float64), parts) for _ in range(DRAWS)
    ]
    return float(np.quantile(drawn, 0.95))


def _sharpness(margin: Floats, share: Floats) -> float:
    """b that maximises the likelihood of P = sigmoid(b * margin); 0 for a judge that never tells two apart."""
    from scipy.optimize import minimize_scalar

    spread = float(np.sqrt(np.mean(margin**2)))
    if spread == 0:
        return 0.0
    unit = margin / spread

    def loss(slope: float) -> float:
        z = slope * unit
        return float(np.mean(np.logaddexp(0, -z) * share + np.logaddexp(0, z) * (1 - share)))

    found = minimize_scalar(loss, bounds=(-50.0, 50.0), method="bounded", options={"xatol": 1e-6})
    return float(found.x) / spread
