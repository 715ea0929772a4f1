"""A channel pays every token the same: a reward for length, whatever it was meant for.

**What.** A channel's reward per token is one number other than 0 on every token before the last; or a channel that
pays at the end of a response pays in a straight line of its length.

**Why it matters.** Only scaling token rewards by a factor is safe. A constant c per token adds c times the length to
the reward of a response: an entropy or survival bonus, a shaping term, or the constant μ(1 − 1/σ) that whitening of
rewards leaves behind, whose sign depends on the arbitrary zero of the score. It is no reward for anything in the
text.

**How.** On each step every channel's token rewards before the last token are compared with each other (of the kl
channel what is left after log π − log π_ref), and the sums of channels that pay at the end with a straight line in
length; both hold to rounding or not at all. The constant counts by what it moves: |c| times the standard deviation of
length, over that of the reward paid without it and without KL. It fails above 0.1 on three steps in a row.

**False alarms.** A negative weight of the `length` channel is a length penalty that somebody has set, and is passed
over. A rule that is meant to pay by the token is found, too: then it is meant.

**Remedy.** Set the channel's weight to 0, or let it count once per response, or per token of the mean length.

**References.** Metamorphic relation r → r + c: the trained policy must not change; Ziegler et al. 2019 for whitening
of rewards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.checks.check import Check, Kind
from kedge.diagnose.finding import Evidence, Finding, Remedy, graded, not_checked
from kedge.diagnose.rows import SMALL, at_last, channel, log_ratio, paid, weight
from kedge.diagnose.steps import aligned, first_where, lasting, lowest_of
from kedge.diagnose.view import Facts, View
from kedge.trace.reader import Series, StepTrace

Array = NDArray[Any]
SHARE = 0.1  # of the reward's deviation
TIMES = 3  # steps in a row
CAP = 10.0
PREFIX = "token_constant/of."
ROUNDING = 1e-5  # channel units: float32 numbers of size 1 and their sums
RESIDUAL = 1e-4  # of the sums' spread, left by a straight line
LEAST = 8  # tokens, or lengths


def facts(step: StepTrace) -> Facts:
    """Reward per token of every channel that pays one, and how much length and the other reward vary."""
    constants = {name: _constant(step, name) for name in step.channels}
    by_length = step.lengths * sum(constants.values())
    found = {f"{PREFIX}{name}": constant for name, constant in constants.items()}
    found["token_constant/length"] = float(step.lengths.std())
    # The kl channel is left out of what is paid, so its constant must not be taken off either.
    own = by_length - step.lengths * constants.get("kl", 0.0)
    return found | {"token_constant/reward": float((paid(step) - own).std())}


def _constant(step: StepTrace, name: str) -> float:
    """Reward per token, weight included; 0 where the channel pays no constant."""
    rewards, weights = channel(step, name), weight(step, name)
    assert rewards is not None and weights is not None
    factor = float(weights.mean())
    if name == "length" and factor < 0:
        return 0.0
    mask, last = step.response_mask, at_last(step)
    rest = rewards - log_ratio(step) if name == "kl" else rewards
    tokens = rest[mask & ~last]
    if len(tokens) >= LEAST and np.ptp(tokens) <= ROUNDING * max(1.0, float(np.abs(rewards[mask]).max())):
        constant = float(tokens.mean())
        if abs(constant) > ROUNDING:
            return factor * constant
    return 0.0 if name == "kl" else factor * _slope(rewards.sum(axis=1), step.lengths, tokens)


def _slope(sums: Array, lengths: Array, tokens: Array) -> float:
    """Of the responses' sums in length, where they lie on a straight line and are paid at the end."""
    if np.abs(tokens).max(initial=0.0) > ROUNDING or len(np.unique(lengths)) < LEAST:
        return 0.0
    sums, lengths = sums - sums.mean(), lengths - lengths.mean()
    slope = float((sums * lengths).sum() / (lengths**2).sum())
    rest = np.linalg.norm(sums - slope * lengths) / (np.linalg.norm(sums) + SMALL)
    return slope if rest <= RESIDUAL else 0.0


def judge(view: View) -> Finding:
    """The constants' effect at its largest that lasted."""
    length, reward = view.fact("token_constant/length"), view.fact("token_constant/reward")
    if length is None or reward is None or len(length.steps) < TIMES:
        return not_checked("token_constant", f"fewer than {TIMES} steps hold token rewards")
    steps = length.steps
    constants = {
        name.removeprefix(PREFIX): np.nan_to_num(aligned(series, steps))
        for name, series in view.facts.items()
        if name.startswith(PREFIX)
    }
    spread = np.maximum(aligned(reward, steps), SMALL)
    effect = {name: np.abs(values) * length.values / spread for name, values in constants.items()}
    total = Series(steps, np.max(list(effect.values()), axis=0))
    lasted = lowest_of(total.values, TIMES)
    at = int(np.argmax(lasted))
    worst = max(effect, key=lambda name: float(effect[name][at]))
    constant, strength = float(constants[worst][at]), float(min(CAP, lasted[at] / SHARE))
    verb = "pays" if constant > 0 else "takes"
    summary = f"Channel {worst} {verb} {abs(constant):.3g} reward per token, whatever the token."
    finding = Finding(
        "token_constant",
        "ok",
        summary if constant else "No channel pays a constant per token.",
        (
            Evidence("reward per token", constant, "reward per token", f"channel {worst}", f"reward.{worst}"),
            Evidence("what it moves", float(total.values[at]), "standard deviations of the reward", "by length"),
            Evidence("length", float(length.values[at]), "tokens", "standard deviation over responses"),
        ),
        onset=first_where(total, lasting(total.values >= SHARE, TIMES)),
        subject="length",
        mechanism=f"Each further token {verb} {abs(constant):.3g} reward, so length is rewarded "
        f"{'upwards' if constant > 0 else 'downwards'} beside what the text is worth.",
        refuted_by="length stays where it is in a short fork with the constant taken out",
        remedies=_remedies(worst),
    )
    return graded(finding, strength)


def _remedies(name: str) -> tuple[Remedy, ...]:
    keys = {
        "length": ("policy.length_penalty=0",),
        "score": (),
        "kl": ('policy.kl.estimator="k1"',),
    }
    return (
        Remedy(
            keys.get(name, (f"rewards.{name}.weight=0",)),
            "responses are paid for what they say; the constant leaves every token's advantage",
            "what the channel was meant for is gone",
        ),
        Remedy((), "pay it once per response: a constant per response leaves every advantage as it is", "none"),
    )


CHECK = Check(
    "token_constant",
    "a constant per token",
    Kind.INTEGRITY,
    ("M7", "M24"),
    judge,
    facts,
    needs=("score",),
    validated=True,
)
