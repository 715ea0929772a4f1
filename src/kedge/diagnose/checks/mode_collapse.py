"""The policy says the same thing whatever it is asked, or leaves nothing to chance.

**What.** Entropy of the next token against the start, and the number of different answers against the reference's.

**Why it matters.** A policy that has collapsed explores nothing, so no reward can move it any more, and users get one
answer. It is a symptom: a large reward for one answer, a β that is too small, a step that is too large.

**How.** Two numbers, the larger counts, each on a log scale. Entropy per token at the start over now, the mean of two
evaluations in a row (of training steps where there are none): it fails at 4. Different answers among the evaluation
prompts, the reference's over the policy's: it fails at 5. A healthy policy on a small task loses a third of its entropy
and half of its different answers, because brief answers are more often the same.

**False alarms.** Tasks with one right answer, and prompts that share it. An entropy that was high because the start was
bad.

**Remedy.** A larger β, a smaller learning rate, an entropy bonus in the loss; the cause's own remedy first.

**References.** Kirk et al. 2024 (generalisation and diversity under RLHF).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kedge.diagnose.behaviour import STRONGEST, firmer, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import first_where
from kedge.diagnose.texts import column
from kedge.diagnose.view import View
from kedge.trace.reader import Series

ENTROPY = 4.0  # times less than at the start
ANSWERS = 5.0  # times fewer than the reference's
SMALLEST = 1e-3  # nats: an entropy below it is 0 for all purposes


class _Loss(NamedTuple):
    """How many times less there is of something than there was."""

    name: str
    times: Series
    limit: float
    where: str

    @property
    def strength(self) -> Series:
        logs = np.log(np.maximum(self.times.values, 1.0)) / math.log(self.limit)
        return Series(self.times.steps, np.minimum(logs, STRONGEST))


def judge(view: View) -> Finding:
    """The larger of both losses."""
    losses = [one for one in (_entropy(view), _answers(view)) if one is not None]
    if not losses:
        return not_checked("mode_collapse", "neither entropies nor texts of answers are there at two steps")
    worst = max(losses, key=lambda one: float(one.strength.values.max()))
    at = int(worst.strength.values.argmax())
    onsets = [first_where(one.strength, one.strength.values >= 1) for one in losses]
    said = " and ".join(f"{one.name} is {one.times.values[-1]:.2g} times less than it was" for one in losses)
    finding = Finding(
        "mode_collapse",
        "ok",
        f"At the end {said}.",
        evidence=tuple(
            Evidence(
                f"{one.name}, times less",
                float(one.times.values.max()),
                "1",
                f"largest; fails from {one.limit:g}",
                one.where,
            )
            for one in losses
        ),
        onset=min((step for step in onsets if step is not None), default=None),
        mechanism="One answer is worth so much more than all others that the policy has stopped trying others.",
        refuted_by="the answers differ where the prompts ask for different answers",
        remedies=(
            firmer(view),
            Remedy(
                ("policy.entropy_bonus=0.01",),
                "adds 0.01 per nat of entropy to the objective of every token",
                "some of the divergence is spent on noise",
            ),
        ),
    )
    return graded(finding, float(worst.strength.values[at]))


def _entropy(view: View) -> _Loss | None:
    found = view.metric("evaluation/entropy", "evaluation")
    if found is None or len(found.values) < 2:
        found = view.metric("entropy/per_token")
    if found is None or len(found.values) < 2 or found.values[0] <= SMALLEST:
        return None
    now = smooth(found)
    return _Loss(
        "entropy", Series(now.steps, found.values[0] / np.maximum(now.values, SMALLEST)), ENTROPY, "evaluation/entropy"
    )


def _answers(view: View) -> _Loss | None:
    steps, values = [], []
    for sample in view.samples:
        own, usual = column(sample, "different"), column(sample, "different", reference=True)
        if own is not None and usual is not None:
            steps.append(int(sample["step"]))
            values.append(float(usual.sum() / own.sum()))
    if len(steps) < 2:
        return None
    return _Loss(
        "the number of different answers", smooth(Series(np.array(steps), np.array(values))), ANSWERS, "samples"
    )


CHECK = Check("mode_collapse", "answers are all the same", Kind.SYMPTOM, (), judge, needs=("entropy | samples",))
