"""What looks at the policy between steps: evaluations on a fixed set, probes, and the likelihood of held-out text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kedge.data.records import prompt_text
from kedge.evaluate.policy import Evaluation, EvaluationSet, Judge, evaluate, prepare
from kedge.models.reward import RewardModel
from kedge.pipeline.context import Context
from kedge.pipeline.probes import Probes, prepare_probes
from kedge.rollout.given import as_rollouts
from kedge.rollout.reward import scores
from kedge.structs import Rollouts
from kedge.trace.jsonl import append_json
from kedge.trace.writer import SampleRecord, TraceWriter
from kedge.train.schedule import seeded
from kedge.train.sft import heldout_loss

Amend = Callable[[Evaluation], Evaluation]
"""A correction of what an evaluation found, where its figures mean something else."""


@dataclass(frozen=True)
class Watch:
    """What looks at the policy between steps."""

    judge: Judge
    fixed: EvaluationSet
    probes: Probes | None
    anchor: Rollouts | None
    reference: Any


def prepare_watch(context: Context, reference: Any, reward_model: RewardModel) -> Watch:
    """The evaluation set as the reference answers it, and the probes."""
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


def look(
    context: Context,
    policy: Any,
    watch: Watch,
    writer: TraceWriter,
    at: int,
    beta: float,
    *,
    last: int,
    amend: Amend | None = None,
) -> None:
    """Evaluate and probe the policy after `at` steps where the recipe says so, and at both ends, 0 and `last`."""
    recipe, ends = context.recipe, at in (0, last)
    if watch.probes is not None and (ends or at % recipe.trace.probes_every == 0):
        writer.write_probes(watch.probes.record(policy, watch.judge, at, beta))
    if not ends and at % recipe.evaluate.every:
        return
    generator = seeded(recipe.seed, "evaluation")  # the same draws at every step: what differs is the policy
    found = evaluate(policy, watch.reference, watch.judge, watch.fixed, generator)
    if amend is not None:
        found = amend(found)
    asked = [prompt_text(text) for text in watch.fixed.texts]
    for name, rule in context.rules.items():
        found.metrics[f"evaluation/rewards/{name}"] = float(rule(asked, found.texts).mean())
    if watch.anchor is not None:
        loss, accuracy = heldout_loss(policy, watch.anchor)
        found.metrics.update({"evaluation/anchor_loss": loss, "evaluation/anchor_accuracy": accuracy})
    context.metric("evaluation", at, found.metrics)
    if found.truth:
        context.run.truth.parent.mkdir(exist_ok=True)
        append_json(context.run.truth, {"step": at, **found.truth})
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
        reference_kl=found.reference_kl.tolist(),
        length=found.rollouts.lengths.tolist(),
        reference_tokens=fixed.answers.lengths.tolist(),
        reference_length=fixed.usual_length.tolist(),
        tercile=fixed.tercile.tolist(),
    )
