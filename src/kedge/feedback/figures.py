"""What a lead sees: how much is done, how fast, how far people agree, and what each of them seems to go by.

The measures are those of `kedge data audit`, on the judgments as they stand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, select

from kedge.data.audit.agreement import Agreement, agreement, label_counts
from kedge.data.audit.annotators import Drift, drifts
from kedge.data.audit.length import LengthBias, length_bias
from kedge.data.audit.position import PositionBias, position_bias
from kedge.data.audit.tables import PAIR, ROW, SINGLE, Tables, Texts
from kedge.evaluate.intervals import wilson
from kedge.feedback import tables
from kedge.feedback.items import COLUMNS, Item, Value, agree
from kedge.feedback.judge import right
from kedge.feedback.store import Rules
from kedge.feedback.tally import Counts, counts

HOUR = 3600.0
FEW = 10  # decided pairs below which nothing is said of somebody's taste
CERTAIN = 0.01  # p of a drift that is shown, after correction for how many were looked at

_items, _done, _said, _people = tables.items, tables.assignments, tables.judgments, tables.annotators


@dataclass(frozen=True)
class Share:
    """`count` of `of`, with Wilson's 95% interval; None where `of` is 0."""

    count: int
    of: int

    @property
    def value(self) -> float | None:
        return self.count / self.of if self.of else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.count / self.of, self.of) if self.of else None


@dataclass(frozen=True)
class Annotator:
    """One annotator. `seconds` is the median time for an item; `position` and `length` None where pairs are few."""

    id: int
    name: str
    active: bool
    passed: bool
    attempt: int
    judged: int
    last_hour: int
    skipped: int
    undone: int
    seconds: float | None
    gold: Share
    repeats: Share
    position: PositionBias | None
    length: LengthBias | None


@dataclass(frozen=True)
class Overview:
    """Everything on the lead's first page."""

    counts: Counts
    agreements: tuple[Agreement, ...]
    annotators: tuple[Annotator, ...]
    drifts: tuple[Drift, ...]


@dataclass(frozen=True)
class Given:
    """A judgment that counts, as far as measures need it."""

    annotator: int
    purpose: str
    kind: str
    item: int
    key: str
    prompt_key: str
    sizes: Sequence[int]
    value: Value
    shown: Sequence[int]
    seconds: float
    at: float


def overview(connection: Connection, rules: Rules, now: float) -> Overview:
    """The figures as they stand."""
    given = _given(connection)
    names = {row.id: row for row in connection.execute(select(_people).where(_people.c.role == "annotator"))}
    table = judged_tables([one for one in given if one.purpose == "task"])
    where = {name: place for place, name in enumerate(table.annotators)}
    actions = _actions(connection)
    people = []
    for number, row in sorted(names.items(), key=lambda entry: entry[1].name):
        own = [one for one in given if one.annotator == number]
        pairs = table.pairs[table.pairs["annotator"] == where.get(str(number), -1)]
        tasks = [one for one in own if one.purpose == "task"]
        few = np.count_nonzero(pairs["strength"] != 0.5) < FEW
        people.append(
            Annotator(
                id=number,
                name=row.name,
                active=row.active,
                passed=row.passed,
                attempt=row.attempt - row.granted,
                judged=len(tasks),
                last_hour=sum(one.at > now - HOUR for one in own),
                skipped=actions.get((number, "skip"), 0),
                undone=actions.get((number, "undo"), 0),
                seconds=median(one.seconds for one in own) if own else None,
                gold=_gold(connection, rules, [one for one in own if one.purpose == "gold"]),
                repeats=_repeats(rules, tasks, [one for one in own if one.purpose == "repeat"]),
                position=None if few else position_bias(pairs),
                length=None if few else length_bias(pairs),
            )
        )
    found = drifts(table) if len(table.rows) else ()
    certain = tuple(_named(drift, names) for drift in found if drift.p * max(1, len(found)) < CERTAIN)
    agreements = tuple(agreement(one) for one in label_counts(table)) if len(table.rows) else ()
    return Overview(counts(connection), agreements, tuple(people), certain)


def judged_tables(given: Sequence[Given]) -> Tables:
    """The tables that `kedge.data.audit` measures, without the texts; annotators are named by their number."""
    coders: dict[str, int] = {}
    pairs: list[tuple[Any, ...]] = []
    singles: list[tuple[Any, ...]] = []
    kinds: dict[str, int] = defaultdict(int)
    for row, one in enumerate(given):
        coder = coders.setdefault(str(one.annotator), len(coders))
        prompt = int(one.prompt_key, 16)
        own = [int(one.key[:14], 16) * 16 + place for place in range(len(one.sizes))]  # a number for each response
        if one.kind == "rating":
            kinds["ratings"] += 1
            singles.append((row, prompt, own[0], one.sizes[0], float(one.value["rating"]), coder, 0))
            continue
        kinds["pairs" if one.kind == "pair" else "rankings"] += 1
        for better, worse, strength, shown in _compared(one):
            sizes = (one.sizes[better], one.sizes[worse])
            pairs.append((row, prompt, own[better], own[worse], *sizes, strength, coder, (0, 0, 0), shown, 0, 0))
    nothing = Texts(np.zeros(0, np.uint64), (), 0)
    return Tables(
        path="the store", total=len(given), rejected=(), rejected_count=0, kinds=dict(kinds),
        rows=np.zeros(len(given), ROW), pairs=np.array(pairs, PAIR), singles=np.array(singles, SINGLE),
        annotators=tuple(coders), domains=(), prompts=nothing, responses=nothing, thinned=0,
    )  # fmt: skip


def _compared(one: Given) -> list[tuple[int, int, float, int]]:
    """Pairs in a judgment: the better place, the worse, the strength, and where the better was shown (0: no pair)."""
    if one.kind == "pair":
        choice = one.value["choice"]
        better = choice if choice in (0, 1) else one.shown[0]
        return [(better, 1 - better, 1.0 if choice in (0, 1) else 0.5, list(one.shown).index(better) + 1)]
    ranks = one.value["ranks"]
    order = sorted(range(len(ranks)), key=lambda place: ranks[place])
    return [
        (better, worse, 0.5 if ranks[better] == ranks[worse] else 1.0, 0)
        for place, better in enumerate(order)
        for worse in order[place + 1 :]
    ]


def _given(connection: Connection) -> list[Given]:
    """All judgments that count, in the order in which they came."""
    found = (
        select(_said.c.annotator, _done.c.purpose, _items.c.kind, _said.c.item, _items.c.key, _items.c.prompt_key,
               _items.c.sizes, _said.c.value, _said.c.shown, func.coalesce(_said.c.active, _said.c.seconds), _said.c.at)
        .join(_done, _done.c.judgment == _said.c.id)
        .join(_items, _items.c.id == _said.c.item)
        .where(_said.c.action == "judge", _done.c.purpose != "calibration")
        .order_by(_said.c.id)
    )  # fmt: skip
    return [Given(*row) for row in connection.execute(found)]


def _actions(connection: Connection) -> dict[tuple[int, str], int]:
    """How often each annotator skipped and undid."""
    found = select(_said.c.annotator, _said.c.action, func.count()).where(_said.c.action != "judge")
    return {
        (who, what): count for who, what, count in connection.execute(found.group_by(_said.c.annotator, _said.c.action))
    }


def _gold(connection: Connection, rules: Rules, own: Sequence[Given]) -> Share:
    if not own:
        return Share(0, 0)
    rows = connection.execute(select(*COLUMNS).where(_items.c.id.in_([one.item for one in own])))
    items = {row.id: Item.of(row) for row in rows}
    return Share(sum(right(rules, items[one.item], one.value) for one in own), len(own))


def _repeats(rules: Rules, tasks: Sequence[Given], again: Sequence[Given]) -> Share:
    first = {one.item: one for one in tasks}
    known = [(first[one.item], one) for one in again if one.item in first]
    same = sum(agree(one.kind, one.value, two.value, rules.settings) for one, two in known)  # type: ignore[arg-type]
    return Share(same, len(known))


def _named(drift: Drift, names: Mapping[int, Any]) -> Drift:
    who = names[int(drift.who)].name if drift.who else ""
    return Drift(who, drift.what, drift.before, drift.after, drift.labels, drift.p)
