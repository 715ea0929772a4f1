"""What is judged: two responses to compare, several to rank, one to rate; and what may be said of each kind."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, select

from kedge.feedback import tables
from kedge.feedback.settings import Settings

Kind = Literal["pair", "ranking", "rating"]
Purpose = Literal["task", "gold", "calibration"]
Value = Mapping[str, Any]

KINDS: tuple[Kind, ...] = ("pair", "ranking", "rating")
PURPOSES: tuple[Purpose, ...] = ("task", "gold", "calibration")
MOST_RANKED = 9  # responses of a ranking: one digit key each
BATCH = 500


@dataclass(frozen=True)
class NewItem:
    """An item to add. `prompt` is text or a list of {"role", "content"}; `answer` a `Value` in the item's own order."""

    kind: Kind
    prompt: str | list[dict[str, str]]
    responses: tuple[str, ...]
    purpose: Purpose = "task"
    answer: Value | None = None
    why: str | None = None
    origin: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    overlap: int | None = None  # of a task; gold and calibration are for everybody

    @property
    def key(self) -> str:
        """The same for items that ask the same for the same purpose, in whichever order the responses stand."""
        said = [self.kind, self.purpose, self.prompt, sorted(self.responses)]
        return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Item:
    """An item as the store holds it."""

    id: int
    key: str
    kind: Kind
    purpose: Purpose
    prompt: str | list[dict[str, str]]
    responses: tuple[str, ...]
    answer: Value | None
    why: str | None
    origin: str | None
    extra: Mapping[str, Any]

    @classmethod
    def of(cls, row: Any) -> Item:
        """From a row with the columns of `COLUMNS`."""
        return cls(
            row.id, row.key, row.kind, row.purpose, row.prompt, tuple(row.responses), row.answer, row.why, row.origin,
            row.extra or {},
        )  # fmt: skip

    @property
    def turns(self) -> list[dict[str, str]]:
        """The prompt as turns; plain text is the user's."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt


COLUMNS = [tables.items.c[name] for name in (
    "id", "key", "kind", "purpose", "prompt", "responses", "answer", "why", "origin", "extra",
)]  # fmt: skip


def add_items(connection: Connection, new: Iterable[NewItem], settings: Settings) -> tuple[int, int]:
    """Add items; returns how many were added and how many were there before, or twice among the new ones."""
    table = tables.items
    waiting: dict[str, NewItem] = {}
    added = seen = 0

    def flush() -> int:
        there = set(connection.execute(select(table.c.key).where(table.c.key.in_(waiting))).scalars())
        rows = [_row(key, item, settings) for key, item in waiting.items() if key not in there]
        if rows:
            connection.execute(table.insert(), rows)
        waiting.clear()
        return len(rows)

    for item in new:
        seen += 1
        waiting.setdefault(item.key, item)
        if len(waiting) >= BATCH:
            added += flush()
    added += flush()
    return added, seen - added


def _row(key: str, item: NewItem, settings: Settings) -> dict[str, Any]:
    overlap = (item.overlap or settings.overlap) if item.purpose == "task" else None
    said = {name: getattr(item, name) for name in ("kind", "prompt", "purpose", "answer", "why", "origin")}
    sizes = [len(response) for response in item.responses]
    said |= {"prompt_key": hashlib.blake2b(json.dumps(item.prompt).encode(), digest_size=8).hexdigest(), "sizes": sizes}
    return said | {"key": key, "responses": list(item.responses), "extra": dict(item.extra), "overlap": overlap}


def item_of(connection: Connection, number: int) -> Item | None:
    """The item of this number."""
    row: Row[Any] | None = connection.execute(select(*COLUMNS).where(tables.items.c.id == number)).first()
    return None if row is None else Item.of(row)


def side_order(secret: bytes, item_key: str, annotator: int, count: int) -> list[int]:
    """Places of the item's responses in the order this annotator sees them.

    A keyed hash of item and annotator: always the same for the two, even over annotators, not to be foretold.
    """

    def rank(place: int) -> bytes:
        return hmac.digest(secret, f"{item_key}:{annotator}:{place}".encode(), "sha256")

    return sorted(range(count), key=rank)


class Unfit(ValueError):
    """An answer that its item does not allow; the text is for the annotator."""


def normalised(item: Item, shown: Sequence[int], given: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What was said of the places on the screen, in terms of the item's own order. Raises `Unfit`.

    `given` has "choice" (left, right, tie, both_bad), "ranks" (one for each place on the screen, the best is 1, equal
    is a tie) or "rating".
    """
    if item.kind == "pair":
        choice = given.get("choice")
        if choice not in ("left", "right", "tie", "both_bad"):
            raise Unfit("Choose one of the answers.")
        return {"choice": shown[0] if choice == "left" else shown[1] if choice == "right" else choice}
    if item.kind == "ranking":
        ranks = list(given.get("ranks") or ())
        if len(ranks) != len(shown) or not all(rank in range(1, len(shown) + 1) for rank in ranks):
            raise Unfit("Give every response a place.")
        levels = {rank: level for level, rank in enumerate(sorted(set(ranks)))}
        own = [0] * len(shown)
        for place, rank in zip(shown, ranks, strict=True):
            own[place] = levels[rank]
        return {"ranks": own}
    rating = given.get("rating")
    if rating not in settings.scale:
        raise Unfit(f"Give a rating from {settings.lowest} to {settings.highest}.")
    return {"rating": rating}


def agree(kind: Kind, first: Value, second: Value, settings: Settings) -> bool:
    """Whether two judgments say the same: neither of the two draws of a pair takes a side.

    Rankings agree unless some two responses stand the other way round, ratings up to a quarter of the scale apart.
    """
    if kind == "pair":
        return side(first) == side(second)
    if kind == "ranking":
        return not any(
            (a - b) * (c - d) < 0
            for i, (a, c) in enumerate(zip(first["ranks"], second["ranks"], strict=True))
            for b, d in list(zip(first["ranks"], second["ranks"], strict=True))[:i]
        )
    return bool(abs(first["rating"] - second["rating"]) <= (settings.highest - settings.lowest) / 4)


def side(value: Value) -> int | None:
    """The place that won a pair, or None."""
    return value["choice"] if value["choice"] in (0, 1) else None
