"""What a check says: grades, JSON, and which status is the worst."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kedge.diagnose.checks import all_checks, check_named, page
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked, worst
from kedge.diagnose.view import View


@pytest.mark.parametrize(
    ("strength", "status"),
    [(0.0, "ok"), (0.69, "ok"), (0.7, "warn"), (0.99, "warn"), (1.0, "fail"), (7.0, "fail"), (np.inf, "fail")],
)
def test_the_status_follows_the_strength(strength: float, status: str) -> None:
    finding = graded(Finding("made", "ok", "."), strength)
    assert (finding.status, finding.strength) == (status, strength)


def test_a_strength_that_is_no_number_is_not_checked() -> None:
    assert graded(Finding("made", "ok", "."), float("nan")) == Finding("made", "not_checked", ".")
    assert graded(Finding("made", "ok", "."), 0.5, warn=0.4).status == "warn"


def test_the_worst_status() -> None:
    findings = [graded(Finding("made", "ok", "."), strength) for strength in (0.1, 0.8, 2.0)]
    assert worst(findings) == "fail" and worst(findings[:2]) == "warn" and worst(findings[:1]) == "ok"
    assert worst([]) == "not_checked" and worst([not_checked("made", "no data"), findings[0]]) == "ok"


def test_a_finding_is_json() -> None:
    finding = Finding(
        "made",
        "fail",
        "It is so.",
        (Evidence("number", float("nan"), "nats"), Evidence("size", np.float64(2.5), "tokens")),  # type: ignore[arg-type]
        strength=float("inf"),
        onset=np.int64(7),  # type: ignore[arg-type]
        remedies=(Remedy(("policy.kl.beta=0.1",), "more", "less"),),
    )
    found = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
    assert found["strength"] is None and found["onset"] == 7
    assert [one["value"] for one in found["evidence"]] == [None, 2.5]
    assert found["remedies"][0]["overrides"] == ["policy.kl.beta=0.1"]


def test_every_module_of_checks_holds_one_with_its_page() -> None:
    checks = all_checks()
    assert len({check.name for check in checks}) == len(checks) >= 19
    assert [check.kind.value for check in checks] == sorted(check.kind.value for check in checks)
    for check in checks:
        assert check_named(check.name) is check
        text = page(check)
        for heading in ("What", "Why it matters", "How", "False alarms", "Remedy", "References"):
            assert f"**{heading}.**" in text, f"{check.name} has no paragraph {heading}"
    with pytest.raises(KeyError):
        check_named("no_such")


def test_a_finding_says_whether_its_check_has_been_validated() -> None:
    def judge(_: View) -> Finding:
        return Finding("made", "ok", ".")

    view = View("empty", {}, {})
    assert not Check("made", "made", Kind.CAUSE, (), judge)(view).validated
    assert Check("made", "made", Kind.CAUSE, (), judge, validated=True)(view).validated
