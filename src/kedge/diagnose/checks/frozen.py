"""The policy does not change.

**What.** Updates leave the policy's log-probabilities exactly as they were: a learning rate of 0, parameters that are
not trained, advantages that are all 0, or a clip that holds every token.

**Why it matters.** A run that learns nothing looks healthy: no KL, no drift, no alarms.

**How.** The mean |log π_new − log π_old| over a batch's tokens as the update last saw them, where the update takes
several optimiser steps; else the log-probabilities of the fixed probe answers from one scoring to the next. Below
1e-6 nats nothing has moved, and next to nothing below a hundredth of the run's own median so far, where that came by
a fall to a tenth at once and not by a decay. It fails after three steps, where the policy had moved before, and after
ten steps where it never has (a critic's warm-up, in which the policy stands still on purpose, is shorter).

**False alarms.** The last step of a learning rate that decays to 0. A long `policy.critic_warmup`. An update that a
limit on KL takes back each time leaves the probes where they were.

**Remedy.** The finding says which it is: no advantage, everything clipped, or no step by the optimiser.

**References.** Low-signal prompts: Razin et al. 2025, arXiv 2503.15477.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import moved
from kedge.diagnose.steps import aligned, before, first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
STILL = 1e-6  # nats per token
SHARE, SUDDEN = 0.01, 0.1  # of the run's own movement so far, and of the movement just before
AFTER, NEVER = 3, 10  # steps
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """How far the batch's tokens moved, where the update took several steps, and what there was to learn from."""
    mask = step.response_mask
    if not mask.any():
        return {}
    distance = float(np.abs(moved(step))[mask].mean())
    steps = step.learning.get("epochs", 0) * step.learning.get("minibatches", 0)
    # With several minibatches but one epoch a row is seen before or after the step, so the mean moves all the same.
    found = {
        "frozen/advantage": float(np.abs(step.advantage())[mask].mean()),
        "frozen/active": np.nan if "active" in step.absent else float(step.active[mask].mean()),
    }
    return found | ({"frozen/moved": distance} if distance > 0 or steps > 1 else {})


def judge(view: View) -> Finding:
    """How long the policy has stood still, over what is too long."""
    series, source = view.fact("frozen/moved"), "new_logprob"
    if series is None or len(series.steps) < AFTER:
        series, source = _of_probes(view), "probes"
    if series is None or len(series.steps) < 2:
        return not_checked("frozen", "neither updates of several optimiser steps nor probes show whether it moves")
    still = _still(series.values)
    had_moved = _moved_before(still)
    patience = np.where(had_moved, AFTER, NEVER)
    strength = np.where(still, _standing(series, still) / patience, 0.0)
    at = int(np.argmax(strength))
    case = _case(view, int(series.steps[at]))
    since = int(series.steps[at] - _standing(series, still)[at] + 1)
    summary = f"An update moves a token's log-probability by {float(np.median(series.values)):.2g} nats (median)."
    if strength[at] >= 0.7:
        summary = f"The policy has not changed from step {since} to step {series.steps[at]}{_WHY[case]}."
    return graded(
        Finding(
            "frozen",
            "ok",
            summary,
            (
                Evidence("moved", float(series.values[at]), "nats per token", f"step {series.steps[at]}", source),
                Evidence("steps without a change", float(_standing(series, still)[at]), "steps"),
                Evidence("had moved before", float(had_moved[at]), "1 if it had"),
            ),
            onset=first_where(series, strength >= 1),
            mechanism="Without a step the policy keeps its answers, and every number of the run is that of its start.",
            refuted_by="the weights of two checkpoints differ",
            remedies=_REMEDIES[case],
        ),
        float(min(CAP, strength[at])),
    )


def _of_probes(view: View) -> Series | None:
    """Mean change of the probes' log-ratio since the scoring before, nats per response."""
    probes = [one for one in view.probes if len(one.kl)]
    if len(probes) < 2:
        return None
    changes = [
        float(np.abs(now.kl - old.kl).mean()) if len(now.kl) == len(old.kl) else np.nan for old, now in pairwise(probes)
    ]
    known = np.isfinite(changes)
    return Series(np.array([one.step for one in probes[1:]])[known], np.array(changes)[known]) if known.any() else None


def _still(values: Array) -> Array:
    """Where nothing moves, or, since a sudden fall, next to nothing."""
    usual = before(values, window=len(values), least=AFTER).median
    # The highest level so far stays the measure: a stretch of standing still must not become the usual.
    usual = np.fmax.accumulate(np.nan_to_num(usual))
    just = before(values, window=AFTER, least=AFTER).median
    found = values < STILL
    for index, value in enumerate(values):
        sudden = value < SUDDEN * just[index] or (index > 0 and found[index - 1])
        found[index] |= bool(value < SHARE * usual[index] and sudden)
    return np.asarray(found)


def _moved_before(still: Array) -> Array:
    """At each entry, whether the policy had moved at any entry before."""
    return np.concatenate([[False], np.maximum.accumulate(~still)[:-1]])


def _standing(series: Series, still: Array) -> Array:
    """Policy steps for which each entry's stretch of standing still has lasted, itself included."""
    found = np.zeros(len(still))
    for index, here in enumerate(still):
        gap = float(series.steps[index] - series.steps[index - 1]) if index else 1.0
        found[index] = (found[index - 1] if index else 0.0) + gap if here else 0.0
    return found


def _case(view: View, step: int) -> str:
    def fact(name: str) -> float:
        return float(aligned(view.facts.get(f"frozen/{name}"), np.array([step]))[0])

    if fact("advantage") < STILL:
        return "nothing"
    return "clipped" if fact("active") < STILL else "optimiser"


_WHY = {
    "nothing": ": every advantage is 0",
    "clipped": ": the clip holds every token",
    "optimiser": ", though there was something to learn",
}
_RATE = (
    Remedy(("policy.lr=3e-4",), "the optimiser takes steps again", "none"),
    Remedy(("policy.final_lr=0.1",), "the rate ends at a tenth and not at 0", "the policy still moves at the end"),
)
_REMEDIES = {
    "nothing": (
        Remedy(
            ("policy.samples_per_prompt=4",),
            "more answers per prompt differ more often",
            "fewer prompts for the same work",
        ),
        Remedy(("policy.temperature=1",), "answers differ, so that some are better than others", "less likely answers"),
    ),
    "clipped": (
        Remedy(("policy.clip=0.2",), "tokens may move before the clip holds them", "larger steps"),
        *_RATE[:1],
    ),
    "optimiser": _RATE,
}

CHECK = Check(
    "frozen",
    "the policy does not change",
    Kind.CAUSE,
    (),
    judge,
    facts,
    needs=("new_logprob | probes", "advantage"),
    validated=True,
)
