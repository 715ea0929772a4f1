"""Other prompts are asked than before: what moved the training curves may not be the policy.

**What.** The make-up of the prompts of a step changed, and how much of a change in length it accounts for.

**Why it matters.** Prompts that need long answers make answers long. A curve over training steps cannot tell that from
a policy that drifts; evaluations, which always ask the same prompts, can.

**How.** Words of the prompts fall into 32 groups by a hash. The share of prompts with a word of each group is compared
with its median over the steps before, in binomial standard errors; the make-up changed where any group passes 6 on
three steps in a row. The group that moved most splits the prompts in two, and the change in mean length is split as
Kitagawa did: Δ = Σ Δshare · mean length + Σ mean share · Δlength; the first is the mix. Groups of words are coarser
than what prompts need, so the mix's part is a lower bound. It warns where the make-up changed and length, too, and
never fails.

**False alarms.** It cannot raise one that costs anything. Prompts in another order, by topic, are a change of make-up
as well.

**Remedy.** None is needed. Judge the policy by evaluations; ask prompts in random order.

**References.** Kitagawa 1955 (components of a difference between two rates); mechanism M23.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import NamedTuple

import numpy as np

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, not_checked
from kedge.diagnose.steps import lasting
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import StepTrace

GROUPS = 32
ERRORS = 6.0  # standard errors
TIMES = 3  # steps in a row
FEWEST = 8  # steps
LARGE = 0.15  # of the mean length
WINDOW = 12  # steps of which a baseline is made
_HASH = re.compile("[0-9a-f]{16}")


class Shift(NamedTuple):
    """When the make-up of the prompts changed, how surely, and what it did to length."""

    step: int
    errors: float  # standard errors of the group that moved most
    length: float  # tokens: after minus before
    mix: float  # tokens of it that the make-up accounts for, at least
    before: float  # tokens


def facts(step: StepTrace) -> Facts:
    """For each group of words, the share of prompts that have one, and the mean length of their answers."""
    texts = step.prompts
    if any(text is None or _HASH.fullmatch(text) for text in texts):
        return {}
    held = np.zeros((len(texts), GROUPS), dtype=bool)
    for row, text in enumerate(texts):
        for word in set(str(text).lower().split()):
            held[row, zlib.crc32(word.encode()) % GROUPS] = True
    lengths = step.lengths.astype(np.float64)
    counts = held.sum(axis=0)
    found = {"prompt_mix/prompts": float(len(np.unique(step.group)))}
    for group in range(GROUPS):
        found[f"prompt_mix/share.{group}"] = float(held[:, group].mean())
        found[f"prompt_mix/length.{group}"] = float(lengths[held[:, group]].mean()) if counts[group] else math.nan
    return found


def shift(view: View) -> Shift | None:
    """The first lasting change in the make-up of the prompts; None where there is none, or prompts are not known."""
    prompts, length = view.fact("prompt_mix/prompts"), view.metric("length/mean")
    if prompts is None or length is None or len(prompts.steps) < FEWEST:
        return None
    shares = np.stack([view.facts[f"prompt_mix/share.{group}"].values for group in range(GROUPS)], axis=1)
    errors = _surprise(shares, prompts.values)
    changed = lasting(errors.max(axis=1) > ERRORS, TIMES)
    if not changed.any():
        return None
    at = int(np.argmax(changed)) - TIMES + 1
    group = int(np.argmax(errors[at : at + TIMES].mean(axis=0)))
    means = view.facts[f"prompt_mix/length.{group}"].values
    whole = dict(zip(length.steps.tolist(), length.values.tolist(), strict=True))
    lengths = np.array([whole.get(int(step), math.nan) for step in prompts.steps])
    early, later = slice(max(0, at - WINDOW), at), slice(at, None)
    share = [float(np.mean(shares[span, group])) for span in (early, later)]
    within = [float(np.nanmean(means[span])) for span in (early, later)]
    mean = [float(np.nanmean(lengths[span])) for span in (early, later)]
    without = [
        (total - part * inside) / (1 - part) if part < 1 - 1e-9 else math.nan
        for total, part, inside in zip(mean, share, within, strict=True)
    ]
    outside = float(np.nanmean(without)) if np.isfinite(without).any() else mean[0]
    mix = (share[1] - share[0]) * (float(np.mean(within)) - outside)
    step = int(prompts.steps[min(at + TIMES - 1, len(prompts.steps) - 1)])
    return Shift(step, float(errors[at : at + TIMES].max()), mean[1] - mean[0], mix, mean[0])


def _surprise(shares: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """[steps, groups] distance of each share from the median of those before, in binomial standard errors.

    A step that lies far off is no part of the baseline of those after it.
    """
    found = np.zeros_like(shares)
    usual: list[np.ndarray] = []
    for at, now in enumerate(shares):
        if len(usual) >= FEWEST // 2:
            middle = np.median(usual[-WINDOW:], axis=0)
            error = np.sqrt(np.maximum(middle * (1 - middle), 1 / prompts[at]) / prompts[at])
            found[at] = np.abs(now - middle) / error
        if found[at].max() <= ERRORS:
            usual.append(now)
    return found


def judge(view: View) -> Finding:
    """Whether the prompts changed, in words."""
    if view.fact("prompt_mix/prompts") is None:
        return not_checked("prompt_mix", "the trace holds no texts of prompts")
    if len(view.facts["prompt_mix/prompts"].steps) < FEWEST:
        return not_checked("prompt_mix", f"fewer than {FEWEST} steps hold prompts")
    found = shift(view)
    if found is None:
        return Finding("prompt_mix", "ok", "The make-up of the prompts stayed the same.")
    large = abs(found.length) > LARGE * found.before
    part = min(1.0, max(0.0, found.mix / found.length)) if found.length else 0.0
    return Finding(
        "prompt_mix",
        "warn" if large else "ok",
        f"Other prompts are asked from about step {found.step}: mean length moved by {found.length:+.1f} tokens, of "
        f"which the prompts account for {part:.0%} at least.",
        evidence=(
            Evidence("change of the make-up", found.errors, "standard errors", f"fails never; shown from {ERRORS:g}"),
            Evidence("change in mean length", found.length, "tokens", "training steps", "length/mean"),
            Evidence("part of the prompts", part, "share", "lower bound: words stand for what prompts need"),
        ),
        strength=0.0,
        onset=found.step,
        mechanism="Different prompts need answers of different length and score differently; the policy need not move.",
        refuted_by="evaluations, which ask the same prompts every time, moved as much",
    )


CHECK = Check("prompt_mix", "other prompts are asked", Kind.BENIGN, ("M23",), judge, facts, needs=("prompts",))
