"""Answers are surer than they are right, and more so than at the start.

**What.** Mean stated confidence minus the share that is correct, from early to late.

**Why it matters.** Rewards that like certainty teach it; calibration is lost although accuracy stays.

**How.** Joined labels `confidence` (0 to 1) and `correct` (0 or 1) on at least six steps. The gap of the last third of
the labelled steps minus that of the first, over 0.1. Words of certainty are feature_reward's.

**False alarms.** Prompts that became harder.

**Remedy.** Rewards that are proper scoring rules of the stated confidence; pairs in which a false certainty loses.

**References.** OpenAI 2023 (calibration before and after post-training); Kadavath et al. 2022.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.behaviour import STRONGEST
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.view import View

WIDER = 0.1
FEWEST = 6  # labelled steps


def judge(view: View) -> Finding:
    """How much the gap has widened."""
    gap = view.fact("labels/overconfidence")
    if gap is None or len(gap.values) < FEWEST:
        return not_checked(
            "overconfidence", f"fewer than {FEWEST} steps have joined labels named `confidence` and `correct`"
        )
    third = len(gap.values) // 3
    early, late = float(np.mean(gap.values[:third])), float(np.mean(gap.values[-third:]))
    wider = (late - early) / WIDER
    finding = Finding(
        "overconfidence",
        "ok",
        f"Confidence lies {early:+.2f} above the share that is correct early, and {late:+.2f} late.",
        evidence=(
            Evidence("confidence minus accuracy, first third", early, "share", "", "joined labels"),
            Evidence("confidence minus accuracy, last third", late, "share", f"fails {WIDER:g} above", "joined labels"),
        ),
        onset=int(gap.steps[-1]) if wider >= 1 else None,
        subject="certainty",
        mechanism="Sounding sure is rewarded whether or not the answer is right.",
        refuted_by="accuracy among sure answers is as high as their confidence",
        remedies=(Remedy((), "pairs in which a false certainty loses take its price away", "labels"),),
    )
    return graded(finding, max(0.0, min(STRONGEST, wider)))


CHECK = Check("overconfidence", "surer than right", Kind.SYMPTOM, (), judge, needs=("labels",))
