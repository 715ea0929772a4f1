"""Divergence is spent on something else than score: efficiency far below the frontier.

**What.** The policy has left the reference by so many nats, and its score has risen by much less than choosing among
the reference's own answers would have gained for them.

**Why it matters.** Every nat of KL is a risk: the reward model was trained on answers like the reference's. A policy
that has spent them on noise has the risk without the score. Steps that are too large, a critic that adds noise, stale
answers and rewards that vary for no reason all look like this, while KL alone looks like success.

**How.** Efficiency is the evaluation score above that of the reference's answers to the same prompts, over σ √(2 KL),
all of one evaluation. σ is the standard deviation of the reference's scores within a prompt, and σ √(2 KL) is the
gain of the best policy at that KL if these scores are normal: tilting a normal distribution by e^(r/β) moves its mean
by σ²/β and costs σ²/(2β²) nats. It fails below 0.3, on two evaluations in a row with at least 0.5 nats, where
efficiency does not rise. Four evaluations after a change of what scores the answers do not count: the policy has not
had time to follow. PPO on small tasks reaches 0.5 to 1, less the further it goes.

**False alarms.** The frontier is that of normal scores. Where the reference's best answers are only a little better
than its usual ones (a score that is bounded above), no policy comes near it, and efficiency falls as KL grows.

**Remedy.** Smaller steps, larger batches, λ nearer to 1, several responses per prompt, or stopping earlier.

**References.** Gao et al. 2023 (score against √KL); the tilt of a normal distribution is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.compare import gaussian_efficiency
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import View

Array = NDArray[Any]
EFFICIENCY = 0.3
SPENT = 0.5  # nats per response
TIMES = 2  # evaluations in a row
RISING = 0.05  # of the frontier, from one evaluation to the next
SETTLING = 4  # evaluations after the reward model has changed
AT_MOST = 2.0  # strength: it says what has come of a run, and another check what brought it there
_REFERENCE = "evaluation/score_reference"


def judge(view: View) -> Finding:
    """The frontier's efficiency over the run's own, at its worst that lasted."""
    score, kl = (view.metric(f"evaluation/{name}", "evaluation") for name in ("score", "kl_per_sequence"))
    within = view.metric("evaluation/score_reference_within", "evaluation")
    if score is None or kl is None or within is None or view.metric(_REFERENCE, "evaluation") is None:
        return not_checked("wasted_kl", "evaluations lack the score, the KL or the spread of the reference's scores")
    efficiency, gain = efficiencies(view)
    spent = aligned(kl, score.steps)
    counts = (spent >= SPENT) & np.isfinite(efficiency) & ~_catching_up(view, efficiency)
    if counts.sum() < TIMES:
        return not_checked("wasted_kl", f"fewer than {TIMES} evaluations at {SPENT} nats or more")
    # A score that has fallen has an efficiency below 0; as a ratio it is as bad as next to none.
    ratio = np.where(counts, EFFICIENCY / np.maximum(efficiency, EFFICIENCY / AT_MOST), 0.0)
    lasted = np.maximum(lowest_of(ratio, TIMES), 0.0)
    at = int(np.argmax(lasted))
    return graded(
        Finding(
            "wasted_kl",
            "ok",
            f"{spent[at]:.3g} nats bought {gain[at]:.2g} of score, {efficiency[at]:.0%} of what they could.",
            (
                Evidence("efficiency", float(efficiency[at]), "of the frontier", f"step {score.steps[at]}"),
                Evidence("gain in score", float(gain[at]), "normalised score", "above the reference's answers"),
                Evidence(
                    "KL to the reference", float(spent[at]), "nats per response", "", "evaluation/kl_per_sequence"
                ),
                Evidence(
                    "spread within a prompt",
                    float(within.values[-1]),
                    "normalised score",
                    "of the reference's answers",
                    "evaluation/score_reference_within",
                ),
            ),
            onset=first_where(score, lasted >= 1),
            mechanism="The update moves the policy in directions that the score does not reward: noise costs KL, too.",
            refuted_by="the best of n reference answers, at the same KL, gain no more score than the policy has",
            remedies=_remedies(view),
        ),
        float(lasted[at]),
    )


def _catching_up(view: View, efficiency: Array) -> NDArray[np.bool_]:
    """Evaluations at which efficiency rose clearly, or came soon after a change of what scores the answers."""
    reference = view.metric(_REFERENCE, "evaluation")
    assert reference is not None
    rising = np.concatenate([[False], np.diff(np.nan_to_num(efficiency)) > RISING])
    score = view.metric("evaluation/score", "evaluation")
    assert score is not None
    other = np.concatenate([[False], np.abs(np.diff(aligned(reference, score.steps))) > 1e-6])
    recent = np.convolve(other, np.ones(SETTLING))[: len(other)] > 0
    return np.asarray(rising | recent)


def efficiencies(view: View) -> tuple[Array, Array]:
    """At each evaluation: gain over sigma sqrt(2 KL), nan where no KL has been spent; and the gain."""
    score, kl = (view.metric(f"evaluation/{name}", "evaluation") for name in ("score", "kl_per_sequence"))
    within = view.metric("evaluation/score_reference_within", "evaluation")
    reference = view.metric(_REFERENCE, "evaluation")
    assert score is not None and kl is not None and within is not None and reference is not None
    # Reference answers are scored by whatever scores the policy's, so a change of the reward model cancels.
    gain = score.values - aligned(reference, score.steps)
    spent, sigma = aligned(kl, score.steps), aligned(within, score.steps)
    numbers = zip(gain, spent, sigma, strict=True)
    return np.array([gaussian_efficiency(float(g), float(k), float(w)) for g, k, w in numbers]), gain


def _remedies(view: View) -> tuple[Remedy, ...]:
    lr = view.settings.get("policy", {}).get("lr")
    lower = (f"policy.lr={float(lr) / 3:.1g}",) if lr is not None else ()
    return (
        Remedy(lower, "smaller steps spend less KL on the noise of a batch", "more steps for the same score"),
        Remedy(
            ("policy.lam=1", "policy.prompts_per_step=192"),
            "every token gets the whole score, averaged over twice the answers",
            "twice the sampling in each step",
        ),
    )


CHECK = Check("wasted_kl", "divergence that buys no score", Kind.CAUSE, ("M11", "M5"), judge, needs=("evaluations",))
