"""The KL coefficient fell, or is too small to hold the policy.

**What.** β, the reward that a nat of divergence costs, dropped within the run; or it has been so small from the start
that the KL grows and costs next to nothing of what the score gains.

**Why it matters.** A response is favoured over another until their log-odds have moved by Δscore/β nats. β divided by
ten is a policy that may go ten times as far. The first thing to see is not the KL, which follows over the next steps,
but the coefficient.

**How.** β of a step is minus the weight of the kl channel, or the coefficient of the KL in the loss in units of the
reward. Falling: it is less than 0.7 of what it was a step before, which controllers do not do; the drop counts as
long as it stands, two steps at least, and fails at a half. Too small: KL per response passes 12 nats and still grows,
and β times KL is less than a quarter of what the score has gained since the start, on three steps in a row; for a
normal score the optimum of the penalised objective pays half.

**False alarms.** Controllers move β by little in each step: what they do in many steps is not seen here, see
controller. Somebody may lower β on purpose: that is what is reported then.

**Remedy.** Put β back. The remedy names the β in force before the drop, or the one at which the KL reached would cost
half of the gain.

**References.** log-odds identity: logit p* = logit p₀ + Δr/β; Ziegler et al. 2019; Stiennon et al. 2020.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, beta_of, log_ratio, paid
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
HALF = math.log(2)
JUMP = 0.7  # of the coefficient one step earlier: a fall beyond what controllers do in a step
WINDOW = 10  # steps
LEAST = 3  # steps before a drop
TIMES = 2  # steps a drop has to last
FAR = 12.0  # nats per response
SPENT = 0.25  # of the gain in score
ZERO = 1e-3  # of the earlier coefficient: as good as none
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The coefficient, the KL of a response, and what a response was paid besides."""
    return {
        "beta/coefficient": beta_of(step),
        "beta/kl": float(log_ratio(step).sum(axis=1).mean()),
        "beta/reward": float(paid(step).mean()),
    }


def judge(view: View) -> Finding:
    """The stronger of a drop and of a coefficient that was too small all along."""
    beta = view.fact("beta/coefficient")
    if beta is None or len(beta.steps) < LEAST + TIMES:
        return not_checked("beta", f"fewer than {LEAST + TIMES} steps tell the KL coefficient")
    kl, reward = (aligned(view.facts.get(f"beta/{name}"), beta.steps) for name in ("kl", "reward"))
    drop, earlier = _drop(beta.values)
    weak, enough = _weak(beta.values, kl, reward)
    strength = np.minimum(CAP, np.maximum(drop, weak))
    at = int(np.argmax(strength))
    dropped = drop[at] >= weak[at]
    right = float(earlier[at]) if dropped else enough
    summary = (
        f"Beta is {beta.values[-1]:.3g} reward per nat; KL costs {beta.values[-1] * kl[-1]:.3g} reward a response."
    )
    if strength[at] >= HALF:
        summary = (
            f"Beta fell from {right:.3g} to {beta.values[at]:.3g} reward per nat."
            if dropped
            else f"KL has grown to {kl[at]:.3g} nats per response and costs {beta.values[at] * kl[at]:.2g} reward."
        )
    finding = Finding(
        "beta",
        "ok",
        summary,
        (
            Evidence("beta", float(beta.values[at]), "reward per nat", f"step {beta.steps[at]}", "weight.kl"),
            Evidence("beta before", float(earlier[at]), "reward per nat", "before it fell", "weight.kl"),
            Evidence("KL to the reference", float(kl[at]), "nats per response", f"step {beta.steps[at]}"),
            Evidence("KL to the reference, last", float(kl[-1]), "nats per response", f"step {beta.steps[-1]}"),
        ),
        onset=first_where(beta, strength >= 1),
        mechanism="An answer is favoured until its log-odds have moved by its margin in score over beta; a lower beta "
        "lets every difference in score move the policy further.",
        refuted_by="KL and length stay where they were in a short fork with the earlier beta",
        remedies=(
            Remedy(
                (f"policy.kl.beta={right:.2g}",),
                f"a nat costs {right:.2g} reward instead of {beta.values[-1]:.2g}",
                "every departure from the reference costs more, good ones too",
            ),
            Remedy(
                ('policy.kl.mode="lagrangian"', f"policy.kl.target={max(0.5, _before_drop(kl, at)):.2g}"),
                "beta moves until KL is at what it was",
                "beta follows with a lag of some ten steps",
            ),
        ),
    )
    return graded(finding, float(strength[at]))


def _drop(beta: Array) -> tuple[Array, Array]:
    """How far each coefficient lies below that from which it fell in one step, 1 at a half; and that coefficient.

    A fall counts as long as it stands; one that takes many small steps is a controller's.
    """
    size = np.abs(beta)
    fall, level, standing = np.zeros(len(size)), np.zeros(len(size)), 0.0
    for index in range(1, len(size)):
        old, new = float(size[index - 1]), float(size[index])
        if not standing and new < JUMP * old and index >= LEAST:
            standing = old
        elif standing and new >= JUMP * standing:
            standing = 0.0
        level[index] = standing
        if standing > SMALL:
            fall[index] = math.log(standing / max(new, ZERO * standing))
    return np.maximum(lowest_of(fall, TIMES), 0.0) / HALF, np.where(level > 0, level, size)


def _weak(beta: Array, kl: Array, reward: Array) -> tuple[Array, float]:
    """1 where KL has run away while it costs too little; and the coefficient at which it would have cost half."""
    if not np.isfinite(kl).all() or not np.isfinite(reward).all():
        return np.zeros(len(beta)), float(beta[-1])
    start = float(reward[:LEAST].mean())
    gain = np.maximum(_smooth(reward) - start, SMALL)
    smooth = _smooth(kl)
    share = np.abs(beta) * smooth / gain
    growing = smooth >= 0.9 * np.maximum.accumulate(smooth)
    weak = np.where(growing & (share < SPENT), smooth / FAR, 0.0)
    return np.maximum(lowest_of(weak, LEAST), 0.0), float(gain[-1] / 2 / max(smooth[-1], 1.0))


def _smooth(values: Array) -> Array:
    """The mean of the last entries up to each."""
    return np.array([values[max(0, i - LEAST + 1) : i + 1].mean() for i in range(len(values))])


def _before_drop(kl: Array, at: int) -> float:
    past = kl[max(0, at - WINDOW) : max(1, at - TIMES)]
    return float(np.nanmedian(past)) if np.isfinite(past).any() else 1.0


CHECK = Check(
    "beta",
    "the KL coefficient fell or is too small",
    Kind.INTEGRITY,
    ("M1",),
    judge,
    facts,
    needs=("old_logprob", "reference_logprob", "beta"),
    validated=True,
)
