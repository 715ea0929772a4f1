"""What counts as KL is not an estimate whose gradient holds the policy, or counts nowhere.

**What.** The `kl` channel of the reward holds something else than log π − log π_ref; or the KL in the loss is
estimated by something without the KL's gradient; or the KL has weight neither in the reward nor in the loss.

**Why it matters.** In the reward only k1 = log π − log π_ref has the gradient of the KL. k2, k3 and |k| there also
charge a token for having become less likely, and nothing pulls the policy back: from a perturbed policy and no score
at all, KL falls to 0 under k1 and grows without bound under k3. In the loss k1 has no gradient on average. The logged
KL looks fine in each of these cases.

**How.** On each step the `kl` channel is set beside k1, k2, k3 and |k| of the logged log-probabilities. Its mean
distance from k1, over the mean |k1|, is 0 to rounding where it is k1, token by token or summed up per response; it
fails above 0.1 on three steps in a row. Steps at which policy and reference still agree (mean |k1| below 0.001 nats)
say nothing. The estimator in the loss is what the optimiser was told: k1 fails, k3 warns; k3 times the ratio (`k3+`)
has the KL's gradient token by token and is sound. A KL that counts nowhere is a warning, since many choose it, and
fails where KL per response passes 20 nats. Both fail in a run that had begun with a sound estimator.

**False alarms.** k3 in the loss is common and is reported as a warning only: it holds the policy by another
divergence, KL(π_ref‖π). A constant added to the channel is not this check's matter, see token_constant.

**Remedy.** k1 in the reward; in the loss k2 of the whole response, or the exact KL of each next token.

**References.** Schulman 2020, "Approximating KL divergence"; Tang and Munos 2025, arXiv 2506.09477; Liu et al. 2025,
arXiv 2510.01555.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, channel, log_ratio, weight
from kedge.diagnose.steps import aligned, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[np.float64]
APART = 0.1  # mean distance from k1 over mean |k1|
TIMES = 3  # steps in a row
SPOKEN = 1e-3  # mean |k1| in nats per token from which a step says anything
AWAY = 20.0  # nats per response: KL that ran away
CAP = 10.0
IN_LOSS = ("none", "k1", "k2", "k3", "full", "k3+")
FORCE = {"k1": 5.0, "k3": 0.8}  # strength of a wrong estimator in the loss
CHANGED = {"loss k3": 2.0, "nowhere": 3.0}  # the same where the run had begun with a right one
_FACTS = ("size", "kl", "weight", "loss_beta", "loss", "k1", "k2", "k3", "abs")
_LARGEST = 50.0  # exponent; beyond it k3 is large enough


def facts(step: StepTrace) -> Facts:
    """Distances of the kl channel from each estimator, and where the KL counts."""
    k = log_ratio(step)
    mask, size = step.response_mask, float(np.abs(k[step.response_mask]).mean()) if step.response_mask.any() else np.nan
    found = {"kl_estimator/size": size, "kl_estimator/kl": float(k.sum(axis=1).mean())}
    found["kl_estimator/loss_beta"] = float(np.nanmean(step.loss_beta)) if np.isfinite(step.loss_beta).any() else np.nan
    name = step.learning.get("kl_loss", "none") or "none"
    found["kl_estimator/loss"] = IN_LOSS.index(name) if step.learning and name in IN_LOSS else np.nan
    paid, weights = channel(step, "kl"), weight(step, "kl")
    found["kl_estimator/weight"] = 0.0 if weights is None else float(weights.mean())
    if paid is not None and size > SPOKEN:
        found |= {f"kl_estimator/{one}": gap for one, gap in _distances(paid, k, mask).items()}
    return found


def _distances(paid: Array, k: Array, mask: NDArray[np.bool_]) -> dict[str, float]:
    """Mean distance of the channel from each estimator, over that estimator's mean size; a constant is left out."""
    guesses = {
        "k1": k,
        "k2": k**2 / 2,
        "k3": np.expm1(np.minimum(-k, _LARGEST)) + k,
        "abs": np.abs(k),
    }
    found = {}
    for name, guess in guesses.items():
        gap = (paid - guess)[mask]
        gap = gap - np.median(gap)
        found[name] = float(np.abs(gap).mean() / (np.abs(guess[mask]).mean() + SMALL))
    sums = np.abs((paid * mask).sum(axis=1) - k.sum(axis=1)).mean() / (np.abs(k.sum(axis=1)).mean() + SMALL)
    return found | {"k1": min(found["k1"], float(sums))}


class _State(NamedTuple):
    """How strong the case is at a step, and what it is: an estimator in the reward or the loss, or nowhere."""

    strength: float
    case: str


def judge(view: View) -> Finding:
    """The worst state that lasted."""
    weights = view.fact("kl_estimator/weight")
    if weights is None or view.fact("kl_estimator/size") is None:
        return not_checked("kl_estimator", "no step holds log-probabilities of policy and reference")
    column = {name: aligned(view.facts.get(f"kl_estimator/{name}"), weights.steps) for name in _FACTS}
    states = [_at({name: float(values[i]) for name, values in column.items()}) for i in range(len(weights.steps))]
    known = [(int(step), state) for step, state in zip(weights.steps, states, strict=True) if state is not None]
    if len(known) < TIMES:
        return not_checked("kl_estimator", f"fewer than {TIMES} steps in which the policy differs from its reference")
    series = Series(np.array([step for step, _ in known]), np.array([state.strength for _, state in known]))
    sound = np.maximum.accumulate([state.case == "k1" for _, state in known])
    worse = [CHANGED.get(state.case, 0.0) if sound[i] else 0.0 for i, (_, state) in enumerate(known)]
    series = Series(series.steps, np.maximum(series.values, worse))
    lasted = lowest_of(series.values, TIMES)
    at = int(np.argmax(lasted))
    strength, case = float(lasted[at]), known[at][1].case
    failing = lasted >= 1
    onset = int(series.steps[int(np.argmax(failing))]) if failing.any() else None
    gap = view.fact("kl_estimator/k1")
    evidence = [
        Evidence("weight of the kl channel", float(weights.values[-1]), "reward per nat", "last step", "weight.kl"),
        Evidence("KL to the reference", _last(view, "kl_estimator/kl"), "nats per response", "last step"),
    ]
    if gap is not None:
        note = "mean distance over mean |k1|, largest"
        evidence.insert(0, Evidence("kl channel against k1", float(gap.values.max()), "1", note, "reward.kl"))
    finding = Finding(
        "kl_estimator",
        "ok",
        _WORDS[case],
        tuple(evidence),
        onset=onset,
        mechanism=_MECHANISMS[case],
        refuted_by="KL falls back towards 0 in a short fork with a score of 0 and the same settings",
        remedies=() if case == "k1" else _REMEDIES,
    )
    return graded(finding, strength)


def _at(fact: Mapping[str, float]) -> _State | None:
    """The state of one step from its facts; None where it says nothing."""
    in_reward, loss_beta, loss = fact["weight"], fact["loss_beta"], fact["loss"]
    if abs(in_reward) > SMALL:
        return _in_reward(fact)
    if np.isnan(loss_beta) and np.isnan(loss):
        return None if np.isnan(fact["size"]) else _nowhere(fact["kl"])
    if not loss_beta > SMALL:
        return _nowhere(fact["kl"])
    estimator = "none" if np.isnan(loss) else IN_LOSS[int(loss)]
    return _State(FORCE.get(estimator, 0.0), f"loss {estimator}" if estimator in FORCE else "k1")


def _in_reward(fact: Mapping[str, float]) -> _State | None:
    gaps = {name: fact[name] for name in ("k1", "k2", "k3", "abs")}
    if np.isnan(gaps["k1"]):
        return None
    if fact["weight"] > 0:
        return _State(CAP / 2, "sign")
    if gaps["k1"] < APART:
        return _State(gaps["k1"] / APART, "k1")
    nearest = min(gaps, key=lambda name: gaps[name])
    return _State(min(CAP, gaps["k1"] / APART), nearest if gaps[nearest] < APART else "unknown")


def _nowhere(kl: float) -> _State:
    return _State(max(0.7, min(CAP, kl / AWAY)), "nowhere")


def _last(view: View, name: str) -> float:
    series = view.fact(name)
    return float(series.values[-1]) if series is not None else np.nan


_WORDS = {
    "k1": "The KL that counts is an estimate with the KL's gradient.",
    "k2": "The kl channel of the reward holds k2, half the squared log-ratio, which does not hold the policy.",
    "k3": "The kl channel of the reward holds k3, which does not hold the policy.",
    "abs": "The kl channel of the reward holds the absolute log-ratio, which does not hold the policy.",
    "unknown": "The kl channel of the reward is not log policy - log reference, nor another known estimate of it.",
    "sign": "The weight of the kl channel is positive: divergence is paid for.",
    "loss k1": "The KL in the loss is estimated by k1, whose gradient is 0 on average: nothing holds the policy.",
    "loss k3": "The KL in the loss is estimated by k3: it holds the policy by another divergence, weakly far away.",
    "nowhere": "The KL counts neither in the reward nor in the loss.",
}
_NO_FORCE = "A token that became less likely is charged as one that became likelier, so the policy is not pulled back."
_MECHANISMS = {
    "k1": "",
    "k2": _NO_FORCE,
    "k3": _NO_FORCE,
    "abs": _NO_FORCE,
    "unknown": "What is subtracted from the score is not the divergence that is logged.",
    "sign": "Leaving the reference raises the reward.",
    "loss k1": "The gradient of k1 on the policy's own samples is noise around 0, whatever its coefficient.",
    "loss k3": "Its coefficient 1 - exp(-k) never passes 1, however likely a token has become.",
    "nowhere": "Only the score and the number of steps decide how far the policy goes.",
}
_REMEDIES = (
    Remedy(
        ('policy.kl.place="reward"', 'policy.kl.estimator="k1"'),
        "the penalty's expected gradient is that of the KL",
        "more variance than k3; the KL settles lower, so the score rises less",
    ),
    Remedy(
        ('policy.kl.place="loss"', 'policy.kl.estimator="full"'),
        "the exact KL of each next token with that of the tokens after it",
        "a forward pass of the reference in every epoch",
    ),
)

CHECK = Check(
    "kl_estimator",
    "the KL that counts is not the KL",
    Kind.INTEGRITY,
    ("M13",),
    judge,
    facts,
    needs=("old_logprob", "reference_logprob", "beta"),
    validated=True,
)
