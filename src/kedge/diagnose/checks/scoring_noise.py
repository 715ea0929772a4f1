"""Training gives the same tokens other probabilities than scoring did, before anything was learnt.

**What.** In the first minibatch of a step, before its optimiser step, the ratio π_new/π_old is not 1; or, at the
run's first step, policy and reference differ though both are the same weights.

**Why it matters.** The ratio is the surrogate's importance weight, so noise in it clips tokens at random and biases
the gradient; the KL gets a floor that no policy can get below and that β is then paid for. Dropout left on in one of
the passes, another kernel or precision, and a batch-dependent layer all do this.

**How.** The mean |π_new/π_old − 1| of the first minibatch, as the run logged it: fails above 0.02 on two steps in a
row, warns above 0.014. Float32 stays below 1e-5, bfloat16 near 0.01. The floor: mean |log π − log π_ref| over the
tokens of the run's first step, where the KL to the model that the policy began as is logged and is not 0 either;
fails above 0.02 nats per token.

**False alarms.** Bfloat16 with different kernels in the two passes comes near the threshold.

**Remedy.** Evaluation mode and the same precision in every pass; old log-probabilities from the trainer, not from the
sampler; truncated importance weights where that cannot be had.

**References.** First-minibatch assertion; reports on mismatch of sampler and trainer in verl.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import log_ratio
from kedge.diagnose.steps import first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

RATIO = 0.02
FLOOR = 0.02  # nats per token
TIMES = 2
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """How far policy and reference are apart on a token."""
    mask = step.response_mask
    return {"scoring_noise/distance": float(np.abs(log_ratio(step)[mask]).mean()) if mask.any() else np.nan}


def judge(view: View) -> Finding:
    """The worse of the first minibatch's ratio and the floor of the KL."""
    error = view.metric("policy/first_ratio_error")
    distance, original = view.fact("scoring_noise/distance"), view.metric("kl/original_per_sequence")
    known = distance is not None and original is not None and distance.steps[0] == original.steps[0] == 0
    if (error is None or len(error.values) < TIMES) and not known:
        return not_checked("scoring_noise", "neither the first minibatch's ratio nor the first step's KL is logged")
    ratio, onset = 0.0, None
    if error is not None and len(error.values) >= TIMES:
        lasted = lowest_of(error.values, TIMES)
        ratio, onset = float(lasted.max()), first_where(error, lasted >= RATIO)
    # A reference that is another model has a distance, and the KL to the start is 0 all the same.
    floor = 0.0
    if known and distance is not None and original is not None and abs(float(original.values[0])) > 1e-6:
        floor = float(distance.values[0])
    if floor >= FLOOR:
        onset = 0
    return graded(
        Finding(
            "scoring_noise",
            "ok",
            f"Before its first step an update finds ratios that are {ratio:.2g} from 1 on average.",
            (
                Evidence("first ratio error", ratio, "1", "largest that lasted", "policy/first_ratio_error"),
                Evidence("floor", floor, "nats per token", "policy against its own start, first step", "old_logprob"),
            ),
            onset=onset,
            mechanism="Ratios that are noise clip tokens at random, and the penalty is paid for a KL that is no KL.",
            refuted_by="the first minibatch's ratio is 1 with dropout off and one precision throughout",
            remedies=(
                Remedy((), "scoring in evaluation mode makes the ratio 1 at the start of every update", "none"),
                Remedy(("policy.importance_cap=2",), "truncated weights bound what the mismatch does", "bias"),
            ),
        ),
        min(CAP, max(ratio / RATIO, floor / FLOOR)),
    )


CHECK = Check(
    "scoring_noise",
    "scoring and training disagree",
    Kind.INTEGRITY,
    ("M20",),
    judge,
    facts,
    needs=("old_logprob", "reference_logprob"),
)
