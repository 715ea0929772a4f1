"""A diagnosis in sentences with numbers: what happens, by what mechanism, why KL did not stop it, what would.

"Accounts for" is what the logged numbers say; "caused" is said only where a trial against null forks has shown it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.diagnose.changes import Change, beyond_settings, changes
from kedge.diagnose.checks import all_checks
from kedge.diagnose.checks.check import Kind
from kedge.diagnose.contrast import Contrast, contrast_of, subject_of
from kedge.diagnose.diagnosis import ALARMS, Diagnosis
from kedge.diagnose.finding import Evidence, Finding
from kedge.diagnose.penalty import penalty
from kedge.diagnose.trials import Tried
from kedge.diagnose.view import View


@dataclass(frozen=True)
class Cause:
    """One mechanism that the run's numbers point to."""

    check: str
    title: str
    sentences: tuple[str, ...]
    refuted_by: str
    symptoms: tuple[str, ...]  # of what it explains: title and what was found
    marked: str  # "" or why to doubt it
    finding: Finding


@dataclass(frozen=True)
class Prose:
    """The diagnosis as a page or a terminal shows it."""

    verdict: str  # one sentence
    happening: tuple[str, ...]
    causes: tuple[Cause, ...]
    contrast: Contrast
    penalty: tuple[str, ...]
    changes: tuple[Change, ...]
    beyond: tuple[str, ...]  # what is no setting of the run


def prose(view: View, found: Diagnosis, trials: Sequence[Tried] = ()) -> Prose:
    """The diagnosis of a view in sentences; `trials` are those carried out from the run."""
    contrast = contrast_of(view, subject_of(found.alone(), view))
    return Prose(
        verdict=verdict(found),
        happening=tuple(_happening(view, found)),
        causes=tuple(_causes(found)),
        contrast=contrast,
        penalty=tuple(penalty(view, contrast)),
        changes=changes(view, found, contrast, trials),
        beyond=beyond_settings(found),
    )


AT_ONCE = 3  # causes that the verdict names


def title_of(check: str) -> str:
    """What a check looks for, in a few words."""
    return next((one.title for one in all_checks() if one.name == check), check.replace("_", " "))


def verdict(found: Diagnosis) -> str:
    """One sentence: how it stands, and the most likely cause."""
    alarms = found.of(*ALARMS)
    if not alarms:
        checked = len(found.of("ok"))
        if not checked:
            return "Nothing could be checked: the run holds too little for any check."
        return f"Nothing fails: {_count(checked, 'check')} found nothing wrong."
    heads = [heading(one) for one in found.alone()][:AT_ONCE]
    if not found.likely:
        listed = "; ".join(heads) or "; ".join(title_of(one.check) for one in alarms[:AT_ONCE])
        if any(one.validated for one in alarms):
            return f"No validated check names a cause. What was seen: {listed}."
        return f"Most likely: {listed}. No check that says so has been validated yet."
    names = [heading(one) for one in found.findings if one.check in found.likely]
    word = "fails" if found.findings[0].status == "fail" else "warns"
    if len(names) == 1:
        return f"Most likely: {names[0]} (the check {word})."
    return f"Most likely one of these, which the run's numbers do not tell apart: {'; '.join(names)}."


def heading(finding: Finding) -> str:
    """The check's title, and what the finding is about where the title leaves that open."""
    title = title_of(finding.check)
    return title if not finding.subject or finding.subject in title else f"{title}: {finding.subject}"


# What is happening


def _happening(view: View, found: Diagnosis) -> Iterator[str]:
    score, usual = (view.metric(f"evaluation/score{end}", "evaluation") for end in ("", "_reference"))
    if score is not None:
        against = "" if usual is None else f" (the reference's answers: {usual.values[-1]:+.2f})"
        updates = int(score.steps[-1])
        yield (
            f"Over {updates} updates the score went from {score.values[0]:+.2f} to {score.values[-1]:+.2f} normalised "
            f"units{against}."
        )
    length, before = (view.metric(f"evaluation/length{end}", "evaluation") for end in ("", "_reference"))
    if length is not None and before is not None and before.values[-1] > 0:
        yield (
            f"Answers went from {length.values[0]:.3g} to {length.values[-1]:.3g} tokens; the reference's have "
            f"{before.values[-1]:.3g}, so they are {length.values[-1] / before.values[-1]:.2f} times as long."
        )
    kl, token = (view.metric(f"evaluation/kl_per_{unit}", "evaluation") for unit in ("sequence", "token"))
    if kl is not None:
        yield f"KL to the reference is {kl.values[-1]:.3g} nats per response{_diluted(kl.values, token)}."
    matched = matched_wins(view)
    if matched:
        step, share, count = matched[-1]
        first = f", {matched[0][1]:.0%} after {matched[0][0]}" if len(matched) > 1 else ""
        yield (
            f"Where both answers are about equally long ({count} prompts, lengths within 10%) the policy's scores "
            f"higher on {share:.0%} after {step} updates{first}."
        )
    first_alarm = found.first_alarm
    if first_alarm is not None:
        yield f"The first alarm is at policy step {first_alarm.onset}: {heading(first_alarm)}."


def _diluted(kl: Any, token: Any) -> str:
    if token is None or len(token.values) < 2 or not (kl[-1] > kl[0] and token.values[-1] < token.values.max() * 0.9):
        return "" if token is None else f", {token.values[-1]:.2g} per token"
    return (
        f"; per token it fell from {token.values.max():.2g} to {token.values[-1]:.2g} while the whole grew: longer "
        f"answers dilute it"
    )


def matched_wins(view: View) -> list[tuple[int, float, int]]:
    """Per evaluation: updates, the share of prompts on which the policy's answer scores higher than the reference's
    among those whose lengths are within 10%, and how many those are; ties count half. Without at least 8, left out."""
    found = []
    for one in view.samples:
        if "reference_tokens" not in one:
            continue
        length, usual = (np.asarray(one[name], float) for name in ("length", "reference_tokens"))
        near = np.abs(length - usual) <= 0.1 * usual
        gap = (np.asarray(one["score"], float) - np.asarray(one["reference_score"], float))[near]
        gap = gap[np.isfinite(gap)]
        if len(gap) >= 8:
            found.append((int(one["step"]), float((gap > 0).mean() + 0.5 * (gap == 0).mean()), len(gap)))
    return found


# The mechanism


def _causes(found: Diagnosis) -> Iterator[Cause]:
    kinds = {check.name: check.kind for check in all_checks()}
    for one in found.alone():
        if kinds.get(one.check) == Kind.BENIGN:
            continue
        yield Cause(
            check=one.check,
            title=heading(one),
            sentences=tuple(part for part in (one.summary, one.mechanism) if part),
            refuted_by=one.refuted_by,
            symptoms=tuple(f"{title_of(it.check)}: {it.summary}" for it in found.symptoms_of(one.check)),
            marked="" if one.validated else "not validated: this check has not been tried on runs it was not made with",
            finding=one,
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def evidence_line(one: Evidence) -> str:
    """One number with its unit and where it can be read again."""
    unit = "" if one.unit in ("", "1") else f" {one.unit}"
    note = f" ({one.note})" if one.note else ""
    where = f" [{one.where}]" if one.where else ""
    return f"{one.name}: {one.value:.4g}{unit}{note}{where}"


def as_record(said: Prose) -> dict[str, Any]:
    """The sentences, for JSON."""
    return {
        "verdict": said.verdict,
        "happening": list(said.happening),
        "penalty": list(said.penalty),
        "beyond": list(said.beyond),
        "changes": [
            {
                "overrides": list(one.overrides),
                "effect": one.effect,
                "reward": one.reward,
                "gradient": one.gradient,
                "cost": one.cost,
                "tried": [] if one.tried is None else list(one.tried.sentences),
            }
            for one in said.changes
        ],
    }
