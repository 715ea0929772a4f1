"""From the rows of a trace to the structs of training and back.

Dimensions: B responses, T response tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.experiment.replay.setting import Setting
from kedge.ops.kl import ESTIMATORS, k1
from kedge.ops.rewards import clip_scores
from kedge.ops.shaping import repeated_share, soft_overlong
from kedge.structs import Experience, Rollouts, ScoredRollouts, TokenScores
from kedge.trace.reader import StepTrace
from kedge.train.experience import BUILT_IN, SCALAR_CRITIC, channel_names, make_experience

Array = NDArray[Any]


@dataclass(frozen=True)
class Rescored:
    """What a step's scores become: new ones, and the length slope that is taken off them."""

    scores: Array | None = None  # [B] of another reward model
    slope: float = 0.0  # score per token
    usual: float = 0.0  # tokens, at which nothing is taken off
    rules: Mapping[str, Callable[[StepTrace], Array]] | None = None  # [B] of rules that are asked again
    buffer: int = 8  # tokens over which an overlong penalty grows


def experience_of(step: StepTrace, setting: Setting, rescored: Rescored = Rescored()) -> Experience:
    """What `train.experience.make_experience` makes of a step's rows under `setting`."""
    scored = scored_rollouts(step, setting, rescored)
    in_loss = setting.place == "loss"
    beta = torch.from_numpy(np.asarray(setting.beta, np.float64))
    weights: dict[str, float | Tensor] = {
        name: torch.from_numpy(np.asarray(setting.weights[name], np.float32))
        for name in channel_names(tuple(scored.scores))
        if name != "kl"
    }
    return make_experience(
        scored,
        weights={**weights, "kl": torch.zeros_like(beta) if in_loss else -beta},
        gamma=setting.gamma,
        lam=setting.lam,
        whiten=setting.whiten,
        method=setting.method,
        kl_estimator=k1 if in_loss else ESTIMATORS[setting.estimator],
        loss_beta=beta if in_loss else 0.0,
    )


def scored_rollouts(step: StepTrace, setting: Setting, rescored: Rescored = Rescored()) -> ScoredRollouts:
    """The rows as training had them: rollouts, log-probabilities, terminal scores by channel, values."""
    rollouts = _rollouts(step)
    scores = _scores(step, rollouts, setting, rescored)
    old, reference = (
        TokenScores(
            logprobs=_tensor(step.tokens[f"{who}_logprob"]),
            eos_logprobs=_tensor(step.tokens[f"{who}_eos_logprob"]),
            entropy=_tensor(step.tokens["entropy"]),  # of the policy; nobody asks for the reference's
        )
        for who in ("old", "reference")
    )
    values = _values(step, tuple(scores), rescored) if setting.method.baseline is None else None
    return ScoredRollouts(rollouts, old, reference, scores, values)


def as_trace(step: StepTrace, experience: Experience, setting: Setting, active: Tensor) -> StepTrace:
    """The rows as training would have written them."""
    advantage = _array(experience.advantage()).astype(np.float64)
    critic = "none" if experience.scored.values is None else step.critic
    return replace(
        step,
        channels=experience.channels,
        gamma=experience.gamma,
        lam=experience.lam,
        critic=critic,
        active=_array(active),
        rewards=_array(experience.rewards),
        values=_array(experience.values),
        weights=_array(experience.weights).astype(np.float64),
        shift=_array(experience.shift).astype(np.float64),
        scale=_array(experience.scale).astype(np.float64),
        loss_beta=_array(experience.loss_beta).astype(np.float64),
        advantage_sum=advantage.sum(axis=1),
        advantage_abs_sum=np.abs(advantage).sum(axis=1),
        learning={**step.learning, **setting.learning()},
    )


def prompt_ids(step: StepTrace) -> list[list[int]]:
    """The prompts' token ids, which the reader leaves on disk. Raises `InputError` where text is not kept."""
    import pyarrow.parquet as pq

    column = pq.read_table(step.path, columns=["prompt_ids"]).column("prompt_ids")
    if column.null_count or step.response_ids is None:
        what = 'token ids are not kept (trace.text is not "full")'
        raise InputError(Problem(str(step.path), what, 'run with trace.text = "full" to rescore responses'))
    return [list(row) for row in column.to_pylist()]


def rollouts_with_prompts(step: StepTrace) -> Rollouts:
    """The rollouts of a step with their prompts, for a reward model."""
    rows = prompt_ids(step)
    width = max(1, *(len(row) for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = True
    return replace(_rollouts(step), prompt_ids=ids, prompt_mask=mask)


def _rollouts(step: StepTrace) -> Rollouts:
    """Without the prompts, which no equation reads."""
    empty = torch.zeros(len(step), 1, dtype=torch.long)
    mask = torch.from_numpy(step.response_mask)
    ids = np.zeros(step.response_mask.shape, np.int64) if step.response_ids is None else step.response_ids
    return Rollouts(
        prompt_ids=empty,
        prompt_mask=empty.bool(),
        response_ids=torch.from_numpy(ids.astype(np.int64)),
        response_mask=mask,
        ended=torch.from_numpy(step.ended.astype(bool)),
        group_id=torch.from_numpy(step.group.astype(np.int64)),
        behaviour_logprobs=_tensor(step.tokens["behaviour_logprob"]),
    )


def _scores(step: StepTrace, rollouts: Rollouts, setting: Setting, rescored: Rescored) -> dict[str, Tensor]:
    """[B] by channel: what the trace holds, what is asked again, and what lengths and ids tell."""
    logged = {
        name: _tensor(step.rewards[..., index].sum(axis=1))
        for index, name in enumerate(step.channels)
        if name not in (*BUILT_IN, SCALAR_CRITIC)
    }
    if rescored.scores is not None:
        logged["score"] = _tensor(rescored.scores)
    logged["score"] = clip_scores(logged["score"], setting.score_clip)
    if rescored.slope:
        beyond = rollouts.lengths.float() - rescored.usual
        logged["score"] = logged["score"] - rescored.slope * beyond
    for name, rule in (rescored.rules or {}).items():
        logged[name] = _tensor(rule(step))
    for name in set(setting.weights) - {*logged, *BUILT_IN, SCALAR_CRITIC}:
        logged[name] = _shaped(step, rollouts, name, setting, rescored.buffer)
    return logged


def _shaped(step: StepTrace, rollouts: Rollouts, name: str, setting: Setting, buffer: int) -> Tensor:
    """[B] a channel that the run did not have, from what the trace holds of its responses."""
    if name == "overlong":
        return soft_overlong(rollouts.lengths, rollouts.ended, budget=setting.budget, buffer=buffer)
    if name == "repetition" and step.response_ids is not None:
        return repeated_share(rollouts.response_ids, rollouts.response_mask)
    what = 'token ids are not kept (trace.text is not "full")' if name == "repetition" else "is not in the trace"
    raise InputError(Problem(f"{step.path}: channel {name}", what, "`kedge trial` carries it out"))


def _values(step: StepTrace, terminal: tuple[str, ...], rescored: Rescored) -> Tensor | None:
    """[B, T, heads] the critic's values in the order of the channels; 0 for a channel that no head predicts."""
    if SCALAR_CRITIC in step.channels:
        return _tensor(step.values[..., [step.channels.index(SCALAR_CRITIC)]])
    values = np.zeros((*step.response_mask.shape, len(terminal) + len(BUILT_IN)), np.float32)
    for index, name in enumerate(channel_names(terminal)):
        if name in step.channels:
            values[..., index] = step.values[..., step.channels.index(name)]
    if rescored.slope:
        # The heads of score and length tell what the head of the changed score would: length so far and to come.
        length = step.values[..., step.channels.index("length")]
        before = np.cumsum(step.response_mask, axis=1) - step.response_mask
        expected = (before + length - rescored.usual) * step.response_mask
        values[..., terminal.index("score")] -= (rescored.slope * expected).astype(np.float32)
    return torch.from_numpy(values)


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


@torch.no_grad()
def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().numpy())
