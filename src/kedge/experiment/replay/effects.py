"""What a push does to features of responses, logged against changed, summed over steps one at a time.

Dimensions: B responses, T response tokens.

Two predictors of a feature's change. *Return*: the covariance of what a response earns in all with the feature. If
whole responses became likelier in proportion to their return, that would be the slope of the feature's mean (the Price
identity). *Push*: the same of the sum of a response's token weights, each less the mean weight at its position, which
moves nothing. It also sees what spreads a return over tokens: lambda, the critic, whitening, aggregation; and with them
the critic's errors. Where every prompt has several responses both are within prompts, else within steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kedge.diagnose.features import Feature
from kedge.diagnose.ledger import STYLES, styles
from kedge.experiment.replay.push import Push
from kedge.experiment.replay.setting import Setting
from kedge.trace.reader import Part, StepTrace

Array = NDArray[Any]
Predictor = Literal["return", "push"]
Z = 1.959964  # of a 95% interval
ALL = "all"


@dataclass(frozen=True)
class ReplayedStep:
    """One step as it was logged, and the same rows under the changed setting."""

    logged: StepTrace
    changed: StepTrace
    logged_setting: Setting
    changed_setting: Setting
    logged_push: Push
    changed_push: Push

    @property
    def step(self) -> int:
        """Its number, from 0."""
        return self.logged.step


@dataclass(frozen=True)
class Covariance:
    """A covariance with its 95% interval over prompts; the unit of the two things that it is of."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Effect:
    """What one feature is pushed to. Covariances are per response; `expected` is in the feature's unit per step."""

    feature: str
    unit: str
    predictor: Predictor  # which of the two decides for this change
    returns: tuple[Covariance, Covariance]  # logged, changed: reward x unit
    pushes: tuple[Covariance, Covariance]  # logged, changed: unit, per mean absolute weight of a token
    difference: Covariance  # changed less logged, of the predictor that decides
    expected: tuple[float, float]  # logged, changed: the next step's change as the last step's movement foretells it
    moved: float  # what the logged updates did to it on their own responses, unit per step

    @property
    def decided(self) -> tuple[Covariance, Covariance]:
        """Logged and changed, of the predictor that decides."""
        return self.returns if self.predictor == "return" else self.pushes

    @property
    def ratio(self) -> float:
        """Changed over logged; nan where nothing is logged."""
        logged, changed = self.decided
        return changed.value / logged.value if logged.value else math.nan

    @property
    def change(self) -> str:
        """What the feature is predicted to do under the change: "rises", "falls", or "unclear"."""
        return {1: "rises", -1: "falls", 0: "unclear"}[self.decided[1].sign]

    @property
    def against(self) -> str:
        """The same against the logged setting: "higher", "lower", or "not clearly another"."""
        return {1: "higher", -1: "lower", 0: "not clearly another"}[self.difference.sign]


@dataclass(frozen=True)
class Flips:
    """Responses of one style whose push, summed over tokens, changes its sign."""

    responses: int
    up_to_down: int  # were made more likely, are made less likely
    down_to_up: int

    @property
    def share(self) -> float:
        """Of the responses; nan where there is none."""
        return (self.up_to_down + self.down_to_up) / self.responses if self.responses else math.nan


@dataclass
class _Sums:
    """Sums over clusters: count, sum and sum of squares of each column."""

    count: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, clusters: Array) -> None:
        self.count += len(clusters)
        self.total = self.total + clusters.sum(axis=0)
        self.squares = self.squares + (clusters**2).sum(axis=0)

    def covariances(self) -> list[Covariance]:
        mean = self.total / max(1, self.count)
        variance = np.maximum(self.squares / max(1, self.count) - mean**2, 0)
        half = Z * np.sqrt(variance / max(1, self.count - 1))
        return [Covariance(float(m), float(m - h), float(m + h)) for m, h in zip(mean, half, strict=True)]


@dataclass
class Account:
    """Adds up replayed steps; memory does not grow with them."""

    features: Mapping[str, Feature]
    predictor: Predictor
    usual: float | None = None  # tokens of the reference's answers
    steps: list[int] = field(default_factory=list)
    responses: int = 0
    tokens: int = 0
    _cov: dict[str, _Sums] = field(default_factory=dict)
    _moved: dict[str, list[float]] = field(default_factory=dict)
    _expected: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    _pace: float = math.nan  # nats that the last step moved a token of mean weight
    _flips: dict[str, Array] = field(default_factory=dict)
    _pushes: dict[str, Array] = field(default_factory=dict)
    _parts: tuple[dict[Part, float], dict[Part, float]] = field(default_factory=lambda: ({}, {}))
    _effective: list[tuple[float, float]] = field(default_factory=list)
    _active: Any = 0.0

    def add(self, one: ReplayedStep) -> None:
        """Take in one step."""
        self.steps.append(one.step)
        self.responses += len(one.logged)
        self.tokens += int(one.logged.response_mask.sum())
        levelled = [_levelled(push.first, one.logged.response_mask) for push in (one.logged_push, one.changed_push)]
        pace, movement = _pace(levelled[0], one.logged)
        known = pace if math.isnan(self._pace) else self._pace
        for name, feature in self.features.items():
            self._feature(name, feature.of(one.logged), one, levelled, movement, known)
        self._pace = pace
        self._style(one)
        self._covariance_parts(one)
        self._effective.append((_effective(one.logged_push.first), _effective(one.changed_push.first)))
        self._active = self._active + np.array([one.logged_push.active.sum(), one.changed_push.active.sum()])

    def _feature(
        self,
        name: str,
        values: Array,
        one: ReplayedStep,
        levelled: list[Array],
        movement: Array,
        pace: float,
    ) -> None:
        here = np.isfinite(values)
        if not here.any():
            return
        group = one.logged.group[here]
        mask = one.logged.response_mask[here]
        inside, factor = _inside(values[here], group)
        returns = [
            _inside(returned(trace, setting)[here], group)[0] * inside * factor
            for trace, setting in ((one.logged, one.logged_setting), (one.changed, one.changed_setting))
        ]
        pushes = [_by_position(weights[here], inside, mask) for weights in levelled]
        columns = np.stack([*returns, *pushes, returns[1] - returns[0], pushes[1] - pushes[0]], axis=1)
        self._cov.setdefault(name, _Sums()).add(_clustered(columns, group))
        self._moved.setdefault(name, []).append(float(_by_position(movement[here], inside, mask).mean()))
        expected = (float(pace * pushes[0].mean()), float(pace * pushes[1].mean()))
        self._expected.setdefault(name, []).append(expected)

    def _style(self, one: ReplayedStep) -> None:
        sums = np.stack([push.first.sum(axis=1) for push in (one.logged_push, one.changed_push)], axis=1)
        scaled = sums * len(one.logged)  # the aggregation divides by what the whole step has
        turned = np.stack([(sums[:, 0] > 0) & (sums[:, 1] < 0), (sums[:, 0] < 0) & (sums[:, 1] > 0)], axis=1)
        style = styles(one.logged.lengths, self.usual)
        for index, name in enumerate((*STYLES, ALL)):
            here = np.full(len(style), True) if name == ALL else style == index
            counts = np.concatenate([[here.sum()], turned[here].sum(axis=0)])
            self._flips[name] = self._flips.get(name, np.zeros(3)) + counts
            self._pushes[name] = self._pushes.get(name, np.zeros(2)) + scaled[here].sum(axis=0)

    def _covariance_parts(self, one: ReplayedStep) -> None:
        lengths, _ = _inside(one.logged.lengths.astype(np.float64), one.logged.group)
        for sums, trace in zip(self._parts, (one.logged, one.changed), strict=True):
            for part, values in trace.parts().items():
                sums[part] = sums.get(part, 0.0) + float(lengths @ values.sum(axis=1))

    def effects(self) -> dict[str, Effect]:
        """By feature; those of which nothing is known are left out."""
        found = {}
        for name, sums in self._cov.items():
            logged, changed, pushed, other, more, further = sums.covariances()
            expected = np.mean(self._expected[name], axis=0)
            found[name] = Effect(
                feature=name,
                unit=self.features[name].unit,
                predictor=self.predictor,
                returns=(logged, changed),
                pushes=(pushed, other),
                difference=more if self.predictor == "return" else further,
                expected=(float(expected[0]), float(expected[1])),
                moved=float(np.mean(self._moved[name])),
            )
        return found

    def flips(self) -> dict[str, Flips]:
        """By style, and of all responses."""
        return {name: Flips(*(int(count) for count in counts)) for name, counts in self._flips.items()}

    def pushes(self) -> dict[str, tuple[float, float]]:
        """By style: the mean over responses of the token weights' sum, logged and changed."""
        found = {}
        for name, sums in self._pushes.items():
            count = self._flips[name][0]
            found[name] = (float(sums[0] / count), float(sums[1] / count)) if count else (math.nan, math.nan)
        return found

    def parts(self) -> dict[Part, tuple[float, float]]:
        """By part: its covariance with length per response, summed over tokens, logged and changed; advantage x tokens.

        They add up to the covariance of the advantage.
        """
        before, after = self._parts
        names = dict.fromkeys([*before, *after])
        count = max(1, self.responses)
        return {part: (before.get(part, 0.0) / count, after.get(part, 0.0) / count) for part in names}

    def effective(self) -> tuple[float, float]:
        """Effective share of responses behind the push, logged and changed: (sum |w|)^2 / (N sum w^2)."""
        mean = np.mean(self._effective, axis=0) if self._effective else np.full(2, math.nan)
        return float(mean[0]), float(mean[1])

    def active(self) -> tuple[float, float]:
        """Share of tokens that the clip lets through in the last epoch, with the ratios that were logged."""
        shares = self._active / max(1, self.tokens) * np.ones(2)
        return float(shares[0]), float(shares[1])


def returned(step: StepTrace, setting: Setting) -> Array:
    """[B] what a response earns in all, in reward: discounted rewards of every channel, and a KL paid in the loss."""
    place = np.cumsum(step.response_mask, axis=1) - 1
    discount = np.where(step.response_mask, setting.gamma ** np.maximum(place, 0), 0.0)
    total = ((step.weights[:, None, :] * step.rewards).sum(axis=-1) * discount).sum(axis=1)
    if setting.place == "loss":
        gap = step.tokens["old_logprob"].astype(np.float64) - step.tokens["reference_logprob"]
        total = total - setting.beta * np.where(step.response_mask, gap, 0).sum(axis=1)
    return np.asarray(total)


def _inside(values: Array, group: Array) -> tuple[Array, float | Array]:
    """[B] less the mean of the prompt, or of the step where a prompt has one response; and what makes it unbiased."""
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        return values - values.mean(), len(values) / max(1, len(values) - 1)
    means = np.bincount(number, values) / counts
    return values - means[number], (counts / (counts - 1))[number]


def _by_position(weights: Array, feature: Array, mask: Array) -> Array:
    """[B] each response's part of sum_t Cov(weight_t, feature) over the responses that reach position t.

    A level that all tokens of a position share moves no feature, so it is taken off. `feature` [B] is centred.
    """
    ahead = mask.sum(axis=0)
    mean = np.where(mask, weights, 0).sum(axis=0) / np.maximum(ahead, 1)
    level = np.where(mask, feature[:, None], 0).sum(axis=0) / np.maximum(ahead, 1)
    return np.asarray((np.where(mask, (weights - mean) * (feature[:, None] - level), 0)).sum(axis=1))


def _levelled(weights: Array, mask: Array) -> Array:
    """[B, T] in units of the mean absolute weight: clipped gradients and Adam level the size of a step."""
    size = np.abs(weights[mask]).mean() if mask.any() else 0.0
    return weights / size if size > 0 else weights


def _pace(levelled: Array, step: StepTrace) -> tuple[float, Array]:
    """Nats that this step moved a token of mean weight (least squares), and [B, T] the movement itself."""
    movement = np.where(
        step.response_mask, step.tokens["new_logprob"].astype(np.float64) - step.tokens["old_logprob"], 0
    )
    norm = float((levelled**2).sum())
    return (float((levelled * movement).sum()) / norm if norm else 0.0), movement


def _effective(weights: Array) -> float:
    sums = weights.sum(axis=1)
    norm = float((sums**2).sum())
    return float(np.abs(sums).sum() ** 2 / (len(sums) * norm)) if norm else math.nan


def _clustered(columns: Array, group: Array) -> Array:
    """[G, K] means over the responses of each prompt."""
    _, number, counts = np.unique(group, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), columns.shape[1]))
    np.add.at(sums, number, columns)
    return np.asarray(sums / counts[:, None])
