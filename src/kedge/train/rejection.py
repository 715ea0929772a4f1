"""Rejection-sampling fine-tuning: imitate the best of the policy's own answers. RAFT, Dong et al. (2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder
from kedge.structs import Prompts
from kedge.train.checkpoint import State
from kedge.train.choice import Lesson, best_and_worst, train_on_choices
from kedge.train.policy import PolicySettings, Step, Tie
from kedge.train.sequence_update import SequenceLoss
from kedge.train.update import Learner, Mix


def train_rejection(
    learner: Learner,
    tie: Tie,
    rewarders: dict[str, Rewarder],
    draw: Callable[[int], Prompts],
    engine: RolloutEngine,
    settings: PolicySettings,
    state: State,
    *,
    mix: Callable[[int], Mix] | None = None,
) -> Iterator[Step]:
    """Keep, in every step, the best answer to each prompt and raise its likelihood, the mean over kept tokens.

    A prompt whose answers are worth the same teaches nothing. There is no tie to the reference but the few steps. The
    advantage in the trace is 1 on every token of a kept answer and 0 on the others.
    """
    lesson = Lesson(_best, _likelihood, by_token=True, names={"loss": "choice/loss"})
    return train_on_choices(learner, tie, rewarders, draw, engine, settings, state, lesson, mix=mix)


def _best(worth: Tensor, group: Tensor) -> Tensor:
    return best_and_worst(worth, group)[:, :1]


def _likelihood(usual: Tensor, beta: Tensor) -> SequenceLoss:
    del usual, beta  # nothing ties the policy
    return lambda logprobs, _: {"loss": -logprobs[:, 0]}
