"""What a row says of a comparison beyond who won it: strength, ties, votes, margin, and the place shown.

Each function returns the value or raises `Unusable` where a cell cannot be read or two of them contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedge.data.cells import Unusable, empty, flag, given, number, numbers, shown, whole

Votes = tuple[int, int, int]

PLACES = {"0": 0, "1": 1, "2": 2, "first": 1, "second": 2}
ROUNDING = 0.01  # how far a strength, often rounded, may be from the share of the votes


def place(row: Mapping[str, Any]) -> int:
    """Where chosen was shown, from the columns chosen_pos, position or shown: 1, 2, or 0 where nobody knows."""
    column = given(row, "chosen_pos", "position", "shown")
    if column is None:
        return 0
    value = row[column]
    key = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if isinstance(value, bool) or key not in PLACES:
        what = f"{column} is {shown(value)}, expected 1 or 2, the place at which chosen was shown, or 0"
        raise Unusable(what, "correct it, or rename the column if it means something else")
    return PLACES[key]


def votes_of(row: Mapping[str, Any], at: int) -> Votes | None:
    """Votes for chosen, for rejected and for neither, where they were counted.

    The column `votes` lists those for the first, the second and neither; `at` is the place of chosen, and without one
    chosen counts as the first. The columns votes_chosen, votes_rejected and votes_tie say it by name.
    """
    counts = _by_name(row) if empty(row.get("votes")) else _in_order(row["votes"], at)
    if counts is None:
        return None
    if not sum(counts):
        raise Unusable("votes are all 0", "remove the votes or the row")
    total = row.get("n_votes")
    if not empty(total) and whole(total, "n_votes") != sum(counts):
        raise Unusable(f"n_votes is {shown(total)}, the votes add up to {sum(counts)}", "correct one or remove the row")
    return counts


def _by_name(row: Mapping[str, Any]) -> Votes | None:
    if given(row, "votes_chosen", "votes_rejected") is None:
        return None
    for_chosen, against = (whole(row.get(column), column) for column in ("votes_chosen", "votes_rejected"))
    return for_chosen, against, 0 if empty(row.get("votes_tie")) else whole(row["votes_tie"], "votes_tie")


def _in_order(value: object, at: int) -> Votes:
    counts = [whole(count, "votes") for count in numbers(value, "votes")]
    if len(counts) not in (2, 3):
        remedy = "write the votes for the first, the second and neither"
        raise Unusable(f"votes holds {len(counts)} numbers, expected 2 or 3", remedy)
    first, second, draw = (*counts, 0)[:3]
    return (second, first, draw) if at == 2 else (first, second, draw)


def strength_of(row: Mapping[str, Any], votes: Votes | None) -> float:
    """The share of votes for chosen, in [0, 1], from the columns strength and tie and from the votes.

    A vote for neither counts half. Votes in which neither has the most, or shares it, may also be called a tie.
    """
    said = row.get("tie")
    tie = not empty(said) and flag(said, "tie")
    if not empty(row.get("strength")):
        strength = _share(row["strength"])
        if tie and strength != 0.5:
            raise Unusable(f"tie is set but strength is {shown(row['strength'])}", "make it 0.5 or clear the tie")
    elif tie or votes is None:
        strength = 0.5 if tie else 1.0
    else:
        return _won(votes)
    if votes is not None and not _agrees(strength, votes):
        counted = f"votes are {votes[0]} for chosen, {votes[1]} for rejected and {votes[2]} for neither"
        raise Unusable(f"strength is {strength:g} but {counted}", "correct one, or say in chosen_pos which was first")
    return strength


def _share(value: object) -> float:
    expected = "a share from 0 to 1"
    share = number(value, "strength", expected)
    if not 0 <= share <= 1:
        raise Unusable(f"strength is {shown(value)}, expected {expected}", "correct it or remove the row")
    return share


def _won(votes: Votes) -> float:
    """The share that the votes give to chosen, which must not have lost: its votes may have been read the other way."""
    if votes[1] > votes[0]:
        what = f"votes are {votes[0]} for chosen and {votes[1]} for rejected: chosen lost"
        raise Unusable(what, "say in chosen_pos which was first, swap them, or give the strength")
    return _counted(votes)


def _counted(votes: Votes) -> float:
    return (votes[0] + votes[2] / 2) / sum(votes)


def _agrees(strength: float, votes: Votes) -> bool:
    drawn = strength == 0.5 and votes[2] >= max(votes[:2])
    return drawn or abs(strength - _counted(votes)) <= ROUNDING


def margin_of(row: Mapping[str, Any]) -> float | None:
    """How much better chosen is, in the annotators' own grades; 0 or more."""
    value = row.get("margin")
    if empty(value):
        return None
    expected = "a number of 0 or more"
    margin = number(value, "margin", expected)
    if margin < 0:
        raise Unusable(f"margin is {shown(value)}, expected {expected}", "swap the sides or correct it")
    return margin
