"""The second and third stage: labelled pairs, and the reward model trained on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kedge.data.records import Preference, Prompt
from kedge.data.split import is_held_out
from kedge.errors import InputError, Problem
from kedge.models.heads import set_score_normalisation
from kedge.models.load import reward_model_from, save_model
from kedge.pipeline.context import Context
from kedge.pipeline.sft import snapshots
from kedge.structs import Rollouts, Sampling
from kedge.trace.jsonl import write_atomically
from kedge.train.reward_model import Comparisons, examine, raw_scores, train_reward_model
from kedge.train.schedule import seed_of, seeded

NORMALISING_SAMPLES = 1024


def rewarded(context: Context) -> None:
    """Train the reward model, measure it on held-out prompts and write `models/reward`."""
    recipe = context.recipe
    given = context.task.preferences
    rows = given.rows if given is not None else _sampled_pairs(context)
    share = max(recipe.reward.holdout, recipe.data.holdout)  # evaluation prompts are not trained on here either
    held_out = torch.tensor([is_held_out(row.prompt, share) for row in rows], dtype=torch.bool)
    if not held_out.any() or held_out.all():
        what = f"{int(held_out.sum())} of {len(rows)} pairs are on held-out prompts; both sides need some"
        raise InputError(Problem("reward.holdout", what, "give more prompts or change reward.holdout"))
    chosen, rejected = context.encode_preferences(rows)
    strength = torch.tensor([row.strength for row in rows])
    training, testing = (_part(chosen, rejected, strength, part) for part in (~held_out, held_out))
    policy = context.policy(context.run.models / "sft")
    model = reward_model_from(policy, seed_of(recipe.seed, "reward head"))
    _train(context, model, training)
    report = examine(model, testing)
    set_score_normalisation(model, *_reference_scores(context, policy, model))
    context.metric("reward", _steps(context, training), {f"heldout/{k}": v for k, v in asdict(report).items()})
    context.progress.note(
        f"reward model: held-out accuracy {report.accuracy:.3f} (longer wins: {report.length_only_accuracy:.3f}), "
        f"calibration error {report.calibration_error:.3f}, length correlation {report.length_correlation:+.2f}"
    )
    save_model(model, context.tokenizer, context.run.models / "reward")


def _part(chosen: Rollouts, rejected: Rollouts, strength: Tensor, mask: Tensor) -> Comparisons:
    index = mask.nonzero().squeeze(1)
    return Comparisons(chosen.rows(index), rejected.rows(index), strength[index])


def _steps(context: Context, training: Comparisons) -> int:
    return context.recipe.reward.epochs * -(-len(training) // context.recipe.reward.batch_size)


def _train(context: Context, model: Any, training: Comparisons) -> None:
    reward = context.recipe.reward
    with context.progress.stage("reward", _steps(context, training)) as stage:
        train_reward_model(
            model,
            training,
            epochs=reward.epochs,
            batch_size=reward.batch_size,
            lr=reward.lr,
            seed=context.recipe.seed,
            on_step=lambda step, loss: context.follow(stage, step, loss),
        )


def _reference_scores(context: Context, policy: Any, model: Any) -> tuple[float, float]:
    """Mean and standard deviation of the raw score on the supervised policy's answers."""
    prompts = context.encode_prompts(context.task.prompts.rows[:NORMALISING_SAMPLES])
    answers = context.engine.generate(policy, prompts, context.sampling, seeded(context.recipe.seed, "normalise"))
    scores = raw_scores(model, answers)
    return float(scores.mean()), float(scores.std())


def _sampled_pairs(context: Context) -> list[Preference]:
    """Two different answers per prompt from the supervised policy, labelled by the task's annotators."""
    labeller = context.task.labeller
    if labeller is None:
        raise InputError(Problem("data.preferences", "no preferences and no annotators", "name a preference file"))
    pairs: list[tuple[Prompt, str, str]] = []
    folders = snapshots(context)
    with context.progress.stage("pairs", len(folders)) as stage:
        for index, folder in enumerate(folders):
            context.interrupt.check("sampling pairs")
            policy = context.policy(folder)
            pairs += _candidates(context, policy, context.task.pair_prompts[index :: len(folders)], index)
            stage.advance(index, pairs=len(pairs))
    preferred = labeller(pairs)
    rows = [
        Preference(prompt, *((first, second) if first_wins else (second, first)))
        for (prompt, first, second), first_wins in zip(pairs, preferred, strict=True)
    ]
    lines = [json.dumps({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}) for r in rows]
    write_atomically(context.run.path / "pairs.jsonl", "".join(line + "\n" for line in lines).encode())
    return rows


def _candidates(context: Context, policy: Any, texts: Sequence[Prompt], index: int) -> list[tuple[Prompt, str, str]]:
    """For each prompt the first two different of `pairs.candidates` answers; prompts with only one answer drop out."""
    pairs = context.recipe.pairs
    if not texts:
        return []
    prompts = context.encode_prompts(texts)
    repeated = prompts.rows(torch.arange(len(prompts)).repeat_interleave(pairs.candidates))
    sampling = Sampling(context.sampling.max_new_tokens, pairs.temperature, pairs.top_p)
    answers = context.text(
        context.engine.generate(policy, repeated, sampling, seeded(context.recipe.seed, "pairs", index))
    )
    found = []
    for row, text in enumerate(texts):
        distinct = list(dict.fromkeys(answers[row * pairs.candidates : (row + 1) * pairs.candidates]))
        if len(distinct) > 1:
            found.append((text, distinct[0], distinct[1]))
    return found
