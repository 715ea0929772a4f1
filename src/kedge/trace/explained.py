"""A foreign trainer's advantage as a sum of channels: what its recorded parts explain, and the rest.

The trace stores rewards, values, weights, shift and scale, from which a reader derives the advantage. Here they are
chosen so that it is the trainer's own: baselines and deviations follow from the stated normalisation, whitening is
solved from the advantage itself, and what then still differs by more than float32 rounding becomes a channel `rest`.

Dimensions: B responses, T response tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kedge.trace.advantages import gae
from kedge.trace.baselines import (
    discounted_values,
    group_deviation,
    group_mean,
    group_sizes,
    values_giving,
    whole_response_values,
)
from kedge.trace.conventions import Conventions
from kedge.trace.reader import FLOAT32, FLOOR, RELATIVE

Array = NDArray[Any]
KL, CRITIC, REST = "kl", "critic", "rest"
_TERMS = 32 * 2.0**-24  # of the terms before they cancel: what a trainer's float32 sums may lose
_SPREAD = 4e-6  # of the advantage's deviation: below what a check of the parts tells apart


@dataclass(frozen=True)
class Parts:
    """Channels of one step, as a trace stores them: float32, in channel units."""

    names: tuple[str, ...]
    mask: Array  # [B, T] bool
    rewards: Array  # [B, T, C]
    values: Array  # [B, T, C]
    weights: Array  # [B, C] reward per channel unit
    outcome: Array  # [B, C] what the response earned, also where it has no token that could carry it
    gamma: float
    lam: float

    def total(self) -> Array:
        """[B, T] weighted advantages before shift and scale, as a reader derives them."""
        advantages = gae(self.rewards, self.values, self.mask, gamma=self.gamma, lam=self.lam)
        return np.asarray((self.weights.astype(np.float64)[:, None] * advantages).sum(axis=-1))

    def terms(self) -> Array:
        """[B] size of what is added up in a response's advantages, in reward."""
        rewards = np.abs(self.rewards.astype(np.float64)).sum(axis=1)
        values = np.abs(self.values.astype(np.float64)).max(axis=1, initial=0.0)
        return np.asarray((np.abs(self.weights) * (rewards + values)).sum(axis=1))


class Explained(NamedTuple):
    """Channels with their baselines, and the affine map of the step: advantage = (total - shift) / scale."""

    parts: Parts
    shift: Array  # [B] float32, reward
    scale: Array  # [B] float32, reward

    def advantage(self) -> Array:
        """[B, T] as a reader derives it, zero outside the mask."""
        given = (self.parts.total() - self.shift[:, None]) / self.scale[:, None].astype(np.float64)
        return np.where(self.parts.mask, given, 0.0)


def explain(parts: Parts, conventions: Conventions, group: Array | None, advantage: Array | None) -> Explained:
    """The channels with what the stated normalisation took off, and `rest` where that is not the trainer's `advantage`.

    `advantage` [B, T] is None where the trainer does not tell; then nothing is compared.
    """
    parts, scale = _centred(parts, conventions, group, advantage)
    found = Explained(parts, np.zeros(len(scale), np.float32), scale)
    if conventions.whitened:
        found = _whitened(found, conventions, advantage)
    if advantage is None:
        return found
    apart = _apart(found, advantage)
    return found if (np.abs(apart) <= _tolerance(found, advantage)).all() else _with_rest(found, apart)


def _apart(found: Explained, advantage: Array) -> Array:
    """[B, T] what the trainer's advantage holds that the parts do not, in reward."""
    total = advantage * found.scale.astype(np.float64)[:, None] + found.shift[:, None]
    return np.where(found.parts.mask, total - found.parts.total(), 0.0)


def _tolerance(found: Explained, advantage: Array) -> Array:
    """[B, T] what rounding may make of it, in reward: of float32 sums, and of the advantage as it was handed over.

    A mean over the batch carries the rounding of its largest terms to every row. It is never more than half of what a
    reader allows the sum over the response, so that what is accepted here is accepted there.
    """
    mask, scale = found.parts.mask, found.scale.astype(np.float64)[:, None]
    spread = float(advantage[mask].std()) if mask.any() else 0.0
    terms = found.parts.terms() + np.abs(found.shift)
    size = np.abs(advantage)
    own = _TERMS * terms.max(initial=0.0) + scale * (_SPREAD * spread + _TERMS * size)
    tokens = np.maximum(mask.sum(axis=1), 1)[:, None]
    reader = FLOAT32 * terms[:, None] + scale * (RELATIVE * size + FLOOR / tokens)
    return np.asarray(np.minimum(own, reader / 2))


def _with_rest(found: Explained, apart: Array) -> Explained:
    """A last channel without reward whose values give what is missing."""
    parts = found.parts
    values = values_giving(apart, parts.mask, gamma=parts.gamma, lam=parts.lam)[..., None]
    nothing, one = np.zeros_like(values), np.ones((len(parts.mask), 1), np.float32)
    parts = replace(
        parts,
        names=(*parts.names, REST),
        rewards=np.concatenate([parts.rewards, nothing], axis=-1),
        values=np.concatenate([parts.values, values], axis=-1),
        weights=np.concatenate([parts.weights, one], axis=-1),
    )
    return found._replace(parts=parts)


class _Variant(NamedTuple):
    """A baseline [B, C] in channel units and a scale [B]."""

    baseline: Array
    scale: Array


def _centred(
    parts: Parts, conventions: Conventions, group: Array | None, advantage: Array | None
) -> tuple[Parts, Array]:
    """The parts with the baseline of the responses to the same prompt as values, and the scale of each group."""
    if conventions.baseline is None or group is None:
        return parts, np.ones(len(parts.mask), np.float32)
    variants = list(_variants(parts, conventions, group))
    if conventions.whole_response and advantage is not None:
        errors = [_error(parts, one, advantage, whitened=conventions.whitened) for one in variants]
        chosen = variants[int(np.argmin(errors))]
    else:
        chosen = variants[0]
    if conventions.whole_response:
        values = whole_response_values(parts.rewards, chosen.baseline, parts.mask)
    else:
        values = discounted_values(chosen.baseline, parts.mask, gamma=parts.gamma)
    return replace(parts, values=parts.values + values.astype(np.float32)), _scale(chosen.scale)


def _variants(parts: Parts, conventions: Conventions, group: Array) -> Iterator[_Variant]:
    """What trainers mean by one normalisation: over n - 1 or n; alone in a group, an advantage of 0 or the reward."""
    weights = parts.weights.astype(np.float64)
    outcome = parts.outcome
    if not conventions.whole_response:
        outcome = np.where([name == KL for name in parts.names], 0.0, outcome)
    baseline = group_mean(outcome, group, leave_one_out=conventions.baseline == "leave one out")
    total = (weights * outcome).sum(axis=1)
    scales = [np.ones(len(total))]
    if conventions.normalisation == "group mean and deviation":
        scales = [group_deviation(total, group, correction=n) + conventions.epsilon for n in (1, 0)]
    alone = group_sizes(group) == 1
    for scale in scales:
        yield _Variant(baseline, scale)
    if alone.any():
        other = np.where(baseline != 0, 0.0, outcome)
        by_itself = 1.0 + conventions.epsilon if len(scales) > 1 else 1.0
        for scale in scales:
            yield _Variant(np.where(alone[:, None], other, baseline), np.where(alone, by_itself, scale))


def _error(parts: Parts, variant: _Variant, advantage: Array, *, whitened: bool) -> float:
    """The largest distance of a variant's advantages of whole responses from the trainer's."""
    some = parts.mask.any(axis=1)
    if not some.any():
        return 0.0
    weights, mask = parts.weights.astype(np.float64), parts.mask
    total = (weights * (parts.outcome - variant.baseline)).sum(axis=1) / _scale(variant.scale)
    total, given = total[some], (np.where(mask, advantage, 0.0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1))[some]
    if whitened:
        shift, scale = _fit(total, given) or (0.0, 1.0)
        total = (total - shift) / scale
    return float(np.abs(total - given).max())


def _whitened(found: Explained, conventions: Conventions, advantage: Array | None) -> Explained:
    """With the shift and scale of the batch: those that the trainer's advantage shows, else those of the rows."""
    total, mask = found.parts.total(), found.parts.mask
    if not mask.any():
        return found
    shift, deviation = _spread(total, mask, of_responses=conventions.baseline is not None)
    own = _affine(found, shift, deviation + conventions.epsilon)
    solved = None if advantage is None else _fit(total[mask], advantage[mask])
    attempts = [own] if solved is None else [_affine(found, *solved), own]
    for attempt in attempts:
        if advantage is None or (np.abs(_apart(attempt, advantage)) <= _tolerance(attempt, advantage)).all():
            return attempt
    return own if deviation else _affine(found, shift, 1.0)


def _spread(total: Array, mask: Array, *, of_responses: bool) -> tuple[float, float]:
    """Mean and deviation of the tokens' advantages, or, over n - 1, of those of whole responses."""
    if not of_responses:
        return float(total[mask].mean()), float(total[mask].std())
    each = (np.where(mask, total, 0.0).sum(axis=1) / np.maximum(mask.sum(axis=1), 1))[mask.any(axis=1)]
    return float(each.mean()), float(each.std(ddof=1)) if len(each) > 1 else 0.0


def _affine(found: Explained, shift: float, scale: float) -> Explained:
    rows = len(found.shift)
    return found._replace(shift=np.full(rows, shift, np.float32), scale=_scale(np.full(rows, scale)))


def _fit(total: Array, advantage: Array) -> tuple[float, float] | None:
    """Shift and scale with which `(total - shift) / scale` is nearest to `advantage`; None where no scale above 0 is.

    Any deviation and any epsilon, and those of rows that are not here, are told from the trainer's own numbers.
    """
    if not len(total):
        return None
    centred = advantage - advantage.mean()
    size = float(centred @ centred)
    if size <= 1e-12 * float(advantage @ advantage) or not size:
        return float((total - advantage).mean()), 1.0
    scale = float(centred @ (total - total.mean())) / size
    return (float(total.mean() - scale * advantage.mean()), scale) if scale > 0 else None


def _scale(scale: Array) -> Array:
    """[B] float32; 1 where a deviation is 0 and nothing was added to it, as what it divides is 0, too."""
    rounded = scale.astype(np.float32)
    return np.where(rounded > 0, rounded, np.float32(1.0))
