"""Each annotator on their own: agreement with the rest, taste for length and place, and change along the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from kedge.data.audit.clusters import clustered, sums
from kedge.data.audit.duplicates import pair_units, single_units
from kedge.data.audit.fit import slope
from kedge.data.audit.tables import Array, Tables, log_ratio, longer, outcome

ENOUGH = 50  # labels of an annotator who is looked at alone
HALF = 30  # labels in each half of the file for a drift to be tested
SHOWN = 200  # annotators told, those with the most labels


@dataclass(frozen=True)
class Annotator:
    """One annotator. What too few of their labels speak to is None.

    `agrees`: share of labels that agree with the majority of the others' on the same pair or response, with how many
    such labels there are in `compared`. `slope`: length slope of their pairs, as in `length_bias`. `first_wins`: share
    of wins for the place shown first. `good`: share of verdicts that are good, or the mean rating.
    """

    name: str
    labels: int
    agrees: float | None
    compared: int
    slope: float | None
    longer_wins: float | None
    first_wins: float | None
    good: float | None


@dataclass(frozen=True)
class Drift:
    """A share in the first and in the second half of the labels in file order; `who` is empty for the whole file."""

    who: str
    what: str
    before: float
    after: float
    labels: int
    p: float


def annotators(tables: Tables) -> tuple[Annotator, ...]:
    """Those with at least `ENOUGH` labels, the most first; empty where rows name none."""
    table = tables.singles if len(tables.singles) else tables.pairs
    if not tables.annotators:
        return ()
    agrees, compared = _with_the_rest(table, len(tables.annotators))
    return tuple(
        _one(tables.annotators[who], rows, agrees[who], int(compared[who]))
        for who, rows in _own_rows(table, len(tables.annotators), ENOUGH)
    )


def drifts(tables: Tables) -> tuple[Drift, ...]:
    """Changes between the halves, for the whole file and for annotators with enough labels, smallest p first."""
    table = tables.singles if len(tables.singles) else tables.pairs
    found = _halves("", table)
    for who, rows in _own_rows(table, len(tables.annotators), 2 * HALF):
        found += _halves(tables.annotators[who], rows)
    return tuple(sorted(found, key=lambda drift: drift.p))


def _own_rows(table: Array, count: int, least: int) -> Iterator[tuple[int, Array]]:
    """Each annotator with at least so many labels and their rows in file order, those with the most first."""
    counts = np.bincount(table["annotator"][table["annotator"] >= 0], minlength=count)
    order = np.argsort(table["annotator"], kind="stable")
    coders = table["annotator"][order]
    for who in np.argsort(-counts, kind="stable")[:SHOWN]:
        if counts[who] >= least:
            low, high = np.searchsorted(coders, [who, who + 1])
            yield int(who), table[order[low:high]]


def _one(name: str, rows: Array, agrees: float, compared: int) -> Annotator:
    known = float(agrees) if compared >= HALF else None
    if "rejected" not in (rows.dtype.names or ()):
        return Annotator(name, len(rows), known, compared, None, None, None, float(rows["label"].mean()))
    who = longer(rows)
    unequal = rows[who != 0]
    first = _first(rows)
    steep = float(slope(log_ratio(unequal), np.ones(len(unequal)))[0]) if len(unequal) >= HALF else None
    return Annotator(
        name,
        len(rows),
        known,
        compared,
        steep,
        float(np.mean(who[who != 0] > 0)) if len(unequal) >= HALF else None,
        float(first.mean()) if len(first) >= HALF else None,
        None,
    )


def _first(pairs: Array) -> Array:
    """Of decided pairs whose order is known: whether the one shown first won."""
    known = pairs[(pairs["shown"] > 0) & (outcome(pairs) != 0)]
    won: Array = (known["shown"] == 1) == (outcome(known) > 0)
    return won


def _halves(who: str, rows: Array) -> list[Drift]:
    """Every share that both halves of the rows have enough labels for."""
    found = (_change(who, what, values, prompts) for what, values, prompts in _shares(rows))
    return [one for one in found if one is not None]


def _shares(rows: Array) -> list[tuple[str, Array, Array]]:
    """What may drift: zeros and ones in file order, with their prompts."""
    if "rejected" not in (rows.dtype.names or ()):
        middle = 0.5 * (float(rows["label"].max()) + float(rows["label"].min()))
        return [("share of good labels", rows["label"] > middle, rows["prompt"])]
    unequal, known = rows[longer(rows) != 0], rows[(rows["shown"] > 0) & (outcome(rows) != 0)]
    return [
        ("longer wins", longer(unequal) > 0, unequal["prompt"]),
        ("first shown wins", _first(known), known["prompt"]),
    ]


def _change(who: str, what: str, values: Array, prompts: Array) -> Drift | None:
    """The difference of the halves against its standard error, clustered by prompt."""
    half = len(values) // 2
    if half < HALF:
        return None
    second = np.arange(len(values)) >= half
    before, after = float(values[~second].mean()), float(values[second].mean())
    pull = np.where(second, (values - after) / (len(values) - half), (before - values) / half)
    clusters = clustered(prompts)
    parts = sums(clusters, pull[:, None])[:, 0]
    error = np.sqrt(float(parts @ parts) * clusters.count / max(1, clusters.count - 1))
    p = float(2 * norm.sf(abs(after - before) / error)) if error > 0 else 1.0
    return Drift(who, what, before, after, len(values), p)


def _with_the_rest(table: Array, count: int) -> tuple[Array, Array]:
    """For each annotator the share of decided labels that agree with the majority of the others', and their number."""
    if "rejected" in (table.dtype.names or ()):
        units = pair_units(table)
        code, side, size = units.code, units.side.astype(np.float64), units.count
    else:
        code, size = single_units(table)
        side = np.sign(table["label"] - 0.5 * (table["label"].max() + table["label"].min())).astype(np.float64)
    rest = np.bincount(code, side, size)[code] - side
    use = (side != 0) & (rest != 0) & (table["annotator"] >= 0)
    who = table["annotator"][use]
    compared = np.bincount(who, minlength=count)
    agrees = np.bincount(who, np.sign(rest[use]) == side[use], count)
    return agrees / np.maximum(compared, 1), compared
