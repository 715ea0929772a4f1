"""Files into records: every malformed row is named with its line, its reason and a remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from kedge.data import columns
from kedge.data.files import read_rows
from kedge.data.records import Demonstration, Judgment, Loaded, Preference, Prompt, Ranking, Rating, Verdict
from kedge.errors import InputError, Problem

T = TypeVar("T")

Kind = Literal["pair", "ranking", "rating", "verdict"]

SHOWN = 5
KINDS: dict[type, Kind] = {Preference: "pair", Ranking: "ranking", Rating: "rating", Verdict: "verdict"}


@dataclass(frozen=True)
class Misnamed(Problem):
    """A row without the columns that are needed."""


def kind_of(judgment: Judgment) -> Kind:
    """What kind of judgment it is."""
    return KINDS[type(judgment)]


def load_demonstrations(path: str | Path, *, max_rejected: float) -> Loaded[Demonstration]:
    """The demonstrations in a file; `max_rejected` is the share of malformed rows to tolerate.

    Raises `InputError` if the columns are none that are known, if more rows are malformed, or all are.
    """
    return _load(path, columns.demonstration, max_rejected)


def load_preferences(path: str | Path, *, max_rejected: float) -> Loaded[Preference]:
    """The preferences in a file; see `load_demonstrations`."""
    return _load(path, columns.preference, max_rejected)


def load_judgments(path: str | Path, *, max_rejected: float) -> Loaded[Judgment]:
    """The judgments in a file, of whichever kind; see `load_demonstrations`.

    Raises `InputError`, too, where the file holds several kinds.
    """
    loaded = _load(path, columns.judgment, max_rejected)
    first: dict[str, str] = {}
    for row, where in zip(loaded.rows, loaded.lines, strict=True):
        first.setdefault(kind_of(row), where)
    check_one_kind(str(path), first)
    return loaded


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
        share = share_to_allow(len(rejected), total)
        remedy = f"fix them or allow a share with --set data.max_rejected={share}"
        problems.append(Problem(path, f"{more} {total} rows are rejected", remedy))
    raise InputError(problems)


def check_one_kind(path: str, first: Mapping[str, str]) -> None:
    """Raise `InputError` if there are several kinds; `first` has the "file:line" at which each occurs first."""
    if len(first) > 1:
        found = ", ".join(f"{kind} first at {where}" for kind, where in first.items())
        what = f"several kinds of judgments: {found}; a file holds one kind"
        raise InputError(Problem(path, what, "split it by kind"))


def share_to_allow(rejected: int, total: int) -> float:
    """The smallest of some round shares that would let the file pass."""
    return next((share for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if rejected <= share * total), 1.0)


def outcomes(path: str | Path, convert: Callable[[Mapping[str, Any]], T]) -> Iterator[tuple[str, T | Problem]]:
    """Each row of the file, one after another, as its "file:line" and its record or what is wrong with it."""
    for number, row in read_rows(path):
        where = f"{path}:{number}"
        if isinstance(row, Problem):
            yield where, row
            continue
        try:
            yield where, convert(row)
        except columns.UnknownColumns as error:
            yield where, Misnamed(where, error.what, error.remedy)
        except columns.Unusable as error:
            yield where, Problem(where, error.what, error.remedy)


def _load(path: str | Path, convert: Callable[[Mapping[str, Any]], T], max_rejected: float) -> Loaded[T]:
    rows: list[T] = []
    lines: list[str] = []
    rejected: list[Problem] = []
    for where, outcome in outcomes(path, convert):
        if isinstance(outcome, Problem):
            rejected.append(outcome)
        else:
            rows.append(outcome)
            lines.append(where)
    total = len(rows) + len(rejected)
    if all(isinstance(problem, Misnamed) for problem in rejected) and not rows:
        raise InputError(rejected[0])
    check_rejected(str(path), rejected, total, max_rejected)
    return Loaded(tuple(rows), tuple(lines), tuple(rejected), total)
