"""The loss divides by a response's length while the KL stands in the loss: long answers are under-punished.

**What.** The loss of a response is the mean over its tokens (`sequence_mean`), and the KL is a term of that loss.

**Why it matters.** Dividing by the length weighs a token of a long response less than one of a short response. While
the KL is in the reward that changes how fast the policy learns and not where it ends. With the KL in the loss it
changes where it ends: a long answer's negative advantages, and its KL, are spread thin, so that an answer that is bad
and long is pushed down less than one that is bad and brief.

**How.** It is a rule: the aggregation that the optimiser was told, and a KL coefficient in the loss. How much it
matters is the ratio of a token's weight in a response at the tenth percentile of length to that at the ninetieth,
over 4. The pressure beside it is Cov(L, A L̄/L) − Cov(L, A) over the responses' summed advantages A, in units of both
deviations.

**False alarms.** Where all answers are about as long the ratio is near 1 and nothing is wrong.

**Remedy.** Divide by a constant (the token budget), or by the batch's tokens; or put the KL into the reward.

**References.** Liu et al. 2025 (Dr. GRPO), arXiv 2503.20783; Shao et al. 2024 for the aggregation.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

RATIO = 4.0  # of token weights, brief over long
TIMES = 3
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """Whether the rule holds, and what it does to the weights of long and brief responses."""
    if "aggregation" not in step.learning:
        return {}
    beside = np.isfinite(step.loss_beta).any() and float(np.nanmean(step.loss_beta)) > SMALL
    lengths = step.lengths.astype(np.float64)
    sums = step.advantage().sum(axis=1)
    scaled = sums * lengths.mean() / np.maximum(lengths, 1)  # TRL's PPO may hold responses without a token
    unit = lengths.std() * sums.std() + SMALL
    return {
        "length_normalised/rule": float(step.learning["aggregation"] == "sequence_mean" and beside),
        "length_normalised/ratio": float(np.quantile(lengths, 0.9) / max(1.0, np.quantile(lengths, 0.1))),
        "length_normalised/pressure": float((_covariance(lengths, scaled) - _covariance(lengths, sums)) / unit),
    }


def _covariance(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x - x.mean()) * (y - y.mean())).mean())


def judge(view: View) -> Finding:
    """The ratio of weights where the rule holds, over its threshold."""
    rule = view.fact("length_normalised/rule")
    if rule is None or len(rule.steps) < TIMES:
        return not_checked("length_normalised", "the trace does not say how token losses were aggregated")
    ratio = aligned(view.facts.get("length_normalised/ratio"), rule.steps)
    pressure = aligned(view.facts.get("length_normalised/pressure"), rule.steps)
    strength = np.maximum(lowest_of(np.where(rule.values > 0, ratio / RATIO, 0.0), TIMES), 0.0)
    at = int(np.argmax(strength))
    holds = bool(rule.values[at])
    summary = "Token losses are not divided by the response's length, or the KL is not in the loss."
    if holds:
        summary = f"A token of a brief response weighs {ratio[at]:.2g} times one of a long response, in the KL, too."
    return graded(
        Finding(
            "length_normalised",
            "ok",
            summary,
            (
                Evidence("token weight, brief over long", float(ratio[at]), "1", "10th over 90th percentile of length"),
                Evidence("pressure on length", float(pressure[at]), "1", "by the division alone", "advantage"),
            ),
            onset=first_where(rule, strength >= 1),
            mechanism="Long answers get less of every push, so bad ones are pushed down less than bad brief ones.",
            refuted_by="length does not move in a short fork with a constant divisor",
            remedies=(
                Remedy(
                    ('policy.aggregation="constant"',),
                    "every token weighs the same",
                    "long responses dominate the step; lower policy.lr by the mean share of the budget that is used",
                ),
                Remedy(
                    ('policy.kl.place="reward"', 'policy.kl.estimator="k1"'),
                    "the division changes the rate and not where the policy ends",
                    "more variance in the advantages",
                ),
            ),
        ),
        float(min(CAP, strength[at])),
    )


CHECK = Check(
    "length_normalised", "long answers are under-punished", Kind.INTEGRITY, ("M8",), judge, facts, needs=("advantage",)
)
