"""The reward pays for a feature of form: refusals, hedges, certainty, lists, repetition.

**What.** What is said plays a smaller part in the score than a feature of how it is said, and the policy takes the
feature up, or the payment began within the run. The finding names the feature.

**Why it matters.** Features of form are cheap to change, so the policy learns them before it learns anything else, and
the score rises while answers get worse.

**How.** Two ways to fail, features being those of `diagnose/features.py` but length, which is length_reward's. *Pays
and grows*: at an evaluation more answers of the policy than of the reference have the feature, and the difference in
score between policy and reference answers to the same prompt, less β times the difference in KL, rises with the
difference in the feature, length and all other features held fixed (three standard errors). The strength is the smaller
of growth / 0.25 of all answers and the feature's part in the whole gain / 0.3. *Began to pay*: the scores of fixed
texts changed between two looks, and the change rises with the feature, length and the others held fixed; the strength
is its price / 0.5 score, less where it explains under 15% of the change. Only the side of the policy that it moved to
is seen: a feature that neither has is not.

**False alarms.** A feature that is right: prompts that should be declined, lists where lists are asked for. Among
prompts, policy and reference differ most where the policy improved, so a right feature is paid, too; it then grows
by little. A reward model replaced by one that is right to value the feature.

**Remedy.** Pairs that differ in the feature and agree in content; a rule that takes its price off; a larger β.

**References.** Chen et al. 2024 (disentangling length from quality); mechanism M14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from kedge.diagnose.behaviour import STRONGEST, beta_at, firmer, present
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.repriced import Price, Repricing, repricings
from kedge.diagnose.texts import HELD, NAMES, differences, slope
from kedge.diagnose.view import View

GROWN = 0.25  # of all answers: a right feature grows, too, by up to 0.14 in the built-in world
PART = 0.3  # of the gain in score
PRICE = 0.5  # score, of standard deviation 1 on the reference's answers
EXPLAINED = 0.15  # share of a change in scores
ERRORS = 3.0  # standard errors
UNIT: Mapping[str, float] = {"repetition": 0.2}  # what counts as one more of a feature; others 1


class _Paid(NamedTuple):
    """A feature that the policy's answers have more often than the reference's, at one evaluation."""

    name: str
    step: int
    share: float  # of the policy's answers
    usual: float  # of the reference's
    gross: float  # score per unit
    price: float  # the same, net of KL
    error: float
    part: float  # of the gain in score

    @property
    def grown(self) -> float:
        return self.share - self.usual

    @property
    def strength(self) -> float:
        if not self.price > ERRORS * self.error:
            return 0.0
        return max(0.0, min(self.grown / GROWN, self.part / PART, STRONGEST))


class _Began(NamedTuple):
    """A feature that a change of scores pays for."""

    name: str
    change: Repricing
    price: Price

    @property
    def step(self) -> int:
        return self.change.step

    @property
    def strength(self) -> float:
        if self.price.value < ERRORS * self.price.error:
            return 0.0
        weight = min(1.0, self.price.explained / EXPLAINED)
        return max(0.0, min(STRONGEST, self.price.value * UNIT.get(self.name, 1.0) / PRICE * weight))


def judge(view: View) -> Finding:
    """The feature that is paid most, by growth or by a change of scores."""
    known = [one for sample in view.samples for one in _paid(sample, beta_at(view, int(sample["step"])))]
    starts = list(_began(view))
    if not known and not any(probes.features for probes in view.probes):
        return not_checked("feature_reward", "no evaluation and no probe holds texts, so their features are not known")
    found: list[_Paid | _Began] = [*known, *starts]
    best = max(found, key=lambda one: one.strength, default=None)
    if best is None:
        return Finding("feature_reward", "ok", "No feature of form is more frequent, and no score has changed for one.")
    mine = [one for one in found if one.name == best.name]
    loud = [one.step for one in mine if one.strength >= 1]
    finding = Finding(
        "feature_reward",
        "ok",
        _summary(best),
        evidence=tuple(_evidence(mine)),
        onset=min(loud, default=None),
        mechanism=f"An answer with {best.name} scores more than one without, and its KL does not take that back.",
        refuted_by=f"people prefer the answers with {best.name} when content is the same",
        remedies=_remedies(view, best),
        subject=best.name,
    )
    return graded(finding, best.strength)


def _paid(sample: Mapping[str, Any], beta: float) -> Iterator[_Paid]:
    gaps = differences(sample, HELD)
    if gaps is None:
        return
    gain = np.asarray(sample["score"], dtype=np.float64) - np.asarray(sample["reference_score"], dtype=np.float64)
    spent = np.asarray(sample["kl"], dtype=np.float64) - np.asarray(sample["reference_kl"], dtype=np.float64)
    cost = np.maximum(beta * spent, 0.0) if math.isfinite(beta) and np.isfinite(spent).all() else np.zeros(len(gain))
    whole = float(gain.mean())
    for at, name in enumerate(NAMES, start=1):
        own, usual = present(sample, name), present(sample, name, reference=True)
        if own is None or usual is None or not np.isfinite(gain).all():
            continue
        others = np.delete(gaps, at, axis=1)
        price, error = slope(gain - cost, gaps[:, at], others)
        gross, _ = slope(gain, gaps[:, at], others)
        if math.isfinite(price):
            part = gross * float(gaps[:, at].mean()) / whole if whole > 0 else 0.0
            yield _Paid(name, int(sample["step"]), float(own.mean()), float(usual.mean()), gross, price, error, part)


def _began(view: View) -> Iterator[_Began]:
    for change in repricings(view):
        if not change.rescaled:
            yield from (_Began(name, change, price) for name, price in change.prices.items() if name != "length")


def _summary(best: _Paid | _Began) -> str:
    if isinstance(best, _Began):
        change = best.change
        return (
            f"Between steps {change.before} and {change.step} the scores of {change.source} changed by "
            f"{best.price.value:+.2g} for one more of {best.name}."
        )
    return (
        f"After step {best.step} {best.share:.0%} of the answers have {best.name}, {best.usual:.0%} of the "
        f"reference's. One more is worth {best.gross:+.2g} score, which accounts for {best.part:.0%} of the gain in "
        f"score; what KL takes off leaves {best.price:+.2g} reward."
    )


def _evidence(found: list[_Paid | _Began]) -> Iterator[Evidence]:
    paid = [one for one in found if isinstance(one, _Paid)]
    began = max((one for one in found if isinstance(one, _Began)), key=lambda one: one.strength, default=None)
    if paid:
        best = max(paid, key=lambda one: (one.strength, one.step))
        note = f"after step {best.step}, policy minus reference; fails from {GROWN:g}"
        yield Evidence(f"answers with {best.name}", best.grown, "share", note, "samples")
        note = f"± {best.error:.2g}, same prompt, length and other features held fixed"
        yield Evidence(f"price of {best.name}, net of KL", best.price, "reward", note, "samples")
        yield Evidence("part in the gain of score", best.part, "share", f"fails from {PART:g}", "samples")
    if began is not None:
        note = f"± {began.price.error:.2g}, {began.change.texts} of {began.change.source}, step {began.step}"
        yield Evidence(f"change of the price of {began.name}", began.price.value, "normalised score", note)
        yield Evidence("change explained by it", began.price.explained, "share", "of its variance, beyond the others")


def _remedies(view: View, best: _Paid | _Began) -> tuple[Remedy, ...]:
    found = [
        Remedy(
            (),
            f"pairs of the same content, one with {best.name} and one without, teach the reward model its worth",
            "labels, and a reward model trained anew",
        ),
        firmer(view),
    ]
    if isinstance(best, _Began):
        effect = f"the policy goes on from step {best.change.before} with the reward model that scored it until then"
        found.insert(0, Remedy((), effect, "what was learnt since then is lost"))
    return tuple(found)


CHECK = Check(
    "feature_reward",
    "reward pays for a feature of form",
    Kind.CAUSE,
    ("M14",),
    judge,
    needs=("probes | samples",),
    validated=True,
)
