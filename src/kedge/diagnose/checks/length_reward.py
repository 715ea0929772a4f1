"""The reward pays for length beyond what the KL penalty takes.

**What.** On the same prompt the longer answer is worth more reward than the brief one, KL paid; and it has an effect:
answers grow, or the payment began within the run.

**Why it matters.** Length costs hardly any KL: a long answer that the reference would give is free, and moving all
answers to a verbose mode that the reference uses on a share p of prompts costs −ln p nats at most. A reward of s per
token therefore outruns the penalty however large the KL becomes; with a geometric reference of mean length L₀ and
Λ = s·L₀/β ≥ 1 there is no finite optimum.

**How.** Two ways to fail. *Pays and grows*: the matched net margin of the probe pairs (verbose minus brief: score −
β·max(KL, 0) − length penalty) has a 95% interval above 0 and most prompts above 0, and the answers' length over the
reference's, the mean of two evaluations in a row, has risen from its lowest value so far by more than two standard
errors. The strength is the smaller of lower end / 0.25 score and rise / 0.12. *Began to pay*: the scores of fixed
texts changed between two looks, and regressed on length and all features of the texts the change rises with length;
the strength is the change in Λ over 0.25, less where length explains under 15% of the change. Without probe pairs the
policy's answers are compared with the reference's to the same prompts. So are, where steps hold several responses to
every prompt, these with each other: it fails where over ten steps one deviation of length within a prompt is worth
0.2 deviations of reward net of β·KL, three standard errors above 0, and responses are 12% longer than the
reference's, or than at the start. Margins are within prompts; slopes across prompts are shown where there is nothing
else, and never fail: prompts that need long answers may score higher.

**False alarms.** A reward that is right to pay for length, because people want these longer answers: ask people to
compare answers of matched length. A reward model that was replaced on purpose by one that values length rightly. Tasks
on which only a long answer gets to the right result are paid for length, too, and the rows cannot tell.

**Remedy.** Take the slope out of the reward (`reward.length`, `policy.length_penalty`), make β large enough to balance
the margin, or relabel pairs so that length and preference are not confounded.

**References.** Singhal et al. 2023 (length correlations in RLHF); Shen et al. 2023; Huang et al. 2024 (calibration of
rewards); mechanisms M1, M2, M14.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kedge.diagnose.behaviour import STRONGEST, beta_at, firmer, length_ratio, smooth, usual_length
from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.correction import BETA_CAP, BETA_FACTOR, balancing_beta, score_slope
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.margin import Margin, Pairs, margin, sampled_pairs
from kedge.diagnose.repriced import Repricing, repricings
from kedge.diagnose.rows import SMALL, beta_of, channel, paid
from kedge.diagnose.steps import aligned, first_where, late
from kedge.diagnose.texts import column
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

PAID = 0.25  # score, of standard deviation 1 on the reference's answers
RISE = 0.12  # of the reference's length
RUNAWAY = 0.25  # change in s * L0 / beta; at 1 a geometric length has no finite optimum
EXPLAINED = 0.15  # share of a change in scores
ERRORS = 3.0  # standard errors
FEWEST = 8  # pairs
SPREAD = 2.0  # standard errors taken off a rise: the lowest of several values lies low by chance
WITHIN = 0.2  # deviations of the reward within prompts, for one of length
WORTH_SAYING = 0.7  # of a failure
STEPS = 10  # of rows, judged together
FIRST = 2  # steps that growth is measured from, where the reference's length is not known
SMALLEST_BETA = 0.01  # reward per nat: below it the penalty is as good as absent


def facts(step: StepTrace) -> Facts:
    """Slopes on length among the step's responses, of the same prompt where it has several."""
    length = step.lengths.astype(np.float64)
    divergence = channel(step, "kl")
    _, group, sizes = np.unique(step.group, return_inverse=True, return_counts=True)
    within = bool((sizes > 1).all())

    def around(values: np.ndarray) -> np.ndarray:
        return values - (np.bincount(group, values) / sizes)[group] if within else values - values.mean()

    spread = around(length)
    size = float(spread @ spread)
    if not size:
        return {}
    reward = around(paid(step))
    found = {
        "length_reward/score_slope": float(spread @ reward) / size,
        "length_reward/length_deviation": float(spread.std()),
        "length_reward/reward_deviation": float(reward.std()),
        "length_reward/length": float(length.mean()),
        "length_reward/beta": beta_of(step),
    }
    if divergence is not None:
        found["length_reward/kl_slope"] = float(spread @ around(divergence.sum(axis=1))) / size
    return found | {"length_reward/within": float(within)}


class _Look(NamedTuple):
    """Where payment and growth stood after `step` updates."""

    step: int
    margin: Margin
    rise: float  # of the reference's length

    @property
    def strength(self) -> float:
        if self.margin.share_positive <= 0.5:
            return 0.0
        return max(0.0, min(self.margin.low / PAID, self.rise / RISE, STRONGEST))


class _Began(NamedTuple):
    """A change of the scores of fixed texts that pays for length."""

    change: Repricing
    runaway: float  # change in s * L0 / beta

    @property
    def strength(self) -> float:
        weight = min(1.0, self.change.prices["length"].explained / EXPLAINED)
        return min(STRONGEST, self.runaway / RUNAWAY * weight)


class _Paid(NamedTuple):
    """What several responses to the same prompt say, step by step: payment for length net of KL, and growth."""

    payment: Series  # deviations of the reward for one deviation of length, both within prompts
    rise: Series  # mean length over the reference's or that of the first steps, minus 1

    @property
    def strength(self) -> Series:
        both = np.minimum(self.payment.values / WITHIN, self.rise.values / RISE)
        return Series(self.payment.steps, np.clip(both, 0.0, STRONGEST))


def judge(view: View) -> Finding:
    """Payment net of KL with growth, or payment that began."""
    pairs = _pairs(view)
    ratio = length_ratio(view)
    starts = tuple(_began(view))
    began = max(starts, key=lambda one: one.strength, default=None)
    rows = None if view.pairs else _within_prompts(view)
    if rows is not None and float(rows.strength.values.max()) >= max(WORTH_SAYING, began.strength if began else 0.0):
        return _of_rows(view, rows)
    if not pairs and began is None:
        return _across_prompts(view)
    looks = list(_looks(pairs, smooth(ratio), _noise(view))) if ratio is not None else []
    grown = max(looks, key=lambda one: one.strength, default=None)
    if grown is None and began is None:
        return not_checked(
            "length_reward", "there are no lengths of the policy's answers to compare with the reference's"
        )
    strengths = [one.strength for one in (grown, began) if one is not None]
    loud = [one.step for one in looks if one.strength >= 1]
    loud += [one.change.step for one in starts if one.strength >= 1]
    recent = pairs[-max(1, len(pairs) // 3) :]
    finding = Finding(
        "length_reward",
        "ok",
        _summary(grown, began, recent),
        evidence=tuple(_evidence(grown, began, recent)),
        onset=min(loud, default=None),
        subject="length",
        mechanism="The score rises with length by more than the KL penalty takes; a long answer that the reference "
        "finds likely costs few nats, so that the penalty does not price length.",
        refuted_by="on the same prompt people prefer the longer answers at matched content, or padding fixed answers "
        "with neutral sentences does not raise their score",
        remedies=_remedies(view, recent, began),
    )
    return graded(finding, max(strengths))


def _pairs(view: View) -> tuple[Pairs, ...]:
    """Probe pairs, else the policy's answers beside the reference's."""
    found = tuple(replace(one, penalty=max(0.0, one.penalty)) for one in view.pairs if len(one.score) >= FEWEST)
    if found:  # a length channel that pays is no price of the score's: token_constant sees it
        return found
    sampled = []
    for sample in view.samples:
        own, usual = column(sample, "length"), column(sample, "length", reference=True)
        beta = beta_at(view, int(sample["step"]))
        if own is not None and usual is not None and math.isfinite(beta):
            sampled.append(sampled_pairs(sample, own, usual, beta=beta))
    return tuple(one for one in sampled if len(one.score) >= FEWEST)


def _noise(view: View) -> float:
    """Standard error of the mean length of an evaluation's answers, over the reference's; 0 where it is not known."""
    usual = usual_length(view)
    lengths = [values for sample in view.samples[:1] if (values := column(sample, "length")) is not None]
    return float(lengths[0].std()) / math.sqrt(len(lengths[0])) / usual if lengths and usual else 0.0


def _looks(pairs: tuple[Pairs, ...], ratio: Series, noise: float) -> Iterator[_Look]:
    """Each time that lengths were measured, with the latest pairs known then."""
    lowest = np.minimum.accumulate(ratio.values)
    margins = {one.step: margin(one) for one in pairs}
    for step, value, low in zip(ratio.steps.tolist(), ratio.values.tolist(), lowest.tolist(), strict=True):
        known = [one for at, one in margins.items() if at <= step and one is not None]
        if known:
            yield _Look(step, known[-1], value - low - SPREAD * noise)


def _began(view: View) -> Iterator[_Began]:
    usual = usual_length(view)
    for change in repricings(view):
        price, beta = change.prices.get("length"), beta_at(view, change.step)
        if price is None or change.rescaled or not usual or not math.isfinite(beta):
            continue
        if price.value > ERRORS * price.error and price.value > 0:
            yield _Began(change, price.value * usual / max(beta, SMALLEST_BETA))


def _within_prompts(view: View) -> _Paid | None:
    """From steps in which every prompt has several responses; None where there are too few or other ones."""
    slope, within = view.fact("length_reward/score_slope"), view.fact("length_reward/within")
    if slope is None or within is None or not within.values.all() or len(slope.steps) < 2 * STEPS:
        return None
    kl, beta, length, of_length, of_reward = (
        aligned(view.facts.get(f"length_reward/{name}"), slope.steps)
        for name in ("kl_slope", "beta", "length", "length_deviation", "reward_deviation")
    )
    if not np.isfinite(length).all():
        return None
    cost = np.maximum(np.nan_to_num(beta), 0.0) * np.maximum(np.nan_to_num(kl), 0.0)
    payment = (slope.values - cost) * of_length / np.maximum(of_reward, SMALL)
    grown, first = smooth(Series(slope.steps, length), FIRST), usual_length(view) or float(length[:FIRST].mean())
    return _Paid(Series(slope.steps, _sure(payment)), Series(slope.steps, grown.values / first - 1))


def _sure(values: np.ndarray) -> np.ndarray:
    """The mean of the last `STEPS` entries, this one included; 0 where they are too few or it could be chance."""
    found = np.zeros(len(values))
    for at in range(STEPS - 1, len(values)):
        recent = values[at - STEPS + 1 : at + 1]
        mean = float(recent.mean())
        if mean > ERRORS * float(recent.std(ddof=1)) / math.sqrt(STEPS):
            found[at] = mean
    return found


def _of_rows(view: View, rows: _Paid) -> Finding:
    strength = rows.strength
    at = int(strength.values.argmax())
    payment, rise = float(rows.payment.values[at]), float(rows.rise.values[at])
    slope = float(aligned(view.facts.get("length_reward/score_slope"), strength.steps[at : at + 1])[0])
    span = f"{STEPS} steps up to step {strength.steps[at]}"
    finding = Finding(
        "length_reward",
        "ok",
        f"Among responses to the same prompt a longer one is paid more, {payment:+.2f} deviations of the reward net of "
        f"KL for one of length, and responses have grown by {rise:.0%}.",
        evidence=(
            Evidence(
                "payment for length, net of KL", payment, "deviations per deviation", f"{span}; fails above {WITHIN:g}"
            ),
            Evidence("growth while it paid", rise, "of the usual length", f"{span}; fails above {RISE:g}"),
            Evidence(
                "slope of the reward on length", slope, "reward per token", f"same prompt, step {strength.steps[at]}"
            ),
        ),
        onset=first_where(strength, strength.values >= 1),
        mechanism="The score rises with length by more than the KL penalty takes; a long answer that the reference "
        "finds likely costs few nats, so that the penalty does not price length.",
        refuted_by="on the same prompt people prefer the longer answers at matched content, or padding fixed answers "
        "with neutral sentences does not raise their score",
        remedies=(
            Remedy(
                (f"policy.length_penalty={max(slope, 0.0):.2g}",),
                f"takes {max(slope, 0.0):.2g} reward per token away, which is what is paid for it within a prompt",
                "answers that need their length are taxed, too",
            ),
            firmer(view),
        ),
    )
    return graded(finding, float(strength.values[at]))


def _across_prompts(view: View) -> Finding:
    """What rows alone can tell: slopes, across prompts unless prompts have several responses."""
    slope = view.fact("length_reward/score_slope")
    if slope is None:
        return not_checked("length_reward", "no probe pairs, no evaluation samples with lengths, and no rows of steps")
    within = view.fact("length_reward/within")
    kind = "within prompts" if within is not None and within.values.all() else "across prompts"
    reason = (
        f"there are no probe pairs and no evaluation samples to match prompts by; {kind} the reward's slope on length "
        f"is {late(slope):+.3g} per token late in the run, which is confounded by what prompts need"
    )
    return not_checked("length_reward", reason)


def _summary(grown: _Look | None, began: _Began | None, recent: tuple[Pairs, ...]) -> str:
    said = []
    if began is not None and began.strength > 0:
        price = began.change.prices["length"]
        said.append(
            f"Between steps {began.change.before} and {began.change.step} the scores of {began.change.source} came to "
            f"pay {price.value:.2g} more per token of length (Λ up by {began.runaway:.2g})."
        )
    last = margin(recent[-1]) if recent else None
    if last is not None:
        said.append(
            f"On the same prompt the longer answer is worth {last.net:+.2f} reward net of KL after step {last.step} "
            f"({last.share_positive:.0%} of {last.prompts} prompts above 0)."
        )
    if grown is not None:
        said.append(f"Answers have grown by up to {grown.rise:.0%} of the reference's length while it paid."
                    if grown.strength > 0 else "Answers did not grow while it paid.")  # fmt: skip
    return " ".join(said)


def _evidence(grown: _Look | None, began: _Began | None, recent: tuple[Pairs, ...]) -> Iterator[Evidence]:
    if recent:
        last = margin(recent[-1])
        assert last is not None  # `_pairs` leaves out what has too few
        span = f"after step {last.step}, {last.prompts} prompts"
        yield Evidence("score margin", last.score, "normalised score", f"longer minus brief, {span}", "trace/probes")
        yield Evidence(
            "KL cost of the margin", last.kl_cost, "reward", f"beta {last.beta:.3g} times nats", "trace/probes"
        )
        yield Evidence(
            "net margin", last.net, "reward", f"95% interval {last.low:+.2f} to {last.high:+.2f}", "trace/probes"
        )
        nats = f"{last.signed / last.beta:+.1f} nats, " if last.beta else ""
        note = f"{nats}above 0 on {last.share_signed:.0%} of the prompts"
        yield Evidence("net margin, KL of either sign", last.signed, "reward", note, "trace/probes")
        yield Evidence("prompts that pay", last.share_positive, "share", "net margin above 0", "trace/probes")
    if grown is not None and grown.strength > 0:
        note = f"since the briefest evaluation before step {grown.step}; fails above {RISE:g}"
        yield Evidence("growth while it paid", grown.rise, "reference lengths", note, "evaluation/length")
    if began is not None:
        price = began.change.prices["length"]
        note = f"± {price.error:.2g}, {began.change.texts} of {began.change.source}, step {began.change.step}"
        yield Evidence("change of the price of length", price.value, "normalised score per token", note)
        yield Evidence("change of the runaway number", began.runaway, "1", f"s L0 / beta; fails above {RUNAWAY:g}")
        yield Evidence("change explained by length", price.explained, "share", "of its variance, beyond all features")


def _remedies(view: View, recent: tuple[Pairs, ...], began: _Began | None) -> tuple[Remedy, ...]:
    """A penalty that takes the slope away, a beta that balances the margin, and a reward model without the slope."""
    pairs = list(recent)
    slope = score_slope(pairs) if pairs else 0.0
    if slope <= 0 and began is not None:
        slope = began.change.prices["length"].value
    found = []
    if slope > 0:
        found.append(
            Remedy(
                (f"policy.length_penalty={slope:.2g}",),
                f"takes {slope:.2g} reward per token away, which is what the score pays for it within a prompt",
                "answers that need their length are taxed, too",
            )
        )
    beta = beta_at(view, pairs[-1].step) if pairs else math.nan
    if math.isfinite(beta) and beta < BETA_CAP:
        balance = max(BETA_FACTOR * beta, balancing_beta(pairs))
        chosen = float(f"{min(BETA_CAP, balance):.2g}")
        enough = "balances the margin on half of the prompts" if chosen >= balance else "does not balance it by itself"
        found.append(
            Remedy(
                ("policy.kl.mode=fixed", f"policy.kl.beta={chosen:g}"),
                f"a nat costs {chosen:g} instead of {beta:.2g} reward, which {enough}",
                "every change is slowed, wanted ones too",
            )
        )
    if began is not None and began.strength >= 1:
        effect = f"the policy goes on from step {began.change.before} with the reward model that scored it until then"
        found.append(Remedy((), effect, "what was learnt since then is lost"))
    found.append(
        Remedy(
            ("reward.length=padded_residual",),
            "what length alone adds, read from answers padded with sentences that say nothing, is taken off the score",
            "where quality needs length, quality is taken away with it",
        )
    )
    return tuple(found)


CHECK = Check(
    "length_reward",
    "reward pays for length",
    Kind.CAUSE,
    ("M1", "M2", "M14"),
    judge,
    facts,
    needs=("score",),
    validated=True,
)
