"""Judgments of every kind in one typed Arrow table, and back.

A column that says nothing of a kind is null there. A prompt of plain text is one user message with `plain` set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import pyarrow as arrow

from kedge.data.records import Judgment, Loaded, Message, Preference, Prompt, Ranking, Rating, Verdict
from kedge.data.validate import kind_of
from kedge.errors import InputError, Problem

MESSAGES = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.string())]))
SCHEMA = arrow.schema(
    [
        ("kind", arrow.string()),  # pair, ranking, rating or verdict
        ("plain", arrow.bool_()),
        ("prompt", MESSAGES),
        ("responses", arrow.list_(arrow.string())),  # chosen and rejected; best first; or one
        ("ranks", arrow.list_(arrow.int64())),
        ("rating", arrow.float64()),
        ("good", arrow.bool_()),
        ("strength", arrow.float64()),
        ("margin", arrow.float64()),
        ("votes", arrow.list_(arrow.int64())),  # for chosen, for rejected, for neither
        ("annotator", arrow.string()),
        ("shown", arrow.int64()),  # the place of chosen: 1, 2, or 0 where nobody knows
        ("line", arrow.string()),  # the "file:line" that was read
    ]
)
REPORT = b"kedge.rejected"  # metadata: the rows that were left out of the table


def to_table(loaded: Loaded[Judgment]) -> arrow.Table:
    """All of `loaded`, its rejected rows as metadata."""
    items = zip(loaded.lines, loaded.rows, strict=True)
    table = arrow.Table.from_batches(batches(items), SCHEMA)
    report = {"rejected": [vars(problem) for problem in loaded.rejected], "total": loaded.total}
    return table.replace_schema_metadata({REPORT: json.dumps(report).encode()})


def from_table(table: arrow.Table) -> Loaded[Judgment]:
    """What `to_table` was given. Raises `InputError` for a table of other columns."""
    if not table.schema.equals(SCHEMA):
        found = ", ".join(table.schema.names[:20])
        raise InputError(Problem("table", f"the columns are {found}; expected a canonical table", "use to_table"))
    report = json.loads((table.schema.metadata or {}).get(REPORT, b"{}"))
    rejected = tuple(Problem(**problem) for problem in report.get("rejected", ()))
    rows = [row for batch in table.to_batches() for row in batch.to_pylist()]
    total = report.get("total", len(rows))
    return Loaded(tuple(map(_judgment, rows)), tuple(row["line"] for row in rows), rejected, total)


def batches(judgments: Iterable[tuple[str, Judgment]], *, size: int = 1024) -> Iterator[arrow.RecordBatch]:
    """("file:line", judgment) as batches of at most `size` rows; holds no more than one of them."""
    rows = (_row(judgment, line) for line, judgment in judgments)
    while batch := list(islice(rows, size)):
        yield arrow.RecordBatch.from_pylist(batch, SCHEMA)


def _row(judgment: Judgment, line: str) -> dict[str, Any]:
    asked = judgment.prompt
    turns = (Message("user", asked),) if isinstance(asked, str) else asked
    prompt = [{"role": turn.role, "content": turn.content} for turn in turns]
    said = {"kind": kind_of(judgment), "annotator": judgment.annotator, "line": line}
    return said | {"plain": isinstance(asked, str), "prompt": prompt} | _graded(judgment)


def _graded(judgment: Judgment) -> dict[str, Any]:
    if isinstance(judgment, Preference):
        sides = {"responses": [judgment.chosen, judgment.rejected]}
        return sides | {name: getattr(judgment, name) for name in ("strength", "margin", "votes", "shown")}
    if isinstance(judgment, Ranking):
        return {"responses": judgment.responses, "ranks": judgment.ranks}
    grade = {"rating": judgment.rating} if isinstance(judgment, Rating) else {"good": judgment.good}
    return {"responses": [judgment.response], **grade}


def _judgment(row: Mapping[str, Any]) -> Judgment:
    turns = tuple(Message(turn["role"], turn["content"]) for turn in row["prompt"])
    prompt: Prompt = turns[0].content if row["plain"] else turns
    first, *others = row["responses"]
    annotator = row["annotator"]
    match row["kind"]:
        case "pair":
            votes = None if row["votes"] is None else tuple(row["votes"])
            said = (row["strength"], row["margin"], votes, annotator, row["shown"])
            return Preference(prompt, first, others[0], *said)
        case "ranking":
            return Ranking(prompt, (first, *others), tuple(row["ranks"]), annotator)
        case "rating":
            return Rating(prompt, first, row["rating"], annotator)
        case _:
            return Verdict(prompt, first, row["good"], annotator)
