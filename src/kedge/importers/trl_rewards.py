"""Which reward columns and which scaling give the advantages that TRL logged; independent of how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kedge.importers.records import Array

EPSILON = 1e-4  # TRL adds it to the deviation
_TOLERANCE = 1e-3  # of the largest advantage: TRL computes in float32


@dataclass(frozen=True)
class Scaling:
    """One value of `scale_rewards`, in the words of Conventions."""

    meaning: str
    normalisation: str
    divides: bool


SCALINGS: Mapping[str, Scaling] = {
    "group": Scaling(
        "minus the group's mean, over the group's deviation (TRL's default)", "group mean and deviation", True
    ),
    "none": Scaling("minus the group's mean", "group mean", False),
    "batch": Scaling(
        "minus the group's mean, over the deviation of all rewards of the batch",
        "group mean and batch",
        True,
    ),
}


def advantages(rewards: Array, group: Array, scaling: str) -> Array:
    """[B] what TRL makes of weighted sums of rewards [B]; a group alone has no deviation, and nan."""
    centred = np.empty(len(rewards))
    deviation = np.full(len(rewards), np.nan)
    for number in np.unique(group):
        rows = group == number
        centred[rows] = rewards[rows] - rewards[rows].mean()
        if rows.sum() > 1:
            deviation[rows] = rewards[rows].std(ddof=1)
    if scaling == "none":
        return centred
    if scaling == "batch":
        deviation = np.full(len(rewards), rewards.std(ddof=1) if len(rewards) > 1 else np.nan)
    return np.asarray(centred / (deviation + EPSILON))


def explanations(scores: Mapping[str, Array], advantage: Array, group: Array) -> set[tuple[str, str]] | None:
    """Pairs of (reward columns with commas, scale_rewards) that give `advantage` [B]; None where it cannot tell.

    Tried are the first column, the first two and so on, with weight 1: TRL writes what `log_extra` took behind the
    rewards. A batch without any advantage explains nothing.
    """
    largest = np.abs(advantage).max(initial=0.0)
    if not np.isfinite(largest) or largest < EPSILON:
        return None
    found = set()
    for count in range(1, len(scores) + 1):
        names = list(scores)[:count]
        total = np.nansum([scores[name] for name in names], axis=0)
        for scaling in SCALINGS:
            derived = advantages(total, group, scaling)
            if np.isfinite(derived).all() and np.abs(derived - advantage).max() < _TOLERANCE * largest:
                found.add((",".join(names), scaling))
    return found
