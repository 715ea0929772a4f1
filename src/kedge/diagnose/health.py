"""Marks: a run's main numbers against what a healthy run shows. Read from the metrics alone.

The ranges are habits of small healthy runs, not laws; each mark says why its range is what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kedge.trace.reader import Run, Series

Status = Literal["ok", "look", "bad", "missing"]
LATE = 1 / 3  # of the steps: means over these stand for the end of the run


@dataclass(frozen=True)
class Mark:
    """One number, the range it has in a healthy run, and why. `value` is None when the run does not hold it."""

    name: str
    value: float | None
    unit: str
    status: Status
    healthy: str
    why: str


@dataclass(frozen=True)
class Range:
    """Inside `ok` is healthy, inside `look` deserves a look, outside is bad; bounds included."""

    ok: tuple[float, float]
    look: tuple[float, float]

    def status(self, value: float | None) -> Status:
        """Where `value` lies; a number that is not finite is bad."""
        if value is None:
            return "missing"
        if self.ok[0] <= value <= self.ok[1]:
            return "ok"
        return "look" if self.look[0] <= value <= self.look[1] else "bad"


WIN_RATE = Range((0.5, 1.0), (0.4, 1.0))
KL = Range((0.0, 8.0), (0.0, 20.0))
KL_TARGET = Range((0.5, 1.5), (0.2, 3.0))
LENGTH = Range((0.5, 1.3), (0.4, 1.5))
ENTROPY = Range((0.5, 1.5), (0.25, 2.5))
ENDED = Range((0.9, 1.0), (0.75, 1.0))
CLIP = Range((0.002, 0.3), (0.0, 0.5))
FIRST_RATIO = Range((0.0, 1e-3), (0.0, 2e-2))
EXPLAINED = Range((0.2, 1.0), (0.0, 1.0))
ANCHOR = Range((0.0, 1.1), (0.0, 2.0))
REWARD_MODEL = Range((0.55, 1.0), (0.5, 1.0))


def marks(run: Run) -> tuple[Mark, ...]:
    """Every mark of the run's policy stage; those without data have status "missing"."""
    policy, evaluation = run.metrics("policy"), run.metrics("evaluation")
    return (
        _win_rate(evaluation),
        _kl(run, policy, evaluation),
        _length(evaluation),
        _entropy(policy, evaluation),
        _simple("ended within the budget", _late(policy, "length/ended"), "share", ENDED, "0.9 to 1",
                "Answers that run into the token budget are scored unfinished."),
        _anchor(evaluation),
        _reward_model(run.metrics("reward")),
        _simple("clip fraction", _mean(policy, "policy/clip_fraction"), "share", CLIP, "0.002 to 0.3",
                "Near 0 the steps are too small to be clipped; above 0.3 most of each step is thrown away."),
        _simple("first-ratio error", _largest(policy, "policy/first_ratio_error"), "1", FIRST_RATIO, "up to 0.001",
                "Before the first update the ratio is 1; more means dropout, other kernels or a stale policy."),
        _simple("explained variance, score head", _explained(policy), "1", EXPLAINED, "0.2 to 1",
                "Below 0 the critic is worse than a constant and adds noise to every advantage."),
    )  # fmt: skip


def _simple(name: str, value: float | None, unit: str, range_: Range, healthy: str, why: str) -> Mark:
    return Mark(name, value, unit, range_.status(value), healthy, why)


def _win_rate(evaluation: Mapping[str, Series]) -> Mark:
    value = _last(evaluation, "evaluation/win_rate")
    low, high = (_last(evaluation, f"evaluation/win_rate_{end}") for end in ("low", "high"))
    status = WIN_RATE.status(value)
    if value is not None and low is not None and high is not None:
        status = "ok" if low > 0.5 else "bad" if high < 0.5 else "look"
    why = "The score is what training raises; if it does not beat the reference's, nothing was learnt."
    return Mark("score against the reference: win rate", value, "share", status, "interval above 0.5", why)


def _kl(run: Run, policy: Mapping[str, Series], evaluation: Mapping[str, Series]) -> Mark:
    value = _last(evaluation, "evaluation/kl_per_sequence")
    value = _late(policy, "kl/reference_per_sequence") if value is None else value
    settings = run.settings.get("policy", {}).get("kl", {})
    if settings.get("mode") == "adaptive" and value is not None:
        target = float(settings["target"])
        healthy = f"{0.5 * target:.3g} to {1.5 * target:.3g} (target {target:.3g})"
        why = "An adaptive beta holds KL near its target; far from it the controller is dead or saturated."
        return Mark("KL to the reference", value, "nats per response", KL_TARGET.status(value / target), healthy, why)
    why = "A mean below 0 means another policy sampled; tens of nats leave what the reference finds likely."
    return _simple("KL to the reference", value, "nats per response", KL, "0 to 8", why)


def _length(evaluation: Mapping[str, Series]) -> Mark:
    own, usual = (_last(evaluation, f"evaluation/length{end}") for end in ("", "_reference"))
    value = own / usual if own is not None and usual else None
    why = "A reward that does not depend on length leaves it about where the reference has it."
    return _simple("length over the reference's", value, "1", LENGTH, "0.5 to 1.3", why)


def _entropy(policy: Mapping[str, Series], evaluation: Mapping[str, Series]) -> Mark:
    values = evaluation.get("evaluation/entropy") or policy.get("entropy/per_token")
    known = values is not None and len(values.values) > 1 and values.values[0] > 0
    value = float(values.values[-1] / values.values[0]) if values is not None and known else None
    why = "A collapse means few answers are left to learn from; a rise towards uniform means token soup."
    return _simple("entropy over its start", value, "1", ENTROPY, "0.5 to 1.5", why)


def _anchor(evaluation: Mapping[str, Series]) -> Mark:
    found = evaluation.get("evaluation/anchor_loss")
    known = found is not None and len(found.values) > 1 and found.values[0] > 0
    value = float(found.values[-1] / found.values[0]) if found is not None and known else None
    why = "Text that people wrote becomes less likely as the policy settles on one style; far more, and language goes."
    return _simple("anchor loss over its start", value, "1", ANCHOR, "up to 1.1", why)


def _reward_model(reward: Mapping[str, Series]) -> Mark:
    value, length = _last(reward, "heldout/accuracy"), _last(reward, "heldout/length_only_accuracy")
    status = REWARD_MODEL.status(value)
    if status == "ok" and value is not None and length is not None and value <= length:
        status = "look"
    why = "A model at chance, or no better than preferring the longer answer, has not learnt what people meant."
    healthy = "above 0.55 and above longer-wins" + (f" ({length:.2f})" if length is not None else "")
    return Mark("reward model, held-out accuracy", value, "share", status, healthy, why)


def _explained(policy: Mapping[str, Series]) -> float | None:
    heads = ("score", "scalar", "critic")
    found = (_late(policy, f"value/explained_variance.{head}") for head in heads)
    return next((value for value in found if value is not None), None)


def _last(metrics: Mapping[str, Series], name: str) -> float | None:
    return float(metrics[name].values[-1]) if name in metrics else None


def _largest(metrics: Mapping[str, Series], name: str) -> float | None:
    return float(np.max(metrics[name].values)) if name in metrics else None


def _mean(metrics: Mapping[str, Series], name: str) -> float | None:
    return float(np.mean(metrics[name].values)) if name in metrics else None


def _late(metrics: Mapping[str, Series], name: str) -> float | None:
    """Mean over the last third of the steps."""
    if name not in metrics:
        return None
    values = metrics[name].values
    return float(np.mean(values[-max(1, round(len(values) * LATE)) :]))
