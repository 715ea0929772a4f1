"""Rows of two named responses and a winner, such as response_a, response_b and winner, as chosen and rejected."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from kedge.data.cells import NUMBER, Unusable, empty, name_list, shown

WINNERS = ("winner", "preference", "label", "better_response_id")
STEMS = ("response", "answer", "completion", "output", "conversation")
ENDINGS = (("a", "b"), ("0", "1"), ("1", "2"))
NAMED = tuple((f"{stem}{gap}{a}", f"{stem}{gap}{b}") for stem in STEMS for gap in ("_", "") for a, b in ENDINGS)
STEM = re.compile(rf"(?:model|{'|'.join(STEMS)})[ _]?(?=.)")
TIES = frozenset({"tie", "draw", "equal", "both_bad", "bothbad", "tie (bothbad)"})


def two_named(names: AbstractSet[str]) -> list[tuple[str, str]]:
    """The pairs of columns that name two responses; more than one where there are three responses or more."""
    return [pair for pair in NAMED if pair[0] in names and pair[1] in names]


def decided(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """The row with chosen and rejected, and the place of chosen among the two columns: 1 or 2, 1 in a tie."""
    named = two_named(row.keys())
    if len(named) > 1:
        columns = name_list(dict.fromkeys(name for pair in named for name in pair))
        raise Unusable(f"more than two responses: {columns}", "write the responses as a list, with ranks or scores")
    said = [name for name in WINNERS if not empty(row.get(name))]
    if not said:
        raise Unusable("no winner is given", f"name the better response in the column {WINNERS[0]}, or write tie")
    shares = {share_of_first(row[name], name, named[0]) for name in said}
    if len(shares) > 1:
        raise Unusable(f"the columns {name_list(said)} name different winners", "keep the column that is meant")
    (share,) = shares
    first, second = named[0] if share >= 0.5 else reversed(named[0])
    whole = {**row, "chosen": row[first], "rejected": row[second]}
    if share == 0.5:
        whole["tie"] = True
    elif 0 < share < 1:
        if not empty(row.get("strength")):
            raise Unusable("strength is given beside a winner that leans", "keep one of them")
        whole["strength"] = max(share, 1 - share)
    return whole, 1 if share >= 0.5 else 2


def share_of_first(value: object, column: str, named: tuple[str, str]) -> float:
    """What the winner's name or number gives to the first response: 1, 0, 0.5 for a tie, or a share between.

    A number is the ending of a column; where the columns end in 1 and 2, 0 is a draw and 1.8 leans to the second, as
    AlpacaEval and PandaLM write it. Letters take no numbers: they may count from 0 or from 1.
    """
    endings = (named[0][-1], named[1][-1])
    key = STEM.sub("", str(value).strip().lower(), count=1)
    if key in TIES:
        return 0.5
    if key in endings:
        return 1.0 if key == endings[0] else 0.0
    if not isinstance(value, bool) and endings[0] != "a" and NUMBER.fullmatch(key):
        figure = float(key)
        if endings == ("1", "2"):
            figure = 1.5 if figure == 0 else figure
            if 1 <= figure <= 2:
                return 2 - figure
        elif figure in (0, 1):
            return 1 - figure
    what = f"{column} is {shown(value)}, expected {endings[0]}, {endings[1]} or tie, as in {named[0]} and {named[1]}"
    raise Unusable(what, "correct it or remove the row")
