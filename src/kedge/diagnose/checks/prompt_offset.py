"""Prompts that need long answers score higher throughout, and the critic does not take it away.

**What.** Between prompts the score rises with length otherwise than within a prompt, and there is no baseline that
knows the prompt.

**Why it matters.** Pairwise labels leave a constant per prompt free. If it goes with length, long responses have larger
advantages than brief ones although on no prompt length pays.

**How.** It needs several responses per prompt and a critic: slopes of the reward without KL on length, between prompts'
means and within prompts; their difference times the deviation of the prompts' mean length, over the deviation of the
score within prompts, on the median of six steps, while the critic explains less than a fifth of the score's return. It
fails at 1. A baseline of the group (RLOO, GRPO) cancels what a prompt adds, so such runs are not affected.

**False alarms.** Few prompts per step make the slope between them noisy.

**Remedy.** A baseline per prompt (`policy.method=rloo`), a score less that of the reference's answer
(`policy.score_normalisation=prompt`), a critic that learns faster.

**References.** Hausman 1978 (between and within); mechanism M25.
"""

from __future__ import annotations

import numpy as np

from kedge.diagnose.behaviour import STRONGEST
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import paid
from kedge.diagnose.steps import aligned, first_where
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

OFFSET = 1.0  # deviations of the score within prompts
EXPLAINED = 0.2  # of the score's return: a critic that explains more takes the offset away
FEWEST = 8  # prompts
WINDOW = 6  # steps


def facts(step: StepTrace) -> Facts:
    """What the prompts' own level adds to long responses, where prompts have several and a critic is the baseline."""
    _, group, sizes = np.unique(step.group, return_inverse=True, return_counts=True)
    if step.critic == "none" or len(sizes) < FEWEST or (sizes < 2).any():
        return {}
    length, reward = step.lengths.astype(np.float64), paid(step)
    means = [np.bincount(group, values) / sizes for values in (length, reward)]
    inner = [values - mean[group] for values, mean in zip((length, reward), means, strict=True)]
    outer = [mean - mean.mean() for mean in means]
    if not (inner[0] @ inner[0]) or not (outer[0] @ outer[0]) or not inner[1].std():
        return {}
    between, within = (float(x @ y) / float(x @ x) for x, y in (outer, inner))
    return {"prompt_offset/offset": (between - within) * float(outer[0].std()) / float(inner[1].std())}


def judge(view: View) -> Finding:
    """The largest lasting offset that the critic leaves."""
    offset = view.fact("prompt_offset/offset")
    if offset is None or len(offset.values) < WINDOW:
        reason = "it takes several responses per prompt and a critic to tell prompts from answers"
        return not_checked("prompt_offset", reason)
    heads = (view.metric(f"value/explained_variance.{head}") for head in ("score", "scalar", "critic"))
    explained = aligned(next((one for one in heads if one is not None), None), offset.steps)
    left = np.where(explained >= EXPLAINED, 0.0, np.abs(offset.values))
    medians = np.array([np.median(left[at - WINDOW + 1 : at + 1]) for at in range(WINDOW - 1, len(left))])
    lasting = Series(offset.steps[WINDOW - 1 :], medians)
    value = float(medians.max())
    finding = Finding(
        "prompt_offset",
        "ok",
        f"Prompts with answers longer by a deviation differ by {value:.2f} deviations of score that no answer earns.",
        evidence=(
            Evidence("offset", value, "deviations of score", f"median of {WINDOW} steps; fails from {OFFSET:g}"),
        ),
        onset=first_where(lasting, medians >= OFFSET),
        mechanism="The prompt's own level of score goes with length, so long responses look better than they are.",
        refuted_by="a baseline per prompt leaves length where it is",
        remedies=(
            Remedy(
                ("policy.method=rloo",), "the group's mean takes the prompt's level away", "several answers a prompt"
            ),
            Remedy(
                ("policy.score_normalisation=prompt",),
                "the score of the reference's answer to the prompt is taken off",
                "one more answer of the reference per prompt",
            ),
        ),
    )
    return graded(finding, min(STRONGEST, value / OFFSET))


CHECK = Check(
    "prompt_offset",
    "prompts differ in score, not answers",
    Kind.CAUSE,
    ("M25",),
    judge,
    facts,
    needs=("group", "score", "values"),
)
