"""Responses were drawn from another distribution than the one that training takes them for.

**What.** Log-probabilities of the tokens when they were sampled differ from those of the policy that is trained on
them.

**Why it matters.** The mean of log π − log π_ref over samples of q is KL(q‖π_ref) − KL(q‖π): the penalty then holds
another policy than the one that learns, and the mean can be negative. Tokens that top-p or top-k never draws get no
gradient, and stale weights give old answers the credit of new ones.

**How.** Mean over a step's tokens of |log q − log π_old|, in nats. It fails where the gap passes 0.02 on three steps in
a row. Float32 rounding stays below 1e-5, and bfloat16 with another kernel near 0.005.

**False alarms.** A correction by importance weights (`policy.importance_cap`) makes a small gap harmless; a quantised
sampler has a gap that does not grow.

**Remedy.** Score with the temperature and truncation that sampled; send new weights to the sampler before every step;
weigh by truncated importance weights.

**References.** Schulman et al. 2017, section 3; reference-free identity E_q[log π/π_ref] = KL(q‖π_ref) − KL(q‖π).
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where, lasting
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

GAP = 0.02  # nats per token
TIMES = 3  # steps in a row


def facts(step: StepTrace) -> Facts:
    """The gap between the sampler and the policy before the update."""
    mask = step.response_mask
    gap = np.abs(step.tokens["behaviour_logprob"] - step.tokens["old_logprob"])[mask]
    return {"sampler/gap": float(gap.mean()) if mask.any() else np.nan}


def judge(view: View) -> Finding:
    """The largest gap that lasted."""
    gap = view.fact("sampler/gap")
    if gap is None or len(gap.values) < TIMES:
        return not_checked("sampler", f"fewer than {TIMES} steps hold the sampler's log-probabilities")
    lowest = np.array([gap.values[max(0, i - TIMES + 1) : i + 1].min() for i in range(len(gap.values))])[TIMES - 1 :]
    worst = float(lowest.max())
    finding = Finding(
        "sampler",
        "ok",
        f"Sampler and learner differ by {worst:.2g} nats per token.",
        evidence=(Evidence("gap", worst, "nats per token", f"largest that lasted {TIMES} steps", "behaviour_logprob"),),
        onset=first_where(gap, lasting(gap.values > GAP, TIMES)),
        mechanism="The penalty and the advantages belong to the distribution that was sampled, not to the policy.",
        refuted_by="log-probabilities scored again at the sampler's temperature and truncation agree",
        remedies=(
            Remedy(
                (), "sampling from the policy itself makes the penalty's gradient that of the KL", "slower sampling"
            ),
            Remedy(
                ("policy.importance_cap=2",), "truncated importance weights correct the mean", "bias, more variance"
            ),
        ),
    )
    return graded(finding, worst / GAP)


CHECK = Check("sampler", "sampler and learner differ", Kind.INTEGRITY, ("M4",), judge, facts)
