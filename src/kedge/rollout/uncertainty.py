"""How far a reward model's opinion of a policy's responses can be trusted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from kedge.models.reward import RewardModel
from kedge.ops.ensembles import centred_on_prompt, disagreement
from kedge.rollout.reward import member_scores
from kedge.structs import Opinion, Rollouts


@dataclass(frozen=True)
class Uncertainty:
    """What a step's responses show; None where one member, or a model without its training data's support, cannot.

    Distance and length are held against the 99th percentiles that they had in the reward model's own data.
    """

    members: Tensor | None = None  # [B, M] normalised scores, M > 1
    disagreement: Tensor | None = None  # [B] normalised score; nan where a prompt has nothing to be centred on
    distance: Tensor | None = None  # [B] Mahalanobis
    beyond_support: Tensor | None = None  # [B] bool
    longer_than_training: Tensor | None = None  # [B] bool


def uncertainty(
    reward_model: RewardModel, opinion: Opinion, rollouts: Rollouts, answers: Rollouts | None
) -> Uncertainty:
    """What `opinion` of `rollouts` is worth.

    Members are compared after each is centred on its prompt: by its score of `answers` (row i answers the prompt of
    row i) where these are given, else by its mean over the responses to the same prompt.
    """
    found, members = Uncertainty(), opinion.members
    if reward_model.members > 1:
        usual = None if answers is None else member_scores(reward_model, answers)
        centred = centred_on_prompt(members, rollouts.group_id) if usual is None else members - usual
        found = Uncertainty(members=members, disagreement=disagreement(centred))
    if (support := reward_model.support) is None or opinion.distance is None:
        return found
    return replace(
        found,
        distance=opinion.distance,
        beyond_support=opinion.distance > support.limit,
        longer_than_training=rollouts.lengths > support.longest,
    )
