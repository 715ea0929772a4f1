"""The controller of the KL coefficient is saturated, dead or steers in another unit.

**What.** A controller moves β step after step by the largest amount it may, and the KL does not come to its target;
or it does not move β at all though the KL is far from the target.

**Why it matters.** Measured in one unit and compared with a target in another (nats per token against nats per
response), the error is always at its bound. With a target that is too large β decays geometrically until nothing
holds the policy; with one that is too small β grows until nothing else counts.

**How.** β of every step, from the rows. A streak is a run of steps in which log β moves by the same amount to a part
in a thousand, eight steps at least. It fails where β has thereby moved by a factor of four, or of two where β had
stood still before the streak, or of 1.5 where the recipe names a target that is ten times as far. A controller that
works ends its streak when the KL comes near the target. Dead: the recipe names a controller, β has moved by less than
2% in 20 steps, and the KL is off the target by a factor of three (a warning).

**False alarms.** At the start the KL is 0, below any target, and a controller lowers β at its bound until it has
risen: that is a streak of its own, as long as β began too high.

**Remedy.** Give the target in the unit that is measured (here nats per response) and a horizon of some 50 steps.

**References.** Ziegler et al. 2019, section 2.2; Stooke et al. 2020 for what a saturated integrator does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, beta_of, log_ratio
from kedge.diagnose.steps import aligned, late
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
SAME = 1e-3  # of a step of log beta
STREAK = 8  # steps
FACTOR, FROM_REST, OFF_TARGET = math.log(4), math.log(2), math.log(1.5)
REST = 5  # steps
UNIT = 10.0  # a target this many times the KL, or a part of it, is in another unit
MOVES = 1e-5  # of log beta: less is rounding of float32
CAP = 10.0
DEAD_STEPS, DEAD_MOVE, DEAD_OFF = 20, 0.02, 3.0
STEERED = ("adaptive", "lagrangian", "pid")


class Streak(NamedTuple):
    """Steps in which log beta moved by the same amount: first and last entry, and the sum of the moves."""

    first: int
    last: int
    total: float
    rested: bool  # beta stood still before


def facts(step: StepTrace) -> Facts:
    """The coefficient and the KL that a controller measures."""
    return {"controller/beta": beta_of(step), "controller/kl": float(log_ratio(step).sum(axis=1).mean())}


def judge(view: View) -> Finding:
    """The longest streak of saturated steps, or a controller that does nothing."""
    beta = view.fact("controller/beta")
    if beta is None or len(beta.steps) < STREAK + 1:
        return not_checked("controller", f"fewer than {STREAK + 1} steps tell the KL coefficient")
    kl = Series(beta.steps, aligned(view.facts.get("controller/kl"), beta.steps))
    target = _target(view)
    moves = np.diff(np.log(np.maximum(np.abs(beta.values), SMALL)))
    if not (np.abs(moves) > MOVES).any():
        return _still(view, beta, kl, target)
    found = [(_strength(streak, kl, target), streak) for streak in streaks(moves)]
    if not found:
        return Finding("controller", "ok", "Beta moves, and not at a bound.", _evidence(beta, kl, target))
    strength, streak = max(found, key=lambda pair: pair[0])
    direction = "fell" if streak.total < 0 else "rose"
    at_bound = f"{abs(moves[streak.last - 1]):.1%}"
    onset = _onset(streak, moves, kl, target)
    finding = Finding(
        "controller",
        "ok",
        f"Beta {direction} by {at_bound} in each of {streak.last - streak.first} steps, by a factor of "
        f"{math.exp(abs(streak.total)):.2g} in all, from {beta.values[streak.first]:.3g} to "
        f"{beta.values[streak.last]:.3g}.",
        _evidence(beta, kl, target),
        onset=None if onset is None else int(beta.steps[onset]),
        mechanism="The error is at its bound whatever the KL does, so beta follows a geometric course and not the KL.",
        refuted_by="beta turns round when the KL passes the target",
        remedies=_remedies(beta, kl, streak),
    )
    return graded(finding, min(CAP, strength))


def streaks(moves: Array) -> list[Streak]:
    """Every stretch of at least `STREAK` equal moves that are not zero; entries count those of beta."""
    found, first = [], 0
    for index in range(1, len(moves) + 1):
        over = index == len(moves) or abs(moves[index] - moves[first]) > SAME * abs(moves[first])
        if over:
            if index - first >= STREAK and abs(moves[first]) > MOVES:
                rested = first >= REST and bool((np.abs(moves[max(0, first - REST) : first - 1]) <= MOVES).all())
                found.append(Streak(first, index, float(moves[first:index].sum()), rested))
            first = index
    return found


def _strength(streak: Streak, kl: Series, target: float | None) -> float:
    return abs(streak.total) / _limit(streak, kl, target)


def _limit(streak: Streak, kl: Series, target: float | None) -> float:
    """The whole move of log beta at which a streak fails."""
    reached = float(kl.values[streak.last])
    off = target is not None and reached > SMALL and not 1 / UNIT < target / reached < UNIT
    return OFF_TARGET if off else FROM_REST if streak.rested else FACTOR


def _onset(streak: Streak, moves: Array, kl: Series, target: float | None) -> int | None:
    """The first entry at which the streak, as far as it had gone, would have failed."""
    for last in range(streak.first + STREAK, streak.last + 1):
        so_far = streak._replace(last=last, total=float(moves[streak.first : last].sum()))
        if _strength(so_far, kl, target) >= 1:
            return last
    return None


def _still(view: View, beta: Series, kl: Series, target: float | None) -> Finding:
    """Beta never moved: fine where nobody steers, dead where somebody does and the target is missed."""
    mode = view.settings.get("policy", {}).get("kl", {}).get("mode")
    evidence = _evidence(beta, kl, target)
    if mode not in STEERED:
        return Finding("controller", "ok", f"Beta is fixed at {beta.values[-1]:.3g} reward per nat.", evidence)
    reached = late(kl)
    missed = target is not None and reached > SMALL and not 1 / DEAD_OFF < target / reached < DEAD_OFF
    if missed and len(beta.steps) >= DEAD_STEPS:
        summary = f"Beta is steered ({mode}) but did not move in {len(beta.steps)} steps; KL is {reached:.3g} nats."
        return Finding(
            "controller",
            "warn",
            summary,
            evidence,
            strength=0.8,
            mechanism="A horizon of many runs, or a gain of next to nothing: the error does not reach beta.",
            refuted_by="beta moves once the KL is further from the target",
            remedies=_remedies(beta, kl, Streak(0, len(beta.steps) - 1, 0.0, rested=False)),
        )
    return Finding("controller", "ok", "The controller did not have to move beta.", evidence)


def _target(view: View) -> float | None:
    """Of the recipe, in nats per response; None where there is no recipe or nobody steers."""
    kl = view.settings.get("policy", {}).get("kl", {})
    return float(kl["target"]) if kl.get("mode") in STEERED and "target" in kl else None


def _evidence(beta: Series, kl: Series, target: float | None) -> tuple[Evidence, ...]:
    found = [
        Evidence("beta", float(beta.values[0]), "reward per nat", "first step", "weight.kl"),
        Evidence("beta, last", float(beta.values[-1]), "reward per nat", "last step", "weight.kl"),
        Evidence("KL to the reference", late(kl), "nats per response", "late"),
    ]
    if target is not None:
        found.append(Evidence("target", target, "nats per response", "", "policy.kl.target"))
    return tuple(found)


def _remedies(beta: Series, kl: Series, streak: Streak) -> tuple[Remedy, ...]:
    usual = float(beta.values[streak.first])
    reached = max(0.1, float(np.nanmedian(kl.values[max(0, streak.first - 5) : streak.first + 1])))
    return (
        Remedy(
            (f"policy.kl.target={max(1.0, reached):.2g}", "policy.kl.horizon=10000", f"policy.kl.beta={usual:.2g}"),
            "the error is of the size of the KL, so beta answers to it",
            "beta follows over some 50 steps",
        ),
        Remedy(
            ('policy.kl.mode="fixed"', f"policy.kl.beta={usual:.2g}"),
            "a nat costs the same throughout",
            "the KL ends where score and beta put it",
        ),
    )


CHECK = Check(
    "controller",
    "the KL controller is saturated or dead",
    Kind.INTEGRITY,
    ("M12", "M3"),
    judge,
    facts,
    needs=("old_logprob", "reference_logprob"),
    validated=True,
)
