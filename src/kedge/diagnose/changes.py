"""What would change it: settings that act on what was found, what each does to reward and gradient, what trials saw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kedge.diagnose.account import Account, account_of
from kedge.diagnose.contrast import LENGTH, Contrast
from kedge.diagnose.correction import BETA_CAP, BETA_FACTOR, balancing_beta, score_slope
from kedge.diagnose.diagnosis import ALARMS, Diagnosis
from kedge.diagnose.finding import Finding
from kedge.diagnose.steps import LATE
from kedge.diagnose.trials import Tried, trial_of
from kedge.diagnose.view import View

PROPOSED = 2
ALSO_TRIED = 4
_BETA, _PENALTY, _FIXED = "policy.kl.beta", "policy.length_penalty", "policy.kl.mode=fixed"
Offer = tuple[tuple[str, ...], str, str]  # settings, effect, cost


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


def changes(view: View, found: Diagnosis, contrast: Contrast, trials: Sequence[Tried] = ()) -> tuple[Change, ...]:
    """Two proposals for what was found, with the trial of each; then what else was tried, most forks first."""
    if not found.alone():
        return ()
    proposed = [
        _change(view, contrast, *offer, trial_of(offer[0], trials, _in_force(view)))
        for offer in _offers(view, found, contrast)
    ]
    known = {one.tried for one in proposed}
    others = sorted((one for one in trials if one not in known), key=lambda one: -one.forks)
    also = [_change(view, contrast, one.changes, "", "", one) for one in others[:ALSO_TRIED]]
    return (*proposed, *also)


def beyond_settings(found: Diagnosis) -> tuple[str, ...]:
    """What would act on it and is no setting of the run, such as other labels, each with its cost."""
    remedies = [remedy for one in found.alone() for remedy in one.remedies if not remedy.overrides]
    return tuple(dict.fromkeys(f"{one.effect} (costs {one.cost})" for one in remedies))[:PROPOSED]


def _offers(view: View, found: Diagnosis, contrast: Contrast) -> list[Offer]:
    """The first two distinct offers: remedies of causes, then what the pairs give, then remedies of symptoms.

    A beta is that which the pairs give, where they give one.
    """
    alone = list(found.alone())
    symptoms = [one for one in found.of(*ALARMS) if one not in alone]
    computed = {_keys(offer[0]): offer for offer in _computed(view, contrast)}
    offered: dict[frozenset[str], Offer] = {}
    for offer in (*_remedies(view, alone), *computed.values(), *_remedies(view, symptoms)):
        keys = _keys(offer[0])
        offered.setdefault(keys, computed.get(keys, offer))
    return list(offered.values())[:PROPOSED]


def _remedies(view: View, findings: Sequence[Finding]) -> Iterator[Offer]:
    for one in findings:
        for remedy in one.remedies:
            if remedy.overrides:
                yield _plain(view, remedy.overrides), remedy.effect, remedy.cost


def _computed(view: View, contrast: Contrast) -> Iterator[Offer]:
    """A beta, and a length penalty where it is about length, from the pairs, where having more of it pays."""
    pairs = contrast.pairs
    late = list(pairs[-max(1, round(len(pairs) * LATE)) :])
    if not late or float(np.mean([one.net.mean() for one in late])) <= 0:
        return
    old = late[-1].beta
    beta = _two_digits(max(old, min(BETA_CAP, max(BETA_FACTOR * old, balancing_beta(late)))))
    if beta > old:
        effect = f"every nat costs {beta:.3g} reward instead of {old:.3g}"
        cost = "every change becomes slower, wanted ones too, and the score stays lower"
        yield _plain(view, (_FIXED, f"{_BETA}={beta:.6g}")), effect, cost
    slope = _two_digits(score_slope(late)) if contrast.subject == LENGTH else 0.0
    if slope > late[-1].penalty:
        effect = "takes the score's slope on length within a prompt away"
        yield (f"{_PENALTY}={slope:.6g}",), effect, "answers that need their length are taxed as well"


def _keys(overrides: Sequence[str]) -> frozenset[str]:
    return frozenset(one.partition("=")[0] for one in overrides if one != _FIXED)


def _in_force(view: View) -> tuple[str, ...]:
    """Settings that proposals may name and the run has already."""
    mode = view.settings.get("policy", {}).get("kl", {}).get("mode")
    return (_FIXED,) if mode == "fixed" else ()


def _plain(view: View, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The settings without those that are in force."""
    return tuple(one for one in overrides if one not in _in_force(view))


def _change(
    view: View, contrast: Contrast, overrides: tuple[str, ...], effect: str, cost: str, tried: Tried | None
) -> Change:
    values = dict(one.partition("=")[::2] for one in overrides)
    beta, tax = _number(values.get(_BETA)), _number(values.get(_PENALTY))
    return Change(
        overrides=overrides,
        effect=effect,
        reward=_effective(contrast, beta, tax),
        gradient=_gradient(view, contrast, beta, tax),
        cost=cost,
        tried=tried,
    )


def _effective(contrast: Contrast, beta: float | None, tax: float | None) -> str:
    """The matched margin under the change."""
    if (beta is None and tax is None) or not contrast.pairs:
        return ""
    last = contrast.pairs[-1]
    new_beta, new_tax = last.beta if beta is None else beta, last.penalty if tax is None else tax
    charged = np.maximum(last.kl, 0.0)
    nets = last.score - new_beta * charged - new_tax * last.length
    taxed = f" minus {new_tax:.3g} per token times {last.length.mean():.0f} tokens" if new_tax else ""
    return (
        f"Where the run stands, the net margin of {contrast.more} goes from {last.net.mean():+.2f} to "
        f"{nets.mean():+.2f} reward: {last.score.mean():+.2f} score minus {new_beta:.3g} times {charged.mean():.1f} "
        f"nats{taxed}; it stays above 0 on {(nets > 0).mean():.0%} of the prompts instead of "
        f"{(last.net > 0).mean():.0%}."
    )


def _gradient(view: View, contrast: Contrast, beta: float | None, tax: float | None) -> str:
    """Where the change lets the policy come to rest, and what verbose and concise tokens would carry."""
    rest = _rest(contrast, beta)
    if contrast.subject != LENGTH:
        return rest
    return " ".join(part for part in (rest, _tokens(view, contrast, beta, tax)) if part)


def _rest(contrast: Contrast, beta: float | None) -> str:
    """At the optimum of a beta two answers have moved apart by score margin / beta: pi ~ pi_ref exp(r / beta)."""
    if beta is None or beta <= 0 or not contrast.pairs:
        return ""
    last = contrast.pairs[-1]
    score, now = float(last.score.mean()), float(last.kl.mean())
    if score <= 0:
        return ""
    end = score / beta
    pull = "pulls back" if end < now else "still pushes on"
    return (
        f"The gradient is 0 where it has gained {score:.2f} / {beta:.3g} = {end:.1f} nats on {contrast.less}; it has "
        f"gained {now:.1f}, so the change {pull}."
    )


def _tokens(view: View, contrast: Contrast, beta: float | None, tax: float | None) -> str:
    """The advantage per token of verbose and concise responses under the change."""
    verbose, concise = account_of(view, "verbose"), account_of(view, "concise")
    if (beta is None and tax is None) or verbose is None or concise is None:
        return ""
    now = view.metric("kl/beta")
    if beta is not None and (now is None or now.values[-1] <= 0):
        return ""
    times = 1.0 if beta is None or now is None else beta / float(now.values[-1])
    in_force = contrast.pairs[-1].penalty if contrast.pairs else 0.0
    more = 0.0 if tax is None else tax - in_force
    first, then = (
        one - other
        for one, other in (
            (verbose.total, concise.total),
            (verbose.under(beta=times, penalty=more), concise.under(beta=times, penalty=more)),
        )
    )
    return (
        f"{_parts(verbose, concise)} Under the change {first:+.2f} becomes {then:+.2f}, before critic and whitening "
        f"follow."
    )


def _parts(verbose: Account, concise: Account) -> str:
    gaps = {name: value - concise.parts[name] for name, value in verbose.parts.items()}
    listed = ", ".join(f"{name} {value:+.2f}" for name, value in gaps.items() if abs(value) >= 0.005)
    return (
        f"Late in the run the advantage of a verbose token lies {verbose.total - concise.total:+.2f} standard "
        f"deviations from a concise one's; these parts account for it: {listed}."
    )


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}") if math.isfinite(value) else BETA_CAP
