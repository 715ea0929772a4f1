"""What a reward model says of rollouts, with one pass over each of its trunks.

Dimensions: B responses, M members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kedge.models.heads import require_spread
from kedge.models.reward import RewardModel
from kedge.models.support import Support, support_of
from kedge.rollout.score import by_length, head_scores, last_states
from kedge.structs import Opinion, Rollouts

MICROBATCH = 512
SUPPORT_ROWS = 8192  # responses whose states are kept for the support, of each kind: bounds memory and time


def judge(reward_model: RewardModel, rollouts: Rollouts) -> Opinion:
    """Score, members' normalised scores and, where the support is known, the distance from it."""
    if reward_model.support is None:
        raw, distance = _raw(reward_model.models, rollouts), None
    else:
        states, first = _read(reward_model.models[0], rollouts)
        raw = torch.cat([first, _raw(reward_model.models[1:], rollouts)], dim=1) if reward_model.models[1:] else first
        distance = reward_model.support.distance(states)
    members = reward_model.normalised(raw)
    return Opinion(reward_model.final(members, rollouts.lengths), members, distance)


def scores(reward_model: RewardModel, rollouts: Rollouts) -> Tensor:
    """[B] mean 0 and standard deviation 1 on the reference's samples."""
    return reward_model.final(member_scores(reward_model, rollouts), rollouts.lengths)


def member_scores(reward_model: RewardModel, rollouts: Rollouts) -> Tensor:
    """[B, M] each member's normalised score."""
    return reward_model.normalised(_raw(reward_model.models, rollouts))


def aggregate_scores(reward_model: RewardModel, rollouts: Rollouts) -> Tensor:
    """[B] the members as one, before length correction and the last normalisation: what a correction is fitted to."""
    return reward_model.aggregated(member_scores(reward_model, rollouts))


def normalised_on(reward_model: RewardModel, rollouts: Rollouts) -> RewardModel:
    """The reward model in units of its scores on the reference's samples; its correction stays as it is.

    Raises `DivergenceError` if scores are not finite and `InputError` if those of a member, or the final ones, do not
    vary.
    """
    raw = _raw(reward_model.models, rollouts)
    units = [_units(column) for column in raw.unbind(dim=1)]
    means, scales = zip(*units, strict=True)
    model = replace(reward_model, means=means, scales=scales, shift=0.0, scale=1.0)
    if model.members == 1 and model.correction is None:
        return model
    shift, scale = _units(model.final(model.normalised(raw), rollouts.lengths))
    return replace(model, shift=shift, scale=scale)


def fit_support(reward_model: RewardModel, training: Rollouts, held_out: Rollouts) -> Support:
    """Where the first member has been trained; distances are taken as usual on the responses held out.

    Raises `InputError` where the states do not vary.
    """
    model = reward_model.models[0]
    known, new = (_read(model, _spread(part))[0] for part in (training, held_out))
    return support_of(known, new, training.lengths)


def _spread(rollouts: Rollouts) -> Rollouts:
    """At most `SUPPORT_ROWS` of the rows, evenly spaced."""
    count = min(len(rollouts), SUPPORT_ROWS)
    return rollouts.rows(torch.arange(count) * len(rollouts) // count)


def _units(values: Tensor) -> tuple[float, float]:
    mean, scale = float(values.mean()), float(values.std()) if len(values) > 1 else 0.0
    require_spread(mean, scale)
    return mean, scale


def _raw(models: tuple[Any, ...], rollouts: Rollouts) -> Tensor:
    """[B, M] unnormalised scores."""
    return torch.cat([_over(rollouts, partial(head_scores, model)) for model in models], dim=1)


def _read(model: Any, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """[B, width] the states under the heads, and [B, heads] the unnormalised scores."""

    def read(part: Rollouts) -> Tensor:
        states = last_states(model, part)
        return torch.cat([states, model.score(states)], dim=1)

    found, width = _over(rollouts, read), model.score.in_features
    return found[:, :width], found[:, width:]


@torch.no_grad()
def _over(rollouts: Rollouts, read: Callable[[Rollouts], Tensor]) -> Tensor:
    return by_length(rollouts, read, MICROBATCH)
