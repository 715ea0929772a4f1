"""Policy stages that optimise against no reward: DPO and IPO on judged pairs, and best-of-n, which trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from kedge.data.records import Judgment, Preference, prompt_text
from kedge.data.task import Task
from kedge.data.validate import kind_of
from kedge.errors import InputError, Problem
from kedge.evaluate.policy import TERCILES, Evaluation
from kedge.models.load import save_model
from kedge.models.reward import RewardModel, load_reward_model
from kedge.ops.bestofn import bon_kl_estimate
from kedge.ops.masked import masked_sum
from kedge.ops.rewards import clip_scores
from kedge.pipeline.context import Context
from kedge.pipeline.follow import begin, follow
from kedge.pipeline.learners import learner_of, references, trainable_policy
from kedge.pipeline.reward import sides
from kedge.pipeline.watch import Watch, look, prepare_watch
from kedge.recipe import Recipe
from kedge.rollout.best_of import BestOf
from kedge.rollout.reward import scores
from kedge.rollout.score import token_scores
from kedge.structs import Judgments, Rollouts
from kedge.trace.jsonl import append_json, read_json_lines
from kedge.trace.writer import TraceWriter
from kedge.train.checkpoint import State
from kedge.train.controller import Controllers, Fixed
from kedge.train.direct import DirectSettings, DirectStep, examine_pairs, train_direct
from kedge.train.limit import expected_kl
from kedge.train.schedule import seeded
from kedge.train.update import UpdateSettings


def directly_optimised(context: Context) -> None:
    """DPO or IPO from `models/sft` on the judged pairs; writes `models/policy`. The reward model only evaluates."""
    policy = trainable_policy(context)
    reference, original = references(context, policy)
    training, testing = judged(context)
    settings = direct_settings(context)
    learner = learner_of(context, policy)
    state = begin(context, learner, State(0, Controllers.of(Fixed(settings.beta))))
    watch = prepare_watch(context, reference, load_reward_model(context.run.models / "reward"))

    def record(writer: TraceWriter, step: DirectStep) -> dict[str, float]:
        del writer  # no responses of the policy's own, so no rows
        append_json(context.run.timings, {"stage": "policy", "step": step.number, **step.seconds})
        figures, at = step.figures, step.state.step
        if at % context.recipe.evaluate.every and at != settings.steps:
            return figures
        held_out = examine_pairs(policy, reference, testing, settings)
        figures = figures | {name.replace("/", "/heldout_"): value for name, value in held_out.items()}
        if original is reference:
            return figures
        return figures | {"kl/original_per_sequence": _distance(context, policy, original, watch)}

    def enter(state: State) -> Iterator[DirectStep]:
        return train_direct(learner, reference, training, settings, state)

    follow(context, learner, watch, state, enter, record)


def direct_settings(context: Context) -> DirectSettings:
    """The numbers of the loop."""
    policy = context.recipe.policy
    return DirectSettings(
        method="ipo" if policy.method == "ipo" else "dpo",
        steps=policy.steps,
        pairs_per_step=policy.prompts_per_step,
        update=UpdateSettings(
            epochs=policy.epochs,
            minibatches=policy.minibatches,
            clip=policy.clip,
            max_grad_norm=policy.max_grad_norm,
            temperature=policy.temperature,
            microbatch=policy.microbatch,
        ),
        beta=policy.kl.beta,
        label_smoothing=policy.label_smoothing,
        seed=context.stream,
        eos_id=context.eos_id,
        final_lr=policy.final_lr,
    )


def require_comparisons(recipe: Recipe, task: Task) -> None:
    """Raise `InputError` where the recipe asks for DPO or IPO and the user's judgments compare nothing."""
    if recipe.policy.method not in ("dpo", "ipo") or task.judgments is None:
        return
    kind = kind_of(task.judgments.rows[0])
    if kind in ("rating", "verdict"):
        what = f"{recipe.policy.method} learns which of two responses is better, and a {kind} is of one"
        raise InputError(Problem("policy.method", what, "give pairs or rankings, or choose an on-policy method"))


def judged(context: Context) -> tuple[Judgments, Judgments]:
    """The judgments of the reward model's stage, to learn from and held out: the user's, or the pairs made there.

    What padding made up for a reward model is no judgment. Raises `InputError` where that stage left none.
    """
    training, testing = sides(context, _judgments(context))
    if training.invented is not None:
        training = training.rows((~training.invented).nonzero().squeeze(1))
    return training, testing


def _judgments(context: Context) -> Sequence[Judgment]:
    if context.task.judgments is not None:
        return context.task.judgments.rows
    path = context.run.path / "pairs.jsonl"
    if not path.exists():
        remedy = "run the reward stage in this folder, or start from a run that holds the file"
        raise InputError(Problem(str(path), f"{context.recipe.policy.method} learns from these pairs", remedy))
    return [Preference(line["prompt"], line["chosen"], line["rejected"]) for line in read_json_lines(path)]


def _distance(context: Context, policy: Any, original: Any, watch: Watch) -> float:
    """KL of the policy from the supervised one on the evaluation prompts, where it is tied to another, in nats."""
    generator = seeded(context.recipe.seed, "original")
    rollouts = context.engine.generate(policy, watch.fixed.prompts, context.sampling, generator)
    settings = context.recipe.policy
    kl = expected_kl(policy, original, rollouts, temperature=settings.temperature, microbatch=settings.microbatch)
    return float(kl.mean())


# The best of n


def best_of(context: Context) -> None:
    """Evaluate the supervised policy as it is, as step 0, and the best of its answers, as step 1.

    `models/policy` is the supervised policy: whoever uses it has to draw and choose as well.
    """
    policy = context.policy(context.run.models / "sft").requires_grad_(False)
    reward_model = load_reward_model(context.run.models / "reward")
    n, recipe = context.recipe.policy.samples_per_prompt, context.recipe
    context.run.truncate(-1)
    # Probes show how a policy's own probabilities move, and these stay.
    watch = replace(prepare_watch(context, policy, reward_model), probes=None)
    texts = [prompt_text(text) for text in watch.fixed.texts]
    engine = BestOf(context.engine, n, partial(_worth, context, reward_model, texts))
    chosen = replace(watch, judge=replace(watch.judge, engine=engine))
    amend = partial(_estimated, policy, watch, n)
    with (
        TraceWriter(context.run, text=recipe.trace.text, keep=recipe.trace.keep) as writer,
        context.progress.stage("policy", 1) as stage,
    ):
        look(context, policy, watch, writer, 0, 0.0, last=1)
        context.interrupt.check("best of n")
        look(context, policy, chosen, writer, 1, 0.0, last=1, amend=amend)
        stage.advance(0)
    save_model(policy, context.tokenizer, context.run.models / "policy")


def _worth(context: Context, reward_model: RewardModel, prompts: Sequence[str], rollouts: Rollouts) -> Tensor:
    """[B] what answers are chosen by: the score and the recipe's rules, weighted; `group_id` numbers `prompts`."""
    worth = clip_scores(scores(reward_model, rollouts), context.recipe.policy.score_clip)
    if not context.rules:
        return worth
    asked, texts = [prompts[group] for group in rollouts.group_id.tolist()], context.text(rollouts)
    weighted = [context.recipe.rewards[name].weight * rule(asked, texts) for name, rule in context.rules.items()]
    return sum(weighted, start=worth)


def _estimated(policy: Any, watch: Watch, n: int, found: Evaluation) -> Evaluation:
    """The evaluation with the divergence of choosing among n in place of that of the model, which is 0."""
    judge, rollouts = watch.judge, found.rollouts
    own = token_scores(policy, rollouts, temperature=judge.sampling.temperature, eos_id=judge.eos_id)
    kl = bon_kl_estimate(masked_sum(own.logprobs, rollouts.response_mask, dim=1), n)
    figures = {
        "evaluation/kl_per_sequence": float(kl.mean()),
        "evaluation/kl_per_token": float(kl.sum() / rollouts.lengths.sum()),
    }
    for index in range(TERCILES):
        rows = watch.fixed.tercile == index
        if rows.any():
            figures[f"evaluation/tercile{index}/kl_per_sequence"] = float(kl[rows].mean())
    return replace(found, metrics=found.metrics | figures)
