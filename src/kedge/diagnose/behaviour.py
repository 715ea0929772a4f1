"""What became of the policy against the reference, evaluation by evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.correction import BETA_FACTOR
from kedge.diagnose.finding import Remedy
from kedge.diagnose.steps import aligned
from kedge.diagnose.texts import column
from kedge.diagnose.view import View
from kedge.trace.reader import Series

Array = NDArray[Any]
LARGE_BETA = 0.1  # reward per nat, where none is in force
STRONGEST = 10.0  # findings are not told apart beyond
PRESENT: Mapping[str, float] = {"repetition": 0.2}  # an answer has a feature above this; others above 0


def length_ratio(view: View) -> Series | None:
    """Mean length of the policy's answers over the reference's.

    From evaluations, where both answer the same prompts; else from training steps and the reference's probe answers.
    """
    own, usual = (view.metric(f"evaluation/length{end}", "evaluation") for end in ("", "_reference"))
    if own is not None and usual is not None:
        other = aligned(usual, own.steps)
        known = other > 0
        if known.sum() > 1:
            return Series(own.steps[known], own.values[known] / other[known])
    training, length = view.metric("length/mean"), usual_length(view)
    return None if training is None or not length else Series(training.steps, training.values / length)


def usual_length(view: View) -> float:
    """Mean tokens of the reference's answers: in evaluations, else among the probes; 0 where there are none."""
    found = view.metric("evaluation/length_reference", "evaluation")
    if found is not None:
        return float(found.values[0])
    for probes in view.probes:
        lengths = probes.length[probes.variant == "reference"]
        if len(lengths):
            return float(lengths.mean())
    return 0.0


def smooth(series: Series, entries: int = 2) -> Series:
    """The mean of each entry and those just before it, `entries` together."""
    if len(series.values) < entries:
        return series
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    first = np.maximum(np.arange(len(series.values)) + 1 - entries, 0)
    last = np.arange(len(series.values)) + 1
    return Series(series.steps, (sums[last] - sums[first]) / (last - first))


def beta_at(view: View, step: int) -> float:
    """Reward per nat in force at the policy step nearest to `step`; nan where it is not known."""
    beta = view.metric("kl/beta")
    if beta is not None:
        return float(beta.values[np.argmin(np.abs(beta.steps - step))])
    found = [probes.beta for probes in view.probes if probes.step <= step]
    return found[-1] if found else float("nan")


def firmer(view: View) -> Remedy:
    """A coefficient of the KL penalty larger than the last one in force."""
    now = beta_at(view, int(view.steps[-1])) if len(view.steps) else float("nan")
    chosen = float(f"{BETA_FACTOR * now:.2g}") if now > 0 else LARGE_BETA
    instead = f" instead of {now:.2g}" if now > 0 else ""
    return Remedy(
        ("policy.kl.mode=fixed", f"policy.kl.beta={chosen:g}"),
        f"a nat costs {chosen:g}{instead} reward; log-odds move by the score's margin over that at most",
        "every change is slowed, wanted ones too",
    )


def present(sample: Mapping[str, Any], name: str, *, reference: bool = False) -> Array | None:
    """[N] 1 on answers of an evaluation that have a feature, else 0; None where it is not known."""
    values = column(sample, name, reference=reference)
    return None if values is None else (values > PRESENT.get(name, 0.0)).astype(np.float64)


def growth(view: View, name: str) -> Series | None:
    """Share of the policy's answers that have a feature, minus that of the reference's, at each evaluation."""
    steps, values = [], []
    for sample in view.samples:
        own, usual = present(sample, name), present(sample, name, reference=True)
        if own is not None and usual is not None:
            steps.append(int(sample["step"]))
            values.append(float(own.mean() - usual.mean()))
    return Series(np.array(steps), np.array(values)) if steps else None
