"""A diagnosis in sentences with numbers: what happens, by what mechanism, why KL did not stop it, what would.

"Accounts for" is what the logged numbers say; "caused" is said only where a trial against null forks has shown it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.diagnose.account import Account, account_of
from kedge.diagnose.checks import all_checks
from kedge.diagnose.checks.check import Kind
from kedge.diagnose.correction import BETA_CAP, BETA_FACTOR, balancing_beta, score_slope
from kedge.diagnose.diagnosis import ALARMS, Diagnosis
from kedge.diagnose.finding import Evidence, Finding
from kedge.diagnose.margin import Margin, Pairs, margin, sampled_pairs
from kedge.diagnose.steps import LATE
from kedge.diagnose.trials import Tried, trial_of
from kedge.diagnose.view import View

CHANGES = 2
PAIRS = 8  # fewer say nothing
_BETA, _PENALTY = "policy.kl.beta", "policy.length_penalty"


@dataclass(frozen=True)
class Cause:
    """One mechanism that the run's numbers point to."""

    check: str
    title: str
    sentences: tuple[str, ...]
    refuted_by: str
    symptoms: tuple[str, ...]  # titles of what it explains
    marked: str  # "" or why to doubt it
    finding: Finding


@dataclass(frozen=True)
class Change:
    """Settings that would act on it: what they do to reward and gradient, what they cost, what a trial found."""

    overrides: tuple[str, ...]
    effect: str
    reward: str
    gradient: str
    cost: str
    tried: Tried | None

    @property
    def settings(self) -> str:
        """As options of a command."""
        return " ".join(f"--set {one}" for one in self.overrides)


@dataclass(frozen=True)
class Prose:
    """The diagnosis as a page or a terminal shows it."""

    verdict: str  # one sentence
    happening: tuple[str, ...]
    causes: tuple[Cause, ...]
    penalty: tuple[str, ...]
    changes: tuple[Change, ...]


def prose(view: View, found: Diagnosis, trials: Sequence[Tried] = ()) -> Prose:
    """The diagnosis of a view in sentences; `trials` are those carried out from the run."""
    causes = tuple(_causes(found))
    return Prose(
        verdict=verdict(found),
        happening=tuple(_happening(view, found)),
        causes=causes,
        penalty=tuple(_penalty(view)),
        changes=_changes(view, found, trials),
    )


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
    if not found.likely:
        doubted = "" if any(one.validated for one in alarms) else ", by checks that have not been validated"
        named = ", ".join(title_of(one.check) for one in alarms[:3])
        return f"No validated check says what moved it. What was seen{doubted}: {named}."
    names = [title_of(name) for name in found.likely]
    word = "fails" if found.findings[0].status == "fail" else "warns"
    if len(names) == 1:
        return f"Most likely: {names[0]} (the check {word})."
    return f"Most likely one of these, which the run's numbers do not tell apart: {'; '.join(names)}."


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
            f"Answers went from {length.values[0]:.3g} to {length.values[-1]:.3g} tokens, "
            f"{length.values[-1] / before.values[-1]:.2f} times the reference's."
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
        yield f"The first alarm is at policy step {first_alarm.onset}: {title_of(first_alarm.check)}."


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
            title=title_of(one.check),
            sentences=tuple(part for part in (one.summary, one.mechanism) if part),
            refuted_by=one.refuted_by,
            symptoms=tuple(title_of(symptom.check) for symptom in found.symptoms_of(one.check)),
            marked="" if one.validated else "not validated: this check has not been tried on runs it was not made with",
            finding=one,
        )


# Why KL did not stop it


def matched_pairs(view: View) -> tuple[Pairs, ...]:
    """Verbose against brief answers of the same prompts, at every look that has at least `PAIRS` of them.

    Probe pairs where the run has them; else the policy's answer against the reference's, the longer one first.
    """
    probes = tuple(one for one in view.pairs if len(one.score))
    if probes:
        return probes
    found = (_by_length(view, sample) for sample in view.samples)
    return tuple(one for one in found if one is not None and len(one.score) >= PAIRS)


def _by_length(view: View, sample: Mapping[str, Any]) -> Pairs | None:
    beta, penalty = view.metric("kl/beta"), view.metric("weight/length")
    if beta is None or not {"reference_tokens", "reference_kl"} <= set(sample):
        return None
    length, usual = (np.asarray(sample[name], float) for name in ("length", "reference_tokens"))

    def at(series: Any) -> float:
        """In force at the evaluation: after k updates, at policy step k or the last there is."""
        return float(series.values[min(np.searchsorted(series.steps, sample["step"]), len(series.steps) - 1)])

    return sampled_pairs(sample, length, usual, beta=at(beta), penalty=0.0 if penalty is None else -at(penalty) + 0.0)


def _penalty(view: View) -> Iterator[str]:
    pairs = matched_pairs(view)
    margins = [one for one in map(margin, pairs) if one is not None]
    if margins:
        if not any(len(one.score) for one in view.pairs):
            yield (
                "The run keeps no probe pairs. In their place stand the policy's and the reference's answer to the "
                "same prompt, the longer of the two for the verbose one."
            )
        yield from _matched(margins[-1], pairs[-1])
        yield from _when_it_paid(margins)
    yield from _price(view)
    if not margins:
        yield (
            "The run keeps neither probe pairs nor evaluation samples, so what the same prompt's verbose and brief "
            "answer score, and how many nats apart they have moved, is not known."
        )


def _matched(last: Margin, pairs: Pairs) -> Iterator[str]:
    yield (
        f"After {last.step} updates, on the same {last.prompts} prompts, the verbose answer scores {last.score:+.2f} "
        f"against the brief one."
    )
    if last.beta <= 0:
        yield "Beta is 0: a nat costs nothing, so there is no penalty that could have stopped anything."
        return
    moved = "more" if last.kl >= 0 else "less"
    yield (
        f"The policy has raised the log-probability of the verbose answer over the reference's by {abs(last.kl):.1f} "
        f"nats {moved} than that of the brief one. At beta {last.beta:.3g} reward per nat that costs "
        f"{last.kl_cost:.2f} reward{_length_cost(last)}, so {last.net:+.2f} is left (95% interval {last.low:+.2f} to "
        f"{last.high:+.2f}; above 0 on {last.share_positive:.0%} of the prompts)."
    )
    if last.score > 0:
        allowed = last.score / last.beta
        yield (
            f"The penalty takes the whole score margin back only at {last.score:.2f} / {last.beta:.3g} = {allowed:.0f} "
            f"nats: until then being verbose pays, even for an answer that the reference finds e^{allowed:.0f} times "
            f"less likely than the brief one."
            if allowed < 200
            else f"The penalty would take the whole score margin back at {allowed:.0f} nats, which no answer of this "
            f"length reaches."
        )
    by_tercile = [margin(pairs, tercile) for tercile in range(3)]
    listed = [f"{name} {one.net:+.2f}" for name, one in zip(("briefest", "middle", "longest"), by_tercile, strict=True)
              if one is not None]  # fmt: skip
    if len(listed) > 1:
        yield f"By how long the reference answers, the net margin is: {', '.join(listed)}."


def _length_cost(last: Margin) -> str:
    return f", and the length penalty {last.length_cost:.2f}" if last.length_cost else ""


def _when_it_paid(margins: Sequence[Margin]) -> Iterator[str]:
    if len(margins) < 3:
        return
    paid = [one.step for one in margins if one.pays]
    if len(paid) == len(margins):
        yield "It paid at every look of the run: the penalty never caught up."
    elif paid and not margins[-1].pays:
        yield f"It paid until {paid[-1]} updates; since then the penalty takes it back."


def _price(view: View) -> Iterator[str]:
    """What the last nats bought, against what they cost."""
    score, kl = view.metric("evaluation/score", "evaluation"), view.metric("evaluation/kl_per_sequence", "evaluation")
    beta = view.metric("kl/beta")
    if score is None or kl is None or beta is None or len(score.values) < 3 or len(score.values) != len(kl.values):
        return
    first = len(kl.values) - max(2, round(len(kl.values) * LATE)) - 1
    first = max(0, first)
    nats, gained = float(kl.values[-1] - kl.values[first]), float(score.values[-1] - score.values[first])
    now, price = float(beta.values[-1]), 0.0
    total = now * float(kl.values[-1])
    yield (
        f"All in all the answers' KL of {kl.values[-1]:.3g} nats costs {total:.2f} reward, against a score gain of "
        f"{score.values[-1] - score.values[0]:+.2f}."
    )
    if nats > 0.5:
        price = gained / nats
        pays = "more" if price > now else "less"
        yield (
            f"Late in the run ({int(kl.steps[first])} to {int(kl.steps[-1])} updates) another nat bought {price:.3g} "
            f"score, {pays} than the {now:.3g} reward it costs."
        )


# What would change it


def _changes(view: View, found: Diagnosis, trials: Sequence[Tried]) -> tuple[Change, ...]:
    """Changes for what was found, those first that were tried; none where nothing was found."""
    alarms = [one for one in found.alone() if one.status in ALARMS]
    if not alarms:
        return ()
    offered: dict[tuple[str, ...], tuple[str, str]] = {one.changes: ("", "") for one in trials}
    for one in alarms:
        for remedy in one.remedies:
            if remedy.overrides:
                offered[remedy.overrides] = (remedy.effect, remedy.cost)
    for overrides, effect, cost in _computed(view):
        offered.setdefault(overrides, (effect, cost))
    distinct: dict[frozenset[str], Change] = {}
    for overrides, (effect, cost) in offered.items():
        keys = frozenset(one.partition("=")[0] for one in overrides)
        if keys not in distinct:
            distinct[keys] = _change(view, overrides, effect, cost, trial_of(overrides, trials))
    return tuple(distinct.values())[:CHANGES]


def _computed(view: View) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """A beta and a length penalty from the matched pairs, where being verbose pays."""
    pairs = matched_pairs(view)
    late = list(pairs[-max(1, round(len(pairs) * LATE)) :])
    if not late or float(np.mean([one.net.mean() for one in late])) <= 0:
        return
    old = late[-1].beta
    beta = _two_digits(max(old, min(BETA_CAP, max(BETA_FACTOR * old, balancing_beta(late)))))
    if beta > old:
        yield (
            ("policy.kl.mode=fixed", f"{_BETA}={beta:.6g}"),
            f"every nat costs {beta:.3g} reward",
            "every change becomes slower, wanted ones too, and the score stays lower",
        )
    slope = _two_digits(score_slope(late))
    if slope > late[-1].penalty:
        yield (
            (f"{_PENALTY}={slope:.6g}",),
            "takes the score's slope on length within a prompt away",
            "answers that need their length are taxed as well",
        )


def _change(view: View, overrides: tuple[str, ...], effect: str, cost: str, tried: Tried | None) -> Change:
    values = dict(one.partition("=")[::2] for one in overrides)
    beta, penalty = _number(values.get(_BETA)), _number(values.get(_PENALTY))
    return Change(
        overrides=overrides,
        effect=effect,
        reward=_effective(view, beta, penalty),
        gradient=_gradient(view, beta, penalty),
        cost=cost,
        tried=tried,
    )


def _effective(view: View, beta: float | None, penalty: float | None) -> str:
    """The matched margin under the change."""
    pairs = matched_pairs(view)
    if (beta is None and penalty is None) or not pairs:
        return ""
    last = pairs[-1]
    new_beta, new_penalty = last.beta if beta is None else beta, last.penalty if penalty is None else penalty
    nets = last.score - new_beta * np.maximum(last.kl, 0.0) - new_penalty * last.length
    taxed = f" minus {new_penalty:.3g} per token times {last.length.mean():.0f} tokens" if new_penalty else ""
    return (
        f"Where the run stands, a verbose answer's net margin goes from {last.net.mean():+.2f} to {nets.mean():+.2f} "
        f"reward: {last.score.mean():+.2f} score minus {new_beta:.3g} times {np.maximum(last.kl, 0).mean():.1f} nats"
        f"{taxed}; it stays above 0 on {(nets > 0).mean():.0%} of the prompts instead of {(last.net > 0).mean():.0%}."
    )


def _gradient(view: View, beta: float | None, penalty: float | None) -> str:
    """The advantage per token of verbose and concise responses under the change."""
    verbose, concise = account_of(view, "verbose"), account_of(view, "concise")
    if (beta is None and penalty is None) or verbose is None or concise is None:
        return ""
    now = view.metric("kl/beta")
    if beta is not None and (now is None or now.values[-1] <= 0):
        return ""
    times = 1.0 if beta is None or now is None else beta / float(now.values[-1])
    pairs = matched_pairs(view)
    in_force = pairs[-1].penalty if pairs else 0.0
    more = 0.0 if penalty is None else penalty - in_force
    changed = [one.under(beta=times, penalty=more) for one in (verbose, concise)]
    return (
        f"{_parts(verbose)} Under the change verbose tokens would carry {changed[0]:+.2f} instead of "
        f"{verbose.total:+.2f}, concise ones {changed[1]:+.2f} instead of {concise.total:+.2f}, before critic and "
        f"whitening follow."
    )


def _parts(verbose: Account) -> str:
    listed = ", ".join(f"{name} {value:+.2f}" for name, value in verbose.parts.items() if abs(value) >= 0.005)
    return (
        f"Late in the run these parts account for the advantage of a verbose token, in standard deviations: {listed}."
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}") if math.isfinite(value) else BETA_CAP


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
