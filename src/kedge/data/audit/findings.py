"""What the figures mean: a status, and in words what they will do to a reward model and what to do about it.

A status never hangs on significance alone: with millions of rows everything is significant, with thirty nothing is. An
alarm needs a 99% interval (or a p corrected for how many were looked at) that excludes the harmless value, and an
effect of a stated least size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Status = Literal["bad", "look", "ok", "not_checked"]
ORDER: tuple[Status, ...] = ("bad", "look", "ok", "not_checked")
FEW = 30  # labels below which nothing is said

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Finding:
    """One question to the data. `says` is what was found, or, for "not_checked", what was missing.

    `effect` is what it will do to a reward model and `remedy` what to do about it; both are empty where all is well.
    """

    name: str
    status: Status
    says: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    effect: str = ""
    remedy: str = ""


def missing(name: str, reason: str, **evidence: Any) -> Finding:
    """A question that these data cannot answer, and why."""
    return Finding(name, "not_checked", reason, evidence)


def worst_first(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sorted by status; where all is well there is nothing to fear and nothing to do."""
    calm = [replace(one, effect="", remedy="") if one.status == "ok" else one for one in findings]
    return tuple(sorted(calm, key=lambda finding: ORDER.index(finding.status)))


def excludes(interval: Interval, value: float) -> bool:
    """Whether a known interval lies to one side of `value`."""
    return interval is not None and not interval[0] <= value <= interval[1]


def by_share(share: float, look: float, bad: float) -> Status:
    """Where a share of rows begins to matter."""
    return "bad" if share >= bad else "look" if share >= look else "ok"


def percent(share: float) -> str:
    """A share for people: 12%, 0.4%, below 0.01%."""
    if share == 0 or share >= 0.1:
        return f"{100 * share:.0f}%"
    return f"{100 * share:.2g}%" if share >= 1e-4 else "less than 0.01%"


def span(interval: Interval, form: str = "{:.2f}") -> str:
    """An interval in words."""
    return f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else "not known"


def shares(interval: Interval) -> str:
    """An interval of shares in words."""
    return span((100 * interval[0], 100 * interval[1]), "{:.1f}") + "%" if interval else "not known"
