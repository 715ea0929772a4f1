"""Advantages are so large that the optimiser's settings no longer fit them.

**What.** The advantages that the loss multiplies with, after any normalisation, have a standard deviation far above
1.

**Why it matters.** Learning rate, clip, value clip and the norm at which gradients are cut were all set for
advantages of about 1. Rewards in the tens make every gradient be cut to the same norm, so that a step is decided by a
few outliers, let the critic's loss swamp what it shares with the policy, and make β a twentieth of what it was meant
to be.

**How.** The standard deviation over tokens of the advantage that training used, from the rows. Fails above 2 on three
steps in a row, from the third step on; strength counts from 1, which whitened advantages have by definition.

**False alarms.** A rule that rarely pays a lot has a large deviation by its outliers; the finding names the share of
tokens beyond three deviations.

**Remedy.** Whitening, or a score in units of its deviation over the reference's answers.

**References.** Engstrom et al. 2020; Andrychowicz et al. 2021 on normalising advantages.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, paid
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

NORMALISED, LARGE = 1.0, 2.0  # standard deviations: where advantages are normalised, and where it fails
FIRST, TIMES = 2, 3
TAIL = 3.0
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The advantage's and the reward's deviation."""
    mask = step.response_mask
    if not mask.any():
        return {}
    advantage = step.advantage()[mask]
    deviation = float(advantage.std())
    return {
        "unscaled_reward/advantage": deviation,
        "unscaled_reward/reward": float(paid(step).std()),
        "unscaled_reward/tail": float((np.abs(advantage - advantage.mean()) > TAIL * deviation + SMALL).mean()),
    }


def judge(view: View) -> Finding:
    """The largest deviation that lasted."""
    advantage = view.fact("unscaled_reward/advantage")
    if advantage is None or len(advantage.steps) < FIRST + TIMES:
        return not_checked("unscaled_reward", f"fewer than {FIRST + TIMES} steps hold advantages")
    reward, tail = (aligned(view.facts.get(f"unscaled_reward/{name}"), advantage.steps) for name in ("reward", "tail"))
    beyond = np.maximum(advantage.values - NORMALISED, 0.0) / (LARGE - NORMALISED)
    lasted = lowest_of(np.where(np.arange(len(beyond)) < FIRST, 0.0, beyond), TIMES)
    at = int(np.argmax(lasted))
    size = float(advantage.values[at])
    factor = max(size, 1.0)
    return graded(
        Finding(
            "unscaled_reward",
            "ok",
            f"Advantages have a standard deviation of {size:.3g} where the optimiser's settings expect about 1.",
            (
                Evidence("deviation of the advantage", size, "1", f"step {advantage.steps[at]}", "advantage"),
                Evidence("deviation of the reward", float(reward[at]), "reward", "over responses, KL left out"),
                Evidence("tail", float(tail[at]), "share of tokens", f"beyond {TAIL:g} deviations"),
            ),
            onset=first_where(advantage, lasted >= 1),
            mechanism="Every gradient is cut to the largest norm allowed, so outliers decide the direction of a step.",
            refuted_by="the same run with whitening on takes steps of the same size",
            remedies=(
                Remedy(
                    ("policy.whiten=true",), "advantages have deviation 1 in every batch", "the batch's scale is lost"
                ),
                Remedy(
                    ('policy.score_normalisation="running"',),
                    f"the score's unit becomes its own deviation, about {factor:.2g} times smaller",
                    "beta is worth as much more: set policy.kl.beta anew",
                ),
            ),
        ),
        float(min(CAP, max(0.0, lasted[at]))),
    )


CHECK = Check(
    "unscaled_reward",
    "advantages far above 1",
    Kind.CAUSE,
    ("M19",),
    judge,
    facts,
    needs=("advantage",),
    validated=True,
)
