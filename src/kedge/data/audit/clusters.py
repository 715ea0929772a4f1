"""Which rows belong together, and intervals that resample them together.

Rows of one prompt are not independent, so prompts are resampled, not rows. Where there are more than `MOST` prompts,
they are put together at random into `MOST` groups first: whole groups are independent just as prompts are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.data.audit.tables import Array, mixed

MOST = 10_000
FEWEST = 8  # below, prompts are too few to resample, and rows are resampled instead
REPLICATES = 1000
_CHUNK = 50


@dataclass(frozen=True)
class Clusters:
    """`code[i]` in [0, count) is the cluster of row i; `by_prompt` is false where rows had to stand for themselves."""

    code: Array
    count: int
    by_prompt: bool


def clustered(prompts: Array) -> Clusters:
    """Clusters of rows with these prompt hashes."""
    distinct, code = np.unique(prompts, return_inverse=True)
    count, by_prompt = len(distinct), len(distinct) >= FEWEST
    if not by_prompt:
        code, count = np.arange(len(prompts)), len(prompts)
    if count > MOST:
        code, count = (mixed(code) % np.uint64(MOST)).astype(np.int64), MOST
    return Clusters(code.astype(np.int32), count, by_prompt)


def sums(clusters: Clusters, values: Array) -> Array:
    """Sums of each column of `values` [n, K] within clusters: [C, K]."""
    return np.column_stack([np.bincount(clusters.code, column, clusters.count) for column in values.T])


def resampled(per_cluster: Array, seed: int = 0) -> Array:
    """Column sums [R, K] of `REPLICATES` resamples of the clusters, from the sums of each [C, K]."""
    rng = np.random.default_rng(seed)
    count = len(per_cluster)
    parts = []
    for start in range(0, REPLICATES, _CHUNK):
        size = min(_CHUNK, REPLICATES - start)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size)
        parts.append(weights.astype(np.float64) @ per_cluster)
    return np.concatenate(parts)


def interval(draws: Array, level: float = 0.95) -> tuple[float, float] | None:
    """The middle `level` of the finite draws; None where hardly any is finite."""
    known = draws[np.isfinite(draws)]
    if len(known) < 0.9 * len(draws) or len(known) == 0:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
