"""One batch moves the policy too far: too many epochs, or too high a learning rate.

**What.** The update changes the log-probabilities of the batch's tokens by much more than sound runs do, or than this
run did before.

**Why it matters.** The batch's advantages hold near the policy that sampled it. Further away the surrogate promises
what it cannot keep, the clip silences more and more of the batch, and the KL term of the batch was measured before
the first of its steps: within a batch nothing pulls back. The policy spends divergence on noise.

**How.** From the rows: the mean |log π_new − log π_old| over tokens as the update last saw them, in nats per token,
and the share of tokens before the last that the clip holds. Far: on three steps in a row more than 0.15 nats or 20%
clipped. Farther than before: three times the run's own median over the ten steps before the change and above 0.05
nats. The first five steps are left out: a fresh optimiser's first steps are large.

**False alarms.** Methods with one optimiser step per batch log π_new before that step; they show 0 and are not
checked. A warm restart of the learning rate raises the step for a while, by less than a factor of three.

**Remedy.** Fewer epochs, a lower learning rate, or a limit on KL inside the update.

**References.** Schulman et al. 2017; target_kl in Spinning Up; T ln(1 + ε) bounds a sequence's way per batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import at_last, moved
from kedge.diagnose.steps import aligned, before, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
FAR = 0.15  # nats per token
CLIPPED = 0.20  # share of tokens
TIMES_BEFORE = 3.0  # times the run's own
NOTICEABLE = 0.05  # nats per token
FIRST = 5  # steps left out
WINDOW, LEAST = 10, 5
TIMES = 3
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """How far the update moved the batch's tokens, and how many the clip held; nothing where it took a single step."""
    mask = step.response_mask
    distance = np.abs(moved(step))[mask]
    if not len(distance) or not distance.any():
        return {}
    # An end that is left out of the loss is not active either, and no clip holds it.
    inner = mask & ~at_last(step)
    clipped = float(1 - step.active[inner].mean()) if inner.any() and "active" not in step.absent else np.nan
    found = {"step_size/moved": float(distance.mean()), "step_size/clipped": clipped}
    for name in ("epochs", "minibatches"):
        if name in step.learning:
            found[f"step_size/{name}"] = float(step.learning[name])
    return found


def judge(view: View) -> Finding:
    """The stronger of the absolute limits and of the run's own baseline."""
    distance = view.fact("step_size/moved")
    if distance is None:
        return not_checked("step_size", "an update of several optimiser steps is needed to see how far it went")
    if len(distance.steps) < FIRST + TIMES:
        return not_checked("step_size", f"fewer than {FIRST + TIMES} steps")
    clipped = np.nan_to_num(aligned(view.facts.get("step_size/clipped"), distance.steps))
    values = np.where(np.arange(len(distance.values)) < FIRST, 0.0, distance.values)
    far = np.maximum(values / FAR, np.where(values > 0, clipped / CLIPPED, 0.0))
    usual = _usual(distance.values)
    with np.errstate(divide="ignore", invalid="ignore"):
        farther = np.nan_to_num(np.where(values > NOTICEABLE, values / usual / TIMES_BEFORE, 0.0))
    lasted = np.maximum(lowest_of(far, TIMES), lowest_of(farther, TIMES))
    at = int(np.argmax(lasted))
    strength = float(min(CAP, max(0.0, lasted[at])))
    epochs = aligned(view.facts.get("step_size/epochs"), distance.steps)
    before_it = f"; it was {usual[at]:.2g} before" if np.isfinite(usual[at]) else ""
    return graded(
        Finding(
            "step_size",
            "ok",
            f"An update moves a token's log-probability by {distance.values[at]:.2g} nats on average{before_it}.",
            (
                Evidence(
                    "moved", float(distance.values[at]), "nats per token", f"step {distance.steps[at]}", "new_logprob"
                ),
                Evidence("moved before", float(np.nan_to_num(usual[at])), "nats per token", "the run's own median"),
                Evidence("clipped", float(clipped[at]), "share of tokens", f"step {distance.steps[at]}", "active"),
                Evidence("epochs", float(epochs[at]), "per batch", f"step {distance.steps[at]}", "learning"),
            ),
            onset=first_where(distance, lasted >= 1),
            mechanism="Past a batch's first steps its advantages and its KL are out of date, and nothing pulls back.",
            refuted_by="the policy gets as much score for its KL in a short fork with a third of the learning rate",
            remedies=_remedies(view, float(distance.values[at]), float(usual[at]), float(epochs[at])),
        ),
        strength,
    )


def _usual(values: Array) -> Array:
    """The run's own step before each entry: the median of `WINDOW` entries, `TIMES` back; the smallest so far, because
    a change that lasts must not become the baseline."""
    found = before(values, window=WINDOW, least=LEAST, lag=TIMES).median
    return np.fmin.accumulate(np.where(np.arange(len(values)) < FIRST + LEAST, np.nan, found))


def _remedies(view: View, distance: float, usual: float, epochs: float) -> tuple[Remedy, ...]:
    found = []
    if epochs > 2:
        found.append(Remedy(("policy.epochs=2",), "fewer passes over one batch", "more batches for the same score"))
    lr = view.settings.get("policy", {}).get("lr")
    aim = usual if np.isfinite(usual) and usual < distance else NOTICEABLE
    if lr is not None:
        lower = float(lr) * min(1.0, aim / distance)
        found.append(Remedy((f"policy.lr={lower:.1g}",), "steps of the size they had", "more steps for the same score"))
    else:
        found.append(Remedy((), f"a learning rate {distance / aim:.2g} times lower", "more steps for the same score"))
    found.append(
        Remedy(
            ("policy.kl.limit=6", 'policy.kl.at_limit="stop"'),
            "an update ends where the policy has gone far enough",
            "a forward pass after each optimiser step",
        )
    )
    return tuple(found[:2])


CHECK = Check(
    "step_size",
    "an update goes too far",
    Kind.CAUSE,
    ("M11",),
    judge,
    facts,
    needs=("old_logprob", "new_logprob"),
    validated=True,
)
