"""Rows that say the same, say nothing, or say the opposite of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kedge.data.audit.near import Near, near_duplicates
from kedge.data.audit.tables import Array, Tables, mixed, outcome


@dataclass(frozen=True)
class Duplicates:
    """Counts.

    `duplicates`: rows beyond the first with the same prompt, responses, winner or label, and annotator. `identical`:
    pairs of two equal responses, `identical_decided` those not called a tie. `empty`: responses without a visible
    character. `repeated`: pairs of different responses, in either order, that were judged more than once (responses,
    for ratings and verdicts); `contradictory`: those of them with opposite winners, both verdicts, or ratings further
    apart than half the scale.
    """

    duplicates: int
    identical: int
    identical_decided: int
    empty: int
    repeated: int
    contradictory: int
    near_prompts: Near
    near_responses: Near


@dataclass(frozen=True)
class Units:
    """What can be judged more than once: `code[i]` is the unit of row i, of `count`; `side` is 1 or -1.

    For pairs `side` says which way the row's winner stands in the unit's own order, 0 for ties.
    """

    code: Array
    count: int
    side: Array


def pair_units(pairs: Array) -> Units:
    """Units of prompt and unordered pair; equal responses make a unit whose side is always 0."""
    first = pairs["chosen"] < pairs["rejected"]
    low, high = np.minimum(pairs["chosen"], pairs["rejected"]), np.maximum(pairs["chosen"], pairs["rejected"])
    distinct, code = np.unique(mixed(pairs["prompt"], low, high), return_inverse=True)
    side = np.where(low == high, 0, outcome(pairs) * np.where(first, 1, -1)).astype(np.int8)
    return Units(code, len(distinct), side)


def single_units(singles: Array) -> tuple[Array, int]:
    """The unit of each rating or verdict, prompt and response together, and how many there are."""
    distinct, code = np.unique(mixed(singles["prompt"], singles["response"]), return_inverse=True)
    return code, len(distinct)


def find_duplicates(tables: Tables) -> Duplicates:
    pairs, same = tables.pairs, tables.pairs["chosen"] == tables.pairs["rejected"]
    units = pair_units(pairs[~same])
    counts = np.bincount(units.code, minlength=units.count)
    both = _seen(units, 1) & _seen(units, -1)
    repeated, opposite = _single_repeats(tables.singles)
    return Duplicates(
        duplicates=len(tables.rows) - len(np.unique(tables.rows["hash"])),
        identical=int(same.sum()),
        identical_decided=int((same & (outcome(pairs) != 0)).sum()),
        empty=int(tables.rows["empty"].sum()),
        repeated=int((counts > 1).sum()) + repeated,
        contradictory=int(both.sum()) + opposite,
        near_prompts=near_duplicates(tables.prompts),
        near_responses=near_duplicates(tables.responses),
    )


def agreed_sides(units: Units) -> Array:
    """Who won each unit: 1 or -1 where all decided labels say so, else 0."""
    up, down = _seen(units, 1), _seen(units, -1)
    return np.where(up & ~down, 1, np.where(down & ~up, -1, 0)).astype(np.int8)


def _seen(units: Units, side: int) -> Array:
    return np.bincount(units.code[units.side == side], minlength=units.count) > 0


def _single_repeats(singles: Array) -> tuple[int, int]:
    if len(singles) == 0:
        return 0, 0
    code, count = single_units(singles)
    label = singles["label"].astype(np.float64)
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, code, label)
    np.maximum.at(high, code, label)
    repeated = int((np.bincount(code, minlength=count) > 1).sum())
    return repeated, int((high - low > 0.5 * np.ptp(label)).sum()) if np.ptp(label) > 0 else 0
