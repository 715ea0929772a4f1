"""Answers grow on prompts that the reference answers briefly, although nothing pays for it there.

**What.** In the third of the prompts that the reference answers most briefly, answers have become longer than the
reference's, and on the probe pairs of this third the longer answer does not pay.

**Why it matters.** A policy learns length where length is cheap, and what it learnt spreads to prompts where one word
would do. The mean over prompts hides it, and so does the KL, which is highest just there.

**How.** `evaluation/tercile0/length_ratio`, the mean of two evaluations in a row, less 1, over 0.4; counted only while
the matched net margin has its 95% interval below 0 in tercile 0 and above 0 in tercile 2. Where it pays in both,
length_reward says so; where it pays in neither, something else makes answers long.

**False alarms.** References that are too brief on these prompts. Few probe pairs in the third.

**Remedy.** Prompts of this kind in every batch, a penalty on length beyond the reference's own
(`policy.target_penalty`), a β per tercile (`policy.kl.budgets`).

**References.** mechanism M17.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.behaviour import STRONGEST, smooth
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.margin import margin
from kedge.diagnose.steps import first_where
from kedge.diagnose.view import View

LONGER = 1.4
FEWEST = 5  # pairs of the third


def judge(view: View) -> Finding:
    """The largest growth in the briefest third while it did not pay there."""
    ratio = view.metric("evaluation/tercile0/length_ratio", "evaluation")
    pairs = [one for one in view.pairs if min((one.tercile == third).sum() for third in (0, 2)) >= FEWEST]
    if ratio is None or len(ratio.values) < 2:
        return not_checked("brief_prompts", "fewer than two evaluations measured the third that is answered briefly")
    if not pairs:
        return not_checked(
            "brief_prompts",
            f"no probe step has {FEWEST} pairs of prompts that are answered briefly, and of those that are not",
        )
    lasting = smooth(ratio)
    margins = [(margin(one, 0), margin(one, 2)) for one in pairs]
    idle = np.zeros(len(lasting.steps), dtype=bool)
    for at, step in enumerate(lasting.steps.tolist()):
        known = [(brief, long) for brief, long in margins if brief and long and brief.step <= step]
        idle[at] = bool(known) and known[-1][0].high < 0 < known[-1][1].low
    strength = np.where(idle, np.maximum(lasting.values - 1, 0.0) / (LONGER - 1), 0.0)
    last = margins[-1][0]
    assert last is not None  # every pair kept has prompts of the third
    finding = Finding(
        "brief_prompts",
        "ok",
        f"Where the reference is brief, answers are {lasting.values[-1]:.2f} times as long; there length is worth "
        f"{last.net:+.2f} reward on the same prompt.",
        evidence=(
            Evidence("length over the reference's, briefest third", float(lasting.values.max()), "1", "largest"),
            Evidence("net margin, briefest third", last.net, "reward", f"{last.low:+.2f} to {last.high:+.2f}"),
        ),
        onset=first_where(lasting, strength >= 1),
        subject="length",
        mechanism="What the policy learnt on prompts where length pays spreads to prompts where it does not.",
        refuted_by="the briefest third's own margin is above 0",
        remedies=(
            Remedy(
                ("policy.target_penalty=0.04",),
                "takes 0.04 reward per token beyond the reference's answer to the same prompt",
                "one more answer of the reference per prompt",
            ),
        ),
    )
    return graded(finding, min(STRONGEST, float(strength.max())))


CHECK = Check(
    "brief_prompts",
    "length spreads to prompts that need none",
    Kind.CAUSE,
    ("M17",),
    judge,
    needs=("probes | evaluations",),
)
