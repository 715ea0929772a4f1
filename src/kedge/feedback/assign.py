"""Who is asked what next: calibration first, then items nobody else needs more of, hidden gold and swapped repeats.

Every function works in the caller's transaction. An item's `live` counts the assignments that are leased or judged;
it is raised only by an UPDATE that asks for room in the same statement, and the table itself forbids more than
`overlap`, so an item is never with more annotators than that, however many ask at once.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Connection,
    Float,
    Integer,
    Row,
    and_,
    bindparam,
    exists,
    func,
    select,
)

from kedge.feedback import tables
from kedge.feedback.items import COLUMNS, Item, side_order
from kedge.feedback.people import Person
from kedge.feedback.store import Rules

Gate = Literal["open", "guidelines", "calibration", "shut"]
RELEASED = 100  # ended leases that one transaction takes back

_items, _done = tables.items, tables.assignments


@dataclass(frozen=True)
class Task:
    """An item in an annotator's hands. `shown` are places of the item's responses as they stand on the screen."""

    assignment: int
    item: Item
    purpose: str  # task, gold, calibration or repeat
    shown: tuple[int, ...]
    handed: float
    until: float


def gate(connection: Connection, rules: Rules, person: Person) -> Gate:
    """What somebody has to do before they are given items; "shut" where the calibration was failed too often."""
    if connection.execute(_READ, {"who": person.id}).first() is None:
        return "guidelines"
    if person.passed or not calibrates(connection):
        return "open"
    return "calibration" if person.attempt < person.granted + rules.settings.attempts else "shut"


def calibrates(connection: Connection) -> bool:
    """Whether there is a calibration at all."""
    return connection.execute(_CALIBRATES).first() is not None


def latest_guidelines(connection: Connection) -> int:
    """The version in force."""
    return int(connection.execute(_LATEST).scalar_one())


def in_hand(connection: Connection, person: Person, now: float) -> Task | None:
    """The item that somebody holds, the latest if there are several; None where they hold none."""
    row = connection.execute(_IN_HAND, {"who": person.id, "now": now}).first()
    return None if row is None else _task(row)


def hand_out(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    """The item that somebody holds, or the next one, leased to them; None where nothing is left for them."""
    if connection.dialect.name == "postgresql":
        # One person's requests queue up here: two windows must not be handed two items.
        connection.execute(_LOCK, {"who": person.id})
    held = in_hand(connection, person, now)
    if held is not None:
        return held
    if not person.passed and calibrates(connection):
        if person.attempt >= person.granted + rules.settings.attempts:
            return None
        return _next_calibration(connection, rules, person, now)
    hidden = _next_hidden(connection, rules, person, now)
    if hidden is not None:
        return hidden
    # Only where nothing else is free are ended leases looked for: that costs everybody, and there is no hurry.
    found = _next_task(connection, rules, person, now)
    if found is None and release(connection, now):
        found = _next_task(connection, rules, person, now)
    return found


def release(connection: Connection, now: float) -> bool:
    """Take back leases that have ended, so that others may have the items; returns whether there were any."""
    ended = select(_done.c.id).where(_done.c.state == "leased", _done.c.until <= now)
    numbers = list(connection.execute(ended.limit(RELEASED).with_for_update(skip_locked=True)).scalars())
    if not numbers:
        return False
    rows = connection.execute(select(_done.c.item, _done.c.purpose).where(_done.c.id.in_(numbers))).all()
    connection.execute(_done.update().where(_done.c.id.in_(numbers)).values(state="expired"))
    for item in sorted(row.item for row in rows if row.purpose == "task"):  # in one order, lest two wait for each other
        give_back(connection, item)
    return True


def take(connection: Connection, item: int) -> bool:
    """Count one more annotator on an item, if it has room."""
    return bool(connection.execute(_TAKE, {"of": item}).rowcount)


def give_back(connection: Connection, item: int) -> None:
    """Count one annotator less."""
    connection.execute(_GIVE_BACK, {"of": item})


def lease_again(connection: Connection, rules: Rules, assignment: int, now: float) -> None:
    """Put an assignment back into its annotator's hands."""
    values = {"state": "leased", "handed": now, "until": now + 60 * rules.settings.lease_minutes, "judgment": None}
    connection.execute(_done.update().where(_done.c.id == assignment).values(values))


def decided(connection: Connection, person: Person) -> int:
    """How many items beside the calibration somebody has answered or skipped."""
    return int(connection.execute(_DECIDED, {"who": person.id}).scalar_one())


def _next_calibration(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    unasked = ~_asked(person, "calibration", person.attempt)
    found = select(*COLUMNS).where(_items.c.purpose == "calibration", unasked).order_by(_items.c.id).limit(1)
    row = connection.execute(found).first()
    return None if row is None else _lease(connection, rules, person, Item.of(row), "calibration", now, person.attempt)


def _next_hidden(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    """Gold or a repeat, where a keyed draw says that it is time and there is one."""
    settings = rules.settings
    if settings.gold_share == settings.repeat_share == 0:
        return None
    count = decided(connection, person)
    draw = int.from_bytes(hmac.digest(rules.secret, f"hidden:{person.id}:{count}".encode(), "sha256")[:8]) / 2**64
    if draw < settings.gold_share:
        return _next_gold(connection, rules, person, now)
    if draw < settings.gold_share + settings.repeat_share:
        return _next_repeat(connection, rules, person, now)
    return None


def _next_gold(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    unasked = ~_asked(person, "gold")
    found = select(*COLUMNS).where(_items.c.purpose == "gold", unasked).order_by(_items.c.id).limit(1)
    row = connection.execute(found).first()
    return None if row is None else _lease(connection, rules, person, Item.of(row), "gold", now)


def _next_repeat(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    """The first item that somebody judged long enough ago and was not asked again, its sides in reverse."""
    mine = and_(_done.c.annotator == person.id, _done.c.purpose == "task", _done.c.state == "judged")
    latest = select(_done.c.judgment).where(mine).order_by(_done.c.judgment.desc())
    recent = connection.execute(latest.limit(1).offset(rules.settings.repeat_gap - 1)).scalar()
    if recent is None:
        return None
    again = select(_done.c.item, _done.c.shown).where(
        mine, _done.c.judgment < recent, _done.c.item.not_in(select(_done.c.item).where(_own(person, "repeat")))
    )
    row = connection.execute(again.order_by(_done.c.judgment).limit(1)).first()
    if row is None:
        return None
    item = Item.of(connection.execute(select(*COLUMNS).where(_items.c.id == row.item)).one())
    return _lease(connection, rules, person, item, "repeat", now, shown=row.shown[::-1])


def _next_task(connection: Connection, rules: Rules, person: Person, now: float) -> Task | None:
    # Whom another transaction is just asking is passed over first; only if there is no other is it waited for.
    for find in (_NEXT_SKIPPING, _NEXT) if connection.dialect.name == "postgresql" else (_NEXT,):
        row = connection.execute(find, {"who": person.id}).first()
        if row is not None and take(connection, row.id):
            return _lease(connection, rules, person, Item.of(row), "task", now)
    return None


def _lease(
    connection: Connection,
    rules: Rules,
    person: Person,
    item: Item,
    purpose: str,
    now: float,
    attempt: int = 0,
    shown: Iterable[int] | None = None,
) -> Task:
    order = side_order(rules.secret, item.key, person.id, len(item.responses)) if shown is None else list(shown)
    until = now + 60 * rules.settings.lease_minutes
    own = {"item": item.id, "annotator": person.id, "purpose": purpose, "attempt": attempt}
    values: dict[str, Any] = {"state": "leased", "shown": order, "handed": now, "until": until, "judgment": None}
    number = connection.execute(_BEFORE, {f"of_{name}": value for name, value in own.items()}).scalar()
    if number is None:
        (number,) = connection.execute(_ADD, own | values).inserted_primary_key or (0,)
    else:  # a lease that ended before
        connection.execute(_done.update().where(_done.c.id == number).values(values))
    return Task(number, item, purpose, tuple(order), now, until)


def _own(person: Person, purpose: str) -> ColumnElement[bool]:
    return and_(_done.c.annotator == person.id, _done.c.purpose == purpose)


def _asked(person: Person, purpose: str, attempt: int = 0) -> ColumnElement[bool]:
    """Whether somebody has an item, or had it and did not let the lease end."""
    own = and_(_own(person, purpose), _done.c.item == _items.c.id, _done.c.attempt == attempt)
    return exists().where(own, _done.c.state != "expired").correlate(_items)


def _task(row: Row[Any]) -> Task:
    return Task(row.a_id, Item.of(row), row.a_purpose, tuple(row.a_shown), row.a_handed, row.a_until)


# Made once: making an expression anew takes longer than running it.
_who: BindParameter[int] = bindparam("who", type_=Integer)
_of: BindParameter[int] = bindparam("of", type_=Integer)
_LATEST = select(func.max(tables.guidelines.c.version))
_READ = select(tables.readings.c.version).where(
    tables.readings.c.annotator == _who, tables.readings.c.version == _LATEST.scalar_subquery()
)
_CALIBRATES = select(_items.c.id).where(_items.c.purpose == "calibration").limit(1)
_LOCK = select(tables.annotators.c.id).where(tables.annotators.c.id == _who).with_for_update()
_IN_HAND = (
    select(*COLUMNS, *(_done.c[name].label(f"a_{name}") for name in ("id", "purpose", "shown", "handed", "until")))
    .join(_done, _done.c.item == _items.c.id)
    .where(_done.c.annotator == _who, _done.c.state == "leased", _done.c.until > bindparam("now", type_=Float))
    .order_by(_done.c.handed.desc(), _done.c.id.desc())
    .limit(1)
)
_TAKE = _items.update().where(_items.c.id == _of, _items.c.live < _items.c.overlap).values(live=_items.c.live + 1)
_GIVE_BACK = _items.update().where(_items.c.id == _of).values(live=_items.c.live - 1)
_DECIDED = (
    select(func.count())
    .select_from(_done)
    .where(_done.c.annotator == _who, _done.c.state.in_(("judged", "skipped")), _done.c.purpose != "calibration")
)
_had = and_(_done.c.annotator == _who, _done.c.item == _items.c.id, _done.c.purpose == "task")
_NEXT = (
    select(*COLUMNS)
    .where(_items.c.purpose == "task", _items.c.live < _items.c.overlap)
    .where(~exists().where(_had, _done.c.state != "expired").correlate(_items))
    .order_by(_items.c.id)
    .limit(1)
    .with_for_update()
)
_NEXT_SKIPPING = _NEXT.with_for_update(skip_locked=True)
_BEFORE = select(_done.c.id).where(
    *(_done.c[name] == bindparam(f"of_{name}") for name in ("item", "annotator", "purpose", "attempt"))
)
_ADD = _done.insert()
