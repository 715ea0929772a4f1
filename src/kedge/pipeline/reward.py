"""The second and third stage: what annotators said, and the reward model that learns it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kedge.data.padding import MOST, padded, padded_pairs
from kedge.data.records import Judgment, Preference, Prompt
from kedge.data.split import is_held_out
from kedge.data.task import Labeller
from kedge.data.validate import kind_of
from kedge.errors import InputError, Problem
from kedge.models.reward import RewardModel, finished, new_member, reward_model, save_reward_model
from kedge.pipeline.candidates import Pair, Score, candidates, diversity
from kedge.pipeline.context import Context
from kedge.pipeline.sft import snapshots
from kedge.recipe import Recipe
from kedge.rollout.reward import aggregate_scores, fit_support, member_scores, normalised_on, scores
from kedge.structs import Judgments, Rollouts
from kedge.trace.jsonl import write_atomically
from kedge.train.length import fit_length_residual
from kedge.train.reward_model import Kind, RewardSettings, Unteachable, examine, steps, train_reward_model
from kedge.train.schedule import seed_of, seeded, seeded_numpy

NORMALISING_SAMPLES = 1024
RESIDUAL_SAMPLES = 4  # answers per prompt from which the length residual is read


def rewarded(context: Context) -> None:
    """Train the reward model, measure it on held-out prompts and write `models/reward`."""
    policy = context.policy(context.run.models / "sft")
    given = context.task.judgments
    rows = given.rows if given is not None else _labelled_pairs(context)
    training, testing = sides(context, rows)
    model = _trained(context, training, kind_of(rows[0]))
    model = _calibrated(context, policy, model)
    model = replace(model, support=fit_support(model, training.responses, testing.responses))
    _report(context, model, training, testing)
    save_reward_model(model, context.tokenizer, context.run.models / "reward")


def sides(context: Context, rows: Sequence[Judgment]) -> tuple[Judgments, Judgments]:
    """Judgments to learn from and held-out ones, split by prompt; the same for the reward model and for DPO."""
    recipe = context.recipe
    share = max(recipe.reward.holdout, recipe.data.holdout)  # evaluation prompts are not trained on here either
    held_out = [is_held_out(row.prompt, share) for row in rows]
    if not any(held_out) or all(held_out):
        what = f"{sum(held_out)} of {len(rows)} judgments are on held-out prompts; both sides need some"
        raise InputError(Problem("reward.holdout", what, "give more prompts or change reward.holdout"))
    learnt = [row for row, held in zip(rows, held_out, strict=True) if not held]
    plain = _padded_pairs(context, learnt) if recipe.reward.length == "padded_pairs" else []
    tested = [row for row, held in zip(rows, held_out, strict=True) if held]
    return context.encode_judgments([*learnt, *plain], invented=len(plain)), context.encode_judgments(tested)


def _padded_pairs(context: Context, rows: Sequence[Judgment]) -> list[Preference]:
    pairs = [row for row in rows if isinstance(row, Preference)]
    if len(pairs) < len(rows):
        what = "padding is compared in pairs, and these judgments are of another kind"
        raise InputError(Problem("reward.length", what, 'set it to "padded_residual"'))
    plain = padded_pairs(pairs, context.task.neutral, seeded_numpy(context.recipe.seed, "padding"))
    return [row for row in plain if context.fits(row.prompt, row.rejected)]


def _trained(context: Context, training: Judgments, kind: Kind, *, interim: bool = False) -> RewardModel:
    """The recipe's members, not yet normalised. Of an interim one no metrics are kept."""
    reward = context.recipe.reward
    trunk_of = context.policy(context.run.models / "sft" if reward.init == "sft" else Path(reward.init))
    trunks = 1 if reward.trunk == "shared" else reward.members
    heads = reward.members if reward.trunk == "shared" else 2 if reward.length == "two_head" else 1
    members = []
    say = context.show if interim else context.follow
    with context.progress.stage(
        "interim reward" if interim else "reward", trunks * steps(training, _settings(context.recipe, 0))
    ) as stage:
        for number in range(trunks):
            seed = seed_of(context.recipe.seed, "reward head", number)
            rank = reward.lora_rank if reward.trunk == "lora" else None
            model = new_member(trunk_of, seed, heads=heads, lora_rank=rank)
            settings = _settings(context.recipe, number)
            done = number * steps(training, settings)

            def follow(step: int, loss: float, done: int = done) -> None:
                say(stage, done + step, loss)

            try:
                train_reward_model(model, training, kind, settings, on_step=follow)
            except Unteachable as error:
                remedy = "choose other [reward] settings or other judgments"
                raise InputError(Problem("reward", str(error), remedy)) from error
            members.append(finished(model, heads=(0,) if reward.length == "two_head" else None))
    return reward_model(members, aggregate=reward.aggregate, variance_weight=reward.variance_weight)


def _settings(recipe: Recipe, member: int) -> RewardSettings:
    reward = recipe.reward
    return RewardSettings(
        epochs=reward.epochs,
        batch_size=reward.batch_size,
        lr=reward.lr,
        seed=recipe.seed if member == 0 else seed_of(recipe.seed, "reward member", member),
        loss=reward.loss,
        flip_rate=reward.flip_rate,
        rankings=reward.rankings,
        ratings=reward.ratings,
        centring=reward.centring,
        length=reward.length,
    )


def _calibrated(context: Context, policy: Any, model: RewardModel) -> RewardModel:
    """Mean 0 and variance 1 on the supervised policy's answers, without what length adds where that is wanted."""
    samples = RESIDUAL_SAMPLES if context.recipe.reward.length == "residual" else 1
    prompts = context.encode_prompts(context.task.prompts.rows[:NORMALISING_SAMPLES])
    repeated = prompts.rows(torch.arange(len(prompts)).repeat_interleave(samples))
    answers = context.engine.generate(policy, repeated, context.sampling, seeded(context.recipe.seed, "normalise"))
    model = normalised_on(model, answers)
    compared = {"residual": lambda: answers, "padded_residual": lambda: _padded(context, answers)}
    if context.recipe.reward.length not in compared:
        return model
    shown = compared[context.recipe.reward.length]()
    correction = fit_length_residual(aggregate_scores(model, shown), shown.lengths, shown.group_id)
    correction = correction.times(context.recipe.reward.length_share)
    return normalised_on(replace(model, correction=correction), answers)


def _padded(context: Context, answers: Rollouts) -> Rollouts:
    """Each answer that ended, as it is and among one to three sentences, as a group of its own; what fits of them.

    Raises `InputError` where no answer can be padded.
    """
    rng = seeded_numpy(context.recipe.seed, "padding")
    asked = [context.task.prompts.rows[group] for group in answers.group_id.tolist()]
    ended = [row for row, whole in enumerate(answers.ended.tolist()) if whole]
    texts = context.text(answers)
    shown = [
        (row, asked[row], padded(texts[row], context.task.neutral, count, rng) if count else texts[row])
        for row in ended
        for count in range(MOST + 1)
    ]
    kept = [one for one in shown if context.fits(*one[1:])]
    groups, prompts, responses = zip(*kept, strict=True) if kept else ((), (), ())
    if len(groups) == len(set(groups)):
        what = f"{len(ended)} of {len(answers)} answers of the supervised policy end, and none has room for padding"
        remedy = "raise policy.max_new_tokens or model.context, or choose another reward.length"
        raise InputError(Problem("reward.length", what, remedy))
    return replace(context.encode(prompts, responses), group_id=torch.tensor(groups))


def _report(context: Context, model: RewardModel, training: Judgments, testing: Judgments) -> None:
    members = member_scores(model, testing.responses)
    # A difference of scores is a log-odds only in the unit in which it was learnt.
    learnt = (members * members.new_tensor(model.scales) + members.new_tensor(model.means)).mean(dim=1)
    report = replace(
        examine(model.final(members, testing.responses.lengths), testing),
        calibration_error=examine(learnt, testing).calibration_error,
    )
    last = steps(training, _settings(context.recipe, 0))
    context.metric("reward", last, {f"heldout/{k}": v for k, v in asdict(report).items()})
    context.progress.note(
        f"reward model: held-out accuracy {report.accuracy:.3f} (longer wins: {report.length_only_accuracy:.3f}), "
        f"calibration error {report.calibration_error:.3f}, length correlation {report.length_correlation:+.2f}"
    )


def _labelled_pairs(context: Context) -> list[Preference]:
    """Pairs of the supervised policy's answers as the task's annotators see them; also written to pairs.jsonl."""
    labeller = context.task.labeller
    if labeller is None:
        raise InputError(Problem("data.preferences", "no preferences and no annotators", "name a preference file"))
    first, second = _halves(context.task.pair_prompts, context.recipe.pairs.method)
    rows = _labelled(labeller, _pairs(context, first, None, "pairs"))
    if second:
        interim = _interim(context, rows)
        rows += _labelled(labeller, _pairs(context, second, partial(scores, interim), "best pairs"))
    figures = diversity([(row.prompt, row.chosen, row.rejected) for row in rows], len(context.task.pair_prompts))
    context.metric("reward", 0, {f"pairs/{name}": value for name, value in figures.items()})
    lines = [json.dumps({"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected}) for r in rows]
    write_atomically(context.run.path / "pairs.jsonl", "".join(line + "\n" for line in lines).encode())
    return rows


def _halves(texts: Sequence[Prompt], method: str) -> tuple[Sequence[Prompt], Sequence[Prompt]]:
    """Prompts whose pairs are sampled plainly, and those for which an interim reward model picks one side."""
    half = len(texts) // 2 if method == "best_of" else len(texts)
    return texts[:half], texts[half:]


def _pairs(context: Context, texts: Sequence[Prompt], score: Score | None, name: str) -> list[Pair]:
    pairs: list[Pair] = []
    folders = snapshots(context)
    with context.progress.stage(name, len(folders)) as stage:
        for index, folder in enumerate(folders):
            context.interrupt.check("sampling pairs")
            pairs += candidates(context, context.policy(folder), texts[index :: len(folders)], index, score)
            stage.advance(index, pairs=len(pairs))
    return pairs


def _labelled(labeller: Labeller, pairs: Sequence[Pair]) -> list[Preference]:
    preferred = labeller(pairs)
    return [
        Preference(prompt, *((first, second) if first_wins else (second, first)), shown=1 if first_wins else 2)
        for (prompt, first, second), first_wins in zip(pairs, preferred, strict=True)
    ]


def _interim(context: Context, rows: Sequence[Preference]) -> RewardModel:
    """A reward model of the pairs so far, asked only which of several answers is best."""
    training, _ = sides(context, rows)
    return _trained(context, training, "pair", interim=True)
