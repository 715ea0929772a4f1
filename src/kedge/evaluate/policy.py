"""The fixed evaluation set: how the reference answers it, and how a policy does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.data.records import Prompt
from kedge.data.task import Truth
from kedge.evaluate.intervals import wilson
from kedge.ops.kl import k1
from kedge.ops.masked import masked_mean, masked_sum
from kedge.rollout.engine import RolloutEngine
from kedge.rollout.score import token_scores
from kedge.structs import Prompts, Rollouts, Sampling

TERCILES = 3


@dataclass(frozen=True)
class Judge:
    """What evaluation needs beside a policy; `decode` turns response ids into text."""

    engine: RolloutEngine
    sampling: Sampling
    score: Callable[[Rollouts], Tensor]
    decode: Callable[[Rollouts], list[str]]
    eos_id: int
    truth: Truth | None = None


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts with the reference's answers. `usual_length` [N] comes from samples other than `answers`, so that
    grouping by it does not bias the comparison with `answers`."""

    texts: tuple[Prompt, ...]
    prompts: Prompts
    usual_length: Tensor
    tercile: Tensor  # [N] 0 where the reference is briefest
    answers: Rollouts
    answer_scores: Tensor
    answer_texts: list[str]
    answer_logprobs: Tensor  # [N] nats, of the whole answer under the reference
    within: float  # standard deviation of the reference's scores within a prompt


@dataclass(frozen=True)
class Evaluation:
    """Figures by metric name, the world's truth where it is known, and the answers themselves."""

    metrics: dict[str, float]
    truth: dict[str, float]
    rollouts: Rollouts
    texts: list[str]
    scores: Tensor
    token_kl: Tensor  # [N, T] k1, nats
    reference_kl: Tensor  # [N] k1 of the policy on the reference's answers, nats


def prepare(
    reference: Any, judge: Judge, texts: Sequence[Prompt], prompts: Prompts, samples: int, generator: torch.Generator
) -> EvaluationSet:
    """Let the reference answer every prompt `samples` times for its usual length, and once more to compare with."""
    repeated = prompts.rows(torch.arange(len(prompts)).repeat_interleave(samples))
    drawn = judge.engine.generate(reference, repeated, judge.sampling, generator)
    usual = drawn.lengths.float().view(len(prompts), samples).mean(dim=1)
    answers = judge.engine.generate(reference, prompts, judge.sampling, generator)
    first, others = judge.score(answers), judge.score(drawn).view(len(prompts), samples)
    return EvaluationSet(
        texts=tuple(texts),
        prompts=prompts,
        usual_length=usual,
        tercile=terciles(usual),
        answers=answers,
        answer_scores=first,
        answer_texts=judge.decode(answers),
        answer_logprobs=_logprobs(reference, judge, answers),
        within=float(torch.cat([first.unsqueeze(1), others], dim=1).var(dim=1).mean().sqrt()),
    )


def _logprobs(model: Any, judge: Judge, answers: Rollouts) -> Tensor:
    """[N] nats of whole answers."""
    scores = token_scores(model, answers, temperature=judge.sampling.temperature, eos_id=judge.eos_id)
    return masked_sum(scores.logprobs, answers.response_mask, dim=1)


def terciles(values: Tensor) -> Tensor:
    """[N] 0, 1 or 2 by rank of `values`, as equal in size as can be; ties keep their order."""
    rank = values.argsort(stable=True).argsort()
    return rank * TERCILES // len(values)


def evaluate(policy: Any, reference: Any, judge: Judge, fixed: EvaluationSet, generator: torch.Generator) -> Evaluation:
    """Answer every prompt once with `policy` and measure; KL is k1 of policy against reference, in nats."""
    rollouts = judge.engine.generate(policy, fixed.prompts, judge.sampling, generator)
    temperature = judge.sampling.temperature
    own = token_scores(policy, rollouts, temperature=temperature, eos_id=judge.eos_id)
    usual = token_scores(reference, rollouts, temperature=temperature, eos_id=judge.eos_id)
    token_kl = k1(own.logprobs, usual.logprobs)
    scores, texts = judge.score(rollouts), judge.decode(rollouts)
    lengths, mask = rollouts.lengths.float(), rollouts.response_mask
    kl = masked_sum(token_kl, mask, dim=1)
    reference_kl = _logprobs(policy, judge, fixed.answers) - fixed.answer_logprobs
    won = float(((scores > fixed.answer_scores).float() + 0.5 * (scores == fixed.answer_scores).float()).mean())
    low, high = wilson(won, len(scores))
    p10, p50, p90 = torch.quantile(lengths, torch.tensor([0.1, 0.5, 0.9])).tolist()
    metrics = {
        "evaluation/score": scores.mean(),
        "evaluation/score_reference": fixed.answer_scores.mean(),
        "evaluation/score_reference_within": fixed.within,
        "evaluation/kl_reference": reference_kl.mean(),
        "evaluation/kl_per_sequence": kl.mean(),
        "evaluation/kl_per_token": masked_mean(token_kl, mask),
        "evaluation/entropy": masked_mean(own.entropy, mask),
        "evaluation/length": lengths.mean(),
        "evaluation/length_reference": fixed.answers.lengths.float().mean(),
        "evaluation/length_p10": p10,
        "evaluation/length_p50": p50,
        "evaluation/length_p90": p90,
        "evaluation/ended": rollouts.ended.float().mean(),
        "evaluation/win_rate": won,
        "evaluation/win_rate_low": low,
        "evaluation/win_rate_high": high,
    }
    for index in range(TERCILES):
        rows = fixed.tercile == index
        if rows.any():
            ratio = lengths[rows].mean() / fixed.answers.lengths[rows].float().mean()
            metrics[f"evaluation/tercile{index}/length_ratio"] = ratio
            metrics[f"evaluation/tercile{index}/kl_per_sequence"] = kl[rows].mean()
            metrics[f"evaluation/tercile{index}/score"] = scores[rows].mean()
    known = _truth(judge.truth, fixed, texts) if judge.truth else {}
    figures = {name: float(value) for name, value in metrics.items()}
    return Evaluation(figures, known, rollouts, texts, scores, token_kl, reference_kl)


def _truth(truth: Truth, fixed: EvaluationSet, texts: list[str]) -> dict[str, float]:
    """Means of what the world knows, over all prompts and by tercile of the reference's length."""
    judged = [truth(prompt, text) for prompt, text in zip(fixed.texts, texts, strict=True)]
    reference = [truth(prompt, text) for prompt, text in zip(fixed.texts, fixed.answer_texts, strict=True)]
    known = {name: _mean(judged, name) for name in judged[0]}
    known["gold_reference"] = _mean(reference, "gold")
    for index in range(TERCILES):
        rows = (fixed.tercile == index).nonzero().flatten().tolist()
        part = [judged[row] for row in rows]
        if part:
            known |= {f"tercile{index}/{name}": _mean(part, name) for name in ("gold", "correct", "answered")}
    return known


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return math.fsum(row[name] for row in rows) / len(rows)
