"""Online DPO: pairs of the policy's own answers, as the rewards rank them. Guo et al. (2024)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from kedge.ops.direct import dpo
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder
from kedge.structs import Prompts
from kedge.train.checkpoint import State
from kedge.train.choice import Lesson, best_and_worst, train_on_choices
from kedge.train.direct import PAIR_METRICS, pair_loss
from kedge.train.policy import PolicySettings, Step, Tie
from kedge.train.sequence_update import SequenceLoss
from kedge.train.update import Learner, Mix


def train_online(
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
    """Learn, in every step, which of a prompt's answers is the best and which the worst; ties teach nothing.

    The loss of a pair is `ops.direct.dpo`, its strength the controller's beta; the tie to the reference is in it, so
    the divergence is no part of what answers are ranked by. The advantage in the trace is beta sigmoid(-beta h) on
    every token of the best answer (less where labels are smoothed), minus that on the worst, and 0 on the others.
    """

    def loss(usual: Tensor, beta: Tensor) -> SequenceLoss:
        return pair_loss(usual, lambda h, chosen: dpo(h, beta[chosen], settings.label_smoothing))

    lesson = Lesson(best_and_worst, loss, by_token=False, names=PAIR_METRICS)
    return train_on_choices(learner, tie, rewarders, draw, engine, settings, state, lesson, mix=mix)
