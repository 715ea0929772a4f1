"""The tables of a store of judgments, the same in SQLite and in PostgreSQL.

`judgments` and `adjudications` are only ever added to. Which judgment of an assignment counts is said by the
assignment, so that taking one back adds a row and moves a pointer. Times are seconds since 1970, UTC.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

VERSION = 2


class Json(TypeDecorator[Any]):
    """Any JSON value as ASCII text: PostgreSQL takes no NUL in a text, and a response may hold one."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002 (SQLAlchemy's shape)
        return None if value is None else json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else json.loads(value)


metadata = MetaData()

schema_version = Table("schema_version", metadata, Column("version", Integer, nullable=False))

settings = Table(
    "settings",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Json, nullable=False),
)

items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),  # digest of what it asks: nothing is imported twice
    Column("kind", String(16), nullable=False),  # pair, ranking, rating
    Column("purpose", String(16), nullable=False),  # task, gold, calibration
    Column("prompt", Json, nullable=False),  # text, or a list of {"role", "content"}
    Column("responses", Json, nullable=False),
    Column("prompt_key", String(16), nullable=False),  # items of one prompt share it
    Column("sizes", Json, nullable=False),  # characters of each response
    Column("answer", Json),  # what is right, of gold and calibration
    Column("why", Text),  # shown after a calibration
    Column("origin", Text),  # "file:line"
    Column("extra", Json),  # further columns, such as who wrote what; never shown to annotators
    Column("overlap", Integer),  # how many annotators are asked; null: everybody
    Column("live", Integer, nullable=False, default=0),  # assignments that are leased or judged
    Column("split", Boolean, nullable=False, default=False),  # judgments that count disagree
    Column("settled", Boolean, nullable=False, default=False),  # a lead has adjudicated
    CheckConstraint("live >= 0", name="live_not_negative"),
    CheckConstraint("overlap IS NULL OR live <= overlap", name="live_within_overlap"),
)
_open = items.c.live < items.c.overlap
Index("items_open", items.c.purpose, items.c.id, sqlite_where=_open, postgresql_where=_open)
Index("items_purpose", items.c.purpose, items.c.id)
Index("items_split", items.c.id, sqlite_where=items.c.split, postgresql_where=items.c.split)

annotators = Table(
    "annotators",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False, unique=True),
    Column("role", String(16), nullable=False),  # annotator, lead
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("active", Boolean, nullable=False, default=True),
    Column("passed", Boolean, nullable=False, default=False),  # the calibration
    Column("attempt", Integer, nullable=False, default=0),  # of the calibration, from 0
    Column("granted", Integer, nullable=False, default=0),  # the attempt at which a lead last let them begin anew
    Column("created", Float, nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("annotator", ForeignKey("annotators.id"), nullable=False),
    Column("expires", Float, nullable=False),
)

guidelines = Table(
    "guidelines",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("text", Json, nullable=False),
    Column("author", ForeignKey("annotators.id")),
    Column("at", Float, nullable=False),
)

readings = Table(
    "readings",
    metadata,
    Column("annotator", ForeignKey("annotators.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("at", Float, nullable=False),
)

assignments = Table(
    "assignments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("annotator", ForeignKey("annotators.id"), nullable=False),
    Column("purpose", String(16), nullable=False),  # that of the item, or repeat
    Column("attempt", Integer, nullable=False, default=0),  # of a calibration
    Column("state", String(16), nullable=False),  # leased, judged, skipped, expired
    Column("shown", Json, nullable=False),  # places of the item's responses, as shown from the left
    Column("handed", Float, nullable=False),
    Column("until", Float, nullable=False),  # when the lease ends
    Column("judgment", Integer),  # the one that counts
    UniqueConstraint("item", "annotator", "purpose", "attempt", name="asked_once"),
)
Index("assignments_own", assignments.c.annotator, assignments.c.state)
Index("assignments_leased", assignments.c.state, assignments.c.until)

judgments = Table(
    "judgments",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),  # of the submission: a retry is stored once
    Column("assignment", ForeignKey("assignments.id"), nullable=False),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("annotator", ForeignKey("annotators.id"), nullable=False),
    Column("action", String(16), nullable=False),  # judge, skip, undo
    Column("value", Json),  # {"choice": 0}, {"ranks": [1, 0, 2]} or {"rating": 4}; places are the item's own
    Column("strength", Integer),  # 1 slightly, 2 clearly, 3 far better
    Column("reasons", Json, nullable=False),
    Column("note", Json),
    Column("flagged", Boolean, nullable=False, default=False),
    Column("shown", Json, nullable=False),
    Column("guidelines", Integer, nullable=False),
    Column("seconds", Float, nullable=False),  # from handing out to receiving
    Column("active", Float),  # seconds that the page was in view, as the browser says
    Column("supersedes", Integer),  # the judgment that an undo takes back
    Column("at", Float, nullable=False),
)
Index("judgments_item", judgments.c.item)
Index("judgments_annotator", judgments.c.annotator, judgments.c.id)

adjudications = Table(
    "adjudications",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),
    Column("item", ForeignKey("items.id"), nullable=False, index=True),
    Column("lead", ForeignKey("annotators.id"), nullable=False),
    Column("value", Json, nullable=False),
    Column("note", Json),
    Column("at", Float, nullable=False),
)
