"""The unit of the score changed: texts that did not change are scored on another scale.

**What.** What one unit of the score is worth is not what it was. The reward model was replaced or retrained, its
normaliser drifts, or its output is scaled.

**Why it matters.** The policy weighs score against β times KL. A score that is five times as large is a β that is a
fifth: what held the policy before holds it no more. With a normaliser that follows the policy, β falls and rises with
the spread of its answers.

**How.** Fixed texts say it exactly: the scores of the probe answers, and else of the reference's answers to the
evaluation prompts, are regressed on their own first scores. A reward model that stays gives slope 1 to rounding. The
logarithm of the slope is taken over log 1.5. Where a line leaves more than a fifth, the score is another one and not
the same in another unit, which is for other checks. Between evaluations, or where they keep the scores of their
start, the responses speak: over two steps both the standard deviation and the root mean square of the score, in
reward, lie above all of the five steps before, the smaller of the two by a factor of 1.8. A fall has to be by a
factor of 3.2, because the spread of scores falls while a policy learns. An offset alone moves nothing that the
advantage keeps, and does not fail.

**False alarms.** A prompt mix that changes at a step may move the spread of the score; fixed texts show that it is no
change of unit. Retraining the reward model on purpose is found: then β should be set anew.

**Remedy.** Normalise the score once, on answers of the reference, and keep it; scale β with the score.

**References.** Ziegler et al. 2019, section 2.1.2 (mean 0 and variance 1 on reference samples); β_eff = β σ.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import channel, weight
from kedge.diagnose.steps import aligned, first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
SLOPE = math.log(1.5)
RISE, FALL = math.log(1.8), math.log(3.2)
AFTER, PAST = 2, 5  # steps
WORTH_SAYING = 0.7  # of a failure
TEXTS = 8
AFFINE = 0.2  # deviation that a line leaves, over its own
LARGE = 1.5  # deviation of the advantage from which the scale itself is the matter, see unscaled_reward
DEFERS = 0.95
CAP = 10.0


class _Rescored(NamedTuple):
    """Fixed texts after `step` updates: the slope of their scores on their first scores, and the rest about it."""

    step: int
    slope: float
    rest: float  # deviation about the line over that of the line

    @property
    def affine(self) -> bool:
        """The scores are the first ones in another unit, clipping aside."""
        return self.slope > 0 and self.rest < AFFINE


def facts(step: StepTrace) -> Facts:
    """The spread and the size of the score over responses, in reward."""
    score, weights = channel(step, "score"), weight(step, "score")
    if score is None or weights is None:
        return {}
    sums = weights * score.sum(axis=1)
    mask = step.response_mask
    return {
        "reward_unit/deviation": float(sums.std()),
        "reward_unit/size": float(np.sqrt((sums**2).mean())),
        "reward_unit/advantage": float(step.advantage()[mask].std()) if mask.any() else np.nan,
    }


def judge(view: View) -> Finding:
    """The stronger of what fixed texts say and of a jump of the responses' scores."""
    spread, texts = view.fact("reward_unit/deviation"), _fixed_texts(view)
    enough = spread is not None and len(spread.values) >= AFTER + PAST
    if not enough and len(texts) < 2:
        return not_checked("reward_unit", f"no text was scored twice, and fewer than {AFTER + PAST} steps hold scores")
    by_text = [abs(math.log(max(one.slope, 1e-3))) / SLOPE if one.affine else 0.0 for one in texts]
    slope = texts[int(np.argmax(by_text))].slope if texts else 1.0
    onsets = [one.step for one, value in zip(texts, by_text, strict=True) if value >= 1][:1]
    evidence, factor, jump = [], slope, 0.0
    if texts:
        rest = f"scores on the first ones; what a line leaves: {texts[-1].rest:.2g}"
        evidence.append(Evidence("slope of fixed texts", slope, "1", rest, "probes, samples"))
    if enough and spread is not None:
        jumps = _jumps(spread.values, aligned(view.facts.get("reward_unit/size"), spread.steps))
        counted = np.where(jumps > 0, jumps / RISE, np.abs(jumps) / FALL)
        counted[_otherwise(texts, spread.steps)] = 0.0
        jump = float(counted.max(initial=0.0))
        if jump > max(by_text, default=0.0):
            factor = math.exp(float(jumps[int(np.argmax(counted))]))
        onset = first_where(spread, counted >= 1)
        onsets += [onset] if onset is not None else []
        last = float(spread.values[-1])
        evidence.append(Evidence("spread of the score", last, "reward", "last step", "reward.score"))
    strength = min(CAP, max(jump, *by_text, 0.0))
    advantage = view.fact("reward_unit/advantage")
    if advantage is not None and float(np.median(advantage.values[-AFTER:])) > LARGE:
        strength = min(strength, DEFERS)
    changed = f"One unit of the score became about {factor:.2g} units."
    steady = "Fixed texts keep their scores, and the spread of the score does not jump."
    return graded(
        Finding(
            "reward_unit",
            "ok",
            changed if strength >= WORTH_SAYING else steady,
            tuple(evidence),
            onset=min(onsets) if onsets else None,
            mechanism=f"Beta was set for another unit: against the score a nat costs 1/{factor:.2g} of what it did.",
            refuted_by="the same texts, scored again, have the scores they had",
            remedies=_remedies(view, factor),
        ),
        strength,
    )


def _otherwise(texts: list[_Rescored], steps: Array) -> NDArray[np.bool_]:
    """The steps up to which fixed texts show that the score is another one, and not the same in another unit."""
    replaced = [one.step for one in texts if not one.affine]
    return np.asarray(steps > min(replaced) - PAST if replaced else np.zeros(len(steps), dtype=bool))


def _fixed_texts(view: View) -> list[_Rescored]:
    """Every time that fixed texts were scored, in order, from the probes or else from the evaluations."""
    first = view.probes[0] if view.probes else None
    if first is not None and len(first.score) >= TEXTS:
        same = [one for one in view.probes if np.array_equal(one.length, first.length)]
        found = [_rescored(one.step, first.score, one.score) for one in same]
        return [one for one in found if one is not None]
    samples = [one for one in view.samples if len(one["reference_score"]) >= TEXTS]
    same_texts = [one for one in samples if np.array_equal(one["reference_length"], samples[0]["reference_length"])]
    found = [_rescored(one["step"], samples[0]["reference_score"], one["reference_score"]) for one in same_texts]
    return [one for one in found if one is not None]


def _rescored(step: int, first: Array, now: Array) -> _Rescored | None:
    """Regression of the scores `now` on the `first` ones, of texts that have both."""
    both = np.isfinite(first) & np.isfinite(now)
    if both.sum() < TEXTS or np.ptp(first[both]) < 1e-6:
        return None
    x, y = first[both] - first[both].mean(), now[both] - now[both].mean()
    slope = float((x * y).sum() / (x**2).sum())
    return _Rescored(int(step), slope, float((y - slope * x).std() / max(abs(slope) * x.std(), 1e-9)))


def _jumps(spread: Array, size: Array) -> Array:
    """At each entry the log of the last `AFTER` entries over the `PAST` before them, where they lie apart; else 0.

    Of spread and size the smaller change counts, and both have to be of one sign: a factor on the score moves both.
    """
    found = [_apart(np.log(np.maximum(values, 1e-9))) for values in (spread, size)]
    same = np.sign(found[0]) == np.sign(found[1])
    return np.where(same, np.sign(found[0]) * np.minimum(np.abs(found[0]), np.abs(found[1])), 0.0)


def _apart(values: Array) -> Array:
    found = np.zeros(len(values))
    for index in range(AFTER + PAST - 1, len(values)):
        now, past = values[index - AFTER + 1 : index + 1], values[index - AFTER - PAST + 1 : index - AFTER + 1]
        if now.min() > past.max() or now.max() < past.min():
            found[index] = float(np.median(now) - np.median(past))
    return found


def _remedies(view: View, factor: float) -> tuple[Remedy, ...]:
    beta = view.metric("kl/beta")
    override = (f"policy.kl.beta={float(beta.values[-1]) * factor:.2g}",) if beta is not None else ()
    return (
        Remedy(override, "a nat costs again what it did against the score", "none: it is the same problem as before"),
        Remedy(
            ('policy.score_normalisation="frozen"',),
            "the score is measured in deviations over the reference's answers, fixed at the start",
            "none, as long as the reward model stays",
        ),
    )


CHECK = Check(
    "reward_unit", "the score's unit changed", Kind.INTEGRITY, ("M19",), judge, facts, needs=("score",), validated=True
)
