"""Shifting advantages to mean 0 turns the sign of many of them.

**What.** Whitening takes the batch's mean off every advantage, weighted by tokens; where that mean is far from 0,
advantages change sign by it.

**Why it matters.** With a raw advantage of −3 on ten tokens of brief answers and −1 on a hundred tokens of long ones
the mean is near −1.2: the long answers, which were bad, come out above 0 and are made likelier. It is a matter of
rate and direction along the way, not of where a sound run ends: at the optimum every advantage is 0.

**How.** From the rows: the flip rate is the share of tokens in long responses (above the median length) whose
advantage is negative before whitening and positive after, or the other way round where that pays for length; beside
it the shift over the scale. Fails where the flips that favour length, minus those against it, exceed 35% of the
tokens in long responses over five steps, after the first ten steps, in which the critic does not know its level yet.

**False alarms.** Without a critic the mean is the mean reward, and taking it off is the method's baseline: then
nothing is judged.

**Remedy.** A critic that knows the level, or scaling without a shift.

**References.** Difference of token- and sequence-weighted means, Cov(L, A)/E[L].
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

FLIPS = 0.35  # of the tokens in long responses
LEARNING = 10  # first steps
TIMES = 5
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The shift in units of the scale, and the net share of flips in favour of long responses."""
    shifted = np.abs(step.shift) > SMALL
    if step.critic == "none" or not shifted.any():
        return {}
    raw = (step.weights[:, None, :] * step.gae).sum(axis=-1)
    now = step.advantage()
    long = (step.lengths > np.median(step.lengths))[:, None] & step.response_mask
    if not long.any():
        return {}
    up, down = (raw < 0) & (now > 0), (raw > 0) & (now < 0)
    return {
        "whitening/shift": float((step.shift / step.scale).mean()),
        "whitening/flips": float((up & long).sum() / long.sum() - (down & long).sum() / long.sum()),
    }


def judge(view: View) -> Finding:
    """The share of flips that lasted."""
    flips = view.fact("whitening/flips")
    if flips is None:
        return not_checked("whitening", "advantages are not shifted, or there is no critic")
    if len(flips.steps) < LEARNING + TIMES:
        return not_checked(
            "whitening", f"fewer than {LEARNING + TIMES} steps: the critic is given {LEARNING} to learn in"
        )
    shift = aligned(view.facts.get("whitening/shift"), flips.steps)
    lasted = lowest_of(np.where(np.arange(len(flips.values)) < LEARNING, 0.0, flips.values), TIMES) / FLIPS
    at = int(np.argmax(lasted))
    strength = float(min(CAP, max(0.0, lasted[at])))
    return graded(
        Finding(
            "whitening",
            "ok",
            f"Whitening moves the sign of {flips.values[at]:+.0%} of the tokens of long responses, net.",
            (
                Evidence("net flips in long responses", float(flips.values[at]), "share of tokens", "", "shift"),
                Evidence("shift over scale", float(shift[at]), "1", f"step {flips.steps[at]}", "shift, scale"),
            ),
            onset=first_where(flips, lasted >= 1),
            mechanism="Long responses that were worth less than expected come out above 0 and are made likelier.",
            refuted_by="length stays where it is in a short fork with policy.whiten=false",
            remedies=(
                Remedy(
                    ("policy.whiten=false",),
                    "advantages keep their sign",
                    "their scale is the reward's: set policy.lr or the score's scale anew",
                ),
                Remedy(
                    ("policy.critic_warmup=5",), "the critic knows the level, and the shift is near 0", "five steps"
                ),
            ),
        ),
        strength,
    )


CHECK = Check(
    "whitening",
    "whitening turns the sign of advantages",
    Kind.CAUSE,
    ("M6",),
    judge,
    facts,
    needs=("advantage", "values"),
)
