"""The rows of the ledger for one step: what the advantage of every token is the sum of, and what stands beside it.

GAE is linear in rewards and values and whitening is affine, so the parts sum to the advantage that training used. Two
measures of every part: per token, as the loss adds them up, and of the whole response, the sum of its TD errors

    sum_t delta_t,  delta_t = r_t + gamma V_{t+1} - V_t,

which for gamma = 1 is the return less the first value, whatever lambda and the later values are. The second is what a
natural-gradient step adds to the log-probability of the response (Kakade 2001), so features move by their covariance
with it; summed per token, a long response counts what all of its tokens share once for each.

Dimensions: B responses, T response tokens, J rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.push import loss_pushes
from kedge.trace.advantages import gae
from kedge.trace.reader import WHITENING, StepTrace

Array = NDArray[Any]
Kind = Literal["part", "side", "loss"]
LIMIT = 1e-5  # of the advantage's standard deviation: what float32 logs may lose
_K1 = 1e-5  # relative: the KL channel is log policy - log reference

CENTRING = {
    "channels": "each channel has a critic head or a baseline of its own: reward and critic part together are centred",
    "scalar": "one critic for the sum of all channels: its share by channel is estimated, the rest left whole",
    "none": "nothing predicts the channels: their parts are not centred, only their sum is, by whitening if at all",
}


@dataclass(frozen=True)
class Entry:
    """One row. A "part" is a term of the advantage, a "side" one of two terms of the row that `of` names, a "loss" a
    push of the loss beside the advantage."""

    channel: str
    source: str
    kind: Kind = "part"
    of: str = ""
    estimated: bool = False

    @property
    def name(self) -> str:
        """For people: "score reward", "kl critic (estimated)", "whitening"."""
        name = self.channel if self.source in ("", WHITENING.source) else f"{self.channel} {self.source}"
        return f"{name} (estimated)" if self.estimated else name


@dataclass(frozen=True)
class Split:
    """The rows of one step: `tokens` [B, T, J] and `whole` [B, J], in the advantage's unit."""

    entries: tuple[Entry, ...]
    tokens: Array
    whole: Array

    def of_kind(self, kind: Kind) -> list[int]:
        """Numbers of the rows of one kind."""
        return [index for index, entry in enumerate(self.entries) if entry.kind == kind]


@dataclass(frozen=True)
class Gap:
    """How far the parts are from the advantage, in its standard deviations over the tokens of the step.

    `token` is the largest difference at a token from the advantage derived apart; `digest` the largest mean difference
    over the tokens of a response from the sum that training wrote. `excess` is what of it training's own rounding does
    not explain: where a reward less its baseline nearly vanishes and is divided by a small scale, as in a group of
    equal rewards, float32 leaves noise in the place of 0.
    """

    token: float
    digest: float
    excess: float

    @property
    def holds(self) -> bool:
        """The parts sum to the advantage within what float32 logs may lose."""
        return max(self.token, self.excess) <= LIMIT

    def worse(self, other: Gap) -> Gap:
        """The larger of each."""
        return Gap(max(self.token, other.token), max(self.digest, other.digest), max(self.excess, other.excess))


def centring(step: StepTrace) -> str:
    """The key of CENTRING that says what predicts the channels of a step."""
    if step.critic == "none" and np.any(step.values):
        return "channels"  # a baseline per channel
    return step.critic if step.critic in CENTRING else "none"


def split(step: StepTrace) -> Split:
    """The rows of a step: parts that sum to the advantage, the sides of the KL reward, and pushes of the loss."""
    columns = _Columns(step)
    for index, channel in enumerate(step.channels):
        columns.add(Entry(channel, "reward"), index, rewards=step.rewards[..., index])
    if centring(step) == "scalar":
        _estimated_critic(step, columns)
    else:
        for index, channel in enumerate(step.channels):
            columns.add(Entry(channel, "critic"), index, values=step.values[..., index])
    _kl_sides(step, columns)
    tokens, whole = columns.advantages()
    shift = (-step.shift / step.scale)[:, None]
    entries = [*columns.entries, Entry(*WHITENING)]
    tokens = np.concatenate([tokens, np.where(step.response_mask, shift, 0.0)[..., None]], axis=-1)
    whole = np.concatenate([whole, shift * (step.lengths > 0)[:, None]], axis=-1)
    for push in loss_pushes(step):
        entries.append(Entry("loss", push.name, "loss"))
        tokens = np.concatenate([tokens, push.tokens[..., None]], axis=-1)
        whole = np.concatenate([whole, push.whole[:, None]], axis=-1)
    return Split(tuple(entries), tokens, whole)


def gap(step: StepTrace, rows: Split | None = None) -> Gap:
    """How far the parts of a step are from the advantage that training used."""
    rows = split(step) if rows is None else rows
    total = rows.tokens[..., rows.of_kind("part")].sum(axis=-1)
    advantage, mask = step.advantage(), step.response_mask
    if not mask.any():
        return Gap(0.0, 0.0, 0.0)
    spread = float(advantage[mask].std())
    if not spread:
        spread = max(float(np.abs(advantage).max(initial=0.0)), 1e-12)
    token = float(np.abs(total - advantage)[mask].max()) / spread
    apart = np.abs(total.sum(axis=1) - step.advantage_sum)
    unit = spread * np.maximum(step.lengths, 1)
    return Gap(token, float((apart / unit).max()), float(np.maximum((apart - step.rounding) / unit, 0).max()))


class _Columns:
    """Rewards and values to be turned into advantages in one recursion, each with its weight over the scale."""

    def __init__(self, step: StepTrace) -> None:
        self.step = step
        self.entries: list[Entry] = []
        self._rewards: list[Array] = []
        self._values: list[Array] = []
        self._factors: list[Array] = []

    def add(self, entry: Entry, channel: int | None, rewards: Array | None = None, values: Array | None = None) -> None:
        """A row of `rewards` or `values` [B, T] in units of a channel, or of the reward where None."""
        nothing = np.zeros(self.step.response_mask.shape)
        weight = np.ones(len(self.step)) if channel is None else self.step.weights[:, channel]
        self.entries.append(entry)
        self._rewards.append(nothing if rewards is None else rewards)
        self._values.append(nothing if values is None else values)
        self._factors.append(weight / self.step.scale)

    def advantages(self) -> tuple[Array, Array]:
        """[B, T, J] generalised advantages and [B, J] sums of TD errors, both over the scale."""
        step, mask = self.step, self.step.response_mask[..., None]
        rewards = np.stack(self._rewards, axis=-1).astype(np.float64)
        values = np.where(mask, np.stack(self._values, axis=-1), 0.0).astype(np.float64)
        factors = np.stack(self._factors, axis=-1)
        tokens = gae(rewards, values, step.response_mask, gamma=step.gamma, lam=step.lam)
        first = values[np.arange(len(step)), step.response_mask.argmax(axis=1)]
        errors = np.where(mask, rewards, 0.0).sum(axis=1) - first
        if step.gamma != 1:
            errors = errors + (step.gamma - 1) * (values.sum(axis=1) - first)
        return tokens * factors[:, None], errors * factors


def _kl_sides(step: StepTrace, columns: _Columns) -> None:
    """-beta log pi and +beta log pi_ref, where the KL channel is their sum and counts; the trace alone says so."""
    if "kl" not in step.channels:
        return
    index = step.channels.index("kl")
    old, reference = (
        np.where(step.response_mask, step.tokens[f"{name}_logprob"], 0.0) for name in ("old", "reference")
    )
    paid = np.where(step.response_mask, step.rewards[..., index], 0.0)
    k1 = np.abs(paid - (old - reference)) <= _K1 * (1 + np.abs(old) + np.abs(reference))
    if not step.weights[:, index].any() or not k1.all():
        return
    columns.add(Entry("kl", "entropy side", "side", of="kl reward"), index, rewards=old)
    columns.add(Entry("kl", "prior side", "side", of="kl reward"), index, rewards=-reference)


def _estimated_critic(step: StepTrace, columns: _Columns) -> None:
    """The one critic's values, divided into what it can know of each channel and the rest.

    By least squares within the step of each channel's discounted reward to go on what the state before a token shows.
    """
    index = step.channels.index("critic") if "critic" in step.channels else len(step.channels) - 1
    values = np.where(step.response_mask, (step.weights[:, None] * step.values).sum(axis=-1), 0.0)
    others = [number for number in range(len(step.channels)) if number != index]
    rest = values
    known = _state(step, values)
    paid = step.weights[:, None, others] * step.rewards[..., others]
    to_go = gae(paid, np.zeros_like(paid), step.response_mask, gamma=step.gamma, lam=1.0)[step.response_mask]
    for column, number in enumerate(others):
        if not np.any(to_go[:, column]):
            continue
        estimate = np.zeros(values.shape)
        estimate[step.response_mask] = known @ np.linalg.lstsq(known, to_go[:, column], rcond=1e-8)[0]
        rest = rest - estimate
        columns.add(Entry(step.channels[number], "critic", estimated=True), None, values=estimate)
    columns.add(Entry(step.channels[index], "rest"), None, values=rest)


def _state(step: StepTrace, values: Array) -> Array:
    """[N, F] what the trace knows of the state before each of the policy's tokens, standardised, with a constant."""
    mask = step.response_mask
    position = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    spent = np.where(mask, step.tokens["old_logprob"] - step.tokens["reference_logprob"], 0.0)
    columns: Sequence[Array] = (
        values,
        position,
        position**2,
        np.cumsum(spent, axis=1) - spent,
        step.tokens["entropy"],
        step.tokens["old_eos_logprob"],
        step.tokens["reference_eos_logprob"],
    )
    known = np.stack([column[mask].astype(np.float64) for column in columns], axis=-1)
    spread = known.std(axis=0)
    varies = spread > 1e-9
    known = (known[:, varies] - known[:, varies].mean(axis=0)) / spread[varies]
    return np.concatenate([known, np.ones((len(known), 1))], axis=1)
