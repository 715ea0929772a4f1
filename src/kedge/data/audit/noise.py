"""How many labels are wrong, from labels given twice, and what accuracy that leaves within reach.

If every decided label is flipped independently at rate e, two labels of one pair differ at rate d = 2e(1 - e). Where
pairs differ in how hard they are, only bounds are known: with e_i of pair i, E(1 - 2e_i)^2 = 1 - 2d, and a judge that
always sides with the better response agrees with a single label at rate E max(e_i, 1 - e_i), which lies between
1 - d (some pairs are coin tosses, the others certain) and (1 + sqrt(1 - 2d)) / 2 (all are as hard).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.data.audit.agreement import Counts
from kedge.data.audit.tables import Array

LEAST = 30  # units with two decided labels


@dataclass(frozen=True)
class Noise:
    """`differ`: chance d that two decided labels of a unit differ, 95% interval by units; `flips`: e of the formula.

    `ceiling` bounds the accuracy, against single labels, of a judge that knows the better response.
    """

    source: str
    units: int
    differ: float
    differ_ci: tuple[float, float]
    flips: float
    ceiling: tuple[float, float]


def label_noise(found: Counts) -> Noise | None:
    """None where fewer than `LEAST` units have two decided labels, or labels are not two-sided."""
    sides = _two_sided(found)
    if sides is None:
        return None
    one, other = sides.astype(np.float64).T
    both = one + other
    keep = both >= 2
    if keep.sum() < LEAST:
        return None
    differ = 2 * one[keep] * other[keep] / (both[keep] * (both[keep] - 1))
    mean = float(differ.mean())
    error = float(differ.std(ddof=1) / np.sqrt(len(differ)))
    return Noise(
        source=found.source,
        units=int(keep.sum()),
        differ=mean,
        differ_ci=(max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error)),
        flips=flip_rate(mean),
        ceiling=(max(0.5, 1 - mean), 1 - flip_rate(mean)),
    )


def flip_rate(differ: float) -> float:
    """e of d = 2e(1 - e); one half where labels differ as often as coins or more."""
    return 0.5 * (1 - float(np.sqrt(max(0.0, 1 - 2 * differ))))


def _two_sided(found: Counts) -> Array | None:
    """Labels for the one and the other side of each unit, ties left out."""
    width = found.counts.shape[1]
    if found.level != "nominal" or width not in (2, 3):
        return None
    return found.counts[:, [0, width - 1]]
