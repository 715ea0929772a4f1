"""Files into records: every malformed row is named with its line, its reason and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kedge.data import columns
from kedge.data.files import read_rows
from kedge.data.records import Demonstration, Loaded, Preference, Prompt
from kedge.errors import InputError, Problem

T = TypeVar("T")

SHOWN = 5


def load_demonstrations(path: str | Path, *, max_rejected: float) -> Loaded[Demonstration]:
    """The demonstrations in a file; `max_rejected` is the share of malformed rows to tolerate.

    Raises `InputError` if the columns are none that are known, if more rows are malformed, or all are.
    """
    return _load(path, columns.demonstration, max_rejected)


def load_preferences(path: str | Path, *, max_rejected: float) -> Loaded[Preference]:
    """The preferences in a file; see `load_demonstrations`."""
    return _load(path, columns.preference, max_rejected)


def load_prompts(path: str | Path, *, max_rejected: float) -> Loaded[Prompt]:
    """The prompts in a file; see `load_demonstrations`."""
    return _load(path, columns.prompt, max_rejected)


def check_rejected(path: str, rejected: Sequence[Problem], total: int, max_rejected: float) -> None:
    """Raise `InputError` with the first problems if too many of `total` rows are rejected, or all of them."""
    if len(rejected) <= max_rejected * total and len(rejected) < total:
        return
    problems = list(rejected[:SHOWN])
    if len(rejected) == total:
        count = f"all {total} rows are rejected" if total > 1 else "its only row is rejected"
        problems.append(Problem(path, count, "fix them"))
    else:
        more = f"and {len(rejected) - SHOWN} more of" if len(rejected) > SHOWN else f"{len(rejected)} of"
        share = _share_to_allow(len(rejected), total)
        remedy = f"fix them or allow a share with --set data.max_rejected={share}"
        problems.append(Problem(path, f"{more} {total} rows are rejected", remedy))
    raise InputError(problems)


def _share_to_allow(rejected: int, total: int) -> float:
    """The smallest of some round shares that would let the file pass."""
    return next((share for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if rejected <= share * total), 1.0)


def _load(path: str | Path, convert: Callable[[Mapping[str, Any]], T], max_rejected: float) -> Loaded[T]:
    rows: list[T] = []
    lines: list[str] = []
    rejected: list[Problem] = []
    unknown = 0
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if isinstance(row, Problem):
            rejected.append(row)
            continue
        try:
            rows.append(convert(row))
            lines.append(where)
        except columns.Unusable as error:
            unknown += isinstance(error, columns.UnknownColumns)
            rejected.append(Problem(where, error.what, error.remedy))
    total = len(rows) + len(rejected)
    if unknown == total:
        raise InputError(rejected[0])
    check_rejected(str(path), rejected, total, max_rejected)
    return Loaded(tuple(rows), tuple(lines), tuple(rejected), total)
