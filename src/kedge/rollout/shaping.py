"""Rewarders that are not about quality: the token budget, the reference's own length, repetition.

Each is a channel with a weight below 0. One of them, and the score above the reference, need the reference's answer to
each prompt of the step; it is drawn once and shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kedge.ops.shaping import beyond_target, repeated_share, soft_overlong
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder
from kedge.structs import Opinion, Prompts, Rollouts, Sampling

SHAPING = ("overlong", "over_target", "repetition")


class ReferenceAnswers:
    """The reference's answer to each distinct prompt of a step, one each, drawn when it is first asked for.

    `generator(step)` seeds the draw; the step is the version of the policy whose responses are looked at. The last
    step's answers are kept, so that everything that needs them in a step sees the same ones.
    """

    def __init__(
        self, engine: RolloutEngine, reference: Any, sampling: Sampling, generator: Callable[[int], torch.Generator]
    ) -> None:
        self.engine, self.reference, self.sampling, self.generator = engine, reference, sampling, generator
        self._step: int | None = None
        self._answers: Rollouts | None = None

    def of(self, rollouts: Rollouts) -> tuple[Rollouts, Tensor]:
        """[G] answers to the prompts of `rollouts`, in the order of their groups, and [B] which one belongs to each."""
        groups, number = rollouts.group_id.unique(return_inverse=True)
        held = self._answers if self._step == rollouts.policy_version else None
        if held is None or not torch.equal(held.group_id, groups):
            rows = torch.arange(len(rollouts), device=number.device)
            first = torch.zeros_like(groups).scatter_reduce(0, number, rows, "amin", include_self=False)
            prompts = Prompts(rollouts.prompt_ids[first], rollouts.prompt_mask[first], groups)
            step = rollouts.policy_version
            held = self.engine.generate(self.reference, prompts, self.sampling, self.generator(step), step)
            self._step, self._answers = step, held
        return held, number


def shaping_rewarders(
    *,
    overlong: float = 0.0,
    target: float = 0.0,
    repetition: float = 0.0,
    budget: int,
    buffer: int,
    answers: ReferenceAnswers,
) -> dict[str, Rewarder]:
    """The rewarders whose penalty is not 0, by channel; the penalties themselves are the weights, with a minus.

    `overlong` is a share of the penalty (`budget` and `buffer` in tokens), `over_target` counts tokens beyond the
    reference's answer to the same prompt, `repetition` is a share of four-token sequences.
    """

    def overlong_share(rollouts: Rollouts) -> Tensor:
        return soft_overlong(rollouts.lengths, rollouts.ended, budget=budget, buffer=buffer)

    def tokens_over(rollouts: Rollouts) -> Tensor:
        given, row = answers.of(rollouts)
        return beyond_target(rollouts.lengths, given.lengths[row])

    def repeated(rollouts: Rollouts) -> Tensor:
        return repeated_share(rollouts.response_ids, rollouts.response_mask)

    pairs = zip(SHAPING, (overlong, target, repetition), (overlong_share, tokens_over, repeated), strict=True)
    return {name: rewarder for name, penalty, rewarder in pairs if penalty}


def above_reference(rewarder: Rewarder, answers: ReferenceAnswers) -> Rewarder:
    """`rewarder` less its score of the reference's answer to the same prompt.

    Comparisons of answers to one prompt leave a score free to move by a constant per prompt; here that constant is
    gone. The reference's answer is one draw, so its own luck stays as noise, the same for all responses to the prompt.
    """

    def score(rollouts: Rollouts) -> Tensor | Opinion:
        found = rewarder(rollouts)
        given, row = answers.of(rollouts)
        offset = _score_of(rewarder(given))[row]
        return replace(found, score=found.score - offset) if isinstance(found, Opinion) else found - offset

    return score


def _score_of(found: Tensor | Opinion) -> Tensor:
    return found.score if isinstance(found, Opinion) else found
