"""An entropy bonus drives the policy to noise.

**What.** The loss pays for entropy, and the policy's entropy rises on account of it.

**Why it matters.** A bonus is paid for every token, whatever the prompt. Where it outweighs the advantages the policy
makes its tokens more alike in probability: answers become longer and less and less related to the question, KL grows,
and the score falls.

**How.** The coefficient is what the optimiser was told. Its push is the coefficient times the entropy of a token,
over the mean size of the advantages that stand beside it; and its effect is the entropy's rise above the smallest it
has been (median of five steps). It fails where a push of more than 1% goes with a rise by a factor of 1.4, on three
steps in a row, or where the push alone passes 5%.

**False alarms.** A bonus of 0.01 (a push of about half a percent of whitened advantages) that keeps entropy from
falling is what bonuses are for.

**Remedy.** A smaller bonus, or none: the KL to a reference that has entropy keeps the policy's.

**References.** Mnih et al. 2016 for the bonus; tokens of mixed entropy in Cui et al. 2025.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
PUSH, ALONE = 0.01, 0.05
RISE = math.log(1.4)
WINDOW, TIMES = 5, 3
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The coefficient, the entropy of a token, and the size of the advantages."""
    mask = step.response_mask
    if "entropy_bonus" not in step.learning or not mask.any():
        return {}
    return {
        "entropy_bonus/coefficient": float(step.learning["entropy_bonus"]),
        "entropy_bonus/entropy": float(step.tokens["entropy"][mask].mean()),
        "entropy_bonus/advantage": float(np.abs(step.advantage())[mask].mean()),
    }


def judge(view: View) -> Finding:
    """The bonus's push with the rise of entropy that goes with it."""
    bonus = view.fact("entropy_bonus/coefficient")
    if bonus is None or len(bonus.steps) < TIMES:
        return not_checked("entropy_bonus", "the trace does not say whether the loss pays for entropy")
    entropy, advantage = (
        aligned(view.facts.get(f"entropy_bonus/{name}"), bonus.steps) for name in ("entropy", "advantage")
    )
    push = bonus.values * entropy / np.maximum(advantage, SMALL)
    rise = _rise(entropy)
    strength = np.maximum(lowest_of(np.maximum(np.where(push > PUSH, rise / RISE, 0.0), push / ALONE), TIMES), 0.0)
    at = int(np.argmax(strength))
    coefficient = float(bonus.values[at])
    smaller = coefficient / max(2.0, 10 * push[at] / PUSH)
    summary = "The loss pays nothing for entropy."
    if coefficient > 0:
        summary = (
            f"The loss pays {coefficient:.3g} per nat; entropy stands {math.expm1(rise[at]):+.0%} above its lowest."
        )
    return graded(
        Finding(
            "entropy_bonus",
            "ok",
            summary,
            (
                Evidence("bonus", coefficient, "loss per nat and token", f"step {bonus.steps[at]}", "learning"),
                Evidence("push", float(push[at]), "of the mean advantage", f"step {bonus.steps[at]}"),
                Evidence("entropy", float(entropy[at]), "nats per token", f"step {bonus.steps[at]}", "entropy"),
            ),
            onset=first_where(bonus, strength >= 1),
            mechanism="Every token is paid for being unsure, whatever the prompt, so the policy becomes noise.",
            refuted_by="entropy goes on rising in a short fork without the bonus",
            remedies=(
                Remedy(
                    ("policy.entropy_bonus=0",), "only score and KL decide", "entropy may fall as the policy learns"
                ),
                Remedy(
                    (f"policy.entropy_bonus={smaller:.1g}",),
                    "a push below 1% of the advantages",
                    "entropy falls a little",
                ),
            ),
        ),
        float(min(CAP, strength[at])),
    )


def _rise(entropy: Array) -> Array:
    """Log of the entropy, median of the last entries, over the smallest such median so far."""
    level = np.array([np.median(entropy[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(entropy))])
    level = np.log(np.maximum(level, SMALL))
    return np.asarray(level - np.minimum.accumulate(level))


CHECK = Check(
    "entropy_bonus",
    "an entropy bonus drives to noise",
    Kind.CAUSE,
    ("M24",),
    judge,
    facts,
    needs=("entropy", "advantage"),
    validated=True,
)
