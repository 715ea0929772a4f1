"""Proximal policy optimisation against a reward model, tied to a frozen reference: the loop, read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kedge.errors import DivergenceError, InputError, Problem
from kedge.ops.masked import masked_mean, masked_variance
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import Rewarder, score_rollouts
from kedge.structs import Experience, Prompts, Sampling, ScoredRollouts, UpdateStats
from kedge.train.checkpoint import State
from kedge.train.experience import make_experience
from kedge.train.schedule import seeded
from kedge.train.update import Learner, PpoSettings, update

RETURN_VARIANCE_DECAY = 0.9
RATIO_TOLERANCE = 1e-3  # rounding stays below 1e-5 in float32


@dataclass(frozen=True)
class PolicySettings:
    """Numbers of the loop; `weights` holds the reward per unit of every channel but `kl`, whose weight is -beta."""

    steps: int
    sampling: Sampling
    ppo: PpoSettings
    weights: dict[str, float]
    gamma: float
    lam: float
    whiten: bool
    critic_warmup: int
    seed: int
    eos_id: int
    final_lr: float = 1.0  # learning rates at the last step over those at the first


@dataclass(frozen=True)
class Step:
    """One pass of the loop: what was drawn, what it was worth, what the optimiser did, and the seconds it took."""

    number: int
    beta: float
    experience: Experience
    stats: UpdateStats
    state: State  # after the step
    seconds: dict[str, float]


def train_policy(
    learner: Learner,
    reference: Any,
    rewarders: dict[str, Rewarder],
    draw: Callable[[int], Prompts],
    engine: RolloutEngine,
    settings: PolicySettings,
    state: State,
) -> Iterator[Step]:
    """Run the loop from `state` and yield after every step; learner is changed in place.

    `draw(step)` gives the prompts of a step. Raises `InputError` where a reward is not finite and `DivergenceError`
    where an update is not.
    """
    for number in range(state.step, settings.steps):
        clock = _Clock()
        prompts = draw(number)
        rollouts = engine.generate(
            learner.policy, prompts, settings.sampling, seeded(settings.seed, "rollout", number), number
        )
        clock.lap("generate_s")
        scored = score_rollouts(
            rollouts,
            learner.policy,
            reference,
            learner.critic,
            rewarders,
            temperature=settings.sampling.temperature,
            eos_id=settings.eos_id,
            microbatch=settings.ppo.microbatch,
        )
        require_finite_scores(scored, number)
        weights = settings.weights | {"kl": -state.controller.beta}
        if state.return_variance is None and learner.critic is not None:
            scored = _calibrated(learner.critic, scored, weights, settings)
        experience = make_experience(
            scored, weights=weights, gamma=settings.gamma, lam=settings.lam, whiten=settings.whiten
        )
        clock.lap("score_s")
        set_rates(learner, decayed(settings, number))
        variance = running_variance(state.return_variance, experience)
        try:
            stats = update(
                learner,
                experience,
                settings.ppo,
                seeded(settings.seed, "update", number),
                return_variance=variance,
                train_policy=number >= settings.critic_warmup,
            )
        except DivergenceError as error:
            raise DivergenceError(f"policy step {number}: {error}") from error
        require_ratio_one(stats, number)
        clock.lap("update_s")
        beta = state.controller.beta
        controller = state.controller.observe(float(experience.channel("kl").mean()), len(rollouts))
        state = State(number + 1, controller, variance)
        yield Step(number, beta, experience, stats, state, clock.seconds)


def decayed(settings: PolicySettings, step: int) -> float:
    """The share of the first learning rates in force at `step`: linear from 1 to `final_lr`."""
    return 1 - (1 - settings.final_lr) * step / max(1, settings.steps - 1)


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


def _calibrated(
    critic: Any, scored: ScoredRollouts, weights: dict[str, float], settings: PolicySettings
) -> ScoredRollouts:
    """Put the critic's heads into the unit of the returns first seen, and the values of this batch with them."""
    before = scored.values
    assert before is not None
    untrained = replace(scored, values=torch.zeros_like(before))
    experience = make_experience(untrained, weights=weights, gamma=settings.gamma, lam=1.0, whiten=False)
    mask = scored.rollouts.response_mask
    returns = experience.returns.unbind(dim=-1)
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


class _Clock:
    """Wall seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self.seconds["step_s"] = now - self._start
        self._last = now
