"""How often a judge agrees with people, on all comparisons and where length cannot help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kedge.evaluate.intervals import Estimate, Floats, Integers, clustered, ratio, wilson
from kedge.evaluate.reward.answers import Judged, NotChecked

MIN_PAIRS = 30
SIMILAR = 1.1  # responses of similar length: the longer has at most so many times the characters of the shorter
STRATA = 5  # of the length ratio, within which longer and shorter winners are made equal


@dataclass(frozen=True)
class Agreement:
    """Accuracy of a judge beside that of one that prefers the longer response; equal scores count half.

    `lead` is the difference of the two, on the same comparisons. `weight` is how many comparisons count: all of them,
    or in a reweighted part the size of the balanced samples that it stands for.
    """

    accuracy: Estimate
    longer: Estimate
    lead: Estimate
    pairs: int
    weight: float
    prompts: int


def agreements(judged: Judged, scores: Floats) -> Mapping[str, Agreement | NotChecked]:
    """By part of the decided comparisons.

    `all`; `length_balanced`, reweighted so that the longer response wins as often as the shorter within each fifth of
    the length ratio; `similar_length`, lengths within 10%; `longer_is_worse` and `longer_is_better` by what people
    preferred. Lengths in characters.
    """
    part = judged.where(judged.decided)
    lengths = np.maximum(judged.characters, 1.0)
    log_ratio = np.log(lengths[part.first] / lengths[part.second])
    hit, longer = _hits(scores[part.first] - scores[part.second]), _hits(log_ratio)
    found: dict[str, Agreement | NotChecked] = {
        "all": _agreement(hit, longer, part.pair_prompt),
        "length_balanced": _balanced(hit, longer, log_ratio, part.pair_prompt),
    }
    masks = {
        "similar_length": np.abs(log_ratio) <= np.log(SIMILAR) + 1e-12,
        "longer_is_worse": log_ratio < 0,
        "longer_is_better": log_ratio > 0,
    }
    for name, mask in masks.items():
        found[name] = _agreement(hit[mask], longer[mask], part.pair_prompt[mask])
    return found


def _hits(margin: Floats) -> Floats:
    """[N] 1 where the first is ahead, 0.5 where the two are equal."""
    return 0.5 + 0.5 * np.sign(margin)


def _agreement(hit: Floats, longer: Floats, prompt: Integers) -> Agreement | NotChecked:
    if len(hit) < MIN_PAIRS:
        return NotChecked(f"{len(hit)} decided comparisons, {MIN_PAIRS} are needed")
    ones = np.ones_like(hit)
    columns = [np.stack([values, ones], axis=1) for values in (hit, longer, hit - longer)]
    accuracy, other, lead = (clustered(column, prompt, ratio) for column in columns)
    prompts = len(np.unique(prompt))
    return Agreement(_widened(accuracy, prompts), _widened(other, prompts), lead, len(hit), float(len(hit)), prompts)


def _widened(estimate: Estimate, prompts: int) -> Estimate:
    """Where every prompt agrees, resampling them shows no spread; the interval is then Wilson's over prompts."""
    if estimate.low is None or estimate.value not in (0.0, 1.0):
        return estimate
    return Estimate(estimate.value, *wilson(estimate.value, prompts))


def _balanced(hit: Floats, longer: Floats, log_ratio: Floats, prompt: Integers) -> Agreement | NotChecked:
    """Accuracy expected on the largest samples in which, within each stratum, both sides win equally often."""
    side = _sides(log_ratio)  # [N, S, 2]
    counts = side.sum(axis=0)
    weight = 2 * counts.min(axis=1).sum() + (log_ratio == 0).sum()
    if weight < MIN_PAIRS:
        what = f"a length-balanced sample would hold {weight:.0f} comparisons, {MIN_PAIRS} are needed"
        return NotChecked(what)
    equal = (log_ratio == 0).astype(np.float64)

    def estimate(values: Floats) -> Estimate:
        flat = side.reshape(len(values), -1)
        parts = np.concatenate([flat * values[:, None], flat, (equal * values)[:, None], equal[:, None]], axis=1)
        return clustered(parts, prompt, _balance)

    accuracy, other, lead = (estimate(values) for values in (hit, longer, hit - longer))
    return Agreement(accuracy, other, lead, len(hit), float(weight), len(np.unique(prompt)))


def _sides(log_ratio: Floats) -> Floats:
    """[N, S, 2] one-hot: stratum of |log length ratio|, and whether the longer response won; zeros at equal lengths."""
    size = np.abs(log_ratio)
    unequal = size > 0
    edges = np.quantile(size[unequal], np.linspace(0, 1, STRATA + 1)[1:-1]) if unequal.any() else np.zeros(0)
    stratum = np.searchsorted(edges, size)
    side: NDArray[np.float64] = np.zeros((len(size), STRATA, 2))
    side[unequal, stratum[unequal], (log_ratio[unequal] > 0).astype(int)] = 1.0
    return side


def _balance(sums: Floats) -> Floats:
    """[D] from column sums [D, 2 * 2S + 2]: values and counts by stratum and side, then those of equal lengths."""
    values, counts = (sums[:, at : at + 2 * STRATA].reshape(-1, STRATA, 2) for at in (0, 2 * STRATA))
    with np.errstate(divide="ignore", invalid="ignore"):
        both = np.where(counts > 0, values / counts, 0.0).sum(axis=2)
        weight = counts.min(axis=2)
        found: Floats = ((weight * both).sum(axis=1) + sums[:, -2]) / (2 * weight.sum(axis=1) + sums[:, -1])
    return found
