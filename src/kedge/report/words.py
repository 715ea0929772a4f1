"""The report in words: five lines, two paragraphs, and for a comparison five lines more.

A channel "accounts for" a sum; nothing here says that it caused anything. Verdicts come from answers to one prompt.
"""

from __future__ import annotations

import math

from kedge.diagnose.correction import Proposal
from kedge.diagnose.margin import Margin
from kedge.report.numbers import fixed, percent, plain, signed
from kedge.report.view import View


def summary(view: View) -> tuple[str, ...]:
    """Five lines: score, length, KL, gold, verdict."""
    return (_score_line(view), _length_line(view), _kl_line(view), _gold_line(view), verdict(view))


def _score_line(view: View) -> str:
    first, last = view.first("evaluation/score"), view.last("evaluation/score")
    if first is None or last is None:
        return "Score: not evaluated yet."
    return (
        f"Score: {signed(first)} → {signed(last)} normalised units {_how(view)}; "
        f"the policy beats the reference on {_win_rate(view)}."
    )


def _how(view: View) -> str:
    return f"over {view.updates} updates" if view.best_of is None else f"by keeping the best of {view.best_of} answers"


def _win_rate(view: View) -> str:
    low, high = view.last("evaluation/win_rate_low"), view.last("evaluation/win_rate_high")
    rate = f"{percent(view.last('evaluation/win_rate'))} of prompts"
    return rate if low is None or high is None else f"{rate} (95% interval {percent(low)} to {percent(high)})"


def _length_line(view: View) -> str:
    last, usual = view.last("evaluation/length"), view.last("evaluation/length_reference")
    if last is None or not usual:
        return "Length: not evaluated yet."
    times = plain(last / usual, 2)
    return f"Length: {plain(usual)} tokens for the reference → {plain(last)} for the policy, {times} times as long."


def _kl_line(view: View) -> str:
    last, token = view.last("evaluation/kl_per_sequence"), view.last("evaluation/kl_per_token")
    if last is None:
        return "KL to the reference: not evaluated yet."
    kind = "k1" if view.best_of is None else "estimated"
    return f"KL to the reference: {plain(last)} nats per response, {plain(token, 2)} per token ({kind})."


def _gold_line(view: View) -> str:
    best = view.best_gold
    if best is None:
        return "Gold utility: nobody knows it for this run."
    first, top, last = view.first("gold"), view.at("gold", best), view.last("gold")
    peak = f"best {signed(top)} {_when(view, best)}"
    return f"Gold utility (never shown to training): {signed(first)} → {peak} → {signed(last)}."


def verdict(view: View) -> str:
    """One sentence: what the rule says, from matched pairs and lengths."""
    if view.proposal.status == "not_checked":
        return f"Verdict: {_lower(view.proposal.words[0])}"
    if not view.proposal.drift:
        return "Length drift: none found; the rule against it proposes nothing."
    return f"Verdict: length drift; on the same prompt {_payers(view)}."


def _payers(view: View) -> str:
    """Which channel accounts for the late matched margin, in a clause."""
    late = view.margins[-1]
    taken = late.kl_cost + late.length_cost
    return (
        f"the score pays {signed(late.score)} for the verbose answer and the penalties take {plain(taken, 2)} back "
        f"(net {signed(late.net)} reward)"
    )


def what_happened(view: View) -> str:
    """The first paragraph: what moved on the fixed evaluation prompts, in numbers with units."""
    if not view.evaluation:
        return f"{view.updates} policy updates are done and none has been evaluated: there is nothing to compare yet."
    sentences = [f"{_opening(view)}{_lengths(view)}", _kl_sentence(view), _gold_sentence(view)]
    return " ".join(sentence for sentence in sentences if sentence)


def _opening(view: View) -> str:
    first, last = view.first("evaluation/score"), view.last("evaluation/score")
    if first is None or last is None:
        return ""
    way = "rose" if last - first > 0.05 else "fell" if last - first < -0.05 else "stayed"
    change = f"from {signed(first)} to {signed(last)}" if way != "stayed" else f"at {signed(last)}"
    how = _how(view)
    return (
        f"{how[0].upper()}{how[1:]} the reward model's score {way} {change} normalised units; the policy beats the "
        f"reference on {_win_rate(view)}. "
    )


def _lengths(view: View) -> str:
    first, last = view.first("evaluation/length"), view.last("evaluation/length")
    usual = view.last("evaluation/length_reference")
    if first is None or last is None or not usual:
        return ""
    ended = view.last("evaluation/ended")
    closed = "" if ended is None else f" {percent(ended)} of them end within the token budget."
    return (
        f"Answers went from {plain(first)} to {plain(last)} tokens where the reference uses {plain(usual)} "
        f"({plain(last / usual, 2)} times).{closed}"
    )


def _kl_sentence(view: View) -> str:
    total, token = view.last("evaluation/kl_per_sequence"), view.last("evaluation/kl_per_token")
    if total is None:
        return ""
    text = f"KL to the reference reached {plain(total)} nats per response ({plain(token, 2)} nats per token)"
    terciles = [view.last(f"evaluation/tercile{index}/kl_per_sequence") for index in range(3)]
    known = [value for value in terciles if value is not None]
    if len(known) < 3:
        return text + "."
    listed = " / ".join(plain(value, 2) for value in known)
    if max(known) - min(known) < 0.1 * max(known):
        return f"{text}, about the same in every tercile of the reference's length ({listed})."
    most = ("briefest", "of middle length", "longest")[known.index(max(known))]
    return f"{text}, most where the reference is {most} ({listed} by tercile)."


def _gold_sentence(view: View) -> str:
    best = view.best_gold
    if best is None:
        return ""
    top, last = view.at("gold", best), view.last("gold")
    assert top is not None and last is not None
    if top - last < 0.1:
        return f"Gold utility, which training never saw, ended at {signed(last)}, about its best."
    score, risen = view.last("evaluation/score"), view.at("evaluation/score", best)
    rising = score is not None and risen is not None and score > risen
    while_rising = " while the score went on rising" if rising else ""
    return (
        f"Gold utility, which training never saw, was best {_when(view, best)} ({signed(top)}) and ended at "
        f"{signed(last)}, {fixed(top - last)} lower{while_rising}."
    )


def _when(view: View, step: int) -> str:
    if view.best_of is not None:
        return _how(view) if step else "without choosing"
    return f"after {step} updates" if step else "before the first update"


def what_accounts(view: View) -> str:
    """The second paragraph: which channel accounts for it, from matched pairs, then what the ledger adds."""
    sentences = [_margin_sentence(view.margins[-1])] if view.margins else []
    if view.margins and view.proposal.drift:
        sentences.append(_share_sentence(view.margins[-1]))
    elif view.proposal.status == "ok":
        sentences.append("The rule finds no length drift.")
    ledger = _ledger_sentence(view)
    sentences.append(ledger)
    if ledger and not view.margins:
        sentences.append("Without matched probe answers this is no verdict: it mixes easy and hard prompts.")
    return " ".join(sentence for sentence in sentences if sentence)


def _margin_sentence(late: Margin) -> str:
    length = f" and the length penalty {plain(late.length_cost, 2)}" if late.length_cost else ""
    return (
        f"After {late.step} updates, on the same {late.prompts} prompts, the verbose answer scores "
        f"{signed(late.score)} against the brief one; of that KL takes {plain(late.kl_cost, 2)} reward "
        f"({signed(late.kl, 1)} nats on average, beta {plain(late.beta)}){length}: net {signed(late.net)} reward (95% "
        f"interval {signed(late.low)} to {signed(late.high)}), above 0 on {percent(late.share_positive)} of prompts."
    )


def _share_sentence(late: Margin) -> str:
    if late.net <= 0:
        return "The score accounts for the pull towards long answers; by now the penalties take all of it back."
    share = percent((late.kl_cost + late.length_cost) / late.score)
    return f"The score accounts for the pull towards long answers; the penalties take back {share} of it."


def _ledger_sentence(view: View) -> str:
    account = view.ledger
    rows = account.rows("verbose", len(account.windows) - 1) if account else []
    if not account or not rows:
        return ""
    by_channel: dict[str, float] = {}
    for row in rows:
        name = str(row.part)
        by_channel[name] = by_channel.get(name, 0.0) + row.token_mean
    total = math.fsum(by_channel.values())
    largest = sorted(by_channel.items(), key=lambda item: -abs(item[1]))[:3]
    first, last = account.windows[-1]
    listed = ", ".join(f"{name} {signed(value)}" for name, value in largest)
    return (
        f"In the ledger of steps {first} to {last}, verbose responses carry {signed(total)} standard deviations of "
        f"advantage per token; the largest parts that account for it are {listed}."
    )


def comparison_summary(drift: View, corrected: View, proposal: Proposal) -> tuple[str, ...]:
    """Five lines on two runs from the same start: score, length, KL, gold, what was changed."""

    def both(name: str, show: str = "signed") -> tuple[str, str]:
        first, second = drift.last(name), corrected.last(name)
        return (signed(first), signed(second)) if show == "signed" else (plain(first), plain(second))

    score, gold = both("evaluation/score"), both("gold")
    length, kl = both("evaluation/length", "plain"), both("evaluation/kl_per_sequence", "plain")
    usual = plain(drift.last("evaluation/length_reference"))
    changed = ", ".join(proposal.overrides) or "nothing"
    return (
        f"Score at the end: {score[0]} drifting, {score[1]} corrected (normalised units, before any penalty).",
        f"Length: {length[0]} tokens drifting, {length[1]} corrected; the reference uses {usual}.",
        f"KL to the reference: {kl[0]} nats per response drifting, {kl[1]} corrected.",
        f"Gold utility, never shown to training: {gold[0]} drifting, {gold[1]} corrected."
        if drift.truth and corrected.truth
        else "Gold utility: nobody knows it for these runs.",
        f"Changed by a rule that read only the trace: {changed}.",
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
