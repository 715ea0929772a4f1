"""The schema's version: made, upgraded step by step in one transaction, refused where it is newer than this program.

A step may name only tables as they were at its version, so it writes its own SQL and never uses `tables`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable

from sqlalchemy import Connection, inspect, text

from kedge.errors import InputError, Problem
from kedge.feedback import tables


def create(connection: Connection, where: str) -> None:
    """Make all tables; raises InputError where there are some."""
    if inspect(connection).get_table_names():
        raise InputError(Problem(where, "already holds tables, and nothing is overwritten", "choose another name"))
    tables.metadata.create_all(connection)
    connection.execute(tables.schema_version.insert().values(version=tables.VERSION))


def upgrade(connection: Connection, where: str) -> int:
    """Bring the tables to this program's version; returns the version found.

    Raises InputError where there is no store, or one that a newer Kedge has written.
    """
    found = version(connection)
    if found is None:
        raise InputError(Problem(where, "holds no labels of Kedge", "make it with kedge label init"))
    if found > tables.VERSION:
        what = f"was written by a newer Kedge: its tables have version {found}, this one knows up to {tables.VERSION}"
        raise InputError(Problem(where, what, "update Kedge"))
    for step in range(found, tables.VERSION):
        STEPS[step](connection)
    if found < tables.VERSION:
        connection.execute(text("UPDATE schema_version SET version = :version"), {"version": tables.VERSION})
    return found


def version(connection: Connection) -> int | None:
    """The version of the tables; None where there are none of ours."""
    if not inspect(connection).has_table("schema_version"):
        return None
    found = connection.execute(text("SELECT version FROM schema_version")).scalar()
    return None if found is None else int(found)


def _to_2(connection: Connection) -> None:
    """Flags on judgments, and a mark on items whose judgments disagree, which the queue of the lead reads."""
    false = "false" if connection.dialect.name == "postgresql" else "0"
    connection.execute(text(f"ALTER TABLE judgments ADD COLUMN flagged BOOLEAN NOT NULL DEFAULT {false}"))
    connection.execute(text("ALTER TABLE judgments ADD COLUMN active FLOAT"))
    connection.execute(text(f"ALTER TABLE items ADD COLUMN split BOOLEAN NOT NULL DEFAULT {false}"))
    connection.execute(text("CREATE INDEX items_split ON items (id) WHERE split"))
    counted = connection.execute(
        text(
            "SELECT assignments.item, judgments.value FROM assignments JOIN judgments"
            " ON judgments.id = assignments.judgment WHERE assignments.purpose = 'task' AND judgments.action = 'judge'"
        )
    )
    said: dict[int, set[str]] = defaultdict(set)
    for item, value in counted:
        chosen = json.loads(value)
        # Version 1 knew pairs alone; neither of its two draws takes a side.
        said[item].add("neither" if chosen["choice"] in ("tie", "both_bad") else str(chosen["choice"]))
    for item, values in said.items():
        if len(values) > 1:
            connection.execute(text("UPDATE items SET split = :yes WHERE id = :id"), {"yes": True, "id": item})


STEPS: dict[int, Callable[[Connection], None]] = {1: _to_2}
