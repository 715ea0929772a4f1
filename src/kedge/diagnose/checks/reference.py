"""The reference moved, or is not the model that the policy began as.

**What.** Log-probabilities under the reference are those of another model than before: of the policy itself, of an
average of its past, or of a folder that is not the start.

**Why it matters.** KL is measured from the reference. Each time it moves to the policy the penalty starts again at 0,
and the sum of what was allowed is not bounded by anything. The logged KL then looks best where the policy is
furthest.

**How.** KL to the reference and KL to the model that the policy began as are taken over the same responses, so their
difference is 0 to the last digit as long as both are one model; it fails at 0.5 nats per response that came up within
the run, and warns where it was there from the first step. Where only the reference is logged: mean |log π − log
π_ref| over tokens falls below a tenth of what it was three steps before and below 1e-3 nats, which happens to the bit
where the reference has just become the policy.

**False alarms.** A reference that moves on purpose (`policy.reference_every`) is found, with what it costs. A policy
that was put back to its start, by a guard or by a rollback, also agrees with the reference; then both KLs are 0.

**Remedy.** Keep the reference at the start; log both KLs.

**References.** Step-0 assertion max |log π − log π_ref| < 1e-3 in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import log_ratio
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
APART = 0.5  # nats per response
BEGAN = 1e-3  # nats per response at the first step: rounding is below
AGREE = 1e-3  # nats per token
FELL = 0.1  # of the distance three steps before
BACK = 3  # steps
TIMES = 2  # steps in a row
EXACT = 2.0  # strength of policy and reference agreeing to the bit, however little was forgotten
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """How far policy and reference are apart."""
    k, mask = log_ratio(step), step.response_mask
    return {
        "reference/kl": float(k.sum(axis=1).mean()),
        "reference/distance": float(np.abs(k[mask]).mean()) if mask.any() else np.nan,
    }


def judge(view: View) -> Finding:
    """The gap between the two KLs where both are logged, else the fall of the distance."""
    distance = view.fact("reference/distance")
    original = view.metric("kl/original_per_sequence")
    measured = view.fact("reference/kl")
    if distance is None or measured is None or len(distance.steps) < BACK + 1:
        return not_checked("reference", f"fewer than {BACK + 1} steps hold log-probabilities of policy and reference")
    fallen = _by_fall(distance, measured)
    if original is None or not np.isin(original.steps, measured.steps).any():
        return fallen
    start = aligned(original, measured.steps)
    gap = Series(measured.steps, np.nan_to_num(np.abs(start - measured.values)))
    apart = _by_gap(gap, start, measured)
    # Who measures the second KL from the first one's reference sees no gap, so a fall to 0 counts beside it.
    return fallen if fallen.strength > apart.strength and not _put_back(gap, start) else apart


def _put_back(gap: Series, start: Array) -> bool:
    """Both KLs are known apart at some step, so a fall of both is the policy's, not the reference's."""
    return bool((gap.values > BEGAN).any()) and bool((start > 0).any())


def _by_gap(gap: Series, start: Array, measured: Series) -> Finding:
    lasted = lowest_of(gap.values, TIMES)
    at, elsewhere = int(np.argmax(lasted)), bool(gap.values[0] > BEGAN)
    strength = float(min(CAP, max(0.0, lasted[at]) / APART))
    if elsewhere:
        # It was another model from the first step on; what it moved since is what counts.
        since = lowest_of(np.abs(gap.values - gap.values[0]), TIMES)
        strength = min(0.9, max(0.7, strength)) if strength >= 0.7 else strength
        moved = float(since.max()) / APART
        strength = max(strength, 0.0 if moved < 1 else 0.9)
    came = "was another model than the start from the first step on" if elsewhere else "moved within the run"
    said = f"KL is {measured.values[at]:.3g} nats from the reference and {start[at]:.3g} from the model it began as"
    summary = f"The reference {came}: {said}." if strength >= 0.7 else "The reference is the model the policy began as."
    moved_at = first_where(gap, lowest_of(gap.values, TIMES) >= APART)
    return graded(
        Finding(
            "reference",
            "ok",
            summary,
            (
                Evidence(
                    "KL to the reference", float(measured.values[at]), "nats per response", f"step {gap.steps[at]}"
                ),
                Evidence(
                    "KL to the start",
                    float(start[at]),
                    "nats per response",
                    f"step {gap.steps[at]}",
                    "kl/original_per_sequence",
                ),
            ),
            onset=None if elsewhere else moved_at,
            mechanism=_MECHANISM,
            refuted_by="both KLs agree when the start's log-probabilities are computed again",
            remedies=_REMEDIES,
        ),
        strength,
    )


def _by_fall(distance: Series, measured: Series) -> Finding:
    values = distance.values
    earlier = np.concatenate([np.full(BACK, np.nan), values[:-BACK]])
    with np.errstate(invalid="ignore"):
        fell = (values < AGREE) & (values < FELL * earlier) & (earlier > AGREE)
    onset = first_where(distance, fell)
    # The size of the deviation is the KL that was forgotten.
    at = int(np.argmax(fell))
    forgotten = float(measured.values[max(0, at - BACK) : at].max(initial=0.0)) if onset is not None else 0.0
    strength = float(min(CAP, max(EXACT, forgotten / APART))) if onset is not None else 0.0
    summary = "The distance from the reference shows no fall to 0."
    if onset is not None:
        summary = f"Policy and reference agree at step {onset}, after {forgotten:.3g} nats per response between them."
    return graded(
        Finding(
            "reference",
            "ok",
            summary,
            (
                Evidence("smallest distance", float(values[BACK:].min()), "nats per token", "after the first steps"),
                Evidence("KL to the reference", float(measured.values[-1]), "nats per response", "last step"),
            ),
            onset=onset,
            mechanism=_MECHANISM,
            refuted_by="the policy's weights went back to the start at that step",
            remedies=_REMEDIES,
        ),
        strength,
    )


_MECHANISM = "The penalty measures the way from where the reference is now, so what came before costs nothing any more."
_REMEDIES = (
    Remedy(
        ("policy.reference_every=0", 'policy.reference="sft"'),
        "KL is measured from the start throughout, so beta times KL bounds the way",
        "the policy stays closer to the start and the score rises less",
    ),
    Remedy(
        ("policy.kl.limit=6",),
        "no update is kept beyond that many nats from the reference",
        "bounds each stretch and not their sum, as long as the reference moves",
    ),
)

CHECK = Check(
    "reference",
    "the reference moved or is not the start",
    Kind.INTEGRITY,
    ("M18",),
    judge,
    facts,
    needs=("old_logprob", "reference_logprob"),
    validated=True,
)
