"""The score rises while another judge of the same answers sees them get worse.

**What.** The score against a second scorer: a member of the reward model, a rule, or what people say.

**Why it matters.** It is what reward hacking means. One scorer alone cannot show it.

**How.** Second scorers are the members of a reward model of several, the recipe's rules whose weight is not negative,
and joined labels named `human`. Score and second scorer are smoothed over three steps. Up to each step Mann's test is
made of both: it counts where the score rises and the other falls, each with p < 0.05, by as much as the other has
fallen from its highest value, over 0.5 of its standard deviation among the responses of the first steps.

**False alarms.** A rule that measures something nobody minds losing. Many rules: one in so many falls by chance.

**Remedy.** Stop at the step where the second scorer was best; let both scorers judge together.

**References.** Gao et al. 2023; Pan et al. 2022; Skalse et al. 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kedge.diagnose.behaviour import STRONGEST, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.steps import aligned, trends
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

FALL = 0.5  # standard deviations of the second scorer
SURE = 0.05
FEWEST = 8  # steps
SMOOTH = 3  # steps
MEMBERS = 8  # members that are followed
SHAPING = ("overlong", "over_target", "repetition", "missing_eos", "length")


class _Second(NamedTuple):
    """Another judge of the answers, its mean at each step and its spread at the start."""

    name: str
    mean: Series
    spread: float


def facts(step: StepTrace) -> Facts:
    """Mean and spread of each member's score."""
    found = {}
    for member in range(min(MEMBERS, step.members.shape[1])):
        scores = step.members[:, member]
        found[f"reward_hacking/member.{member}"] = float(scores.mean())
        found[f"reward_hacking/spread.{member}"] = float(scores.std())
    return found


def judge(view: View) -> Finding:
    """The second scorer that fell most while the score rose."""
    score = view.metric("score/mean")
    seconds = [one for one in _seconds(view) if len(one.mean.values) >= FEWEST and one.spread > 0]
    if score is None or not seconds:
        reason = "there is no second scorer: no member of a reward model of several, no rule, no joined label `human`"
        return not_checked("reward_hacking", reason)
    found = [(one, *_divergence(score, one)) for one in seconds]
    worst, strength, onset = max(found, key=lambda each: each[1])
    ends = smooth(worst.mean, SMOOTH).values
    finding = Finding(
        "reward_hacking",
        "ok",
        f"While the score went from {score.values[0]:.2f} to {score.values[-1]:.2f}, {worst.name} went from "
        f"{ends[0]:.2f} to {ends[-1]:.2f}.",
        evidence=(
            Evidence(f"fall of {worst.name}", strength * FALL, "standard deviations", f"fails from {FALL:g}"),
            Evidence("second scorers", len(seconds), "count", ", ".join(one.name for one in seconds)),
        ),
        onset=onset,
        mechanism="The policy has learnt what the score rewards and the other judge does not.",
        refuted_by="people agree with the score on the answers of the last steps",
        remedies=(
            Remedy((), "the checkpoint at which the second scorer was highest is the better policy", "score"),
            Remedy(
                ("reward.members=3", "reward.aggregate=worst"), "all members must rise together", "three reward models"
            ),
        ),
    )
    return graded(finding, strength)


def _seconds(view: View) -> Iterator[_Second]:
    for member in range(MEMBERS):
        mean, spread = (view.fact(f"reward_hacking/{name}.{member}") for name in ("member", "spread"))
        if mean is not None and spread is not None:
            yield _Second(f"member {member}", mean, float(np.median(spread.values[:SMOOTH])))
    for name in view.metrics.get("policy", {}):
        rule = name.removeprefix("rewards/").removesuffix("/mean")
        if name != f"rewards/{rule}/mean" or rule in SHAPING:
            continue
        mean, spread, weight = (view.metric(each) for each in (name, f"rewards/{rule}/std", f"weight/{rule}"))
        if mean is not None and spread is not None and (weight is None or weight.values[-1] >= 0):
            yield _Second(f"rule {rule}", mean, float(np.median(spread.values[:SMOOTH])))
    mean, spread = view.fact("labels/human"), view.fact("labels/human_spread")
    if mean is not None and spread is not None:
        yield _Second("people's judgement", mean, float(np.median(spread.values[:SMOOTH])))


def _divergence(score: Series, second: _Second) -> tuple[float, int | None]:
    """The largest fall while the score rose, over FALL, and the first step at which it was FALL."""
    other = smooth(second.mean, SMOOTH)
    rising = aligned(smooth(score, SMOOTH), other.steps)
    strengths = np.zeros(len(other.steps))
    ups, downs = trends(rising), trends(other.values)
    for at in range(FEWEST - 1, len(other.steps)):
        up, down = ups[at], downs[at]
        if up.tau > 0 > down.tau and max(up.p, down.p) < SURE:
            fall = float(other.values[: at + 1].max() - other.values[at]) / second.spread
            strengths[at] = min(STRONGEST, fall / FALL)
    loud = np.flatnonzero(strengths >= 1)
    return float(strengths.max()), int(other.steps[loud[0]]) if len(loud) else None


CHECK = Check(
    "reward_hacking",
    "another judge disagrees with the score",
    Kind.SYMPTOM,
    (),
    judge,
    facts,
    needs=("members | labels",),
)
