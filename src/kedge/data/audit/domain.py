"""Extra columns of few values that predict the label, or along which length means something else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2

from kedge.data.audit.clusters import clustered, sums
from kedge.data.audit.length import label_length, pair_slope
from kedge.data.audit.tables import Array, Domain, Tables, longer

LEAST, LEAST_PROMPTS = 20, 5  # rows and distinct prompts of a value that is compared


@dataclass(frozen=True)
class Part:
    """One value of a column. `share`: of good verdicts, the mean rating, or how often the longer response wins.

    `slope` is the length slope within the value; None where lengths or labels do not vary.
    """

    value: str
    rows: int
    prompts: int
    share: float
    slope: float | None


@dataclass(frozen=True)
class DomainMix:
    """How far a column predicts `what`: 0 nothing, 1 everything.

    `effect` is the correlation ratio less what chance gives; for labels of two kinds that is Cramér's V. `p` is of a
    chi-square test that all values have the same mean, each mean's variance clustered by prompt. Values with fewer
    than `LEAST` rows or `LEAST_PROMPTS` prompts are left out.
    """

    column: str
    what: str
    effect: float
    p: float
    parts: tuple[Part, ...]


def domain_mix(tables: Tables) -> tuple[DomainMix, ...]:
    """Every column with at least two values to compare, the strongest first."""
    if len(tables.singles):
        rows, label = tables.singles, tables.singles["label"].astype(np.float64)
        what = "share of good verdicts" if "verdicts" in tables.kinds else "mean rating"
    else:
        who = longer(tables.pairs)
        rows, label, what = tables.pairs[who != 0], (who[who != 0] > 0).astype(np.float64), "longer wins"
    found = (_mix(domain, rows, label, what) for domain in tables.domains)
    return tuple(sorted((one for one in found if one is not None), key=lambda mix: -mix.effect))


def _mix(domain: Domain, rows: Array, label: Array, what: str) -> DomainMix | None:
    code = domain.codes[rows["row"]]
    values = _compared(code, rows["prompt"], domain)
    keep = np.isin(code, values)
    if len(values) < 2 or np.ptp(label[keep]) == 0:
        return None
    groups = [(code == value) for value in values]
    total, spread = int(keep.sum()), float(label[keep].var())
    middle = float(label[keep].mean())
    means = np.array([label[inside].mean() for inside in groups])
    sizes = np.array([inside.sum() for inside in groups])
    variances = np.array([_variance(label[inside], rows["prompt"][inside], spread) for inside in groups])
    ratio = float(sizes @ (means - middle) ** 2) / (total * spread)
    chance = (len(values) - 1) / (total - 1)
    weights = 1 / variances
    apart = float(weights @ (means - (weights @ means) / weights.sum()) ** 2)
    parts = tuple(
        Part(domain.values[value], int(size), len(np.unique(rows["prompt"][inside])), float(mean),
             _slope(rows[inside], what))
        for value, inside, size, mean in zip(values, groups, sizes, means, strict=True)
    )  # fmt: skip
    effect = float(np.sqrt(max(0.0, (ratio - chance) / (1 - chance))))
    return DomainMix(domain.name, what, effect, float(chi2.sf(apart, len(values) - 1)), parts)


def _variance(label: Array, prompts: Array, spread: float) -> float:
    """Of the mean of labels: clustered by prompt, and no less than if rows with the pooled spread were independent."""
    clusters = clustered(prompts)
    residuals = sums(clusters, (label - label.mean())[:, None])[:, 0]
    robust = float(residuals @ residuals) * clusters.count / max(1, clusters.count - 1) / len(label) ** 2
    return max(robust, spread / len(label))


def _slope(rows: Array, what: str) -> float | None:
    if what == "longer wins":
        return pair_slope(rows)
    found = label_length(rows, "verdict" if what == "share of good verdicts" else "rating")
    return None if found is None else found.slope


def _compared(code: Array, prompts: Array, domain: Domain) -> list[int]:
    counts = np.bincount(code[code >= 0], minlength=len(domain.values))
    enough = [int(value) for value in np.argsort(-counts, kind="stable") if counts[value] >= LEAST]
    return [value for value in enough if len(np.unique(prompts[code == value])) >= LEAST_PROMPTS]
