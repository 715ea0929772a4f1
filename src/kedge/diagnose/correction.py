"""The rule that proposes a correction for length drift. It reads only the trace.

Drift means both: the policy's answers have become clearly longer than the reference's, and on the same prompt the
reward paid for the verbose answer, late in the run or while length rose. Longer answers alone are not drift (they may
have been needed); a paying margin without longer answers has had no effect.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.finding import Evidence
from kedge.diagnose.ledger import reference_length
from kedge.diagnose.margin import Margin, Pairs, margin, probe_pairs
from kedge.trace.reader import Run

Array = NDArray[Any]
LENGTH_RATIO = 1.3  # healthy runs stay below it
LATE = 1 / 3  # of the probe steps, and of the run
RISEN = 0.9  # of the whole change in length
BETA_FACTOR = 3.0
BETA_CAP = 0.3  # reward per nat; above it the policy hardly leaves the reference
_BETA_SEARCH = 100.0  # reward per nat
MIN_PROBE_STEPS = 3
MIN_PROBES = 8


@dataclass(frozen=True)
class Proposal:
    """What the rule found and what it would change. `overrides` are `key=value` settings of the recipe."""

    drift: bool
    status: Literal["ok", "fail", "not_checked"]
    evidence: tuple[Evidence, ...]
    overrides: tuple[str, ...]
    words: tuple[str, ...]
    trade_offs: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The proposal as JSON can hold it."""
        return asdict(self)


class _Lengths(NamedTuple):
    """Mean response length over the reference's, after each of `steps` updates."""

    steps: Array
    ratios: Array
    source: str

    @property
    def late(self) -> float:
        last = self.ratios[self.steps >= self.steps[-1] * (1 - LATE)]
        return float(last[-2:].mean()) if self.source == "evaluation" else float(last.mean())

    @property
    def risen_at(self) -> int:
        """The first step at which length had made most of its change."""
        start, end = self.ratios[0], self.late
        return int(self.steps[np.argmax(self.ratios >= start + RISEN * (end - start))])


def propose(run: Run) -> Proposal:
    """Look for length drift in the trace of `run` and propose settings for another run from the same start."""
    pairs = list(probe_pairs(run))
    lengths = _lengths(run)
    reason = _too_little(pairs, lengths)
    if reason or lengths is None:
        return Proposal(False, "not_checked", (), (), (f"Length drift was not checked: {reason}.",), ())
    found = [one for one in map(margin, pairs) if one is not None]
    late = found[-max(1, round(len(found) * LATE)) :]
    rising = [one for one in found if one.step <= lengths.risen_at] or found[:1]
    longer = lengths.late > LENGTH_RATIO
    paying_late, paying_rising = _majority_pays(late), _majority_pays(rising)
    evidence = _evidence(lengths, late, paying_late, rising)
    if not (longer and (paying_late or paying_rising)):
        words = (_no_drift(lengths, late, longer),)
        return Proposal(False, "ok", evidence, (), words, ())
    return _correct(pairs[-len(late) :], lengths, late, evidence, paying_late)


def _lengths(run: Run) -> _Lengths | None:
    """Length ratios from evaluations, which use the same prompts for both; else from training steps and probes."""
    evaluation = run.metrics("evaluation")
    if {"evaluation/length", "evaluation/length_reference"} <= set(evaluation):
        own, reference = evaluation["evaluation/length"], evaluation["evaluation/length_reference"]
        if len(own.steps) == len(reference.steps) > 1 and reference.values.min() > 0:
            return _Lengths(own.steps, own.values / reference.values, "evaluation")
    training, usual = run.metrics("policy").get("length/mean"), reference_length(run)
    if training is None or not usual:
        return None
    return _Lengths(training.steps, training.values / usual, "training steps")


def _too_little(pairs: list[Pairs], lengths: _Lengths | None) -> str:
    if len(pairs) < MIN_PROBE_STEPS:
        return f"the run has {len(pairs)} probe steps and the rule needs {MIN_PROBE_STEPS}"
    fewest = min(len(one.score) for one in pairs)
    if fewest < MIN_PROBES:
        return f"{fewest} probe prompts have both answers scored and the rule needs {MIN_PROBES}"
    if lengths is None or not np.isfinite(lengths.ratios).all():
        return "no lengths to compare with the reference's"
    return ""


def _majority_pays(found: list[Margin]) -> bool:
    return sum(one.pays for one in found) * 2 > len(found)


def _evidence(lengths: _Lengths, late: list[Margin], paying_late: bool, rising: list[Margin]) -> tuple[Evidence, ...]:
    def mean(name: str) -> float:
        return float(np.mean([getattr(one, name) for one in late]))

    span = f"steps {late[0].step} to {late[-1].step}"
    return (
        Evidence("length over reference", lengths.late, "1", f"{lengths.source}, late; drift above {LENGTH_RATIO}"),
        Evidence("score margin", mean("score"), "normalised score", f"verbose minus brief, same prompt, {span}"),
        Evidence("KL margin", mean("kl"), "nats", f"verbose minus brief, {span}"),
        Evidence("KL cost", mean("kl_cost"), "reward", f"beta {late[-1].beta:.3g} times the KL margin, where above 0"),
        Evidence("length cost", mean("length_cost"), "reward", "length penalty times the length margin"),
        Evidence("net margin", mean("net"), "reward", f"{'above' if paying_late else 'not clearly above'} 0, {span}"),
        Evidence("net margin, lower end", mean("low"), "reward", "95% interval, prompts resampled"),
        Evidence("prompts that pay", mean("share_positive"), "share", "net margin above 0"),
        Evidence("probe steps that paid while length rose", sum(one.pays for one in rising), f"of {len(rising)}"),
    )


def _no_drift(lengths: _Lengths, late: list[Margin], longer: bool) -> str:
    net = float(np.mean([one.net for one in late]))
    if longer:
        return (
            f"No drift found: answers are {lengths.late:.2f} times as long as the reference's, but on the same prompt "
            f"the reward did not clearly pay for the verbose answer (net {net:+.2f} reward)."
        )
    return (
        f"No length drift found: answers are {lengths.late:.2f} times as long as the reference's (drift above "
        f"{LENGTH_RATIO}); the late net margin of verbose answers is {net:+.2f} reward. Nothing is proposed."
    )


def _correct(
    pairs: list[Pairs], lengths: _Lengths, late: list[Margin], evidence: tuple[Evidence, ...], paying_late: bool
) -> Proposal:
    old_beta, old_penalty = pairs[-1].beta, pairs[-1].penalty
    slope = score_slope(pairs)
    penalty = max(_two_digits(slope), old_penalty)
    balance = balancing_beta(pairs)
    beta = max(old_beta, min(BETA_CAP, max(BETA_FACTOR * old_beta, balance)))
    beta = _two_digits(beta)
    net = float(np.mean([one.net for one in late]))
    when = "still pays" if paying_late else "paid while length rose"
    words = [
        f"Answers grew to {lengths.late:.2f} times the reference's length, and on the same prompt the reward {when} "
        f"for the verbose answer (late net margin {net:+.2f} reward).",
    ]
    overrides, trade_offs = [], []
    if penalty > 0:
        overrides.append(f"policy.length_penalty={penalty:.6g}")
        words.append(
            f"Within a prompt the score rises {slope:.3g} per token of the probe answers; a length penalty of "
            f"{penalty:.6g} reward per token takes that slope away."
        )
        trade_offs.append("The length penalty also taxes answers that need their length.")
    overrides += ["policy.kl.mode=fixed", f"policy.kl.beta={beta:.6g}"]
    words.append(_beta_words(old_beta, beta, balance))
    trade_offs.append("A larger beta slows every change, wanted ones too, and holds the score down.")
    trade_offs.append("Both treat the symptom; labels that do not favour length would treat the reward model.")
    found = (*evidence, Evidence("score slope", slope, "normalised score per token", "within prompt, late"))
    return Proposal(True, "fail", found, tuple(overrides), tuple(words), tuple(trade_offs))


def score_slope(pairs: list[Pairs]) -> float:
    """Score margin over length margin, both averaged over prompts and probe steps; score units per token."""
    length = float(np.mean(np.concatenate([one.length for one in pairs])))
    score = float(np.mean(np.concatenate([one.score for one in pairs])))
    return score / length if length > 0 else 0.0


def balancing_beta(pairs: list[Pairs]) -> float:
    """The beta at which the median over prompts of score margin - beta * max(KL margin, 0) reaches 0, by bisection.

    0 when the median is not above 0 without any KL; infinite when it is above 0 even at `_BETA_SEARCH`, because the
    verbose answer costs hardly any KL on half of the prompts.
    """
    score = np.concatenate([one.score for one in pairs])
    kl = np.maximum(np.concatenate([one.kl for one in pairs]), 0.0)

    def pays(beta: float) -> bool:
        return bool(np.median(score - beta * kl) > 0)

    low, high = 0.0, _BETA_SEARCH
    if not pays(low):
        return 0.0
    if pays(high):
        return math.inf
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return high


def _beta_words(old: float, new: float, balance: float) -> str:
    if math.isinf(balance):
        return (
            f"Beta goes from {old:.3g} to {new:.3g} reward per nat, fixed and capped at {BETA_CAP:g}: on half of the "
            f"prompts the verbose answer costs no more KL than the brief one, so KL alone would not hold it back."
        )
    if new >= balance * 0.99:
        return (
            f"Beta goes from {old:.3g} to {new:.3g} reward per nat, fixed: {balance:.2g} would make the verbose answer "
            f"stop paying on half of the prompts by KL alone, and a rise below {BETA_FACTOR:g} times has little effect."
        )
    return (
        f"Beta goes from {old:.3g} to {new:.3g} reward per nat, fixed and capped at {BETA_CAP:g}: {balance:.2g} would "
        f"be needed to make the verbose answer stop paying by KL alone, and would freeze the policy."
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")
