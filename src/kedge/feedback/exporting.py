"""What was said, into files: judgments as `kedge data` and a recipe read them, every event raw, or other tools' shapes.

What counts is the latest judgment of each annotator of each task, or, where a lead has settled an item, the lead's word
alone. Repeats, gold and calibration are only among the raw events.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Text, func, select, type_coerce

from kedge.data.files import new_file
from kedge.errors import InputError, Problem
from kedge.feedback import tables
from kedge.feedback.items import COLUMNS, Item, Kind, Value, side
from kedge.feedback.shapes import argilla_record, label_studio_task
from kedge.feedback.store import Rules, Store, rules_of

SHAPES = ("judgments", "majority", "raw", "argilla", "label-studio")
SUFFIXES = {"argilla": (".json",), "label-studio": (".json",)}
ROWS = (".jsonl", ".parquet")
BATCH = 1000

Row = dict[str, Any]
Name = Callable[[str], str]

_items, _done, _said = tables.items, tables.assignments, tables.judgments


@dataclass(frozen=True)
class Said:
    """One judgment that counts, and of which item."""

    item: Item
    who: str
    value: Value
    shown: tuple[int, ...] | None  # None: a lead settled it, who sees the item's own order
    strength: int | None
    reasons: tuple[str, ...]
    seconds: float | None
    guidelines: int | None


def export(
    store: Store, out: Path, *, shape: str = "judgments", kind: Kind | None = None, anonymous: bool = False
) -> int:
    """Write a new file and return how many rows, records or tasks it has.

    `anonymous` replaces names by pseudonyms that are the same in every export of this store. Raises InputError where
    the shape or suffix is not known, where there is nothing to write, or several kinds and none is chosen.
    """
    _check(out, shape)

    def work(connection: Connection) -> int:
        rules = rules_of(connection)
        name: Name = (lambda who: pseudonym(rules, who)) if anonymous else str
        if shape == "raw":
            return _written(out, _raw(connection, name))
        if shape in ("argilla", "label-studio"):
            return _written_json(out, _records(connection, shape, name))
        judged = _one_kind(connection, kind, store.place)
        turns = _conversations(connection)
        found = said(connection, judged)
        if shape == "majority":
            return _written(out, _majority(found, turns=turns))
        return _written(out, (_judgment(one, name, turns=turns) for one in found))

    return store.read(work)


def pseudonym(rules: Rules, name: str) -> str:
    """A name that says nothing, the same for the same person."""
    return "annotator-" + hmac.digest(rules.secret, f"name:{name}".encode(), "sha256").hex()[:8]


def said(connection: Connection, kind: Kind | None = None) -> Iterator[Said]:
    """Every judgment that counts, item by item."""
    word = _settled(connection)
    found = (
        select(*COLUMNS, tables.annotators.c.name, _said.c.value, _said.c.shown, _said.c.strength, _said.c.reasons,
               _said.c.seconds, _said.c.guidelines.label("version"), _items.c.settled)
        .join(_done, _done.c.judgment == _said.c.id)
        .join(_items, _items.c.id == _said.c.item)
        .join(tables.annotators, tables.annotators.c.id == _said.c.annotator)
        .where(_done.c.purpose == "task", _said.c.action == "judge", ~_items.c.settled)
        .order_by(_items.c.id, _said.c.id)
    )  # fmt: skip
    if kind is not None:
        found = found.where(_items.c.kind == kind)
    for row in connection.execute(found.execution_options(yield_per=BATCH)):
        yield Said(
            Item.of(row), row.name, row.value, tuple(row.shown), row.strength, tuple(row.reasons), row.seconds,
            row.version,
        )  # fmt: skip
    for item, (who, value) in word.items():
        row = connection.execute(select(*COLUMNS).where(_items.c.id == item)).one()
        if kind in (None, row.kind) and row.purpose == "task":
            yield Said(Item.of(row), who, value, None, None, (), None, None)


def _settled(connection: Connection) -> dict[int, tuple[str, Value]]:
    """The lead's latest word on each item that was settled."""
    table = tables.adjudications
    named = select(table.c.item, tables.annotators.c.name, table.c.value).join(
        tables.annotators, tables.annotators.c.id == table.c.lead
    )
    return {row.item: (row.name, row.value) for row in connection.execute(named.order_by(table.c.id))}


def _check(out: Path, shape: str) -> None:
    if shape not in SHAPES:
        raise InputError(Problem(f"--shape {shape}", "is not known", f"use {', '.join(SHAPES)}"))
    allowed = SUFFIXES.get(shape, ROWS)
    if out.suffix.lower() not in allowed:
        what = f"the suffix {out.suffix!r} is not one for --shape {shape}"
        raise InputError(Problem(str(out), what, f"end the name in {' or '.join(allowed)}"))


def _one_kind(connection: Connection, kind: Kind | None, place: str) -> Kind:
    counted = select(_items.c.kind, func.count()).join(_done, _done.c.item == _items.c.id)
    held = counted.where(_done.c.purpose == "task", _done.c.judgment.is_not(None)).group_by(_items.c.kind)
    kinds: list[Kind] = [row.kind for row in connection.execute(held.order_by(_items.c.kind))]
    if kind is None and len(kinds) > 1:
        what = f"holds judgments of several kinds: {', '.join(kinds)}; a file holds one"
        raise InputError(Problem(place, what, "name one with --kind"))
    if not kinds or (kind is not None and kind not in kinds):
        raise InputError(Problem(place, f"holds no judgments{f' of kind {kind}' if kind else ''} yet"))
    return kind or kinds[0]


def _conversations(connection: Connection) -> bool:
    """Whether some prompt is a conversation: then all are written as such, for a column has one type."""
    text = func.substr(type_coerce(_items.c.prompt, Text), 1, 1)
    return connection.execute(select(_items.c.id).where(text == "[").limit(1)).first() is not None


def _prompt(item: Item, *, turns: bool) -> Any:
    return item.turns if turns else item.prompt


def _response(text: str, *, turns: bool) -> Any:
    return [{"role": "assistant", "content": text}] if turns else text


def _judgment(one: Said, name: Name, *, turns: bool) -> Row:
    item, value = one.item, one.value
    row: Row = {"prompt": _prompt(item, turns=turns)}
    if item.kind == "pair":
        won = side(value)
        chosen = won if won is not None else (one.shown or (0, 1))[0]
        row |= {
            "chosen": _response(item.responses[chosen], turns=turns),
            "rejected": _response(item.responses[1 - chosen], turns=turns),
            "tie": won is None,
            "both_bad": value["choice"] == "both_bad",
            "position": 0 if one.shown is None else one.shown.index(chosen) + 1,
            "margin": None if one.strength is None else float(one.strength),
        }
    elif item.kind == "ranking":
        row |= {"responses": list(item.responses), "ranks": list(value["ranks"])}
    else:
        row |= {"response": _response(item.responses[0], turns=turns), "rating": float(value["rating"])}
    return row | {
        "annotator": name(one.who),
        "adjudicated": one.shown is None,
        "reasons": list(one.reasons),
        "seconds": one.seconds,
        "guidelines": one.guidelines,
        "item": item.key,
        "origin": item.origin,
    }


def _majority(found: Iterator[Said], *, turns: bool) -> Iterator[Row]:
    """One row for each pair with its votes; where a lead has settled it, the lead's word without votes."""
    for _, group in groupby(found, key=lambda one: one.item.id):
        ones = list(group)
        item = ones[0].item
        if item.kind != "pair":
            raise InputError(Problem("--shape majority", f"counts votes on pairs; these are of kind {item.kind}"))
        sides = [side(one.value) for one in ones]
        votes = [sides.count(0), sides.count(1)]
        chosen = int(votes[1] > votes[0])
        settled = ones[0].shown is None
        counts = (None, None, None) if settled else (votes[chosen], votes[1 - chosen], sides.count(None))
        yield {
            "prompt": _prompt(item, turns=turns),
            "chosen": _response(item.responses[chosen], turns=turns),
            "rejected": _response(item.responses[1 - chosen], turns=turns),
            "tie": (settled and sides == [None]) or (not settled and votes[0] == votes[1]),
            **dict(zip(("votes_chosen", "votes_rejected", "votes_tie"), counts, strict=True)),
            "adjudicated": settled,
            "item": item.key,
            "origin": item.origin,
        }


def _raw(connection: Connection, name: Name) -> Iterator[Row]:
    """Every event in the order in which it came."""
    people = {row.id: row.name for row in connection.execute(select(tables.annotators))}
    found = (
        select(_said, _items.c.key.label("item_key"), _items.c.kind, _items.c.prompt, _items.c.responses,
               _items.c.origin, _items.c.extra, _done.c.purpose, _done.c.judgment.label("live"))
        .join(_done, _done.c.id == _said.c.assignment)
        .join(_items, _items.c.id == _said.c.item)
        .order_by(_said.c.id)
    )  # fmt: skip
    for row in connection.execute(found.execution_options(yield_per=BATCH)):
        value = row.value or {}
        yield {
            "id": row.id,
            "action": row.action,
            "counts": row.live == row.id and row.action == "judge",
            "purpose": row.purpose,
            "kind": row.kind,
            "item": row.item_key,
            "prompt": json.dumps(row.prompt, ensure_ascii=False),
            "responses": list(row.responses),
            "annotator": name(people[row.annotator]),
            "choice": None if "choice" not in value else str(value["choice"]),
            "ranks": value.get("ranks"),
            "rating": None if "rating" not in value else float(value["rating"]),
            "shown": list(row.shown),
            "strength": row.strength,
            "reasons": list(row.reasons),
            "note": row.note,
            "flagged": row.flagged,
            "guidelines": row.guidelines,
            "seconds": row.seconds,
            "active": row.active,
            "supersedes": row.supersedes,
            "at": datetime.fromtimestamp(row.at, UTC).isoformat(),
            "origin": row.origin,
            "extra": json.dumps(row.extra or {}, ensure_ascii=False),
        }


def _records(connection: Connection, shape: str, name: Name) -> Iterator[Row]:
    write = argilla_record if shape == "argilla" else label_studio_task
    for _, group in groupby(said(connection), key=lambda one: one.item.id):
        ones = list(group)
        yield write(ones[0].item, [(name(one.who), one.value) for one in ones])


def _written(out: Path, rows: Iterator[Row]) -> int:
    first = next(rows, None)
    if first is None:
        raise InputError(Problem(str(out), "there is nothing to write yet"))
    rows = chain([first], rows)
    with new_file(out) as temporary:
        return (_parquet if out.suffix.lower() == ".parquet" else _json_lines)(temporary, rows)


def _json_lines(path: Path, rows: Iterator[Row]) -> int:
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


def _written_json(out: Path, rows: Iterator[Row]) -> int:
    """A JSON array, one record a line."""
    found = [json.dumps(row, ensure_ascii=False) for row in rows]
    if not found:
        raise InputError(Problem(str(out), "there is nothing to write yet"))
    with new_file(out) as temporary:
        temporary.write_text("[\n" + ",\n".join(found) + "\n]\n", encoding="utf-8")
    return len(found)


def _parquet(path: Path, rows: Iterator[Row]) -> int:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    from kedge.data.table import MESSAGES

    first = next(rows)
    types = {
        **dict.fromkeys(("id", "guidelines", "strength", "supersedes", "position"), arrow.int64()),
        **dict.fromkeys(("votes_chosen", "votes_rejected", "votes_tie"), arrow.int64()),
        **dict.fromkeys(("rating", "margin", "seconds", "active"), arrow.float64()),
        **dict.fromkeys(("tie", "both_bad", "adjudicated", "counts", "flagged"), arrow.bool_()),
        **dict.fromkeys(("ranks", "shown"), arrow.list_(arrow.int64())),
        **dict.fromkeys(("responses", "reasons"), arrow.list_(arrow.string())),
    }
    turns = {name for name, value in first.items() if isinstance(value, list) and value and isinstance(value[0], dict)}
    schema = arrow.schema([(name, MESSAGES if name in turns else types.get(name, arrow.string())) for name in first])
    written = 0
    whole = chain([first], rows)
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        while batch := list(islice(whole, BATCH)):
            writer.write_batch(arrow.RecordBatch.from_pylist(batch, schema))
            written += len(batch)
    return written
