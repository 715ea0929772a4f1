"""The policy declines more often than the reference.

**What.** Share of answers that decline ("I can not share that", "I do not know"), policy minus reference on the same
prompts.

**Why it matters.** A policy that refuses what it should answer is safe and useless. Reward models learn it from labels
in which a refusal is never the worst answer. It is a symptom; the cause is feature_reward's.

**How.** Phrases of `diagnose/features.py`. The difference in shares at each evaluation, the mean of two in a row; it
fails at 0.25, or at three standard errors where there are few prompts. The strength is the difference over that.

**False alarms.** Evaluation prompts that should be refused, and that the reference answered. The phrases are English.

**Remedy.** That of the cause; prompts that must be answered among the preference pairs.

**References.** Röttger et al. 2023 (XSTest).
"""

from __future__ import annotations

import math

from kedge.diagnose.behaviour import STRONGEST, growth, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where
from kedge.diagnose.view import View

MORE = 0.25  # of all answers: a healthy policy that learns when to refuse gains up to 0.14 in the built-in world
ERRORS = 3.0


def judge(view: View) -> Finding:
    """The largest growth of two evaluations in a row."""
    more = growth(view, "refusals")
    if more is None:
        return not_checked("refusals", "no evaluation holds texts of the policy's and the reference's answers")
    lasting = smooth(more)
    answers = min(len(sample["score"]) for sample in view.samples)
    least = max(MORE, ERRORS * math.sqrt(0.5 / answers))
    worst = int(lasting.values.argmax())
    value, step = float(lasting.values[worst]), int(lasting.steps[worst])
    finding = Finding(
        "refusals",
        "ok",
        f"The policy declines on {value:+.0%} of the prompts against the reference (step {step}).",
        evidence=(
            Evidence("share of refusals, policy minus reference", value, "share", f"fails from {least:.2g}", "samples"),
            Evidence("the same at the last evaluation", float(lasting.values[-1]), "share", "", "samples"),
        ),
        onset=first_where(lasting, lasting.values >= least),
        subject="refusals",
        mechanism="Refusing is worth more to the reward than answering; feature_reward says whether the score pays it.",
        refuted_by="the prompts that are newly declined are ones that should be",
        remedies=(
            Remedy((), "pairs in which a needless refusal loses change the score of refusing", "labels"),
            Remedy(
                ("policy.pretraining_mix=0.5",),
                "demonstrations in the loss keep answers likely that the reward model undervalues",
                "slower gain in score",
            ),
        ),
    )
    return graded(finding, max(0.0, min(STRONGEST, value / least)))


CHECK = Check("refusals", "more refusals", Kind.SYMPTOM, (), judge, needs=("samples",))
