"""A diagnosis as one HTML page: first what a team lead takes to a meeting, then the evidence.

Transcripts and all that a run or its recipe named are escaped; nothing on the page runs or loads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge.diagnose.checks import all_checks
from kedge.diagnose.contrast import Contrast
from kedge.diagnose.diagnosis import ALARMS, Diagnosis, diagnose, read_view, with_notes
from kedge.diagnose.margin import TERCILES, margin
from kedge.diagnose.prose import Prose, heading, matched_wins, prose, title_of
from kedge.diagnose.trials import MANY, Effect, read_trials
from kedge.diagnose.view import View
from kedge.evaluate.intervals import wilson
from kedge.report.charts import UPDATES
from kedge.report.html import write_page
from kedge.report.plots import Line, line_chart
from kedge.report.samples import LEVELS, choose, read_samples
from kedge.trace.reader import read_run

PAGE = "diagnosis.html"  # in the run's folder
REPORT = "report.html"
STATUS_WORDS = {"fail": "fails", "warn": "warns", "ok": "nothing found", "not_checked": "not checked"}
MARKS = {"fail": "bad", "warn": "look", "ok": "ok", "not_checked": "missing"}  # classes of the style sheet


def write_diagnosis(
    run: Path, view: View, found: Diagnosis, said: Prose, out: Path, *, reported: bool | None = None
) -> Path:
    """Write the page to `out` and return it; `reported` says that the run has a report, or is about to have one.

    Raises `InputError` where it cannot be written.
    """
    reported = (run / REPORT).exists() if reported is None else reported
    report = Path(os.path.relpath(run / REPORT, out.parent)).as_posix() if reported else None
    write_page(out, "diagnosis.html", {**_page(run, view, found, said), "report": report})
    return out


def _page(run: Path, view: View, found: Diagnosis, said: Prose) -> dict[str, Any]:
    samples = choose(read_samples(read_run(run)))
    return {
        "found": found,
        "said": said,
        "facts": _facts(found),
        "first": found.first_alarm,
        "charts": _charts(view, said.contrast),
        "many": MANY,
        "heading": heading,
        "changes": [(change, _effects(change.tried.effects if change.tried else ())) for change in said.changes],
        "samples": samples,
        "levels": LEVELS,
        "rows": [(one, title_of(one.check), STATUS_WORDS[one.status], MARKS[one.status]) for one in found.findings],
        "kinds": {check.name: check.kind.name.lower() for check in all_checks()},
        "title_of": title_of,
    }


def findings_section(run: Path, out: Path, *, write: bool) -> Mapping[str, Any]:
    """What a run's report at `out` says about its diagnosis, with the way to the page; `write` writes that anew."""
    view, notes = read_view(run)
    found = with_notes(diagnose(view), notes)
    said = prose(view, found, read_trials(run))
    page = run / PAGE
    if write:
        write_diagnosis(run, view, found, said, page, reported=True)
    return {
        "verdict": said.verdict,
        "alarms": [(one, title_of(one.check), MARKS[one.status]) for one in found.of(*ALARMS)],
        "link": Path(os.path.relpath(page, out.parent)).as_posix() if page.exists() else None,
        "not_checked": len(found.of("not_checked")),
    }


def _facts(found: Diagnosis) -> list[str]:
    span = [] if found.steps is None else [f"policy steps {found.steps[0]} to {found.steps[1]}"]
    counts = {status: len(found.of(status)) for status in ("fail", "warn", "ok", "not_checked")}
    words = {"fail": "failing", "warn": "warning", "ok": "ok", "not_checked": "not checked"}
    return [*span, *(f"{number} {words[status]}" for status, number in counts.items() if number)]


def _charts(view: View, contrast: Contrast) -> list[Any]:
    from markupsafe import Markup

    figures = [
        line_chart("Score", _score(view), x=UPDATES, y="normalised score", zero=True),
        line_chart("Wins at equal length", _wins(view), x=UPDATES, y="share of prompts",
                   note="Policy against reference where their lengths are within 10%; the score decides. The band is "
                   "Wilson's 95% interval."),
        line_chart(f"Net margin of {contrast.more}", _margins(contrast), x=UPDATES, y="reward", zero=True,
                   note=f"Same prompt, against {contrast.less}, after KL and penalties; by the reference's length."),
    ]  # fmt: skip
    return [Markup(figure) for figure in figures if figure]


def _score(view: View) -> list[Line]:
    lines = []
    for name, label, tone in (
        ("evaluation/score", "policy", "policy"),
        ("evaluation/score_reference", "reference", "reference"),
    ):
        series = view.metric(name, "evaluation")
        if series is not None:
            lines.append(Line(label, series.steps, series.values, tone, dashed=tone == "reference"))
    return lines


def _wins(view: View) -> list[Line]:
    found = matched_wins(view)
    if not found:
        return []
    steps, shares, _ = (np.array(column, float) for column in zip(*found, strict=True))
    low, high = np.array([wilson(share, int(count)) for _, share, count in found]).T
    even = Line("even", steps, np.full(len(steps), 0.5), "reference", dashed=True)
    return [Line("policy wins", steps, shares, "policy", low, high), even]


def _margins(contrast: Contrast) -> list[Line]:
    lines = []
    for tercile, label, tone in zip(
        TERCILES, ("briefest", "middle", "longest"), ("quiet", "reference", "drift"), strict=True
    ):
        found = [one for one in (margin(pairs, tercile) for pairs in contrast.pairs) if one is not None]
        if found:
            at, net = np.array([one.step for one in found]), np.array([one.net for one in found])
            lines.append(Line(f"reference {label}", at, net, tone))
    return lines


def _effects(effects: Sequence[Effect]) -> list[dict[str, Any]]:
    """Rows of the trial's table: the figure, both forks, the difference with its widest interval."""
    return [
        {
            "figure": one.figure.replace("_", " "),
            "unit": one.unit,
            "null": one.null,
            "changed": one.changed,
            "difference": one.difference,
            "interval": _widest(one),
            "over": "seeds" if one.over_seeds is not None and _widest(one) == one.over_seeds else "prompts",
            "caused": one.caused,
            "truth": one.truth,
        }
        for one in effects
    ]


def _widest(one: Effect) -> tuple[float, float] | None:
    known = [
        interval for interval in (one.over_seeds, one.over_prompts) if interval and all(map(math.isfinite, interval))
    ]
    return max(known, key=lambda interval: interval[1] - interval[0], default=None)
