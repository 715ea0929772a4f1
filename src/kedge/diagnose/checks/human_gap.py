"""People agree less and less with the reward model on what the policy now says.

**What.** Rank correlation of score and joined human labels on the policy's own responses, from early to late.

**Why it matters.** A reward model is right where its labels came from. If people and score part on the current answers,
no setting of the optimiser helps: the reward itself is wrong.

**How.** Labels named `human`, joined to responses of at least six steps. Spearman's correlation with the score within
each step; the mean over the first third of the labelled steps minus that over the last third, over 0.25.

**False alarms.** A policy whose answers have become alike: correlation falls because there is nothing to rank. Few
labels.

**Remedy.** Label fresh pairs from the current policy and train the reward model on them too.

**References.** Gao et al. 2023 (iterated RLHF); mechanism M22.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.behaviour import STRONGEST
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.view import View

LOST = 0.25
FEWEST = 6  # labelled steps


def judge(view: View) -> Finding:
    """Agreement lost from the first to the last third of what was labelled."""
    agreement = view.fact("labels/agreement")
    if agreement is None or len(agreement.values) < FEWEST:
        return not_checked("human_gap", f"fewer than {FEWEST} steps have joined labels named `human`")
    third = len(agreement.values) // 3
    early, late = float(np.mean(agreement.values[:third])), float(np.mean(agreement.values[-third:]))
    lost = (early - late) / LOST
    finding = Finding(
        "human_gap",
        "ok",
        f"Within a step, score and people's judgement correlate {early:.2f} early and {late:.2f} late.",
        evidence=(
            Evidence("agreement, first third", early, "rank correlation", "", "joined labels"),
            Evidence(
                "agreement, last third", late, "rank correlation", f"fails {LOST:g} below the first", "joined labels"
            ),
        ),
        onset=int(agreement.steps[-1]) if lost >= 1 else None,
        mechanism="The policy has moved to answers that the reward model's labels never covered.",
        refuted_by="fresh pairs from the current policy agree with the reward model as the old ones did",
        remedies=(Remedy((), "pairs from the current policy change what is rewarded", "labels"),),
    )
    return graded(finding, max(0.0, min(STRONGEST, lost)))


CHECK = Check("human_gap", "people and score part", Kind.SYMPTOM, ("M22",), judge, needs=("labels",))
