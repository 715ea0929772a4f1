"""The policy's answers have become much longer than the reference's.

**What.** Mean length of the policy's answers over that of the reference's to the same prompts.

**Why it matters.** It is the commonest thing that an over-optimised reward does to a policy. It is a symptom: the
causes are other checks' (length_reward, token_constant, ending, discount).

**How.** Evaluations ask the same prompts of both; the ratio is the mean of two evaluations in a row, and it fails at
1.4. Runs without evaluations are measured in training steps, against the reference's probe answers. The strength is
(ratio − 1) / 0.4.

**False alarms.** Prompts for which the reference is too brief, where longer answers are better ones. In training steps
a change of prompts looks the same (prompt_mix).

**Remedy.** That of the cause. Without one: `policy.length_penalty`, or `policy.target_penalty` against the reference's
own length.

**References.** Singhal et al. 2023; mechanism M2.
"""

from __future__ import annotations

from kedge.diagnose.behaviour import STRONGEST, length_ratio, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where
from kedge.diagnose.view import View

LONGER = 1.4


def judge(view: View) -> Finding:
    """The largest ratio of two evaluations in a row."""
    ratio = length_ratio(view)
    if ratio is None:
        return not_checked("runaway_length", "there are no lengths of the policy's answers beside the reference's")
    lasting = smooth(ratio)
    worst = int(lasting.values.argmax())
    value, step = float(lasting.values[worst]), int(lasting.steps[worst])
    finding = Finding(
        "runaway_length",
        "ok",
        f"Answers are {lasting.values[-1]:.2f} times as long as the reference's, {value:.2f} times at step {step}.",
        evidence=(
            Evidence("length over the reference's", value, "1", f"fails from {LONGER:g}", "evaluation/length"),
            Evidence("length over the reference's, last", float(lasting.values[-1]), "1", "", "evaluation/length"),
        ),
        onset=first_where(lasting, lasting.values >= LONGER),
        subject="length",
        mechanism="Something pays for length, or does not let answers end; the checks of causes say what.",
        refuted_by="the same prompts answered at greater length are preferred by people",
        remedies=(
            Remedy(
                ("policy.length_penalty=0.04",),
                "takes 0.04 reward per token away",
                "answers that need their length are taxed, too",
            ),
            Remedy(
                ("policy.target_penalty=0.04",),
                "takes 0.04 reward per token beyond the reference's answer to the same prompt",
                "one more answer of the reference per prompt",
            ),
        ),
    )
    return graded(finding, max(0.0, min(STRONGEST, (value - 1) / (LONGER - 1))))


CHECK = Check("runaway_length", "answers run long", Kind.SYMPTOM, ("M2",), judge, needs=("samples | evaluations",))
