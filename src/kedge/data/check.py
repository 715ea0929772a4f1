"""A file of judgments, read through once and counted: kinds, what its rows hold, and why rows are rejected.

Nothing grows with the file but the counts: it may be far larger than memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.data import columns
from kedge.data.records import Judgment, Preference
from kedge.data.validate import kind_of, outcomes
from kedge.errors import Problem

MOST_REASONS = 100
OTHER = "other reasons"
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
SAID = re.compile(r" is (?!missing|of type).*?, expected ")
FIGURE = re.compile(r"(?<!\w)[-+]?\d[\d.]*(?:e[-+]?\d+)?")


@dataclass
class Tally:
    """How many rows, and the "file:line" of the first."""

    first: str
    rows: int = 0


@dataclass
class Survey:
    """What a file holds. `kinds` and `forms` count usable rows, `reasons` rejected ones; `holds` what is optional."""

    path: Path
    usable: int = 0
    rejected: int = 0
    kinds: dict[str, Tally] = field(default_factory=dict)
    forms: dict[str, Tally] = field(default_factory=dict)  # standard, conversational
    holds: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Tally] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)  # the first of those rejected

    @property
    def rows(self) -> int:
        return self.usable + self.rejected

    @property
    def sound(self) -> bool:
        """Whether every row can be used, as one kind."""
        return not self.rejected and len(self.kinds) == 1


def survey(
    path: str | Path,
    *,
    show: int = 0,
    reject: Callable[[Problem], None] | None = None,
    step: Callable[[int], None] | None = None,
) -> Survey:
    """Read every row of `path`; keep the first `show` problems, pass each to `reject` and each line number to `step`.

    Raises `InputError` only where the file itself cannot be read.
    """
    seen = Survey(Path(path))
    for where, outcome in outcomes(path, columns.judgment):
        if isinstance(outcome, Problem):
            _count_problem(seen, outcome, show)
            if reject is not None:
                reject(outcome)
        else:
            _count_judgment(seen, outcome, where)
        if step is not None:
            step(int(where.rpartition(":")[2]))
    return seen


def reason_of(what: str) -> str:
    """What is wrong without the figures and words of one row, so that like problems count as one."""
    return FIGURE.sub("N", QUOTED.sub("...", SAID.sub(" is ..., expected ", what)))


def _count_problem(seen: Survey, problem: Problem, show: int) -> None:
    seen.rejected += 1
    reason = reason_of(problem.what)
    if reason not in seen.reasons and len(seen.reasons) >= MOST_REASONS:
        reason = OTHER
    _count(seen.reasons, reason, problem.where)
    if len(seen.problems) < show:
        seen.problems.append(problem)


def _count_judgment(seen: Survey, judgment: Judgment, where: str) -> None:
    seen.usable += 1
    _count(seen.kinds, kind_of(judgment), where)
    _count(seen.forms, "standard" if isinstance(judgment.prompt, str) else "conversational", where)
    seen.holds.update(name for name, there in _optional(judgment).items() if there)


def _optional(judgment: Judgment) -> Mapping[str, Any]:
    """What a judgment may but need not hold."""
    annotator = {"annotator": judgment.annotator is not None}
    if not isinstance(judgment, Preference):
        return annotator
    return annotator | {
        "ties": judgment.strength == 0.5,
        "strength": judgment.strength not in (0.5, 1.0),
        "margin": judgment.margin is not None,
        "votes": judgment.votes is not None,
        "shown": judgment.shown,
    }


def _count(tallies: dict[str, Tally], name: str, where: str) -> None:
    tallies.setdefault(name, Tally(where)).rows += 1
