"""A few responses hold most of the score's push: heavy tails of the reward.

**What.** The one per cent of a step's responses with the largest score advantage hold a large share of all that is
above 0.

**Why it matters.** With heavy-tailed errors the reward model's largest scores are its largest mistakes, and a policy
can raise the mean score without becoming better. A step is then an accident of a few samples.

**How.** The score's reward part of the advantage and its critic part, summed over tokens, centred on the step's mean;
the share of the sum above 0 that the top one per cent holds, at least one response. It is the median of six steps in a
row. For normal values it is 0.06 with 96 responses; it fails at 0.4.

**False alarms.** Steps of few responses, where one is more than one per cent: fewer than 50 are not judged. A rare
success that is real, as in tasks that are seldom solved.

**Remedy.** A smaller `policy.score_clip`; reward models that judge together (`reward.members`,
`reward.aggregate=worst`).

**References.** Kwa et al. 2024 (catastrophic Goodhart); mechanism M16.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.behaviour import STRONGEST
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

SHARE = 0.4
TOP = 100  # one response in so many
FEWEST = 50  # responses of a step
WINDOW = 6  # steps


def facts(step: StepTrace) -> Facts:
    """The share of the positive score advantage that the top one per cent of responses holds."""
    if len(step) < FEWEST:
        return {}
    parts = [part.sum(axis=1) for name, part in step.parts().items() if name.channel == "score"]
    if not parts:
        return {}
    push = np.sum(parts, axis=0)
    push = np.sort(push - push.mean())[::-1]
    above = push[push > 0]
    return {"heavy_tail/top": float(above[: max(1, len(push) // TOP)].sum() / above.sum()) if len(above) else np.nan}


def judge(view: View) -> Finding:
    """The largest median of six steps in a row."""
    top = view.fact("heavy_tail/top")
    if top is None or len(top.values) < WINDOW:
        return not_checked("heavy_tail", f"fewer than {WINDOW} steps with {FEWEST} responses and a score")
    medians = np.array([np.median(top.values[at - WINDOW + 1 : at + 1]) for at in range(WINDOW - 1, len(top.values))])
    lasting = Series(top.steps[WINDOW - 1 :], medians)
    value = float(medians.max())
    finding = Finding(
        "heavy_tail",
        "ok",
        f"The top 1% of responses hold {value:.0%} of the score's advantage above 0 where it is most.",
        evidence=(
            Evidence("share of the top 1%", value, "share", f"median of {WINDOW} steps; fails from {SHARE:g}", "trace"),
        ),
        onset=first_where(lasting, medians >= SHARE),
        mechanism="The largest scores, which hold the largest mistakes of the reward model, make the gradient.",
        refuted_by="the responses at the top are the best ones for people, too",
        remedies=(
            Remedy(
                ("policy.score_clip=3",), "no response counts for more than 3 deviations", "real successes count less"
            ),
            Remedy(
                ("reward.members=3", "reward.aggregate=worst"),
                "a score is large only where all members agree",
                "three reward models to train and to ask",
            ),
        ),
    )
    return graded(finding, min(STRONGEST, value / SHARE))


CHECK = Check(
    "heavy_tail", "a few responses make the gradient", Kind.CAUSE, ("M16",), judge, facts, needs=("score", "advantage")
)
