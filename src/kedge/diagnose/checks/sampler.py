"""Responses were drawn from another distribution than the one that training takes them for.

**What.** Log-probabilities of the tokens when they were sampled differ from those of the policy that is trained on
them; or the tokens themselves are not what that policy would have drawn.

**Why it matters.** The mean of log π − log π_ref over samples of q is KL(q‖π_ref) − KL(q‖π): the penalty then holds
another policy than the one that learns, and the mean can be negative. Tokens that top-p or top-k never draws get no
gradient, and stale weights give old answers the credit of new ones.

**How.** Two numbers. The gap is the mean over a step's tokens of |log q − log π_old|, in nats; it fails where it
passes 0.02 on three steps in a row, or ten times the run's own median before, if that is less, and 0.002 at least.
Float32 rounding stays below 1e-5, and bfloat16 with another kernel near 0.005. The surprise is the mean of −log π_old
of the drawn tokens minus the entropy of π_old before each: for tokens drawn from π_old its expectation is exactly 0,
whatever the policy, so it needs no log q. It is pooled over five steps and fails where it is more than 0.02 nats from
0 by six standard errors, responses taken as independent.

**False alarms.** A correction by importance weights (`policy.importance_cap`) makes a small gap harmless; a quantised
sampler has a gap that does not grow. Duplicate responses in a step make the standard error too small.

**Remedy.** Score with the temperature and truncation that sampled; send new weights to the sampler before every step;
weigh by truncated importance weights.

**References.** Schulman et al. 2017, section 3; reference-free identity E_q[log π/π_ref] = KL(q‖π_ref) − KL(q‖π);
−log π − H is a martingale difference under π.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import aligned, before, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
GAP = 0.02  # nats per token
TIMES = 3  # steps in a row
OWN, LEAST = 10.0, 0.002  # times the run's own gap before, and nats per token
POOLED = 5  # steps
ERRORS = 6.0  # standard errors
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The gap between the sampler and the policy before the update, and how surprised that policy is by the tokens."""
    mask = step.response_mask
    if not mask.any():
        return {}
    old = step.tokens["old_logprob"].astype(np.float64)
    gap = np.abs(step.tokens["behaviour_logprob"] - old)[mask]
    found = {"sampler/gap": float(gap.mean()), "sampler/tokens": float(mask.sum())}
    entropy = step.tokens["entropy"]
    if not entropy[mask].any():  # not recorded
        return found
    sums = np.where(mask, -old - entropy, 0.0).sum(axis=1)
    mean = sums.sum() / mask.sum()
    error = math.sqrt(float(((sums - mean * step.lengths) ** 2).sum())) / float(mask.sum())
    return found | {"sampler/surprise": float(mean), "sampler/surprise_error": error}


def judge(view: View) -> Finding:
    """The largest gap that lasted and the largest surprise of five steps together."""
    gap = view.fact("sampler/gap")
    if gap is None or len(gap.values) < TIMES:
        return not_checked("sampler", f"fewer than {TIMES} steps hold the sampler's log-probabilities")
    own = before(gap.values, window=len(gap.values), least=TIMES, lag=TIMES - 1).median
    # The smallest level so far: what has lasted must not become the baseline that excuses it.
    own = np.fmin.accumulate(own)
    limit = np.where(np.isfinite(own), np.clip(OWN * np.nan_to_num(own), LEAST, GAP), GAP)
    lasted = lowest_of(gap.values / limit, TIMES)
    mean, error = _pooled(view, gap)
    odd = np.where(np.abs(mean) > ERRORS * error, np.abs(mean), 0.0)
    strength = np.maximum(lasted, odd / GAP)
    at = int(np.argmax(strength))
    largest = float(lowest_of(gap.values, TIMES).max())
    finding = Finding(
        "sampler",
        "ok",
        _words(largest, float(mean[at]), odd=bool(odd[at] >= GAP)),
        evidence=(
            Evidence("gap", largest, "nats per token", f"largest that lasted {TIMES} steps", "behaviour_logprob"),
            Evidence(
                "surprise",
                float(mean[at]),
                "nats per token",
                f"± {error[at]:.2g}, {POOLED} steps up to {gap.steps[at]}",
                "old_logprob, entropy",
            ),
        ),
        onset=first_where(gap, strength >= 1),
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
    return graded(finding, float(min(CAP, strength[at])))


def _pooled(view: View, gap: Series) -> tuple[Array, Array]:
    """The surprise over the last steps up to each, weighted by tokens, and its standard error; 0 where unknown."""
    tokens, mean, error = (
        aligned(view.facts.get(f"sampler/{name}"), gap.steps) for name in ("tokens", "surprise", "surprise_error")
    )
    known = np.isfinite(mean) & np.isfinite(error)
    weight = np.where(known, tokens, 0.0)
    total = np.convolve(weight, np.ones(POOLED))[: len(weight)]
    sums = np.convolve(weight * np.nan_to_num(mean), np.ones(POOLED))[: len(weight)]
    squares = np.convolve((weight * np.nan_to_num(error)) ** 2, np.ones(POOLED))[: len(weight)]
    enough = np.convolve(known, np.ones(POOLED))[: len(weight)] >= TIMES
    total = np.where(enough & (total > 0), total, np.inf)
    return np.asarray(sums / total), np.asarray(np.sqrt(squares) / total)


def _words(gap: float, surprise: float, *, odd: bool) -> str:
    said = f"Sampler and learner differ by {gap:.2g} nats per token."
    if not odd:
        return said
    likely = "likelier" if surprise < 0 else "less likely"
    return f"{said} The tokens are {abs(surprise):.2g} nats {likely} under the learner than its own draws would be."


CHECK = Check(
    "sampler",
    "sampler and learner differ",
    Kind.INTEGRITY,
    ("M4",),
    judge,
    facts,
    needs=("behaviour_logprob", "old_logprob"),
    validated=True,
)
