"""Optimiser steps on losses of whole responses: one at a time, or in groups such as pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kedge.errors import DivergenceError
from kedge.ops.kl import k3
from kedge.ops.logprobs import entropy, taken
from kedge.ops.masked import masked_sum
from kedge.rollout.score import response_logprobs
from kedge.structs import Rollouts, ScoredRollouts
from kedge.train.mix import mix_backward
from kedge.train.update import Learner, Mix, Stop, UpdateSettings

SequenceLoss = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""Log-probabilities of whole responses [g, K] in nats and their rows [g, K] to figures [g] of each group; `loss` is the
one that is trained on."""
_OF_POLICY = ("entropy", "approx_kl", "ratio_error", "ratio_max", "mix_loss", "left_out", "grad_norm")


@dataclass(frozen=True)
class SequenceStats:
    """What the optimiser did with one batch. Figures are [epochs, minibatches]; per-token fields are [B, T].

    `new_logprobs` are those before a row's last optimiser step; rows in no group have zeros and are not `trained`.
    """

    figures: dict[str, Tensor]
    new_logprobs: Tensor
    trained: Tensor  # [B] bool


def sequence_update(
    learner: Learner,
    rollouts: Rollouts,
    groups: Tensor,
    loss: SequenceLoss,
    settings: UpdateSettings,
    generator: torch.Generator,
    *,
    size: Tensor,
    scored: ScoredRollouts | None = None,
    mix: Mix | None = None,
    stop: Stop | None = None,
) -> SequenceStats:
    """Several epochs of steps of the policy on `loss` of the groups of rows [G, K]; learner is changed in place.

    A minibatch's loss is the sum over its groups divided by the sum of their `size` [G]: with ones their mean, with
    lengths the token mean. Nothing happens in a minibatch without groups, nor once `stop` says so. With `scored`, which
    `stop` needs, the figures tell how far the policy went since the responses were sampled; else those are 0. Raises
    `DivergenceError` where a step is not finite.
    """
    new_logprobs = torch.zeros_like(rollouts.behaviour_logprobs)
    rows: list[list[dict[str, Tensor]]] = []
    stopped = False
    for epoch in range(settings.epochs):
        order = torch.randperm(len(groups), generator=generator)
        rows.append([])
        for number, minibatch in enumerate(order.tensor_split(settings.minibatches)):
            totals = dict.fromkeys([*loss(torch.zeros(0, groups.shape[1]), groups[:0]), *_OF_POLICY], torch.zeros(()))
            rows[-1].append(totals)
            if not len(minibatch):
                continue
            learner.optimizer.zero_grad(set_to_none=True)
            share, tokens = size[minibatch].sum(), rollouts.response_mask[groups[minibatch]].sum()
            for part in _by_length(rollouts, groups[minibatch], settings.microbatch):
                figures, logprobs = _part(learner, rollouts, part, loss, settings, share, tokens, scored)
                for name, value in figures.items():
                    totals[name] = torch.maximum(totals[name], value) if name == "ratio_max" else totals[name] + value
                new_logprobs[part.flatten(), : logprobs.shape[1]] = logprobs.to(new_logprobs.dtype)
            if stop is not None and scored is not None and not stopped:
                stopped = stop(*_seen(scored, new_logprobs, groups[minibatch].flatten()))
            totals["left_out"] = torch.tensor(float(stopped))
            if stopped:
                continue
            if mix is not None:
                shown = mix(epoch, number)
                totals["mix_loss"] = mix_backward(learner.policy, shown, settings.mix_weight, settings.microbatch)
            totals["grad_norm"] = _step(learner, settings.max_grad_norm, totals["loss"])
    trained = torch.zeros(len(rollouts), dtype=torch.bool).index_fill(0, groups.flatten(), True)
    found = {name: torch.stack([torch.stack([m[name] for m in row]) for row in rows]) for name in rows[0][0]}
    return SequenceStats(found, new_logprobs, trained)


def _part(
    learner: Learner,
    rollouts: Rollouts,
    rows: Tensor,
    loss: SequenceLoss,
    settings: UpdateSettings,
    share: Tensor,
    tokens: Tensor,
    scored: ScoredRollouts | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Backward through the groups of `rows` [g, K]; their part of the minibatch's figures, and log-probabilities."""
    batch = rollouts.rows(rows.flatten())
    mask = batch.response_mask
    distribution = response_logprobs(learner.policy, batch, settings.temperature)
    logprobs = taken(distribution, batch.response_ids).masked_fill(~mask, 0)
    each = loss(masked_sum(logprobs, mask, dim=1).view(rows.shape), rows)
    figures = {name: values.sum() / share for name, values in each.items()}
    figures["loss"].backward()
    figures["entropy"] = masked_sum(entropy(distribution), mask) / tokens
    logprobs = logprobs.detach()
    if scored is not None:
        old = scored.old.logprobs[rows.flatten(), : mask.shape[1]].masked_fill(~mask, 0)
        ratio = torch.exp(logprobs - old)
        figures["approx_kl"] = masked_sum(k3(old, logprobs), mask) / tokens
        figures["ratio_error"] = masked_sum((ratio - 1).abs(), mask) / tokens
        figures["ratio_max"] = ratio.max()
    return {name: value.detach() for name, value in figures.items()}, logprobs


def _by_length(rollouts: Rollouts, groups: Tensor, microbatch: int) -> Iterator[Tensor]:
    """The groups [G, K] of a minibatch in parts of at most `microbatch` responses, but one group at least; each part is
    as wide as its own longest response."""
    order = rollouts.last[groups].amax(dim=1).argsort(stable=True)
    yield from groups[order].split(max(1, microbatch // groups.shape[1]))


def _seen(scored: ScoredRollouts, new_logprobs: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `Stop` asks for, of the rows at `index`."""
    return (
        new_logprobs[index],
        scored.old.logprobs[index],
        scored.reference.logprobs[index],
        scored.rollouts.response_mask[index],
    )


def _step(learner: Learner, max_norm: float, loss: Tensor) -> Tensor:
    """Clip the gradient, refuse a loss or gradient that is not finite, step; the gradient's norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(learner.policy.parameters(), max_norm)
    if not math.isfinite(float(norm) + float(loss)):
        raise DivergenceError(
            f"the update is not finite: loss {float(loss)}, gradient norm {float(norm)} -> lower policy.lr and --resume"
        )
    learner.optimizer.step()
    return norm.detach()
