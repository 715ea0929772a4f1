"""The first stage: from demonstrations to the supervised policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from kedge.evaluate.ngram import Trigram
from kedge.models.load import disable_dropout, load_policy, save_model, scratch_policy
from kedge.pipeline.context import Context
from kedge.structs import Rollouts
from kedge.train.schedule import seed_of
from kedge.train.sft import heldout_loss, train_sft


def supervised(context: Context) -> None:
    """Train the policy on demonstrations and write `models/sft`; a model folder without demonstrations passes as is."""
    recipe = context.recipe
    model = _initial(context)
    if context.task.demonstrations.rows:
        shown = context.encode_demonstrations(context.task.demonstrations)
        _train(context, model, shown)
        if context.task.held_out.rows:
            figures = _held_out(context, model, shown)
            context.metric("sft", recipe.sft.steps, figures)
            perplexity, trigram = figures["heldout/perplexity"], figures["heldout/trigram_perplexity"]
            context.progress.note(f"held-out perplexity {perplexity:.2f} (3-gram model: {trigram:.2f})")
    save_model(model, context.tokenizer, context.run.models / "sft")


def snapshots(context: Context) -> list[Path]:
    """Folders of the policies that sample pairs: evenly spaced checkpoints of fine-tuning, the last one included."""
    earlier = range(1, context.recipe.pairs.checkpoints)
    return [*(context.run.models / f"sft-{index}" for index in earlier), context.run.models / "sft"]


def _initial(context: Context) -> Any:
    model = context.recipe.model
    if model.init != "scratch":
        return disable_dropout(load_policy(model.init, trust_remote_code=model.trust_remote_code)[0])
    return scratch_policy(
        context.tokenizer,
        family=model.family,
        hidden=model.hidden,
        layers=model.layers,
        heads=model.heads,
        context=model.context,
        seed=seed_of(context.recipe.seed, "model"),
    )


def _train(context: Context, model: Any, shown: Rollouts) -> None:
    sft, saved = context.recipe.sft, snapshots(context)[:-1]
    due = {round(sft.steps * (index + 1) / (len(saved) + 1)): folder for index, folder in enumerate(saved)}
    with context.progress.stage("sft", sft.steps) as stage:

        def on_step(step: int, loss: float) -> None:
            context.follow(stage, step, loss)
            if step + 1 in due:
                save_model(model, context.tokenizer, due[step + 1])

        train_sft(
            model,
            shown,
            steps=sft.steps,
            batch_size=sft.batch_size,
            lr=sft.lr,
            warmup=sft.warmup,
            weight_decay=sft.weight_decay,
            seed=context.recipe.seed,
            on_step=on_step,
        )


def _held_out(context: Context, model: Any, shown: Rollouts) -> dict[str, float]:
    """Perplexity per response token beside that of a 3-gram model fitted to the same demonstrations."""
    held_out = context.encode_demonstrations(context.task.held_out)
    loss, _ = heldout_loss(model, held_out)
    trigram = Trigram.fit(_sequences(shown), len(context.tokenizer), _starts(shown))
    baseline = trigram.nats_per_token(_sequences(held_out), _starts(held_out))
    return {
        "heldout/loss": loss,
        "heldout/perplexity": math.exp(loss),
        "heldout/trigram_perplexity": math.exp(baseline),
    }


def _sequences(rollouts: Rollouts) -> list[list[int]]:
    ids = torch.cat([rollouts.prompt_ids, rollouts.response_ids], dim=1)
    mask = torch.cat([rollouts.prompt_mask, rollouts.response_mask], dim=1)
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def _starts(rollouts: Rollouts) -> list[int]:
    starts: list[int] = rollouts.prompt_mask.sum(dim=1).tolist()
    return starts
