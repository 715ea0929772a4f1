"""Single cells: text, numbers, flags and lists, whichever way JSON, CSV and Parquet write them.

Each function returns the value or raises `Unusable` with the reason and the remedy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
SURROGATE = re.compile("[\ud800-\udfff]")
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
LARGEST = 2**53  # beyond it a float is no exact count


class Unusable(Exception):
    """A row that cannot be used: the reason and what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


class UnknownColumns(Unusable):
    """A row without the columns that are needed."""


def shown(value: object) -> str:
    """A value as an error shows it: at most 60 characters, and nothing that a terminal would obey."""
    if isinstance(value, str | bytes) and len(value) > 60:
        value = value[:60]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def name_list(names: Iterable[object]) -> str:
    """Column names for an error: at most twenty, escaped where they do not print."""
    found = [str(name)[:60] for name in names]
    escaped = [name if name.isprintable() else ascii(name) for name in found[:20]]
    more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
    return ", ".join([*escaped, *more]) or "none"


def given(row: Mapping[str, Any], *names: str) -> str | None:
    """The first of these columns that holds something."""
    return next((name for name in names if not empty(row.get(name))), None)


def empty(value: object) -> bool:
    """Whether a cell was left out: null, or no text at all, which is how CSV writes null."""
    return value is None or (isinstance(value, str) and not value)


def text(value: object, column: str) -> str:
    if isinstance(value, str):
        if SURROGATE.search(value):
            raise Unusable(f"{column} holds half a surrogate pair, which is no character", "write the text as UTF-8")
        return value
    kind = "missing" if value is None else f"of type {type(value).__name__}"
    raise Unusable(f"{column} is {kind}, expected text", "write text or remove the row")


def number(value: object, column: str, expected: str = "a number") -> float:
    """A finite number, written as one or as text."""
    found = math.nan
    if not isinstance(value, bool) and (not isinstance(value, str) or NUMBER.fullmatch(value)):
        try:
            found = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            found = math.nan
    if not math.isfinite(found):
        raise Unusable(f"{column} is {shown(value)}, expected {expected}", "correct it or remove the row")
    return found


def whole(value: object, column: str) -> int:
    """A whole number of 0 or more."""
    expected = "a whole number of 0 or more"
    found = number(value, column, expected)
    if not found.is_integer() or not 0 <= found < LARGEST:
        raise Unusable(f"{column} is {shown(value)}, expected {expected}", "correct it or remove the row")
    return int(found)


def flag(value: object, column: str) -> bool:
    """True or false, as words or as 1 and 0."""
    key = str(value).strip().lower()
    if key not in FLAGS:
        raise Unusable(f"{column} is {shown(value)}, expected true or false", "correct it or remove the row")
    return FLAGS[key]


def listed(value: object, column: str) -> list[Any]:
    """A list, or the JSON of one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise Unusable(f"{column} is not readable as a JSON list", 'write it as ["...", "..."]') from None
    if isinstance(value, list | tuple):
        return list(value)
    kind = "missing" if empty(value) else f"of type {type(value).__name__}"
    raise Unusable(f"{column} is {kind}, expected a list", "write a list or remove the row")


def numbers(value: object, column: str) -> list[Any]:
    """A list of cells that should be numbers: a list, the JSON of one, or "3,1,0"."""
    if isinstance(value, str) and "," in value and not value.lstrip().startswith("["):
        return value.split(",")
    return listed(value, column)


def annotator(row: Mapping[str, Any]) -> str | None:
    """Who judged, from the columns annotator, annotator_id, worker or worker_id; None where nobody is named."""
    column = given(row, "annotator", "annotator_id", "worker", "worker_id")
    if column is None:
        return None
    value = row[column]
    if isinstance(value, str):
        return text(value, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # what a column of numbers with gaps becomes
        return str(int(value))
    raise Unusable(f"{column} is {shown(value)}, expected a name or a whole number", "name one annotator a row")
