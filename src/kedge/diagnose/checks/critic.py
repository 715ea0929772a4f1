"""The critic's values do not predict the returns, so that they add noise or a bias to every advantage.

**What.** Values are worse than a constant, or off by a constant, or much worse than they were earlier in the run.

**Why it matters.** The advantage is the return minus the value. A value that is noise makes the advantage noisier
than without a critic; one that lags behind a rising score makes every token that was sampled look good; one that
follows length pays for length. The score may rise all the same, which is why it goes unnoticed.

**How.** From the rows, over all channels together: the Monte-Carlo return G of every token (λ = 1, the run's γ) and
its value V. Explained variance 1 − Var(G − V)/Var(G), and bias, the mean of G − V over the deviation of G. The first
ten steps are left to the critic to learn in. Each is judged over seven steps. Noise: explained variance, its upper
quartile, below 0; it fails at −0.5. Fall: the same below the run's own best median before by 0.45 (of a whole). Bias:
the median beyond 0.6 deviations. The upper quartile is what a critic that is catching up would have raised.

**False alarms.** With answers that are all worth about the same there is little variance to explain: steps with a
deviation of G below 0.05 reward say nothing. A change of the reward makes any critic wrong for some ten steps.

**Remedy.** A lower or higher `policy.critic_lr`, a few steps in which only the critic learns, or a method without a
critic, with several responses per prompt.

**References.** Schulman et al. 2016; explained variance as in OpenAI baselines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import aligned, first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.advantages import gae
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
LEARNING = 10  # first steps
TIMES = 7  # steps judged together
UPPER = 0.75  # quantile of explained variance
LEAST = 5  # steps behind a baseline
WORSE = 0.5  # explained variance below 0
FALL = 0.45  # of explained variance
BIAS = 0.6  # deviations of the return
STILL = 0.05  # reward: a return that varies less has nothing to explain
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """Explained variance and bias of the values, all channels together; nothing where there is no critic."""
    if step.critic == "none":
        return {}
    mask, weights = step.response_mask, step.weights[:, None, :].astype(np.float64)
    ahead = gae(step.rewards, step.values, mask, gamma=step.gamma, lam=1.0)
    error = (weights * ahead).sum(axis=-1)[mask]
    returns = error + (weights * step.values).sum(axis=-1)[mask]
    deviation = float(returns.std())
    if not len(returns) or deviation < STILL:
        return {"critic/deviation": deviation if len(returns) else np.nan}
    return {
        "critic/deviation": deviation,
        "critic/explained": float(1 - error.var() / returns.var()),
        "critic/bias": float(error.mean() / deviation),
    }


def judge(view: View) -> Finding:
    """The strongest of noise, fall and bias."""
    explained = view.fact("critic/explained")
    if explained is None:
        return not_checked("critic", "the run has no critic, or its returns do not vary")
    if len(explained.steps) < LEARNING + TIMES:
        return not_checked("critic", f"fewer than {LEARNING + TIMES} steps: the critic is given {LEARNING} to learn in")
    bias = aligned(view.facts.get("critic/bias"), explained.steps)
    recent, lasting_bias = _recent(explained.values, UPPER), np.abs(_recent(bias, 0.5))
    level = _recent(explained.values, 0.5)
    usual = _best_before(level)
    young = np.arange(len(recent)) < LEARNING + TIMES - 1
    cases = {
        "noise": -recent / WORSE,
        "fall": np.where(np.isfinite(usual), usual - recent, 0.0) / FALL,
        "bias": lasting_bias / BIAS,
    }
    cases = {name: np.where(young, 0.0, values) for name, values in cases.items()}
    strength = np.maximum(np.max(list(cases.values()), axis=0), 0.0)
    at = int(np.argmax(strength))
    case = max(cases, key=lambda name: float(cases[name][at]))
    return graded(
        Finding(
            "critic",
            "ok",
            _words(case, recent, bias, at) if strength[at] >= 0.7 else _fine(explained),
            (
                Evidence("explained variance", float(recent[at]), "1", _span(explained, at), "value.*, reward.*"),
                Evidence("bias", float(_recent(bias, 0.5)[at]), "deviations of the return", _span(explained, at)),
                Evidence("explained variance before", float(np.nan_to_num(usual[at])), "1", "the run's own best"),
            ),
            onset=first_where(explained, strength >= 1),
            mechanism="What the critic gets wrong is in every token's advantage, as noise or as a push of its own.",
            refuted_by="advantages without the values (the batch's mean as baseline) rank the responses alike",
            remedies=_REMEDIES,
        ),
        float(min(CAP, strength[at])),
    )


def _recent(values: Array, share: float) -> Array:
    """A quantile of the last `TIMES` entries up to each."""
    return np.array([np.quantile(values[max(0, i - TIMES + 1) : i + 1], share) for i in range(len(values))])


def _best_before(level: Array) -> Array:
    """The largest of the levels that ended before the entries judged together; nan where there were too few."""
    best = np.full(len(level), np.nan)
    for index in range(TIMES + LEAST, len(level)):
        best[index] = level[LEAST - 1 : index - TIMES + 1].max()
    return best


def _span(series: Series, at: int) -> str:
    return f"steps {series.steps[max(0, at - TIMES + 1)]} to {series.steps[at]}"


def _fine(explained: Series) -> str:
    return f"Values explain {float(np.median(explained.values[-TIMES:])):.0%} of the returns' variance."


def _words(case: str, recent: Array, bias: Array, at: int) -> str:
    if case == "bias":
        side = "below" if _recent(bias, 0.5)[at] > 0 else "above"
        return f"Values lie {abs(_recent(bias, 0.5)[at]):.2g} deviations {side} the returns."
    if recent[at] < 0:
        return f"Values are worse than a constant: explained variance {recent[at]:.2g}."
    return f"Values explain {recent[at]:.0%} of the returns' variance, much less than before."


_REMEDIES = (
    Remedy(
        ("policy.critic_lr=1e-3", "policy.critic_warmup=5"),
        "the critic settles before the policy learns from it",
        "five steps in which the policy stands still",
    ),
    Remedy(
        ('policy.method="rloo"', "policy.samples_per_prompt=4"),
        "the baseline is the mean of other responses to the same prompt, which no critic can get wrong",
        "four responses per prompt: a quarter of the prompts for the same work",
    ),
)

CHECK = Check(
    "critic",
    "the critic does not predict the returns",
    Kind.CAUSE,
    ("M5",),
    judge,
    facts,
    needs=("values", "score"),
    validated=True,
)
