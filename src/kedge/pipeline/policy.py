"""The fourth and fifth stage: the policy optimised against the reward model, watched and traced."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kedge.data.records import prompt_text
from kedge.errors import InputError, Problem
from kedge.evaluate.policy import terciles
from kedge.models.heads import Critic
from kedge.models.reward import RewardModel, load_reward_model
from kedge.ops.kl import ESTIMATORS, k1
from kedge.ops.rewards import clip_scores
from kedge.pipeline.context import Context
from kedge.pipeline.direct import best_of, directly_optimised
from kedge.pipeline.follow import begin, follow
from kedge.pipeline.guard import LiveGuard
from kedge.pipeline.learners import learner_of, references, trainable_policy
from kedge.pipeline.watch import prepare_watch
from kedge.recipe.length_rewards import length_rewards
from kedge.recipe.methods import kl_in_words, unread
from kedge.recipe.sections import Kl
from kedge.rollout.reward import judge
from kedge.rollout.rules import RuleReward
from kedge.rollout.score import Rewarder
from kedge.rollout.shaping import ReferenceAnswers, above_reference, shaping_rewarders
from kedge.rollout.uncertainty import Uncertainty, uncertainty
from kedge.structs import Opinion, Prompts, Rollouts
from kedge.trace.jsonl import append_json
from kedge.trace.writer import TraceWriter
from kedge.train.checkpoint import State
from kedge.train.controller import Adaptive, Controller, Controllers, Fixed, Lagrangian, Pid
from kedge.train.experience import SCALAR_CRITIC, channel_names
from kedge.train.limit import Guard, Stop, exact_check, sequence_kl
from kedge.train.methods import METHODS, PPO
from kedge.train.mix import Mix
from kedge.train.normalise import RunningScore
from kedge.train.online import train_online
from kedge.train.policy import PolicySettings, Step, Tie, prompt_batch, train_policy
from kedge.train.record import step_metrics, step_record
from kedge.train.rejection import train_rejection
from kedge.train.schedule import seed_of, seeded
from kedge.train.token_constants import constant_token_rewards, constant_words
from kedge.train.update import UpdateSettings


def optimised(context: Context) -> None:
    """The recipe's method from `models/sft`, going on from the newest checkpoint; writes `models/policy`."""
    for key, why in unread(context.recipe):
        context.event("policy", 0, "not_read", f"{key} {why}")
    _STAGES.get(context.recipe.policy.method, _on_policy)(context)


def _on_policy(context: Context) -> None:
    """Methods that learn from responses of their own: draw, score, update, again."""
    recipe = context.recipe
    policy = trainable_policy(context)
    reference, original = references(context, policy)
    reward_model = load_reward_model(context.run.models / "reward")
    prompts = [prompt_text(text) for text in context.task.prompts.rows]
    pool = context.encode_prompts(context.task.prompts.rows)
    rewarders = _rewarders(context, reward_model, reference, prompts)
    learner = learner_of(context, policy, reference, _critic(context, reward_model, tuple(rewarders)))
    settings = policy_settings(context)
    guard = LiveGuard(context) if recipe.guard.checks else None
    tie = _tie(context, reference, pool)  # before a checkpoint moves the reference: its groups are those of the start
    running = RunningScore() if recipe.policy.score_normalisation == "running" else None
    state = begin(context, learner, State(0, controllers(recipe.policy.kl), score=running))
    watch = prepare_watch(context, original, reward_model)
    if state.step == 0:
        if tie.guard is not None:
            tie.guard.require_inside(policy)
        context.event("policy", 0, "kl", kl_in_words(recipe.policy.kl))
        if recipe.policy.kl.study:
            what = f"policy.kl.estimator = {recipe.policy.kl.estimator} is under study: it need not hold the policy"
            context.event("policy", 0, "study", what)
        for notice in length_rewards(recipe):
            context.event("policy", 0, "length_reward", str(notice))
    per_step, samples = recipe.policy.prompts_per_step, recipe.policy.samples_per_prompt
    mix = _mix(context, settings)

    def enter(state: State) -> Iterator[Step]:
        stream = context.stream_of(state.guard.branch)
        return _LOOPS.get(recipe.policy.method, train_policy)(
            learner,
            tie,
            rewarders,
            lambda step: prompt_batch(pool, per_step, samples, stream, step),
            context.engine,
            replace(settings, seed=stream),
            state,
            mix=mix,
        )

    def record(writer: TraceWriter, step: Step) -> dict[str, float]:
        doubt = _uncertainty(context, reward_model, reference, step)
        since = _since_the_start(context, step, None if original is reference else original)
        return _record(context, writer, step, doubt, prompts, since)

    follow(context, learner, watch, state, enter, record, guard=guard)


def _critic(context: Context, reward_model: RewardModel, terminal: tuple[str, ...]) -> Critic | None:
    """A critic for the methods that ask one; its first head starts as the score where that is in the score's unit."""
    settings = context.recipe.policy
    if settings.method not in METHODS or METHODS[settings.method].baseline is not None:
        return None
    if settings.critic == "scalar":
        return Critic.from_reward_model(reward_model, (SCALAR_CRITIC,), None)
    heads = channel_names(terminal)
    known = heads.index("score") if settings.score_normalisation == "frozen" else None
    return Critic.from_reward_model(reward_model, heads, known)


def _rewarders(context: Context, reward_model: RewardModel, reference: Any, prompts: list[str]) -> dict[str, Rewarder]:
    """Every terminal reward of the run by channel: the score, the recipe's rules, and what shapes the responses."""
    settings = context.recipe.policy
    draw = partial(seeded, context.recipe.seed, "reference answer")
    answers = ReferenceAnswers(context.engine, reference, context.sampling, draw)
    shaping = shaping_rewarders(
        overlong=settings.overlong_penalty,
        target=settings.target_penalty,
        repetition=settings.repetition_penalty,
        budget=settings.max_new_tokens,
        buffer=settings.overlong_buffer,
        answers=answers,
    )

    def score(rollouts: Rollouts) -> Opinion:
        return _clipped(judge(reward_model, rollouts), settings.score_clip)

    compared = above_reference(score, answers) if settings.score_normalisation == "prompt" else score
    return {"score": compared, **_rules(context, prompts), **shaping}


def _rules(context: Context, prompts: list[str]) -> dict[str, Rewarder]:
    """The recipe's rewards that are not a model; `group_id` numbers `prompts`."""

    def of_text(rule: RuleReward) -> Rewarder:
        return lambda rollouts: rule([prompts[group] for group in rollouts.group_id.tolist()], context.text(rollouts))

    return {name: of_text(rule) for name, rule in context.rules.items()}


def _clipped(opinion: Opinion, limit: float) -> Opinion:
    """The score held within the limit, except for what is not finite: that must be seen, not clipped."""
    score = opinion.score
    return replace(opinion, score=torch.where(score.isfinite(), clip_scores(score, limit), score))


def controllers(kl: Kl) -> Controllers:
    """What sets beta, for all prompts or for each tercile of the reference's answer length."""
    modes: dict[str, Controller] = {
        "fixed": Fixed(kl.beta),
        "adaptive": Adaptive(kl.beta, kl.target, kl.horizon),
        "lagrangian": Lagrangian(kl.beta, kl.target, kl.rate),
        "pid": Pid(kl.beta, kl.target, kl.proportional, kl.integral, kl.derivative),
    }
    return Controllers.of(modes[kl.mode], kl.budgets)


def _tie(context: Context, reference: Any, pool: Prompts) -> Tie:
    """The reference, the budget group of each prompt, and what happens at the limit."""
    recipe, kl = context.recipe, context.recipe.policy.kl
    tiers = _tiers(context, reference, pool) if kl.budgets is not None else None
    if kl.limit is None:
        return Tie(reference, tiers)
    if kl.at_limit == "stop":
        return Tie(reference, tiers, stop=Stop(kl.limit))
    check = exact_check(
        reference,
        lambda step: prompt_batch(pool, recipe.policy.prompts_per_step, 1, seed_of(recipe.seed, "kl check"), step),
        context.engine,
        context.sampling,
        recipe.seed,
        microbatch=recipe.policy.microbatch,
    )
    return Tie(reference, tiers, guard=Guard(kl.limit, kl.at_limit, check=check, every=recipe.checkpoint.every))


def _tiers(context: Context, reference: Any, pool: Prompts) -> Tensor:
    """[prompts] 0 where the reference answers most briefly of all, 2 where at most length."""
    generator = seeded(context.recipe.seed, "usual length")
    answers = context.engine.generate(reference, pool, context.sampling, generator)
    return terciles(answers.lengths.float())


def _mix(context: Context, settings: PolicySettings) -> Callable[[int], Callable[[int, int], Rollouts]] | None:
    """The demonstrations beside the policy's loss, by step, where they weigh anything."""
    if not settings.update.mix_weight:
        return None
    if not context.task.demonstrations.rows:
        what = "there are no demonstrations to mix in"
        raise InputError(Problem("policy.pretraining_mix", what, "name data.demonstrations, or set it to 0"))
    shown = context.encode_demonstrations(context.task.demonstrations)
    size = context.recipe.sft.batch_size
    return Mix(shown, size, settings.update.epochs, settings.update.minibatches, context.recipe.seed).at


def policy_settings(context: Context) -> PolicySettings:
    """The numbers of the loop."""
    policy, kl = context.recipe.policy, context.recipe.policy.kl
    method = METHODS.get(policy.method, PPO)
    in_loss = kl.place == "loss"
    return PolicySettings(
        steps=policy.steps,
        sampling=context.sampling,
        update=UpdateSettings(
            # An unclipped ratio bears one step a batch.
            epochs=policy.epochs if method.clipped else 1,
            minibatches=policy.minibatches if method.clipped else 1,
            clip=policy.clip if method.clipped else math.inf,
            clip_high=policy.clip_high,
            dual_clip=policy.dual_clip,
            aggregation=policy.aggregation or method.aggregation,
            budget=policy.max_new_tokens,
            importance_cap=policy.importance_cap,
            kl_loss=(kl.estimator or "k2") if in_loss else None,
            value_clip=policy.value_clip,
            entropy_bonus=policy.entropy_bonus,
            mix_weight=policy.pretraining_mix,
            max_grad_norm=policy.max_grad_norm,
            temperature=policy.temperature,
            microbatch=policy.microbatch,
        ),
        weights={
            "score": 1.0,
            **{name: rule.weight for name, rule in context.recipe.rewards.items()},
            "length": -policy.length_penalty,
            "missing_eos": -policy.missing_eos_penalty,
            "overlong": -policy.overlong_penalty,
            "over_target": -policy.target_penalty,
            "repetition": -policy.repetition_penalty,
        },
        gamma=policy.gamma,
        lam=policy.lam,
        whiten=policy.whiten,
        critic_warmup=policy.critic_warmup,
        seed=context.stream,
        eos_id=context.eos_id,
        final_lr=policy.final_lr,
        method=method,
        kl_estimator=k1 if in_loss else ESTIMATORS[kl.estimator or "k1"],
        reference_every=policy.reference_every,
        label_smoothing=policy.label_smoothing,
    )


def _uncertainty(context: Context, reward_model: RewardModel, reference: Any, step: Step) -> Uncertainty:
    """How far the scores of a step can be trusted; members are compared on answers of the reference where a prompt has
    but one response."""
    scored = step.experience.scored
    rollouts, answers = scored.rollouts, None
    if reward_model.members > 1 and context.recipe.policy.samples_per_prompt == 1:
        prompts = Prompts(rollouts.prompt_ids, rollouts.prompt_mask, rollouts.group_id)
        generator = seeded(context.recipe.seed, "disagreement", step.number)
        answers = context.engine.generate(reference, prompts, context.sampling, generator)
    return uncertainty(reward_model, scored.opinions["score"], rollouts, answers)


def _since_the_start(context: Context, step: Step, original: Any | None) -> Tensor:
    """[B] k1 of each response against the supervised policy; None says that it is the reference."""
    if original is None:
        return step.experience.kl_per_response()
    scored, settings = step.experience.scored, context.recipe.policy
    return sequence_kl(
        original,
        scored.rollouts,
        scored.old.logprobs,
        temperature=settings.temperature,
        eos_id=context.eos_id,
        microbatch=settings.microbatch,
    )


def _record(
    context: Context, writer: TraceWriter, step: Step, doubt: Uncertainty, prompts: list[str], since: Tensor
) -> dict[str, float]:
    """Metrics, trace rows, events and timings of one step; returns the metrics."""
    began = time.perf_counter()
    rollouts = step.experience.scored.rollouts
    figures = step_metrics(step, doubt) | {"kl/original_per_sequence": float(since.mean())}
    keep_text = context.recipe.trace.text != "none"
    writer.write_step(
        step_record(
            step,
            doubt,
            learning=policy_settings(context).update,
            prompts=[prompts[group] for group in rollouts.group_id.tolist()] if keep_text else None,
            responses=context.text(rollouts) if keep_text else None,
        )
    )
    if step.number == 0:
        for name, constant in constant_token_rewards(step.experience).items():
            context.event("policy", 0, "length_reward", constant_words(name, constant))
    if step.verdict is not None and step.verdict.outcome != "kept":
        context.event("policy", step.number, step.verdict.outcome, step.verdict.sentence)
    seconds = step.seconds | {"trace_s": time.perf_counter() - began}
    append_json(context.run.timings, {"stage": "policy", "step": step.number, **seconds})
    return figures


_STAGES: dict[str, Callable[[Context], None]] = {
    "dpo": directly_optimised,
    "ipo": directly_optimised,
    "best_of_n": best_of,
}
_LOOPS: dict[str, Callable[..., Iterator[Step]]] = {"online_dpo": train_online, "rejection": train_rejection}
