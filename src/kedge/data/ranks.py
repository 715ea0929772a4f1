"""The rank of each response in a list, from the columns that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kedge.data.cells import Unusable, empty, flag, given, number, numbers, shown, whole

SCORES = ("overall", "wins", "ratings", "scores")  # one for each response, higher is better


def ranks_of(row: Mapping[str, Any], count: int) -> list[int]:
    """The ranks of `count` responses, from 0 for the best, from the first of the columns that hold something.

    `ranks` holds one for each response, lower is better; `order` the places of the responses, best first; `ranking`
    either, where both say the same; `best_first` that they are in order; the columns of `SCORES` one for each.
    """
    if not empty(row.get("ranks")):
        return _from_zero([whole(rank, "ranks") for rank in _as_many(row["ranks"], "ranks", count)])
    if not empty(row.get("order")):
        return _inverse(_permutation(row["order"], count))
    if not empty(row.get("ranking")):
        return _ranks_or_order(row["ranking"], count)
    if not empty(row.get("best_first")) and flag(row["best_first"], "best_first"):
        return list(range(count))
    column = given(row, *SCORES)
    if column is None:
        remedy = f"add ranks, order, {', '.join(SCORES)}, or best_first if they are in order"
        raise Unusable("nothing says which response is better", remedy)
    scores = [number(score, column) for score in _as_many(row[column], column, count)]
    levels = {score: rank for rank, score in enumerate(sorted(set(scores), reverse=True))}
    return [levels[score] for score in scores]


def _as_many(value: object, column: str, count: int) -> list[Any]:
    found = numbers(value, column)
    if len(found) != count:
        raise Unusable(f"{column} holds {len(found)} for {count} responses", "give one for each response")
    return found


def _from_zero(ranks: Sequence[int]) -> list[int]:
    return [rank - min(ranks) for rank in ranks]


def _permutation(value: object, count: int) -> list[int]:
    """Places of the responses, best first, counted from 0 or from 1."""
    places = _from_zero([whole(place, "order") for place in _as_many(value, "order", count)])
    if sorted(places) != list(range(count)):
        raise Unusable("order does not name every response once", "list the places of the responses, best first")
    return places


def _inverse(order: Sequence[int]) -> list[int]:
    ranks = [0] * len(order)
    for rank, place in enumerate(order):
        ranks[place] = rank
    return ranks


def _ranks_or_order(value: object, count: int) -> list[int]:
    """A `ranking`, which some write as ranks and others as an order."""
    ranks = _from_zero([whole(rank, "ranking") for rank in _as_many(value, "ranking", count)])
    if sorted(ranks) == list(range(count)) and _inverse(ranks) != ranks:
        what = f"ranking is {shown(value)}, which says one thing as ranks and another as places, best first"
        raise Unusable(what, "name the column ranks or order")
    return ranks
