"""On-policy optimisation against a reward model, tied to a reference: the loop, read top to bottom.

PPO, A2C, REINFORCE, RLOO, GRPO, Dr. GRPO and REINFORCE++ differ in their `Method` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kedge.errors import DivergenceError, InputError, Problem
from kedge.ops.kl import k1
from kedge.ops.masked import masked_mean, masked_variance
from kedge.ops.rewards import Estimator
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder, score_rollouts
from kedge.structs import Experience, Prompts, Rollouts, Sampling, ScoredRollouts, UpdateStats
from kedge.train.checkpoint import State
from kedge.train.experience import channel_names, make_experience
from kedge.train.limit import Guard, Verdict
from kedge.train.methods import PPO, Method
from kedge.train.normalise import in_running_unit
from kedge.train.ranks import across_ranks
from kedge.train.schedule import seeded
from kedge.train.update import Learner, Mix, Stop, UpdateSettings, update

RETURN_VARIANCE_DECAY = 0.9
RATIO_TOLERANCE = 1e-3  # rounding stays below 1e-5 in float32


@dataclass(frozen=True)
class PolicySettings:
    """Numbers of the loop; `weights` holds the reward per unit of every channel but `kl`, whose weight is -beta."""

    steps: int
    sampling: Sampling
    update: UpdateSettings
    weights: Mapping[str, float]
    gamma: float
    lam: float
    whiten: bool
    critic_warmup: int
    seed: int
    eos_id: int
    final_lr: float = 1.0  # learning rates at the last step over those at the first
    method: Method = PPO
    kl_estimator: Estimator = k1  # of the reward's channel
    reference_every: int = 0  # steps after which the policy becomes the reference; 0 never
    label_smoothing: float = 0.0  # of online DPO


@dataclass(frozen=True)
class Step:
    """One pass of the loop: what was drawn, what it was worth, what the optimiser did, and the seconds it took."""

    number: int
    beta: float  # mean over the responses, reward per nat
    experience: Experience
    stats: UpdateStats
    state: State  # after the step
    seconds: dict[str, float]
    verdict: Verdict | None = None  # of the guard at the limit
    figures: Mapping[str, float] = field(default_factory=dict)  # what the method measures beside


@dataclass(frozen=True)
class Tie:
    """What holds the policy: the reference, each prompt's budget group, and what happens at the limit.

    `tiers` [prompts] numbers the group of each prompt, by its `group_id`; None is one group for all.
    """

    reference: Any
    tiers: Tensor | None = None
    guard: Guard | None = None
    stop: Stop | None = None

    def tier(self, rollouts: Rollouts) -> Tensor:
        """[B] the budget group of each response."""
        return torch.zeros_like(rollouts.group_id) if self.tiers is None else self.tiers[rollouts.group_id]


def train_policy(
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
    """Run the loop from `state` and yield after every step; learner is changed in place.

    `draw(step)` gives the prompts of a step, `mix(step)` its demonstrations. Raises `InputError` where a reward is not
    finite and `DivergenceError` where an update is not.
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
        scored = scored_by(rollouts, learner, tie.reference, rewarders, settings)
        require_finite_scores(scored, number)
        running = state.score
        if running is not None:
            running = running.observe(scored.scores["score"], across_ranks())
            scored = in_running_unit(scored, running)
        beta = state.controller.beta(tie.tier(rollouts))
        experience = experience_of(scored, beta, settings)
        if state.return_variance is None and learner.critic is not None:
            experience = experience_of(_calibrated(learner.critic, experience, settings), beta, settings)
        variance = running_variance(state.return_variance, experience)
        clock.lap("score_s")
        set_rates(learner, decayed(settings.final_lr, settings.steps, number))
        if tie.guard is not None:
            tie.guard.before(learner, past)
        try:
            stats = update(
                learner,
                experience,
                settings.update,
                seeded(settings.seed, "update", number),
                return_variance=variance,
                train_policy=number >= settings.critic_warmup,
                reference=tie.reference,
                mix=None if mix is None else mix(number),
                stop=tie.stop,
            )
        except DivergenceError as error:
            raise DivergenceError(f"policy step {number}: {error}") from error
        require_ratio_one(stats, number)
        verdict = None if tie.guard is None else tie.guard.after(learner, number)
        clock.lap("update_s")
        state = State(
            number + 1,
            state.controller.observe(experience.kl_per_response(), tie.tier(rollouts)),
            variance,
            score=running,
            past=past if verdict is None else verdict.past,
        )
        yield Step(number, float(beta.mean()), experience, stats, state, clock.seconds, verdict)


def scored_by(
    rollouts: Rollouts, learner: Learner, reference: Any, rewarders: dict[str, Rewarder], settings: PolicySettings
) -> ScoredRollouts:
    """What the models and the rewarders say about the rollouts, at the sampling temperature."""
    return score_rollouts(
        rollouts,
        learner.policy,
        reference,
        learner.critic,
        rewarders,
        temperature=settings.sampling.temperature,
        eos_id=settings.eos_id,
        microbatch=settings.update.microbatch,
    )


def experience_of(scored: ScoredRollouts, beta: Tensor, settings: PolicySettings) -> Experience:
    """The step's experience under `beta` [B], which is paid in the reward or in the loss."""
    in_loss = settings.update.kl_loss is not None
    return make_experience(
        scored,
        weights={**settings.weights, "kl": torch.zeros_like(beta) if in_loss else -beta},
        gamma=settings.gamma,
        lam=settings.lam,
        whiten=settings.whiten,
        method=settings.method,
        kl_estimator=settings.kl_estimator,
        loss_beta=beta if in_loss else 0.0,
    )


def decayed(final_lr: float, steps: int, step: int) -> float:
    """The share of the first learning rates in force at `step`: linear from 1 to `final_lr` over `steps`."""
    return 1 - (1 - final_lr) * step / max(1, steps - 1)


def set_rates(learner: Learner, share: float) -> None:
    """Set both optimisers to `share` of the rates they were made with. A function of the step, so nothing to save."""
    for optimizer in (learner.optimizer, learner.critic_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * share


def require_finite_scores(scored: ScoredRollouts, step: int) -> None:
    """Raise `InputError` if any rewarder gave a number that is not finite."""
    for name, score in scored.scores.items():
        bad = ~torch.isfinite(score)
        if bad.any():
            row = int(bad.nonzero()[0])
            share = f"{int(bad.sum())} of {len(score)} responses"
            what = f"the reward is {score[row].item()} for {share} (first: row {row})"
            remedy = "check the reward model's weights and inputs, then --resume from the last checkpoint"
            raise InputError(Problem(f"policy step {step}: channel {name}", what, remedy))


def require_ratio_one(stats: UpdateStats, step: int) -> None:
    """Raise `InputError` unless the first minibatch found the policy as the scoring pass left it."""
    error = float(stats.ratio_error[0, 0])
    if error > RATIO_TOLERANCE:
        what = f"training gives the responses other probabilities than scoring did (mean |ratio - 1| = {error:.2g})"
        raise InputError(Problem(f"policy step {step}", what, "turn off what is random in the model, such as dropout"))


def running_variance(before: Tensor | None, experience: Experience) -> Tensor:
    """[heads] exponential average of each return's variance over tokens, floored so that a constant return is safe."""
    mask = experience.scored.rollouts.response_mask
    heads = experience.returns.unbind(dim=-1)
    now = torch.stack([masked_variance(head, mask) for head in heads]).clamp(min=1e-3)
    return now if before is None else RETURN_VARIANCE_DECAY * before + (1 - RETURN_VARIANCE_DECAY) * now


def _calibrated(critic: Any, experience: Experience, settings: PolicySettings) -> ScoredRollouts:
    """Put the critic's heads into the unit of the returns first seen, and the values of this batch with them."""
    scored, mask = experience.scored, experience.scored.rollouts.response_mask
    before = scored.values
    assert before is not None
    untrained = replace(scored, values=torch.zeros_like(before))
    weights = experience.weights[:, : len(channel_names(tuple(scored.scores)))]  # but for that of a scalar critic
    plain = make_experience(untrained, weights=weights, gamma=settings.gamma, whiten=False)
    returns = plain.returns.unbind(dim=-1)
    mean = torch.stack([masked_mean(head, mask) for head in returns])
    deviation = torch.stack([masked_variance(head, mask).sqrt() for head in returns])
    shift, scale = critic.shift.clone(), critic.scale.clone()
    critic.calibrate(mean, deviation)
    values = critic.shift + (before - shift) * critic.scale / scale
    return replace(scored, values=values * mask.unsqueeze(-1))


def prompt_batch(pool: Prompts, per_step: int, samples: int, seed: int, step: int) -> Prompts:
    """The prompts of a step: consecutive ones of a seeded permutation per epoch, each repeated `samples` times."""
    size = len(pool)
    positions = range(step * per_step, (step + 1) * per_step)
    epochs = range(positions[0] // size, positions[-1] // size + 1)
    orders = {epoch: torch.randperm(size, generator=seeded(seed, "prompts", epoch)) for epoch in epochs}
    index = torch.stack([orders[p // size][p % size] for p in positions])
    return trim(pool.rows(index.repeat_interleave(samples)))


def trim(prompts: Prompts) -> Prompts:
    """Without the columns that are padding in every row."""
    width = int(prompts.mask.sum(dim=1).max())
    return Prompts(prompts.ids[:, -width:], prompts.mask[:, -width:], prompts.group_id)


class Clock:
    """Wall seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self.seconds["step_s"] = now - self._start
        self._last = now
