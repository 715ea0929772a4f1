"""The fourth and fifth stage: PPO against the reward model, watched by evaluations, probes and the trace."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kedge.data.records import prompt_text
from kedge.evaluate.policy import Evaluation, EvaluationSet, Judge, evaluate, prepare
from kedge.models.heads import Critic
from kedge.models.load import save_model
from kedge.models.reward import RewardModel, load_reward_model
from kedge.ops.rewards import clip_scores
from kedge.pipeline.context import Context
from kedge.pipeline.probes import Probes, prepare_probes
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import judge, scores
from kedge.rollout.rules import RuleReward
from kedge.rollout.score import Rewarder
from kedge.rollout.uncertainty import Uncertainty, uncertainty
from kedge.structs import Opinion, Prompts, Rollouts
from kedge.trace.jsonl import append_json
from kedge.trace.writer import SampleRecord, TraceWriter
from kedge.train import checkpoint
from kedge.train.checkpoint import State
from kedge.train.controller import KlController
from kedge.train.experience import SCALAR_CRITIC, channel_names
from kedge.train.policy import PolicySettings, Step, prompt_batch, train_policy
from kedge.train.record import step_metrics, step_record
from kedge.train.schedule import seeded
from kedge.train.sft import heldout_loss
from kedge.train.update import Learner, PpoSettings

ADAM_EPSILON = 1e-5  # as in the original implementations; 1e-8 makes the first steps erratic


@dataclass(frozen=True)
class Watch:
    """What looks at the policy between steps."""

    judge: Judge
    fixed: EvaluationSet
    probes: Probes | None
    anchor: Rollouts | None
    reference: Any


def optimised(context: Context) -> None:
    """PPO from `models/sft` against `models/reward`, going on from the newest checkpoint; writes `models/policy`."""
    learner, reference, reward_model = _models(context)
    recipe = context.recipe
    found = checkpoint.latest(context.run.checkpoints)
    kl = recipe.policy.kl
    state = State(0, KlController(kl.mode, kl.beta, kl.target, kl.horizon))
    if found is not None:
        state = checkpoint.load(found, learner)
        context.event("policy", state.step, "resumed", f"policy: going on from step {state.step}")
    # Without a checkpoint the evaluation before the first step is made again, too.
    context.run.truncate(-1 if found is None else state.step)
    watch = _watch(context, reference, reward_model)
    texts = context.task.prompts.rows
    pool = context.encode_prompts(texts)
    prompts = [prompt_text(text) for text in texts]
    per_step, samples = recipe.policy.prompts_per_step, recipe.policy.samples_per_prompt
    steps = train_policy(
        learner,
        reference,
        {
            "score": lambda rollouts: _clipped(judge(reward_model, rollouts), recipe.policy.score_clip),
            **_rules(context, prompts),
        },
        lambda step: prompt_batch(pool, per_step, samples, recipe.seed, step),
        context.engine,
        _settings(context),
        state,
    )
    total = recipe.policy.steps
    with (
        TraceWriter(context.run, text=recipe.trace.text, keep=recipe.trace.keep) as writer,
        context.progress.stage("policy", total, start=state.step) as stage,
    ):
        if state.step == 0:
            _look(context, learner, watch, writer, state)
        for step in steps:
            doubt = _uncertainty(context, reward_model, reference, step)
            figures = _record(context, writer, step, doubt, prompts)
            stage.advance(
                step.number,
                score=figures["score/mean"],
                kl=figures["kl/reference_per_sequence"],
                length=figures["length/mean"],
            )
            _look(context, learner, watch, writer, step.state)
            stopping = context.interrupt.requested
            if stopping or step.state.step % recipe.checkpoint.every == 0 or step.state.step == total:
                writer.flush()  # what a checkpoint says is done must be on disk
                place = context.run.checkpoint(step.state.step)
                checkpoint.save(place, learner, step.state, keep=recipe.checkpoint.keep)
            if step.state.step < total:
                context.interrupt.check(f"policy step {step.state.step}")
    save_model(learner.policy, context.tokenizer, context.run.models / "policy")


def _models(context: Context) -> tuple[Learner, Any, RewardModel]:
    """The learner, the frozen reference and the reward model."""
    settings = context.recipe.policy
    policy = context.policy(context.run.models / "sft")
    reference = context.policy(context.run.models / "sft").requires_grad_(False)
    reward_model = load_reward_model(context.run.models / "reward")
    scalar = settings.critic == "scalar"
    heads = (SCALAR_CRITIC,) if scalar else channel_names(("score", *context.rules))
    critic = Critic.from_reward_model(reward_model, heads, None if scalar else heads.index("score"))
    learner = Learner(
        policy,
        torch.optim.Adam(policy.parameters(), lr=settings.lr, eps=ADAM_EPSILON),
        critic,
        torch.optim.Adam(critic.parameters(), lr=settings.critic_lr, eps=ADAM_EPSILON),
    )
    return learner, reference, reward_model


def _rules(context: Context, prompts: list[str]) -> dict[str, Rewarder]:
    """The recipe's rewards that are not a model; `group_id` numbers `prompts`."""

    def of_text(rule: RuleReward) -> Rewarder:
        return lambda rollouts: rule([prompts[group] for group in rollouts.group_id.tolist()], context.text(rollouts))

    return {name: of_text(rule) for name, rule in context.rules.items()}


def _clipped(opinion: Opinion, limit: float) -> Opinion:
    """The score held within the limit, except for what is not finite: that must be seen, not clipped."""
    score = opinion.score
    return replace(opinion, score=torch.where(score.isfinite(), clip_scores(score, limit), score))


def _settings(context: Context) -> PolicySettings:
    policy = context.recipe.policy
    return PolicySettings(
        steps=policy.steps,
        sampling=context.sampling,
        ppo=PpoSettings(
            epochs=policy.epochs,
            minibatches=policy.minibatches,
            clip=policy.clip,
            value_clip=policy.value_clip,
            entropy_bonus=policy.entropy_bonus,
            max_grad_norm=policy.max_grad_norm,
            temperature=policy.temperature,
            microbatch=policy.microbatch,
        ),
        weights={
            "score": 1.0,
            **{name: rule.weight for name, rule in context.recipe.rewards.items()},
            "length": -policy.length_penalty,
            "missing_eos": -policy.missing_eos_penalty,
        },
        gamma=policy.gamma,
        lam=policy.lam,
        whiten=policy.whiten,
        critic_warmup=policy.critic_warmup,
        seed=context.recipe.seed,
        eos_id=context.eos_id,
        final_lr=policy.final_lr,
    )


def _watch(context: Context, reference: Any, reward_model: RewardModel) -> Watch:
    score = partial(scores, reward_model)
    judge = Judge(context.engine, context.sampling, score, context.text, context.eos_id, context.task.truth)
    texts = context.task.evaluation.rows
    prompts = context.encode_prompts(texts)
    samples = context.recipe.evaluate.reference_samples
    fixed = prepare(reference, judge, texts, prompts, samples, seeded(context.recipe.seed, "reference answers"))
    return Watch(judge, fixed, prepare_probes(context, reference, judge), _anchor(context), reference)


def _anchor(context: Context) -> Rollouts | None:
    """Held-out text whose likelihood must not suffer: the recipe's plain text, else held-out demonstrations."""
    task = context.task
    if task.text:
        room = context.recipe.model.context - 1
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        rows = [context.tokenizer(text, **options)["input_ids"][:room] for text in task.text]
        bos = context.tokenizer.bos_token_id
        opening = [context.eos_id if bos is None else bos]
        kept = [row for row in rows if row]
        return as_rollouts([opening] * len(kept), kept, context.pad_id)
    return context.encode_demonstrations(task.held_out) if task.held_out.rows else None


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


def _record(
    context: Context, writer: TraceWriter, step: Step, doubt: Uncertainty, prompts: list[str]
) -> dict[str, float]:
    """Metrics, trace rows and timings of one step; returns the metrics."""
    began = time.perf_counter()
    figures = step_metrics(step, doubt)
    rollouts = step.experience.scored.rollouts
    policy, keep_text = context.recipe.policy, context.recipe.trace.text != "none"
    writer.write_step(
        step_record(
            step,
            doubt,
            gamma=policy.gamma,
            lam=policy.lam,
            prompts=[prompts[group] for group in rollouts.group_id.tolist()] if keep_text else None,
            responses=context.text(rollouts) if keep_text else None,
        )
    )
    context.metric("policy", step.number, figures)
    seconds = step.seconds | {"trace_s": time.perf_counter() - began}
    append_json(context.run.timings, {"stage": "policy", "step": step.number, **seconds})
    return figures


def _look(context: Context, learner: Learner, watch: Watch, writer: TraceWriter, state: State) -> None:
    """Evaluate and probe the policy where the recipe says so, and at both ends."""
    recipe, at = context.recipe, state.step
    ends = at in (0, recipe.policy.steps)
    if watch.probes is not None and (ends or at % recipe.trace.probes_every == 0):
        writer.write_probes(watch.probes.record(learner.policy, watch.judge, at, state.controller.beta))
    if not ends and at % recipe.evaluate.every:
        return
    generator = seeded(recipe.seed, "evaluation")  # the same draws at every step: what differs is the policy
    found = evaluate(learner.policy, watch.reference, watch.judge, watch.fixed, generator)
    asked = [prompt_text(text) for text in watch.fixed.texts]
    for name, rule in context.rules.items():
        found.metrics[f"evaluation/rewards/{name}"] = float(rule(asked, found.texts).mean())
    if watch.anchor is not None:
        loss, accuracy = heldout_loss(learner.policy, watch.anchor)
        found.metrics.update({"evaluation/anchor_loss": loss, "evaluation/anchor_accuracy": accuracy})
    context.metric("evaluation", at, found.metrics)
    if found.truth:
        context.run.truth.parent.mkdir(exist_ok=True)
        append_json(context.run.truth, {"step": at, **found.truth})
    if ends:
        writer.write_samples(_samples(context, watch.fixed, found, at))


def _samples(context: Context, fixed: EvaluationSet, found: Evaluation, step: int) -> SampleRecord:
    rows = list(zip(found.rollouts.response_ids, found.rollouts.response_mask, found.token_kl, strict=True))
    return SampleRecord(
        step=step,
        prompt=[prompt_text(prompt) for prompt in fixed.texts],
        response=found.texts,
        reference_response=fixed.answer_texts,
        response_tokens=[context.pieces(ids[mask]) for ids, mask, _ in rows],
        token_kl=[kl[mask].tolist() for _, mask, kl in rows],
        score=found.scores.tolist(),
        reference_score=fixed.answer_scores.tolist(),
        length=found.rollouts.lengths.tolist(),
        reference_length=fixed.usual_length.tolist(),
        tercile=fixed.tercile.tolist(),
    )
