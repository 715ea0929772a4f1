"""Discounting hides the reward from the tokens that earned it, or pays for length by itself.

**What.** γ and λ spread the score over the tokens of a response: the token l places before the end gets (γλ)^l of it.

**Why it matters.** With γλ = 0.5 a token five places before the end sees 3% of the score, so the early tokens, which
decide what is said, are hardly trained; the critic's values stand in, and with them its errors. With γ < 1 the score
itself shrinks by the token: where scores are negative, going on longer makes them less bad.

**How.** γ and λ are in every step's rows. Two numbers: the half-life of the credit, ln ½ / ln γλ, against a quarter
of the mean length (it fails where it is shorter); and what discounting pays per token, (1 − γ) times the mean reward,
times the standard deviation of length, over the reward's (it fails above 0.1). A γλ that falls within the run fails
by itself: how credit is given has been changed under a critic that learnt another.

**False alarms.** λ = 0.95 on long answers is common and works with a good critic: from λ = 0.9 on, with γ = 1, a
short half-life is a warning at most.

**Remedy.** γ = 1; λ towards 1, with a larger batch or several responses per prompt against the variance.

**References.** Schulman et al. 2016, section 4; weights (γλ)^(T − t) of the score in GAE.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, paid
from kedge.diagnose.steps import aligned, before, first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
QUARTER = 0.25  # of the mean length
PAID = 0.1  # of the reward's deviation
TIMES = 3
WINDOW = 10
SOUND = 0.9  # lambda from which, at gamma 1, a critic stands in well enough
BESIDE = 0.9  # of a failure: the most that such a lambda is held against a run
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """Both factors, lengths, and the reward besides KL."""
    reward = paid(step)
    return {
        "discount/gamma": step.gamma,
        "discount/lam": step.lam,
        "discount/length": float(step.lengths.mean()),
        "discount/length_deviation": float(step.lengths.std()),
        "discount/reward": float(reward.mean()),
        "discount/reward_deviation": float(reward.std()),
    }


def judge(view: View) -> Finding:
    """The strongest of the three, from smoothed lengths and rewards."""
    gammas = view.fact("discount/gamma")
    if gammas is None or len(gammas.steps) < TIMES:
        return not_checked("discount", f"fewer than {TIMES} steps hold gamma and lambda")
    steps, gamma = gammas.steps, gammas.values
    lam, length, spread, reward, deviation = (
        aligned(view.facts.get(f"discount/{name}"), steps)
        for name in ("lam", "length", "length_deviation", "reward", "reward_deviation")
    )
    short = QUARTER * _usual(length) / _half_life(gamma * lam)
    short = np.where((gamma == 1) & (lam >= SOUND), np.minimum(short, BESIDE), short)
    pays = (1 - gamma) * np.abs(_usual(reward)) * _usual(spread) / (PAID * np.maximum(_usual(deviation), SMALL))
    fell = _fell(gamma * lam)
    strength = np.minimum(CAP, np.nan_to_num(np.max([short, pays, fell], axis=0)))
    at = int(np.argmax(strength))
    half = float(_half_life(gamma * lam)[at])
    return graded(
        Finding(
            "discount",
            "ok",
            _words(gamma, lam, at, half, bool(fell[at])),
            (
                Evidence("gamma", float(gamma[at]), "1", f"step {steps[at]}", "gamma"),
                Evidence("lambda", float(lam[at]), "1", f"step {steps[at]}", "lam"),
                Evidence("half-life of the credit", half, "tokens", "", "gamma, lam"),
                Evidence("length", float(length[at]), "tokens", "mean", "response_mask"),
                Evidence("paid per token", float(-(1 - gamma) @ reward / len(reward)), "reward", "by discounting"),
            ),
            onset=first_where(gammas, strength >= 1),
            mechanism="Tokens far from the end get little of the score; what they get instead is the critic's guess.",
            refuted_by="the score rises no faster in a short fork with gamma and lambda at 1",
            remedies=(
                Remedy(
                    ("policy.gamma=1", "policy.lam=1"),
                    "every token of a response gets the same share of its score",
                    "more variance in the advantages",
                ),
                Remedy(
                    ("policy.gamma=1", "policy.lam=0.95"),
                    f"half-life {math.log(0.5) / math.log(0.95):.0f} tokens",
                    "early tokens of long answers rest on the critic",
                ),
            ),
        ),
        float(strength[at]),
    )


def _usual(values: Array) -> Array:
    """Median of the last entries up to each, so that a single batch decides nothing."""
    return np.array([np.nanmedian(values[max(0, i - WINDOW + 1) : i + 1]) for i in range(len(values))])


def _half_life(factor: Array) -> Array:
    """Tokens before the end at which the score's weight has halved; infinite without discounting."""
    with np.errstate(divide="ignore"):
        return np.where(factor >= 1, np.inf, math.log(0.5) / np.minimum(np.log(np.maximum(factor, SMALL)), -SMALL))


def _fell(factor: Array) -> Array:
    """Nonzero from where the run's own factor has fallen: 1.5 for any fall, more where the horizon 1/(1 - factor) fell
    by more than that."""
    usual = before(factor, window=len(factor), least=TIMES).median
    # What was in force for most of the run so far is not its usual factor once the change has lasted: keep the first.
    first = np.fmax.accumulate(np.nan_to_num(usual, nan=-np.inf))
    horizon = np.log((1 - factor + 0.01) / (1 - np.maximum(first, factor) + 0.01))
    return np.where(np.isfinite(first) & (factor < first - 1e-6), 1.5 + horizon, 0.0)


def _words(gamma: Array, lam: Array, at: int, half: float, fell: bool) -> str:
    now = f"gamma {gamma[at]:g} and lambda {lam[at]:g}"
    if math.isinf(half):
        return f"With {now} every token gets the whole score."
    said = f"With {now} the score's weight halves every {half:.3g} tokens."
    return f"{said} The run began with gamma {gamma[0]:g} and lambda {lam[0]:g}." if fell else said


CHECK = Check(
    "discount",
    "discounting smears or hides the reward",
    Kind.INTEGRITY,
    ("M9",),
    judge,
    facts,
    needs=("score",),
    validated=True,
)
