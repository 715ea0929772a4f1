"""DPO and IPO: a policy learns from judged pairs, without a reward model and without sampling."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from kedge.errors import DivergenceError, InputError, Problem
from kedge.ops.direct import dpo, ipo
from kedge.ops.masked import masked_sum
from kedge.rollout.score import token_scores
from kedge.structs import Judgments, Rollouts
from kedge.train.checkpoint import State
from kedge.train.policy import decayed, set_rates
from kedge.train.schedule import seeded
from kedge.train.sequence_update import SequenceLoss, sequence_update
from kedge.train.update import Learner, UpdateSettings

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""Differences of log-ratios [P] in nats and the rows of the chosen responses [P] to losses [P]."""

PAIR_METRICS = {
    "loss": "direct/loss",
    "accuracy": "direct/accuracy",
    "margin": "direct/margin",
    "chosen": "direct/chosen",
    "rejected": "direct/rejected",
}


@dataclass(frozen=True)
class DirectSettings:
    """Numbers of the loop. `beta` is DPO's, in 1 per nat, or IPO's tau; of `update` the clips and the critic's part are
    not read."""

    method: Literal["dpo", "ipo"]
    steps: int
    pairs_per_step: int
    update: UpdateSettings
    beta: float
    label_smoothing: float
    seed: int
    eos_id: int
    final_lr: float = 1.0


@dataclass(frozen=True)
class DirectStep:
    """One pass of the loop: its figures by the names of the metrics, and the seconds it took."""

    number: int
    beta: float
    figures: dict[str, float]
    state: State  # after the step
    seconds: dict[str, float]


def train_direct(
    learner: Learner, reference: Any, judgments: Judgments, settings: DirectSettings, state: State
) -> Iterator[DirectStep]:
    """Run the loop from `state` and yield after every step; learner is changed in place.

    A step takes the next `pairs_per_step` of the judged pairs, in an order drawn anew once all have been seen, through
    `epochs` times `minibatches` optimiser steps. The reference is asked once, before the first step. Raises
    `InputError` where no judgment says which of two responses is better and `DivergenceError` where an update is not
    finite.
    """
    pairs = preference_pairs(judgments)
    usual = sequence_logprobs(reference, judgments.responses, settings)
    for number in range(state.step, settings.steps):
        began = time.perf_counter()
        rows = pairs[batch_of(len(pairs), settings.pairs_per_step, settings.seed, number)]
        batch = judgments.responses.rows(rows.flatten())
        set_rates(learner, decayed(settings.final_lr, settings.steps, number))
        try:
            done = sequence_update(
                learner,
                batch,
                torch.arange(len(batch)).view(rows.shape),
                pair_loss(usual[rows.flatten()], loss_of(settings)),
                settings.update,
                seeded(settings.seed, "update", number),
                size=torch.ones(len(rows)),
            )
        except DivergenceError as error:
            raise DivergenceError(f"policy step {number}: {error}") from error
        figures = {metric: float(done.figures[name].mean()) for name, metric in PAIR_METRICS.items()}
        figures["kl/beta"] = settings.beta
        figures["policy/grad_norm"] = float(done.figures["grad_norm"].mean())
        state = replace(state, step=number + 1)
        seconds = time.perf_counter() - began
        yield DirectStep(number, settings.beta, figures, state, {"update_s": seconds, "step_s": seconds})


def loss_of(settings: DirectSettings) -> PairLoss:
    """The loss that the settings name."""
    if settings.method == "ipo":
        return lambda h, _: ipo(h, settings.beta)
    return lambda h, _: dpo(h, settings.beta, settings.label_smoothing)


def pair_loss(usual: Tensor, loss: PairLoss) -> SequenceLoss:
    """Of pairs of responses, the chosen one first; `usual` [B] are their log-probabilities under the reference."""

    def figures(logprobs: Tensor, rows: Tensor) -> dict[str, Tensor]:
        chosen, rejected = (logprobs - usual[rows].to(logprobs.dtype)).unbind(dim=1)
        margin = chosen - rejected
        right = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)
        return {
            "loss": loss(margin, rows[:, 0]),
            "accuracy": right,
            "margin": margin,
            "chosen": chosen,
            "rejected": rejected,
        }

    return figures


@torch.no_grad()
def examine_pairs(policy: Any, reference: Any, judgments: Judgments, settings: DirectSettings) -> dict[str, float]:
    """The figures of `PAIR_METRICS` over all judged pairs, without learning from them; none where all are ties."""
    pairs = _decided(judgments)
    if not len(pairs):
        return {}
    own, usual = (sequence_logprobs(model, judgments.responses, settings) for model in (policy, reference))
    found = pair_loss(usual, loss_of(settings))(own[pairs], pairs)
    return {metric: float(found[name].mean()) for name, metric in PAIR_METRICS.items()}


def sequence_logprobs(model: Any, responses: Rollouts, settings: DirectSettings) -> Tensor:
    """[B] log-probability of each whole response, in nats."""
    numbers = settings.update
    scores = token_scores(
        model, responses, temperature=numbers.temperature, eos_id=settings.eos_id, microbatch=numbers.microbatch
    )
    return masked_sum(scores.logprobs, responses.response_mask, dim=1)


def preference_pairs(judgments: Judgments) -> Tensor:
    """[P, 2] rows of `judgments.responses`, the better one first: of rankings every two of an item, ties left out.

    Raises `InputError` where there is none, as for ratings and verdicts, which say nothing of two responses.
    """
    pairs = _decided(judgments)
    if not len(pairs):
        what = "no judgment says which of two responses to a prompt is better"
        raise InputError(Problem("policy.method", what, "give pairs or rankings, or choose an on-policy method"))
    return pairs


def _decided(judgments: Judgments) -> Tensor:
    grades, mask = judgments.grades, judgments.mask
    over = (grades.unsqueeze(2) > grades.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)
    item, better, worse = over.nonzero(as_tuple=True)
    return torch.stack([judgments.index[item, better], judgments.index[item, worse]], dim=1)


def batch_of(count: int, per_step: int, seed: int, step: int) -> Tensor:
    """[per_step] numbers of the pairs of a step: consecutive ones of a seeded permutation per pass over all."""
    positions = torch.arange(step * per_step, (step + 1) * per_step)
    passes = range(int(positions[0]) // count, int(positions[-1]) // count + 1)
    orders = {number: torch.randperm(count, generator=seeded(seed, "pairs", number)) for number in passes}
    return torch.stack([orders[p // count][p % count] for p in positions.tolist()])
