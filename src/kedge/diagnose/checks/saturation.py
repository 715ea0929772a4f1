"""A clamp holds many numbers at its bound, and what lies beyond it teaches nothing.

**What.** Scores stand at the limit that clips them, or token log-ratios at the limit of a clamp.

**Why it matters.** At the bound the reward no longer grows with what it measures: among answers at the limit no
gradient tells better from worse, and a KL term at its clamp does not pull at all on the tokens that went furthest.

**How.** Scores: the share of a step's responses whose score is the step's largest or smallest to the bit, where that
extreme is the same over five steps. Different answers do not score alike to the bit, step after step, unless
something holds them. Log-ratios: the share of tokens whose kl reward is the largest in size to the bit, where log π −
log π_ref itself is larger there. It fails where, on five steps in a row, 5% of the scores or 0.5% of the tokens are
held. (What the ratio's clip silences is step_size's.)

**False alarms.** A rule that pays 0 or 1 has two values by nature: only the `score` channel is looked at. A score
that takes few values, such as a grade, is told by its number of values and passed over.

**Remedy.** A wider limit, where the outliers are real; a squashing function, which keeps an order, where they are
not.

**References.** Clamps of ±10 and ±20 on log-ratios in public trainers; score clipping in Ziegler et al. 2019.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import channel, log_ratio
from kedge.diagnose.steps import aligned, first_where, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

Array = NDArray[Any]
SCORES, TOKENS = 0.05, 0.005  # shares
TIMES = 5  # steps in a row
VALUES = 10  # a score that takes fewer is a grade
CAP = 10.0


def facts(step: StepTrace) -> Facts:
    """The extreme scores and the shares that stand at them."""
    found: dict[str, float] = {}
    score = channel(step, "score")
    if score is not None:
        sums = score.sum(axis=1)
        for name, extreme in (("top", sums.max()), ("bottom", sums.min())):
            found[f"saturation/{name}"] = float(extreme)
            found[f"saturation/{name}_share"] = float((sums == extreme).mean())
        found["saturation/values"] = float(len(np.unique(sums)))
    paid = channel(step, "kl")
    if paid is not None and step.response_mask.any():
        size = np.abs(np.where(step.response_mask, paid, 0.0))
        held = (size == size.max()) & (np.abs(log_ratio(step)) > size * 1.001 + 1e-4)
        found["saturation/tokens"] = float(held[step.response_mask].mean())
    return found


def judge(view: View) -> Finding:
    """The largest share that stood at one bound for `TIMES` steps."""
    top = view.fact("saturation/top")
    if top is None or len(top.steps) < TIMES:
        return not_checked("saturation", f"fewer than {TIMES} steps hold scores")
    shares = {name: _held(view, name, top.steps) for name in ("top", "bottom")}
    tokens = np.nan_to_num(aligned(view.facts.get("saturation/tokens"), top.steps))
    counted = {name: share / SCORES for name, share in shares.items()} | {"tokens": tokens / TOKENS}
    lasted = {name: lowest_of(values, TIMES) for name, values in counted.items()}
    strength = np.maximum(np.max(list(lasted.values()), axis=0), 0.0)
    at = int(np.argmax(strength))
    worst = max(lasted, key=lambda name: float(lasted[name][at]))
    extreme = float(aligned(view.facts.get(f"saturation/{worst}"), top.steps)[at]) if worst != "tokens" else np.nan
    held = f"{shares[worst][at]:.0%} of the scores stand at {extreme:.3g}." if worst != "tokens" else ""
    held = held or f"{tokens[at]:.1%} of the tokens' log-ratios stand at a clamp."
    return graded(
        Finding(
            "saturation",
            "ok",
            held if strength[at] >= 0.7 else "No score and no log-ratio stands at a bound.",
            (
                Evidence(
                    "scores at the top", float(shares["top"][at]), "share", f"step {top.steps[at]}", "reward.score"
                ),
                Evidence("scores at the bottom", float(shares["bottom"][at]), "share", "", "reward.score"),
                Evidence("log-ratios at a clamp", float(tokens[at]), "share of tokens", "", "reward.kl"),
            ),
            onset=first_where(top, strength >= 1),
            mechanism="Answers at the bound are worth the same, so nothing prefers the better of them.",
            refuted_by="the unclipped numbers of the same responses are equal, too",
            remedies=_remedies(extreme),
        ),
        float(min(CAP, strength[at])),
    )


def _held(view: View, name: str, steps: Array) -> Array:
    """The share at an extreme that is the same as a step earlier, else 0; 0 for a grade."""
    extreme = aligned(view.facts.get(f"saturation/{name}"), steps)
    share = aligned(view.facts.get(f"saturation/{name}_share"), steps)
    same = np.zeros(len(steps), dtype=bool)
    same[1:] = np.abs(np.diff(extreme)) <= 1e-6 * (1 + np.abs(extreme[1:]))
    values = aligned(view.facts.get("saturation/values"), steps)
    # Once a score has taken many values it is no grade; what holds nearly all of them later leaves few.
    many = np.maximum.accumulate(np.nan_to_num(values, nan=VALUES)) >= VALUES
    return np.where(same & many, np.nan_to_num(share), 0.0)


def _remedies(extreme: float) -> tuple[Remedy, ...]:
    wider = (f"policy.score_clip={2 * abs(extreme):.2g}",) if np.isfinite(extreme) and extreme else ()
    return (
        Remedy(wider, "scores differ again where they were held", "outliers of the reward model count in full"),
        Remedy((), "a logarithm or a logistic function of the score keeps its order", "large differences count less"),
    )


CHECK = Check("saturation", "a clamp holds what should teach", Kind.INTEGRITY, ("M21",), judge, facts, needs=("score",))
