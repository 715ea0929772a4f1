"""Ending is not learnt as it should be: EOS is left out, or cut answers are scored as if they were complete.

**What.** The token that ends a response is not part of what is trained; or a response that ran into the token budget
is paid like one that ended; or more and more responses do.

**Why it matters.** When to stop is one token's decision. If that token is masked nobody teaches it, and length drifts
with whatever else moves. If a cut answer costs nothing, a reward model that likes long answers has no end to its
liking but the budget.

**How.** Five numbers of every step. EOS in the mask: for a response that ended, log π of its last token is log π of
EOS at that place; the share for which it is. EOS in the loss: the share of those ends that are not active though their
ratio stands inside the clip; both fail at a quarter. Cut answers: the weight of the `missing_eos` channel, against
what it was at the start, and, where it is 0 and more than 5% of the responses are cut, how much less a cut response is
paid than one that ended. Rows of other trainers have no such channel: there it also counts that on the same prompt a
cut response is paid more than one that ended on at least 40% of pairs. Truncation: the share of responses that did not
end, above its own earlier level by 10 points. Each counts over its own threshold, on two steps in a row.

**False alarms.** Responses that stop at another token (a stop string) end without EOS. A budget that was lowered on
purpose cuts more of them. A weight of 0 from the start on answers that all end does no harm and is not held against a
run.

**Remedy.** Keep EOS in the mask and the loss; take a fixed amount from responses that do not end; raise the budget.

**References.** Ziegler et al. 2019 and Huang et al. 2024 (the EOS trick); Yu et al. 2025 (soft overlong penalty).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import at_last, moved, paid, weight
from kedge.diagnose.steps import aligned, before, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
SAME = 1e-3  # nats: the same log-probability, as float32
OUT = 0.25  # share of ends that are not EOS, or not trained
CLIP = 0.2  # the usual one, where the trace does not say
GONE = 0.5  # of the penalty
CUT = 0.05  # share of responses that run into the budget
AT_MOST = 1.2
OFTEN = 0.4  # of pairs of a cut response and one that ended; a half where nothing tells them apart
RISE = 0.10  # the same, above its earlier level
WINDOW, LEAST = 20, 5
TIMES = 2
CAP = 10.0
CASES = ("mask", "loss", "weight", "paid", "rise")
_FACTS = ("eos", "untrained", "weight", "costs", "above")


def facts(step: StepTrace) -> Facts:
    """Whether the ends are EOS and trained, and what cut responses cost."""
    last, ended = at_last(step), step.ended.astype(bool)
    found = {"ending/cut": float((~ended).mean())}
    ends = last & ended[:, None]
    if ends.any() and "old_eos_logprob" not in step.absent and step.tokens["old_eos_logprob"][ends].any():
        gap = np.abs(step.tokens["old_logprob"] - step.tokens["old_eos_logprob"])[ends]
        found["ending/eos"] = float((gap < SAME).mean())
    if ends.any() and not step.absent & {"active", "old_logprob", "new_logprob"}:
        found["ending/untrained"] = float((~step.active & (np.abs(moved(step)) < _clip(step) / 2))[ends].mean())
    weights = weight(step, "missing_eos")
    if weights is not None:
        found["ending/weight"] = float(weights.mean())
    if ended.any() and not ended.all() and "score" not in step.absent:
        reward = paid(step)
        found["ending/costs"] = float(reward[ended].mean() - reward[~ended].mean())
        found["ending/above"] = _above(reward, ended, None if "group" in step.absent else step.group)
    return found


def _above(reward: Array, ended: Array, group: Array | None) -> float:
    """How often a cut response is paid more than one that ended, on the same prompt where some prompt has both."""
    pairs = ~ended[:, None] & ended[None, :]
    if group is not None and (matched := pairs & (group[:, None] == group[None, :])).any():
        pairs = matched
    return float((reward[:, None] > reward[None, :])[pairs].mean())


def _clip(step: StepTrace) -> float:
    """How far a log-probability may move before the clip holds it, nats."""
    clip = step.learning.get("clip", CLIP)
    return math.log1p(CLIP if clip is None else float(clip))


def judge(view: View) -> Finding:
    """The strongest of the five cases."""
    cut = view.fact("ending/cut")
    if cut is None or len(cut.steps) < TIMES:
        return not_checked("ending", f"fewer than {TIMES} steps hold responses")
    fact = {name: aligned(view.facts.get(f"ending/{name}"), cut.steps) for name in _FACTS}
    cases = {
        "mask": (1 - fact["eos"]) / OUT,
        "loss": fact["untrained"] / OUT,
        "weight": _weight(fact["weight"], cut.values),
        "paid": _paid(fact["weight"], fact["costs"], fact["above"], cut.values),
        "rise": _rise(cut.values),
    }
    lasted = {name: lowest_of(np.nan_to_num(values), TIMES) for name, values in cases.items()}
    case = max(CASES, key=lambda name: float(lasted[name].max()))
    strength = np.max(list(lasted.values()), axis=0)
    at = int(np.argmax(strength))
    value = max(0.0, float(strength[at]))
    evidence = [Evidence("responses cut", float(cut.values[at]), "share", f"step {cut.steps[at]}", "ended")]
    for name, title, unit, where in _SHOWN:
        if np.isfinite(fact[name]).any():
            known = Series(cut.steps[np.isfinite(fact[name])], fact[name][np.isfinite(fact[name])])
            evidence.append(Evidence(title, float(known.values[-1]), unit, f"step {known.steps[-1]}", where))
    return graded(
        Finding(
            "ending",
            "ok",
            _WORDS[case] if value >= 0.7 else "Ends are EOS, trained, and cut responses are told from complete ones.",
            tuple(evidence),
            onset=first_where(cut, strength >= 1),
            mechanism=_MECHANISMS[case],
            refuted_by="the share of responses that end stays as it was in a short fork with the setting put back",
            remedies=_REMEDIES[case],
        ),
        min(CAP, value),
    )


def _weight(weight: Array, cut: Array) -> Array:
    """The penalty fell from its first value: 1.5 for its end alone, and the share of cut responses in tenths."""
    first = weight[np.isfinite(weight)][:1]
    if not len(first) or first[0] >= 0:
        return np.zeros(len(weight))
    fallen = (first[0] - weight) / first[0]  # 0 as at the start, 1 where it is gone
    return np.where(fallen > GONE, 1.5 * fallen + _mean_so_far(cut) / RISE, 0.0)


def _paid(weight: Array, costs: Array, above: Array, cut: Array) -> Array:
    """No penalty, many cut responses, and these are paid as much as others.

    Where no channel says what a missing end costs, a penalty may be inside the score: then it shows in how often a cut
    response is paid more than one that ended, which a difference of means between kinds of answers does not hide.
    """
    free, share = np.nan_to_num(weight, nan=0.0) >= 0, _mean_so_far(cut)
    alike = (_mean_so_far(np.nan_to_num(costs)) <= 0) | (
        np.isnan(weight) & (_mean_so_far(np.nan_to_num(above)) >= OFTEN)
    )
    return np.where(free & alike & (share > CUT), share / (2 * CUT), 0.0)


def _rise(cut: Array) -> Array:
    """Above the median of the run's past by `RISE`; never strong, because it is what longer answers come to."""
    usual = before(cut, window=WINDOW, least=LEAST, lag=1).median
    return np.minimum(np.nan_to_num((cut - usual) / RISE), AT_MOST)


def _mean_so_far(values: Array) -> Array:
    return np.array([values[max(0, i - LEAST + 1) : i + 1].mean() for i in range(len(values))])


_SHOWN = (
    ("eos", "ends that are EOS", "share", "old_eos_logprob"),
    ("untrained", "ends without a gradient", "share", "active, new_logprob"),
    ("weight", "weight of a missing end", "reward", "weight.missing_eos"),
    ("costs", "what being cut costs", "reward", "reward.*"),
    ("above", "cut responses paid more than ended ones", "share of pairs", "reward.*"),
)
_WORDS = {
    "mask": "Responses that ended have no EOS among the tokens that are trained.",
    "loss": "The token that ends a response has no part in the loss.",
    "weight": "Responses that are cut off are scored as if they were complete: the penalty was taken away.",
    "paid": "Responses that are cut off are paid as much as those that end.",
    "rise": "More responses run into the token budget than before.",
}
_MECHANISMS = {
    "mask": "Nothing teaches when to stop; how often the policy stops follows what else the update moves.",
    "loss": "Nothing teaches when to stop; how often the policy stops follows what else the update moves.",
    "weight": "Not ending costs nothing any more, so a score that likes length has no end but the budget.",
    "paid": "Not ending costs nothing, so a score that likes length has no end but the budget.",
    "rise": "Answers grow towards the budget; what is cut is scored unfinished.",
}
_PENALTY = (
    Remedy(
        ("policy.missing_eos_penalty=1",),
        "a response that never ends loses 1 reward",
        "answers that need more than the budget lose it, too",
    ),
    Remedy(
        ("policy.overlong_penalty=1",),
        "the reward falls over the last tokens of the budget, so that ending early pays before the cut",
        "long answers that end are charged",
    ),
)
_MASK = (
    Remedy((), "the mask and the loss reach through EOS, so that stopping gets the response's advantage", "none"),
    *_PENALTY[:1],
)
_REMEDIES = {"mask": _MASK, "loss": _MASK, "weight": _PENALTY, "paid": _PENALTY, "rise": _PENALTY}

CHECK = Check(
    "ending", "ending is not learnt", Kind.INTEGRITY, ("M10",), judge, facts, needs=("ended",), validated=True
)
