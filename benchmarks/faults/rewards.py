"""Reward models that a fault or a benign change puts in the place of the run's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

LONGEST = 96  # tokens: beyond every answer
Edit = Callable[[Any, Mapping[str, Any], Any], Any]
"""From the run's reward model, those trained beside it by name, and answers of the reference, to another one."""


@dataclass(frozen=True)
class Beside:
    """A reward model trained beside the run's own, on the same supervised policy."""

    name: str
    settings: tuple[str, ...]


TONE = Beside("tone", ("desk.annotators.tone=4.0",))
BETTER = Beside("better", ("pairs.prompts=9000",))


@dataclass(frozen=True)
class Change:
    """An edit, and the model beside that it needs."""

    edit: Edit
    beside: Beside | None = None


def longer_is_better(per_token: float) -> Change:
    """`per_token` score units for each token; mean and deviation on the reference's answers as before."""

    def edit(own: Any, _others: Mapping[str, Any], answers: Any) -> Any:
        from kedge.models.correction import LengthCorrection
        from kedge.rollout.reward import normalised_on

        slope = LengthCorrection((0.0, float(LONGEST)), (0.0, -per_token * LONGEST))
        return normalised_on(replace(own, correction=slope), answers)

    return Change(edit)


def scaled(by: float) -> Change:
    """The same ranking, all scores times `by`."""
    return Change(lambda own, _others, _answers: replace(own, shift=own.shift, scale=own.scale / by))


def swapped(beside: Beside, share: float = 1.0) -> Change:
    """The reward model trained beside; with `share` below 1 the weights of both, averaged with that share.

    Both began as the same model and saw the same answers in the same order, so that the average is a reward model.
    """

    def edit(own: Any, others: Mapping[str, Any], answers: Any) -> Any:
        from kedge.rollout.reward import normalised_on

        other = others[beside.name]
        if share == 1:
            return other
        mean, left, right = copy.deepcopy(own.models[0]), own.models[0].state_dict(), other.models[0].state_dict()
        mean.load_state_dict({name: (1 - share) * left[name] + share * right[name] for name in left})
        return normalised_on(replace(own, models=(mean,)), answers)

    return Change(edit, beside)
