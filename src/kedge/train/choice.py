"""The loop of methods that draw several answers to a prompt, keep some, and learn from which were kept.

They use rewards only to choose, so an advantage in the usual sense there is none. What a step leaves in the trace as
the advantage of a token is the coefficient of its log-probability's gradient at the first minibatch, before the loss is
averaged. It is the reward of a channel of its own, `choice`, with weight 1; the channels by which answers were chosen
stand beside it with weight 0. With gamma = lambda = 1 and no critic every token of a response then has the coefficient
as its advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.ops.masked import masked_sum
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder
from kedge.structs import Experience, Prompts, ScoredRollouts, UpdateStats
from kedge.train.checkpoint import State
from kedge.train.experience import make_experience
from kedge.train.normalise import in_running_unit
from kedge.train.policy import (
    Clock,
    PolicySettings,
    Step,
    Tie,
    decayed,
    require_finite_scores,
    require_ratio_one,
    scored_by,
    set_rates,
)
from kedge.train.ranks import across_ranks
from kedge.train.schedule import seeded
from kedge.train.sequence_update import SequenceLoss, SequenceStats, sequence_update
from kedge.train.update import Learner, Mix

CHANNEL = "choice"


@dataclass(frozen=True)
class Lesson:
    """What is learnt from answers of known worth.

    `groups` picks rows [G, K] by the answers' worth [B] and their prompts' numbers [B]. `loss` makes the loss of a
    group from the log-probabilities of whole answers [B] under the reference, in nats, and the strength of the tie to
    it [B]. `by_token` averages over tokens, else over groups. `names` are those of the figures among the metrics.
    """

    groups: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], SequenceLoss]
    by_token: bool
    names: Mapping[str, str]


def train_on_choices(
    learner: Learner,
    tie: Tie,
    rewarders: dict[str, Rewarder],
    draw: Callable[[int], Prompts],
    engine: RolloutEngine,
    settings: PolicySettings,
    state: State,
    lesson: Lesson,
    *,
    mix: Callable[[int], Mix] | None = None,
) -> Iterator[Step]:
    """Run the loop from `state` and yield after every step; learner is changed in place, a critic is not asked.

    `draw(step)` gives the prompts of a step, each as often as it is to be answered, `mix(step)` its demonstrations.
    Raises `InputError` where a reward is not finite and `DivergenceError` where an update is not.
    """
    for number in range(state.step, settings.steps):
        clock = Clock()
        past = state.past
        if settings.reference_every and number and number % settings.reference_every == 0:
            tie.reference.load_state_dict(learner.policy.state_dict())
            past = past.released()
        random = seeded(settings.seed, "rollout", number)
        rollouts = engine.generate(learner.policy, draw(number), settings.sampling, random, number)
        clock.lap("generate_s")
        scored = scored_by(rollouts, replace(learner, critic=None), tie.reference, rewarders, settings)
        require_finite_scores(scored, number)
        running = state.score
        if running is not None:
            running = running.observe(scored.scores["score"], across_ranks())
            scored = in_running_unit(scored, running)
        beta = state.controller.beta(tie.tier(rollouts))
        worth = worths(scored, settings.weights)
        groups = lesson.groups(worth, rollouts.group_id)
        loss = lesson.loss(masked_sum(scored.reference.logprobs, rollouts.response_mask, dim=1), beta)
        experience = chosen(scored, groups, loss, settings.weights)
        clock.lap("score_s")
        set_rates(learner, decayed(settings.final_lr, settings.steps, number))
        if tie.guard is not None:
            tie.guard.before(learner, past)
        try:
            done = sequence_update(
                learner,
                rollouts,
                groups,
                loss,
                settings.update,
                seeded(settings.seed, "update", number),
                size=rollouts.lengths[groups].sum(dim=1) if lesson.by_token else torch.ones(len(groups)),
                scored=scored,
                mix=None if mix is None else mix(number),
                stop=tie.stop,
            )
        except DivergenceError as error:
            raise DivergenceError(f"policy step {number}: {error}") from error
        stats = _as_update(done, experience)
        require_ratio_one(stats, number)
        verdict = None if tie.guard is None else tie.guard.after(learner, number)
        clock.lap("update_s")
        state = replace(
            state,
            step=number + 1,
            controller=state.controller.observe(experience.kl_per_response(), tie.tier(rollouts)),
            score=running,
            past=past if verdict is None else verdict.past,
        )
        figures = _figures(done, lesson, worth, groups)
        figures |= _in_force(experience, {**settings.weights, "kl": -float(beta.mean())})
        yield Step(number, float(beta.mean()), experience, stats, state, clock.seconds, verdict, figures)


def worths(scored: ScoredRollouts, weights: Mapping[str, float]) -> Tensor:
    """[B] the weighted rewards of each answer, the divergence from the reference left out: it is in the loss."""
    experience = make_experience(scored, weights={**weights, "kl": 0.0}, whiten=False)
    return (experience.weights * experience.rewards.sum(dim=1)).sum(dim=1)


def chosen(scored: ScoredRollouts, groups: Tensor, loss: SequenceLoss, weights: Mapping[str, float]) -> Experience:
    """Experience whose advantage is minus the slope of each group's loss in its answers' log-probabilities."""
    old = masked_sum(scored.old.logprobs, scored.rollouts.response_mask, dim=1)
    at = old[groups].detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(loss(at, groups)["loss"].sum(), at)
    coefficient = torch.zeros_like(old).index_add(0, groups.flatten(), -slope.flatten())
    marked = replace(scored, scores={**scored.scores, CHANNEL: coefficient})
    return make_experience(marked, weights=dict.fromkeys([*weights, "kl"], 0.0) | {CHANNEL: 1.0}, whiten=False)


def best_and_worst(worth: Tensor, group: Tensor) -> Tensor:
    """[G, 2] rows of the best and of the worst answer to each prompt, where one is better than the other."""
    order = worth.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]  # by prompt, and within it from worst to best
    counts = group[order].unique_consecutive(return_counts=True)[1]
    last = counts.cumsum(dim=0) - 1
    pairs = torch.stack([order[last], order[last - counts + 1]], dim=1)
    return pairs[worth[pairs[:, 0]] > worth[pairs[:, 1]]]


def _as_update(done: SequenceStats, experience: Experience) -> UpdateStats:
    """The figures that every policy step has; nothing is clipped and no critic learns."""
    figures, rollouts = done.figures, experience.scored.rollouts
    nothing = torch.zeros_like(figures["loss"])
    trained = done.trained.unsqueeze(1) & rollouts.response_mask
    return UpdateStats(
        policy_loss=figures["loss"],
        kl_loss=nothing,
        mix_loss=figures["mix_loss"],
        value_loss=nothing.unsqueeze(-1).expand(*nothing.shape, experience.returns.shape[-1]),
        approx_kl=figures["approx_kl"],
        clip_fraction=nothing,
        ratio_max=figures["ratio_max"],
        ratio_error=figures["ratio_error"],
        entropy=figures["entropy"],
        policy_grad_norm=figures["grad_norm"],
        critic_grad_norm=nothing,
        left_out=figures["left_out"],
        new_logprobs=torch.where(trained, done.new_logprobs, experience.scored.old.logprobs),
        active=trained,
    )


def _figures(done: SequenceStats, lesson: Lesson, worth: Tensor, groups: Tensor) -> dict[str, float]:
    """What only these methods know, and what the reward was before the choice took its place."""
    found = {metric: float(done.figures[name].mean()) for name, metric in lesson.names.items()}
    found |= {"reward/mean": float(worth.mean()), "choice/groups": float(len(groups))}
    if len(groups):
        found["choice/reward_kept"] = float(worth[groups[:, 0]].mean())
    return found


def _in_force(experience: Experience, weights: Mapping[str, float]) -> dict[str, float]:
    """The weights by which answers were chosen, in place of the zeros beside `choice`."""
    return {f"weight/{channel}": weights[channel] for channel in experience.channels if channel != CHANNEL}
