"""Supervised fine-tuning: maximise the likelihood of demonstrated responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kedge.ops.logprobs import taken
from kedge.ops.losses import token_nll
from kedge.ops.masked import masked_mean
from kedge.rollout.score import response_logprobs
from kedge.structs import Rollouts
from kedge.train.descent import Descent
from kedge.train.schedule import batches, seeded


def train_sft(
    model: Any,
    demonstrations: Rollouts,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    warmup: int,
    weight_decay: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    """Train `model` in place with AdamW and a cosine schedule; loss in nats per response token, EOS included.

    `on_step(step, loss)` is called after every optimiser step. Raises `DivergenceError` on a loss that is not finite.
    """
    model.eval()  # dropout stays off: the same network must score and train
    descent = Descent(model, lr=lr, steps=steps, warmup=warmup, weight_decay=weight_decay)
    expected_tokens = batch_size * float(demonstrations.lengths.float().mean())
    for step, index in enumerate(batches(demonstrations.lengths, batch_size, steps, seeded(seed, "sft", 0))):
        batch = demonstrations.rows(index)
        logprobs = taken(response_logprobs(model, batch, 1.0), batch.response_ids)
        loss = token_nll(logprobs, batch.response_mask, expected_tokens)
        descent.step(loss, f"sft step {step}", "lower sft.lr")
        on_step(step, -masked_mean(logprobs.detach(), batch.response_mask).item())


@torch.no_grad()
def heldout_loss(model: Any, demonstrations: Rollouts, *, microbatch: int = 256) -> tuple[float, float]:
    """Nats per response token and the share of response tokens ranked first, teacher-forced."""
    total, right, count = 0.0, 0, 0
    for index in demonstrations.lengths.argsort(stable=True).split(microbatch):
        batch = demonstrations.rows(index)
        logprobs = response_logprobs(model, batch, 1.0)
        mask = batch.response_mask
        total -= float(taken(logprobs, batch.response_ids).masked_fill(~mask, 0).sum())
        right += int(((logprobs.argmax(dim=-1) == batch.response_ids) & mask).sum())
        count += int(mask.sum())
    return total / count, right / count
