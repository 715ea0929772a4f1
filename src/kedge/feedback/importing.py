"""Items from files: prompts with one, two or more responses, judged or not, in every spelling `kedge.data` reads.

Of a task the judgments of the file are left aside; gold and calibration need one, which is their known answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kedge.data import columns
from kedge.data.cells import Unusable, given, listed
from kedge.data.files import read_rows
from kedge.data.records import Judgment, Preference, Prompt, Ranking, Rating, Verdict
from kedge.data.turns import answered, answers, messages_of
from kedge.data.winners import two_named
from kedge.errors import Problem
from kedge.feedback.items import MOST_RANKED, Kind, NewItem, Purpose
from kedge.feedback.settings import Settings
from kedge.feedback.shapes import Row, plain_row

LONGEST_EXTRA = 500  # characters of a further column that is kept
NEEDED = "prompt and responses: chosen and rejected, response_a and response_b, a list responses, or response"
EXPLAINED = ("why", "explanation")


def read_items(
    path: Path,
    settings: Settings,
    *,
    kind: Kind | None = None,
    purpose: Purpose = "task",
    overlap: int | None = None,
) -> Iterator[NewItem | Problem]:
    """Each row as an item, or what is wrong with it. `kind` "ranking" ranks two responses rather than comparing them.

    Raises InputError for a file that cannot be read.
    """
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if isinstance(row, Problem):
            yield row
            continue
        try:
            yield _item(plain_row(row), f"{path.name}:{number}", settings, kind, purpose, overlap)
        except Unusable as error:
            yield Problem(where, error.what, error.remedy)


def _item(
    row: Row, origin: str, settings: Settings, kind: Kind | None, purpose: Purpose, overlap: int | None
) -> NewItem:
    prompt, responses, used = _asked(row)
    found: Kind = "rating" if len(responses) == 1 else "pair" if len(responses) == 2 else "ranking"
    if kind == "ranking" and found == "pair":
        found = "ranking"
    elif kind is not None and kind != found:
        raise Unusable(f"holds {len(responses)} responses, which make no {kind}", "leave --as away")
    if len(set(responses)) < len(responses):
        raise Unusable("responses are the same text", "remove the row: there is nothing to compare")
    if len(responses) > MOST_RANKED:
        raise Unusable(f"holds {len(responses)} responses, a page at most {MOST_RANKED}", "split the row")
    text = prompt if isinstance(prompt, str) else [{"role": one.role, "content": one.content} for one in prompt]
    answer = None
    if purpose != "task":
        answer = _answer(columns.judgment(row), responses, found, settings)
    why = given(row, *EXPLAINED)
    extra = {name: value for name, value in row.items() if name not in used and _small(value)}
    return NewItem(
        found, text, responses, purpose, answer, None if why is None else str(row[why]), origin, extra, overlap
    )


def _asked(row: Row) -> tuple[Prompt, tuple[str, ...], set[str]]:
    """The prompt, the responses, and the columns they came from."""
    if row.keys() >= set(columns.CANONICAL) and row["plain"]:
        row = {**row, "prompt": messages_of(row["prompt"], "prompt")[0].content}
    sides = _sides(row)
    if sides is None:
        raise Unusable(f"the columns are {', '.join(sorted(row)[:20])}; expected {NEEDED}", "rename the columns")
    used = {"prompt", "instruction", "input", "messages"} | {name.partition("[")[0] for _, name in sides}
    if sides[0][1] == "messages":
        prompt, response = answered(messages_of(row["messages"], "messages"))
        return prompt, (response,), used
    asked, texts = answers(row, sides)
    if not any(text.strip() for text in texts) and len(texts) > 1:
        raise Unusable("all responses are empty", "remove the row")
    return asked, tuple(texts), used


def _sides(row: Row) -> list[tuple[Any, str]] | None:
    """Each response and its column."""
    there = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= there:
        return [(row[name], name) for name in ("chosen", "rejected")]
    named = two_named(there)
    if len(named) == 1:
        return [(row[name], name) for name in named[0]]
    column = next((name for name in columns.LISTS if name in there), None)
    if column is not None:
        return [(value, f"{column}[{place}]") for place, value in enumerate(listed(row[column], column))] or None
    single = next((name for name in columns.SINGLE if name in there), None)
    return None if single is None or named else [(row[single], single)]


def _answer(said: Judgment, responses: Sequence[str], kind: Kind, settings: Settings) -> dict[str, Any]:
    """What the file says, in the order in which the item holds its responses."""
    match said:
        case Preference() if kind == "pair":
            return {"choice": "tie" if said.strength == 0.5 else responses.index(_winner(said))}
        case Ranking():
            ranks = dict(zip(said.responses, said.ranks, strict=True))
            own = [ranks[response] for response in responses]
            levels = {rank: level for level, rank in enumerate(sorted(set(own)))}
            if kind == "pair":
                return {"choice": "tie" if len(levels) == 1 else own.index(min(own))}
            return {"ranks": [levels[rank] for rank in own]}
        case Preference():
            decided = 0 if said.strength == 0.5 else 1
            return {"ranks": [0 if response == _winner(said) else decided for response in responses]}
        case Rating() if said.rating in settings.scale:
            return {"rating": int(said.rating)}
        case Rating():
            what = f"the known rating is not one of {settings.lowest} to {settings.highest}"
            raise Unusable(what, "correct it, or set lowest and highest")
        case Verdict():
            raise Unusable("the known answer is a verdict, which is no task here", "give a rating")


def _winner(said: Preference) -> str:
    return said.chosen if said.strength >= 0.5 else said.rejected


def _small(value: Any) -> bool:
    """Whether a further column's value is kept with the item."""
    if isinstance(value, str):
        return len(value) <= LONGEST_EXTRA
    return isinstance(value, int | float | bool) and value == value


def counted(found: Iterator[NewItem | Problem]) -> tuple[list[NewItem], list[Problem]]:
    """The items and the problems apart."""
    items: list[NewItem] = []
    problems: list[Problem] = []
    for one in found:
        if isinstance(one, Problem):
            problems.append(one)
        else:
            items.append(one)
    return items, problems
