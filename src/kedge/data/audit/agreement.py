"""Agreement between annotators, from rows that name them, from rows that repeat, and from counted votes.

Everything is read off one table: for each judged unit (a pair, or a response) how many labels of each value it got.
Krippendorff's alpha is the `krippendorff` library's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import krippendorff
import numpy as np

from kedge.data.audit.duplicates import pair_units, single_units
from kedge.data.audit.tables import Array, Tables

Level = Literal["nominal", "interval"]
UNITS = 200_000  # units with at least two labels that alpha is computed on
GRADES = 20  # distinct ratings; more are put into so many steps


@dataclass(frozen=True)
class Counts:
    """Labels of each value [units, V], only units with at least two; `source` is "votes", "annotators" or "repeats".

    Values of pairs are: the one response won, neither, the other won; which one is which is the texts' hash order.
    """

    counts: Array
    source: str
    level: Level


@dataclass(frozen=True)
class Agreement:
    """`alpha` is Krippendorff's, 1 for perfect and 0 for chance agreement; None where all labels are the same.

    `agree`: chance that two random labels of one unit are the same; `unanimous`: share of units whose labels are all
    the same. Both over units with at least two labels.
    """

    source: str
    level: str
    units: int
    labels: int
    alpha: float | None
    agree: float
    unanimous: float


def label_counts(tables: Tables) -> tuple[Counts, ...]:
    """One table for each source of double labels that the file has."""
    found = []
    pairs = tables.pairs[tables.pairs["chosen"] != tables.pairs["rejected"]]
    voted = pairs[pairs["votes"].sum(axis=1) > 1]
    if len(voted):
        found.append(Counts(_vote_counts(voted), "votes", "nominal"))
    named = pairs[pairs["annotator"] >= 0]
    if len(named):
        found.append(Counts(_pair_counts(named), "annotators", "nominal"))
    elif len(pairs):
        found.append(Counts(_pair_counts(pairs), "repeats", "nominal"))
    if len(tables.singles):
        known = bool(np.any(tables.singles["annotator"] >= 0))
        level: Level = "nominal" if "verdicts" in tables.kinds else "interval"
        found.append(Counts(_single_counts(tables.singles), "annotators" if known else "repeats", level))
    return tuple(counts for counts in found if len(counts.counts))


def agreement(found: Counts) -> Agreement:
    """Alpha on at most `UNITS` units, the shares on all of them."""
    counts = found.counts.astype(np.float64)
    labels = counts.sum(axis=1)
    same = (counts * (counts - 1)).sum(axis=1) / (labels * (labels - 1))
    some = found.counts[:: -(-len(counts) // UNITS)]
    used = some[:, some.sum(axis=0) > 0]
    alpha = None
    if used.shape[1] > 1:
        alpha = float(krippendorff.alpha(value_counts=used, level_of_measurement=found.level))
    unanimous = float(np.mean(counts.max(axis=1) == labels))
    return Agreement(found.source, found.level, len(counts), int(labels.sum()), alpha, float(same.mean()), unanimous)


def _vote_counts(pairs: Array) -> Array:
    """Votes for the two responses in hash order, neither in the middle."""
    turned = pairs["chosen"] > pairs["rejected"]
    chosen, rejected, neither = pairs["votes"].astype(np.int64).T
    return np.column_stack([np.where(turned, rejected, chosen), neither, np.where(turned, chosen, rejected)])


def _pair_counts(pairs: Array) -> Array:
    units = pair_units(pairs)
    counts: Array = np.zeros((units.count, 3), np.int64)
    np.add.at(counts, (units.code, 1 - units.side), 1)
    several: Array = counts[counts.sum(axis=1) > 1]
    return several


def _single_counts(singles: Array) -> Array:
    code, count = single_units(singles)
    several = (np.bincount(code, minlength=count) > 1)[code]
    if not several.any():
        return np.zeros((0, 2), np.int64)
    label = singles["label"][several]
    values, grade = np.unique(label, return_inverse=True)
    if len(values) > GRADES:
        steps = (label - label.min()) / np.ptp(label) * (GRADES - 1)
        values, grade = np.arange(GRADES), np.rint(steps).astype(np.int64)
    units = np.unique(code[several], return_inverse=True)[1]
    counts = np.zeros((int(units.max()) + 1, len(values)), np.int64)
    np.add.at(counts, (units, grade), 1)
    return counts
