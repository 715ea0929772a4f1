"""docs/results/diagnosis.md; every number in it comes from the scored rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from policy_runs import spread, table

from faults.faults import BENIGN, FAULTS, ONSETS, STEPS, TEST_SEEDS, TUNING_SEEDS
from faults.score import Row, first, may_be_validated, summary, title

COMMAND = "python benchmarks/diagnosis.py"
NEEDED = {"strong": 0.8, "mild": 0.6}  # share of faults whose cause is to be first


def render(rows: Sequence[Row]) -> str:
    """The page."""
    test = [row for row in rows if row["split"] == "test"]
    tuning = [row for row in rows if row["split"] == "tuning"]
    parts = [
        "# Diagnosis: real faults, healthy runs",
        "",
        f"Made by `{COMMAND} make`, `views` and `score`; every run's figures in `diagnosis.json`.",
        "",
        *_setting(rows),
    ]
    for name, mine in (("Test split", test), ("Tuning split", tuning)):
        if mine:
            parts += ["", f"## {name}", "", *_split(mine)]
    parts += ["", "## What the faults do", "", *_effects(rows)]
    if test:
        parts += ["", "## Validated checks", "", *_validated(rows)]
    return "\n".join([*parts, ""])


def _setting(rows: Sequence[Row]) -> list[str]:
    held_out = ", ".join(fault.name for fault in FAULTS if fault.held_out)
    return [
        f"Each seed has a base run of {STEPS} steps in the built-in desk, in which score and gold rise together.",
        f"Every other run is a fork of it: a fault sets in after {ONSETS[0]} to {ONSETS[-1]} steps, drawn by name, and",
        "the steps before are the base's to the bit. Null forks change nothing but the draws; benign forks change",
        "something that is no fault. What is expected of the diagnosis was written down before any threshold was set",
        "(`benchmarks/faults/faults.py`).",
        "",
        f"Thresholds were set on seeds {_list(TUNING_SEEDS)}; the test seeds are {_list(TEST_SEEDS)}. Faults that no",
        f"tuning seed has: {held_out}. One dose was changed after its run: annotators who like refusals taught a",
        "reward model that hardly does (the file says why), and refusal_reward is a bonus since.",
        "",
        *table(
            ["fault", "strong (mild)", "expected", "counts half"],
            [[fault.name, fault.what, fault.expected, ", ".join(fault.confusable) or "–"] for fault in FAULTS],
        ),
        "",
        "Benign: " + "; ".join(one.what for one in _distinct_benign()) + ".",
        "",
        f"Runs scored here: {len(rows)}.",
    ]


def _distinct_benign() -> list[Any]:
    return list({one.what: one for one in BENIGN}.values())


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _split(rows: Sequence[Row]) -> list[str]:
    """Figures of one split."""
    found = summary(rows)
    faulted = sorted({row["seed"] for row in rows if row["kind"] == "fault"})
    only = "" if faulted == found["seeds"] else f"; faults under {_list(faulted)}, under the others healthy runs alone"
    return [
        f"Seeds {_list(found['seeds'])}{only}.",
        "",
        *_named(found),
        "",
        *_alarms(found),
        "",
        "Time to detect: steps from the onset until the expected check fails on what there is by then.",
        "",
        *table(
            ["", "median", "never", "runs"],
            [
                [name, _number(one["median"]), str(one["missed"]), str(one["runs"])]
                for name, one in found["times"].items()
            ],
        ),
        "",
        "What each check does: its own faults that make it fail, healthy runs and other faults that do, and other",
        "faults whose first cause it is.",
        "",
        *_checks(found),
        "",
        "### Misses",
        "",
        *_misses(found),
        "",
        "### Rules that need no diagnosis",
        "",
        *_trivial(found),
    ]


def _named(found: Mapping[str, Any]) -> list[str]:
    heads = ["faults", "recipe", "flagged", "right cause first", "needed", "with half credit", "among first three"]
    rows = []
    for severity, needed in NEEDED.items():
        for mode, words in (("with_recipe", "read"), ("without_recipe", "not read")):
            one = found["named"][mode][severity]
            count = one["runs"]
            if count:
                shares = [f"{one[key] / count:.2f}" for key in ("flagged", "first", "credited", "three")]
                rows.append([f"{severity} ({count})", words, *shares[:2], f"{needed:.2f}", *shares[2:]])
    return table(heads, rows)


def _alarms(found: Mapping[str, Any]) -> list[str]:
    heads = ["failing checks in healthy runs", "runs", "steps", "alarms", "per 1,000 steps", "at most (95%)"]
    heads += ["runs with one", "at most (95%)"]
    rows = []
    for name, words in (("false_alarms", "at the end"), ("false_alarms_live", "looked at on the way")):
        one = found[name]
        rows.append(
            [
                words,
                str(one["runs"]),
                f"{one['steps']} ({one['steps_with_shared']} with shared ones)",
                str(len(one["alarms"])),
                _number(one["per_1000"], 2),
                _number(one["per_1000_upper"], 2),
                str(one["runs_with"]),
                _number(one["runs_with_upper"], 2),
            ]
        )
    alarms = [f"- {one['run']}: {one['check']}" for one in found["false_alarms"]["alarms"]]
    on_way = [
        f"- {one['run']}: {one['check']} after {one['onset']} steps" for one in found["false_alarms_live"]["alarms"]
    ]
    return [*table(heads, rows), *(["", "At the end:", "", *alarms] if alarms else []),
            *(["", "On the way:", "", *on_way] if on_way else [])]  # fmt: skip


def _checks(found: Mapping[str, Any]) -> list[str]:
    heads = ["check", "strong", "mild", "healthy", "other faults", "first of others"]
    rows = []
    for name, one in found["by_check"].items():
        own = [f"{one[severity][0]} of {one[severity][1]}" if one[severity][1] else "–" for severity in NEEDED]
        first_of = ", ".join(one["first_of_others"]) or "–"
        rows.append([name, *own, str(one["healthy"]), str(one["others"]), first_of])
    return table(heads, rows)


def _misses(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for mode, words in (("with_recipe", "With the recipe"), ("without_recipe", "Without it")):
        missed = found["misses"][mode]
        lines += [f"{words}: {len(missed) or 'none'}.", ""]
        lines += [f"- {one['run']}: {one['expected']}; said: {', '.join(one['said']) or 'nothing'}" for one in missed]
        lines += [""] if missed else []
    return lines[:-1]


def _trivial(found: Mapping[str, Any]) -> list[str]:
    rows = []
    for one in found["trivial"]:
        caught = [f"{count} of {total}" for count, total in one["caught"].values()]
        rows.append([one["rule"], *caught, _number(one["false"]["per_1000"], 2), str(one["false"]["runs_with"])])
    return table(
        ["rule", "strong flagged", "mild flagged", "alarms per 1,000 healthy steps", "healthy runs with one"], rows
    )


def _effects(rows: Sequence[Row]) -> list[str]:
    """How far the runs moved from the last evaluation before the onset to the last of all."""
    heads = ["run", "seeds", "gold", "score", "length", "KL", "steps done"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        name = "null" if row["name"].startswith("null-") else row["name"]
        groups.setdefault((name, row["severity"]), []).append(row)
    found = []
    for (name, severity), mine in groups.items():
        moved = [
            [row["truth"]["end"][what] - row["truth"]["before"][what] for row in mine]
            for what in ("gold", "score", "length", "kl")
        ]
        done = spread([float(row["steps"]) for row in mine], 0)
        found.append([f"{name} {severity}".strip(), str(len(mine)), *(spread(one) for one in moved), done])
    return [
        "From the last evaluation before the onset to the end of the run; mean over runs, in brackets the lowest and",
        "the highest.",
        "",
        *table(heads, found),
    ]


def _validated(rows: Sequence[Row]) -> list[str]:
    found = may_be_validated(rows)
    passed = [name for name, one in found.items() if one["passed"]]
    failed = [name for name, one in found.items() if not one["passed"]]
    return [
        "A check is validated if, in the test split, at least four in five of its own strong faults make it fail and",
        "as many have it first without the recipe, no healthy run makes it fail, and it is first for at most a tenth",
        "of the other faults.",
        "",
        f"- Passed: {', '.join(passed) or 'none'}.",
        f"- Did not: {', '.join(failed) or 'none'}.",
    ]


def _number(value: float | None, places: int = 0) -> str:
    return "–" if value is None else f"{value:.{places}f}"


def lines_of(rows: Sequence[Row]) -> list[str]:
    """One line a run, for those who tune: what is expected, and all that fails or warns."""
    found = []
    for row in rows:
        parts = []
        for mode in ("with_recipe", "without_recipe"):
            said = [
                f"{one['check']}{'' if one['status'] == 'fail' else '?'} {one['strength']:.1f}@{one['onset']}"
                for one in row[mode]["alarms"]
            ]
            parts.append(", ".join(said) or "nothing")
        right = "  " if row["kind"] != "fault" else "OK" if first(row["without_recipe"]) == row["expected"] else "--"
        wanted = row.get("expected", "healthy")
        live = sorted({f"{one['check']}@{one['steps']}" for one in row.get("live", ())})
        extra = f" | live: {', '.join(live)}" if live else ""
        found.append(
            f"{right} {title(row)} (t0 {row['onset']}, expects {wanted}, after {row.get('detected_after')}): {parts[0]}"
            + (f" | without recipe: {parts[1]}" if parts[1] != parts[0] else "") + extra
        )  # fmt: skip
    return found
