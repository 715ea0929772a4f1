"""What a check says: a status, the numbers behind it, where they come from, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Status = Literal["ok", "warn", "fail", "not_checked"]
STATUSES: tuple[Status, ...] = ("fail", "warn", "ok", "not_checked")  # worst first


@dataclass(frozen=True)
class Evidence:
    """One number that a check looked at. `where` names the file or metric it can be read again from."""

    name: str
    value: float
    unit: str
    note: str = ""
    where: str = ""


@dataclass(frozen=True)
class Remedy:
    """A change that would act on the mechanism: settings, what they do to reward or gradient, what they cost."""

    overrides: tuple[str, ...]  # `key=value` of the recipe; empty where no setting does it
    effect: str
    cost: str


@dataclass(frozen=True)
class Finding:
    """What one check found.

    `strength` is the statistic over its threshold for `fail`: 1 is at the threshold, below 1 is not failing; findings
    are compared by it. `onset` is the first policy step at which the check would have spoken, None where there is none.
    `mechanism` says how the cause works on the policy, `refuted_by` what observation would speak against it. `subject`
    is what answers have more of, where the finding is about that: a feature, or a phrase (`kedge.diagnose.contrast`).
    """

    check: str
    status: Status
    summary: str
    evidence: tuple[Evidence, ...] = ()
    strength: float = 0.0
    onset: int | None = None
    mechanism: str = ""
    refuted_by: str = ""
    remedies: tuple[Remedy, ...] = ()
    validated: bool = True
    subject: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite becomes null."""
        found: dict[str, Any] = _plain(asdict(self))
        return found


def not_checked(check: str, reason: str) -> Finding:
    """A check that the run does not hold enough for; `reason` says what is missing."""
    return Finding(check, "not_checked", reason)


def graded(finding: Finding, strength: float, *, warn: float = 0.7) -> Finding:
    """`finding` with the status its strength deserves: fail from 1, warn from `warn`, else ok; nan is not checked."""
    if math.isnan(strength):
        return replace(finding, status="not_checked", strength=0.0)
    status: Status = "fail" if strength >= 1 else "warn" if strength >= warn else "ok"
    return replace(finding, status=status, strength=strength)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among findings; "not_checked" where there is none."""
    found = {finding.status for finding in findings}
    return next((status for status in STATUSES if status in found), "not_checked")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value
