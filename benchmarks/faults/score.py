"""Scoring the diagnosis from saved views: does it speak, when, of the right cause, and how often of nothing.

A run is flagged where a check fails that is no check of a benign change. Healthy are base runs, forks with other draws
alone, and forks with a benign change. A fork shares the steps before its onset with its base: they count once, and so
does an alarm in them.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import beta as beta_distribution

from faults.faults import FAULTS, STEPS, TUNING_SEEDS, Fault
from faults.runs import Case
from faults.views import beside, until

if TYPE_CHECKING:
    from kedge.diagnose.view import View

LOOKS = (8, 16, 24, 32, STEPS)  # steps done when a healthy run is looked at while it goes on
KL_LIMIT, SIGMAS = 10.0, 2.0  # of the trivial rows
BEFORE = 12  # steps that tell the trivial length row what is usual; no fault sets in earlier
CONFIDENCE = 0.95
Row = dict[str, Any]


def score(case: Case) -> Row:
    """What the diagnosis says of one run, with and without its recipe, while it goes on and at its end."""
    from kedge.diagnose.view import load

    view = load(case.view)
    row: Row = {
        "name": case.name,
        "kind": case.kind,
        "severity": case.severity,
        "seed": case.seed,
        "split": split(case.seed),
        "onset": case.onset,
        "steps": _steps(view),
        "truth": json.loads(beside(case).read_text(encoding="utf-8")),
        "with_recipe": spoken(view),
        "without_recipe": spoken(view.without_settings()),
        "on_trial": spoken(view.without_settings(), on_trial=True),
        "trivial": trivial(view, case.onset),
    }
    if case.kind == "fault":
        fault = fault_named(case.name)
        row["expected"] = fault.expected
        row["detected_after"] = delay(view, fault.expected, case.onset)
    else:
        row["live"] = live(view)
    return row


def split(seed: int) -> str:
    return "tuning" if seed in TUNING_SEEDS else "test"


def fault_named(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def spoken(view: View, *, on_trial: bool = False) -> Row:
    """The checks that fail or warn in the order of the diagnosis, and those that could not be made.

    A check that is not validated never comes first; `on_trial` all are ranked as if they were, to see who may be.
    """
    from kedge.diagnose.checks import check_named, run_checks
    from kedge.diagnose.diagnosis import rank

    findings = rank(replace(one, validated=True) if on_trial else one for one in run_checks(view))
    alarms = [
        {
            "check": one.check,
            "status": one.status,
            "strength": round(float(one.strength), 3),
            "onset": one.onset,
            "kind": check_named(one.check).kind.name,
            "validated": one.validated,
        }
        for one in findings
        if one.status in ("fail", "warn")
    ]
    return {"alarms": alarms, "not_checked": [one.check for one in findings if one.status == "not_checked"]}


def failing(said: Mapping[str, Any]) -> list[Row]:
    """Alarms that call a run faulty."""
    return [one for one in said["alarms"] if one["status"] == "fail" and one["kind"] != "BENIGN"]


def first(said: Mapping[str, Any]) -> str | None:
    """The first cause named, of those that fail or warn; a benign change is no cause."""
    return next((one["check"] for one in said["alarms"] if one["kind"] != "BENIGN"), None)


def live(view: View) -> list[Row]:
    """Checks that fail when the run is looked at while it goes on: the steps done, and which."""
    from kedge.diagnose.checks import all_checks, run_checks
    from kedge.diagnose.checks.check import Kind

    benign = {check.name for check in all_checks() if check.kind is Kind.BENIGN}
    found = []
    for steps in LOOKS:
        failed = [one for one in run_checks(until(view, steps)) if one.status == "fail" and one.check not in benign]
        found += [{"steps": steps, "check": one.check} for one in failed]
    return found


def delay(view: View, expected: str, onset: int) -> int | None:
    """Steps from the onset until the expected check first fails on what there is by then; None if it never does."""
    from kedge.diagnose.checks import check_named

    try:
        check = check_named(expected)
    except KeyError:
        return None
    for steps in range(onset + 1, _steps(view) + 1):
        if check(until(view, steps)).status == "fail":
            return steps - onset
    return None


def trivial(view: View, onset: int) -> Row:
    """What two rules that need no diagnosis say: the first step past KL 10, and past the usual length by two sigma."""
    kl, length = view.metric("kl/reference_per_sequence"), view.metric("length/mean")
    found: Row = {"kl": None, "length": None}
    if kl is not None and (kl.values > KL_LIMIT).any():
        found["kl"] = int(kl.steps[np.argmax(kl.values > KL_LIMIT)])
    if length is not None and len(length.values) > BEFORE:
        usual = length.values[4:BEFORE]  # the first steps still learn to be brief
        high = (length.values > usual.mean() + SIGMAS * usual.std(ddof=1)) & (length.steps >= BEFORE)
        found["length"] = int(length.steps[np.argmax(high)]) if high.any() else None
    return found | {"after": onset}


def _steps(view: View) -> int:
    return int(view.steps.max()) + 1 if len(view.steps) else 0


# What the rows come to


def upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Clopper and Pearson (1934), one-sided: the rate above which so few events would be rarer than 1 - confidence."""
    if trials == 0 or events >= trials:
        return 1.0
    return float(beta_distribution.ppf(confidence, events + 1, trials - events))


def false_alarms(rows: Sequence[Row], which: Callable[[Row], Iterable[tuple[str, int | None]]]) -> Row:
    """Failing checks in healthy runs, per 1,000 steps of their own, with bounds by steps and by runs.

    `which` gives the alarms of a run as (check, onset). What a fork says of the steps before it left its base counts
    only if the base does not say it.
    """
    healthy = [row for row in rows if row["kind"] != "fault"]
    of_base = {row["seed"]: {check for check, _ in which(row)} for row in healthy if row["kind"] == "base"}
    steps = sum(row["steps"] - row["onset"] for row in healthy)
    alarms, runs = [], 0
    for row in healthy:
        own = [
            (check, at)
            for check, at in which(row)
            if row["kind"] == "base"
            or not (check in of_base.get(row["seed"], ()) and at is not None and at < row["onset"])
        ]
        alarms += [{"run": title(row), "check": check, "onset": at} for check, at in own]
        runs += bool(own)
    return {
        "runs": len(healthy),
        "steps": steps,
        "steps_with_shared": sum(row["steps"] for row in healthy),
        "alarms": alarms,
        "per_1000": 1000 * len(alarms) / steps if steps else None,
        "per_1000_upper": 1000 * upper_bound(len(alarms), steps),
        "runs_with": runs,
        "runs_with_upper": upper_bound(runs, len(healthy)),
    }


def title(row: Row) -> str:
    return f"{row['name']}, {row['severity'] + ', ' if row['severity'] else ''}seed {row['seed']}"


def named(rows: Sequence[Row], mode: str, severity: str) -> Row:
    """How often the right cause is first or among the first three; a declared confusable that is first counts half."""
    mine = [row for row in rows if row["kind"] == "fault" and row["severity"] == severity]
    right = [first(row[mode]) == row["expected"] for row in mine]
    three = [row["expected"] in _first_causes(row[mode], 3) for row in mine]
    half = [first(row[mode]) in fault_named(row["name"]).confusable for row in mine]
    flagged = [bool(failing(row[mode])) for row in mine]
    return {
        "runs": len(mine),
        "flagged": sum(flagged),
        "first": sum(right),
        "three": sum(three),
        "credited": sum(right) + 0.5 * sum(h and not r for h, r in zip(half, right, strict=True)),
    }


def _first_causes(said: Mapping[str, Any], count: int) -> list[str]:
    return [one["check"] for one in said["alarms"] if one["kind"] != "BENIGN"][:count]


def misses(rows: Sequence[Row], mode: str) -> list[Row]:
    """Every faulted run whose cause is not first, with what is said instead."""
    return [
        {"run": title(row), "expected": row["expected"], "said": _first_causes(row[mode], 3)}
        for row in rows
        if row["kind"] == "fault" and first(row[mode]) != row["expected"]
    ]


def by_check(rows: Sequence[Row], mode: str = "with_recipe") -> dict[str, Row]:
    """For every check: how its own faults, other faults and healthy runs made it fail."""
    names = sorted({fault.expected for fault in FAULTS} | {one["check"] for row in rows for one in failing(row[mode])})
    found = {}
    for name in names:
        spoke = [row for row in rows if name in {one["check"] for one in failing(row[mode])}]
        own = [row for row in rows if row.get("expected") == name]
        found[name] = {
            **{
                severity: [
                    sum(row in spoke for row in own if row["severity"] == severity),
                    sum(row["severity"] == severity for row in own),
                ]
                for severity in ("strong", "mild")
            },
            "healthy": sum(row["kind"] != "fault" for row in spoke),
            "others": sum(row["kind"] == "fault" and row not in own for row in spoke),
            "first_of_others": sorted(
                title(row) for row in rows if row["kind"] == "fault" and row not in own and first(row[mode]) == name
            ),
        }
    return found


def times(rows: Sequence[Row], severity: str) -> Row:
    """Steps from the onset until the expected check fails; those that never do are censored."""
    mine = [row for row in rows if row["kind"] == "fault" and row["severity"] == severity]
    after = [row["detected_after"] for row in mine]
    known = sorted(STEPS if one is None else one for one in after)
    middle = statistics.median(known) if known else None
    return {
        "median": None if middle is None or middle >= STEPS else middle,
        "missed": sum(one is None for one in after),
        "runs": len(mine),
    }


def trivial_rows(rows: Sequence[Row]) -> list[Row]:
    """What flagging everything, nothing, or by one number would score; none of them names a cause."""

    def at(rule: str, row: Row) -> list[tuple[str, int | None]]:
        if rule == "flag all":
            return [(rule, row["onset"])]
        step = row["trivial"].get({"KL > 10": "kl", "length + 2 sigma": "length"}.get(rule, ""))
        return [] if step is None else [(rule, step)]

    found = []
    for rule in ("flag all", "flag none", "KL > 10", "length + 2 sigma"):
        said = partial(at, rule)
        caught = {
            severity: [
                sum(any(step is not None and step >= row["onset"] for _, step in said(row)) for row in mine),
                len(mine),
            ]
            for severity in ("strong", "mild")
            for mine in [[row for row in rows if row["kind"] == "fault" and row["severity"] == severity]]
        }
        found.append({"rule": rule, "caught": caught, "false": false_alarms(rows, said)})
    return found


def may_be_validated(rows: Sequence[Row]) -> dict[str, Row]:
    """Which checks passed faults and controls of the test split.

    Of a check's own strong faults at least four in five make it fail and as many have it first without the recipe, no
    healthy run makes it fail, and at most one in ten of the other faults have it first.
    """
    test = [row for row in rows if row["split"] == "test"]
    others = [row for row in test if row["kind"] == "fault"]
    found = {}
    for name, figures in by_check(test, "on_trial").items():
        own = [row for row in others if row["expected"] == name and row["severity"] == "strong"]
        if not own:
            continue
        right = sum(first(row["on_trial"]) == name for row in own)
        wrong = len(figures["first_of_others"])
        passed = (
            figures["strong"][0] >= 0.8 * len(own)
            and right >= 0.8 * len(own)
            and figures["healthy"] == 0
            and wrong <= 0.1 * max(1, len(others) - len(own))
        )
        found[name] = {"passed": passed, "strong": figures["strong"], "healthy": figures["healthy"], "wrong": wrong}
    return found


def summary(rows: Sequence[Row]) -> Row:
    """All figures of one split."""

    def ended(row: Row) -> list[tuple[str, int | None]]:
        return [(one["check"], one["onset"]) for one in failing(row["with_recipe"])]

    def on_the_way(row: Row) -> list[tuple[str, int | None]]:
        earliest: dict[str, int | None] = {}
        for one in row.get("live", ()):
            earliest.setdefault(one["check"], one["steps"])
        return [*earliest.items()]

    modes = ("with_recipe", "without_recipe")
    return {
        "seeds": sorted({row["seed"] for row in rows}),
        "named": {mode: {severity: named(rows, mode, severity) for severity in ("strong", "mild")} for mode in modes},
        "false_alarms": false_alarms(rows, ended),
        "false_alarms_live": false_alarms(rows, on_the_way),
        "times": {severity: times(rows, severity) for severity in ("strong", "mild")},
        "misses": {mode: misses(rows, mode) for mode in modes},
        "by_check": by_check(rows),
        "trivial": trivial_rows(rows),
    }
