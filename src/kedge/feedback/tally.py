"""How far a labelling job is: what every page shows of it, without the measures that need SciPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, select

from kedge.feedback import tables

_items, _done, _said = tables.items, tables.assignments, tables.judgments


@dataclass(frozen=True)
class Counts:
    """Of tasks: `asked` judgments wanted in all, `judged` given, `held` in somebody's hands."""

    items: int
    asked: int
    judged: int
    held: int
    finished: int
    split: int
    settled: int
    gold: int
    calibration: int
    flagged: int


def counts(connection: Connection) -> Counts:
    """How far the job is."""
    task = _items.c.purpose == "task"
    live = func.coalesce(func.sum(_items.c.live), 0)
    whole = select(func.count(), func.coalesce(func.sum(_items.c.overlap), 0), live).where(task)
    items, asked, taken = connection.execute(whole).one()

    def number(*where: Any) -> int:
        return int(connection.execute(select(func.count()).select_from(_items).where(*where)).scalar_one())

    own = and_(_done.c.purpose == "task", _done.c.state == "judged")
    judged = int(connection.execute(select(func.count()).select_from(_done).where(own)).scalar_one())
    full = select(_done.c.item).where(own).group_by(_done.c.item, _items.c.overlap)
    full = full.join(_items, _items.c.id == _done.c.item).having(func.count() >= _items.c.overlap)
    finished = int(connection.execute(select(func.count()).select_from(full.subquery())).scalar_one())
    flagged = select(func.count()).select_from(_said).join(_done, _done.c.judgment == _said.c.id).where(_said.c.flagged)
    return Counts(
        items=int(items),
        asked=int(asked),
        judged=judged,
        held=int(taken) - judged,
        finished=finished,
        split=number(_items.c.split, ~_items.c.settled),
        settled=number(_items.c.settled),
        gold=number(_items.c.purpose == "gold"),
        calibration=number(_items.c.purpose == "calibration"),
        flagged=int(connection.execute(flagged).scalar_one()),
    )
