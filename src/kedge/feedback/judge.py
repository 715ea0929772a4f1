"""Taking answers: judged, skipped, taken back, settled by a lead. What is acknowledged is committed, and stored once.

Every function works in the caller's transaction. A submission carries a key that its page was given; the same key
again, after a crash or a second click, finds what was stored and stores nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Connection, Integer, Row, String, and_, bindparam, select

from kedge.feedback import tables
from kedge.feedback.assign import give_back, latest_guidelines, lease_again, take
from kedge.feedback.items import COLUMNS, Item, Unfit, Value, agree, item_of, normalised
from kedge.feedback.people import Person
from kedge.feedback.store import Rules

LONGEST_NOTE = 2000

_done, _said = tables.assignments, tables.judgments


@dataclass(frozen=True)
class Answer:
    """What a page sends. `given` is as `items.normalised` takes it, None to skip; `active`: seconds it was seen."""

    key: str
    given: Mapping[str, Any] | None
    strength: int | None = None
    reasons: Sequence[str] = ()
    note: str = ""
    flagged: bool = False
    active: float | None = None


@dataclass(frozen=True)
class Stored:
    """The judgment that counts; `again` where it was there before; `calibrated` says how an attempt ended."""

    judgment: int
    again: bool = False
    calibrated: bool | None = None


class Refused(Exception):
    """An answer that came too late, or twice; the text is for the annotator."""


def submit(connection: Connection, rules: Rules, person: Person, assignment: int, answer: Answer, now: float) -> Stored:
    """Store an answer. Raises `Unfit` where the item does not allow it, `Refused` where the item is gone."""
    before = _stored(connection, person, answer.key)
    if before is not None:
        return Stored(before, again=True)
    row: Any = connection.execute(_HELD_BY, {"which": assignment, "who": person.id}).first()
    if row is None:
        raise Refused("This page is not yours; go on with the next item.")
    item = Item(row.item, *[getattr(row, f"i_{column.name}") for column in COLUMNS[1:]])
    value = None if answer.given is None else normalised(item, row.shown, answer.given, rules.settings)
    if value is None and row.purpose == "calibration":
        raise Unfit("The items of the calibration cannot be skipped.")
    _hold(connection, row)
    stored = _insert(connection, rules, person, row, answer, value, now)
    state = "skipped" if value is None else "judged"
    connection.execute(_ANSWERED, {"which": assignment, "new_state": state, "new_judgment": stored})
    if row.purpose == "task":
        if value is None:
            give_back(connection, item.id)
        if row.split or row.live > 1:  # otherwise nobody else has said anything
            mark_split(connection, rules, item)
    calibrated = _calibrated(connection, rules, person) if row.purpose == "calibration" else None
    return Stored(stored, calibrated=calibrated)


def undo(connection: Connection, rules: Rules, person: Person, key: str, now: float) -> Stored:
    """Take back the latest answer that counts and put its item into the annotator's hands again.

    Raises `Refused` where there is none, where a lead has settled the item, or where its place is taken.
    """
    before = _stored(connection, person, key)
    if before is not None:
        return Stored(before, again=True)
    mine = and_(_done.c.annotator == person.id, _done.c.judgment.is_not(None), _done.c.purpose != "calibration")
    latest = select(_done.c.id, *[_done.c[name] for name in _HELD if name != "id"], _done.c.judgment).where(mine)
    row = connection.execute(latest.order_by(_done.c.judgment.desc()).limit(1).with_for_update()).first()
    if row is None:
        raise Refused("There is nothing to undo.")
    if connection.execute(select(tables.items.c.settled).where(tables.items.c.id == row.item)).scalar():
        raise Refused("Your last answer cannot be undone: a lead has settled the item.")
    if row.state == "skipped" and row.purpose == "task" and not take(connection, row.item):
        raise Refused("The item that you skipped has gone to others.")
    said = {"key": key, "assignment": row.id, "item": row.item, "annotator": person.id, "action": "undo", "at": now}
    more = {"reasons": [], "shown": row.shown, "guidelines": latest_guidelines(connection), "seconds": now - row.handed}
    stored = _inserted(connection, said | more | {"supersedes": row.judgment})
    lease_again(connection, rules, row.id, now)
    item = item_of(connection, row.item)
    if row.purpose == "task" and item is not None:
        mark_split(connection, rules, item)
    return Stored(stored)


def adjudicate(
    connection: Connection, rules: Rules, lead: Person, item: Item, key: str, given: Mapping[str, Any], note: str,
    now: float,
) -> None:  # fmt: skip
    """Settle an item: what the lead says counts in the exports, in place of the judgments. Raises `Unfit`.

    A lead sees the responses in the item's own order; the latest word counts.
    """
    table = tables.adjudications
    if connection.execute(select(table.c.id).where(table.c.key == key)).first() is not None:
        return
    value = normalised(item, range(len(item.responses)), given, rules.settings)
    said = {"key": key, "item": item.id, "lead": lead.id, "value": value, "note": note[:LONGEST_NOTE] or None}
    connection.execute(table.insert().values(said | {"at": now}))
    connection.execute(tables.items.update().where(tables.items.c.id == item.id).values(settled=True))


def counted(connection: Connection, item: int) -> list[Value]:
    """The judgments of an item that count, repeats left out."""
    return list(connection.execute(_COUNTED, {"which": item}).scalars())


def mark_split(connection: Connection, rules: Rules, item: Item) -> None:
    """Note whether the judgments of an item disagree, for the queue of the lead."""
    values = counted(connection, item.id)
    split = any(
        not agree(item.kind, first, second, rules.settings)
        for place, first in enumerate(values)
        for second in values[:place]
    )
    table = tables.items
    connection.execute(table.update().where(table.c.id == item.id, table.c.split != split).values(split=split))


def _stored(connection: Connection, person: Person, key: str) -> int | None:
    row = connection.execute(_STORED, {"which": key}).first()
    if row is not None and row.annotator != person.id:
        raise Refused("This page is not yours; go on with the next item.")
    return None if row is None else int(row.id)


def _hold(connection: Connection, row: Row[Any]) -> None:
    """Make sure that the assignment may be answered; one whose lease ended is taken up again where there is room."""
    if row.state in ("judged", "skipped"):
        raise Refused("You have answered this item already, perhaps in another window.")
    if row.state == "expired" and row.purpose == "task" and not take(connection, row.item):
        raise Refused("You held this item too long and it went to others; the answer was not kept.")


def _insert(
    connection: Connection, rules: Rules, person: Person, row: Row[Any], answer: Answer, value: Value | None, now: float
) -> int:
    allowed = set(rules.settings.reasons)
    said = {
        "key": answer.key,
        "assignment": row.id,
        "item": row.item,
        "annotator": person.id,
        "action": "skip" if value is None else "judge",
        "value": value,
        "strength": answer.strength if value is not None and value.get("choice") in (0, 1) else None,
        "reasons": [reason for reason in answer.reasons if reason in allowed],
        "note": answer.note.strip()[:LONGEST_NOTE] or None,
        "flagged": answer.flagged,
        "shown": row.shown,
        "guidelines": latest_guidelines(connection),
        "seconds": max(0.0, now - row.handed),
        # A page cannot have been seen for longer than it was out.
        "active": None if answer.active is None else min(max(0.0, answer.active), max(0.0, now - row.handed)),
        "at": now,
    }
    return _inserted(connection, said)


def _inserted(connection: Connection, values: Mapping[str, Any]) -> int:
    (number,) = connection.execute(_ADD, dict(values)).inserted_primary_key or (0,)
    return int(number)


def calibration(connection: Connection, person: Person, attempt: int) -> list[tuple[Item, Value, tuple[int, ...]]]:
    """The answers of an attempt: item, what was said, and the order in which the responses were shown."""
    own = and_(_done.c.annotator == person.id, _done.c.purpose == "calibration", _done.c.attempt == attempt)
    rows: Sequence[Any] = connection.execute(
        select(*COLUMNS, _said.c.value, _said.c.shown)
        .join(_done, _done.c.item == tables.items.c.id)
        .join(_said, _said.c.id == _done.c.judgment)
        .where(own)
        .order_by(tables.items.c.id)
    ).all()
    return [(Item.of(row), row.value, tuple(row.shown)) for row in rows]


def right(rules: Rules, item: Item, value: Value) -> bool:
    """Whether a judgment is what the item's known answer says."""
    return item.answer is not None and agree(item.kind, value, item.answer, rules.settings)


def _calibrated(connection: Connection, rules: Rules, person: Person) -> bool | None:
    """Whether the attempt just ended was passed; None while it goes on."""
    table = tables.items
    asked = connection.execute(select(table.c.id).where(table.c.purpose == "calibration")).scalars().all()
    answered = calibration(connection, person, person.attempt)
    if len(answered) < len(asked):
        return None
    share = sum(right(rules, item, value) for item, value, _ in answered) / len(answered)
    passed = share >= rules.settings.threshold
    people = tables.annotators
    changed = {"passed": passed, "attempt": person.attempt + (not passed)}
    connection.execute(people.update().where(people.c.id == person.id).values(changed))
    return passed


_HELD = ("id", "item", "purpose", "state", "shown", "handed")


# Made once: making an expression anew takes longer than running it.
_which: BindParameter[int] = bindparam("which", type_=Integer)
_HELD_BY = (
    select(
        *(_done.c[name] for name in _HELD),
        *(column.label(f"i_{column.name}") for column in COLUMNS[1:]),
        tables.items.c.live,
        tables.items.c.split,
    )
    .join(tables.items, tables.items.c.id == _done.c.item)
    .where(_done.c.id == _which, _done.c.annotator == bindparam("who", type_=Integer))
    .with_for_update(of=_done)
)
_ANSWERED = (
    _done.update().where(_done.c.id == _which).values(state=bindparam("new_state"), judgment=bindparam("new_judgment"))
)
_STORED = select(_said.c.id, _said.c.annotator).where(_said.c.key == bindparam("which", type_=String))
_COUNTED = (
    select(_said.c.value)
    .join(_done, _done.c.judgment == _said.c.id)
    .where(_done.c.item == _which, _done.c.purpose == "task", _said.c.action == "judge")
)
_ADD = _said.insert()
