"""Probe pairs: the same prompt answered briefly and verbosely, scored through the run so that matched margins exist."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedge.data.records import Prompt, prompt_text
from kedge.evaluate.policy import Judge, terciles
from kedge.ops.masked import masked_sum
from kedge.pipeline.context import Context
from kedge.rollout.score import token_scores
from kedge.structs import Rollouts
from kedge.trace.writer import ProbeRecord
from kedge.train.schedule import seeded

VARIANTS = ("brief", "verbose", "reference")
SAMPLES = 8  # reference answers per probe prompt
LONGER = 1.5  # a sampled probe pair needs a verbose answer this many times as long as the brief one


@dataclass(frozen=True)
class Probes:
    """Answers whose scores do not change, and under whose prompts the policy's log-probabilities are followed."""

    answers: Rollouts
    probe: list[int]
    variant: list[str]
    prompts: list[str]
    responses: list[str]
    score: Tensor
    reference_logprob: Tensor  # [B] nats, summed over the response
    reference_length: list[float]
    tercile: list[int]

    def record(self, policy: Any, judge: Judge, step: int, beta: float) -> ProbeRecord:
        """Where the policy stands on the probes after `step` updates."""
        return ProbeRecord(
            step=step,
            beta=beta,
            probe=self.probe,
            variant=self.variant,
            length=self.answers.lengths.tolist(),
            score=self.score.tolist(),
            logprob=_logprobs(policy, judge, self.answers).tolist(),
            reference_logprob=self.reference_logprob.tolist(),
            reference_length=self.reference_length,
            tercile=self.tercile,
            prompt=self.prompts,
            response=self.responses,
        )


def prepare_probes(context: Context, reference: Any, judge: Judge) -> Probes | None:
    """The task's probe pairs, or, where it has none, short and long samples of the reference on training prompts.

    Each prompt also keeps one sample of the reference. None if no prompt has a pair.
    """
    given = context.task.probes
    texts: list[Prompt] = [probe.prompt for probe in given]
    if not given:
        texts = list(context.task.prompts.rows[: context.recipe.trace.probes])
    prompts = context.encode_prompts(texts).rows(torch.arange(len(texts)).repeat_interleave(SAMPLES))
    samples = context.engine.generate(reference, prompts, judge.sampling, seeded(context.recipe.seed, "probes"))
    sampled, lengths = context.text(samples), samples.lengths.view(-1, SAMPLES).float()
    ended = samples.ended.view(-1, SAMPLES)
    usual = lengths.mean(dim=1)
    tercile = terciles(usual).tolist()
    rows: list[tuple[int, str, str]] = []
    for index in range(len(texts)):
        own = sampled[index * SAMPLES : (index + 1) * SAMPLES]
        pair = (given[index].brief, given[index].verbose) if given else _contrast(own, lengths[index], ended[index])
        if pair is not None:
            rows += [(index, variant, text) for variant, text in zip(VARIANTS, (*pair, own[0]), strict=True)]
    if not rows:
        return None
    answers = context.encode([texts[index] for index, _, _ in rows], [text for _, _, text in rows])
    return Probes(
        answers=answers,
        probe=[index for index, _, _ in rows],
        variant=[variant for _, variant, _ in rows],
        prompts=[prompt_text(texts[index]) for index, _, _ in rows],
        responses=[text for _, _, text in rows],
        score=judge.score(answers),
        reference_logprob=_logprobs(reference, judge, answers),
        reference_length=[float(usual[index]) for index, _, _ in rows],
        tercile=[tercile[index] for index, _, _ in rows],
    )


def _contrast(texts: list[str], lengths: Tensor, ended: Tensor) -> tuple[str, str] | None:
    """The shortest and the longest of the samples that ended, if they differ enough in length."""
    finished = ended.nonzero().squeeze(1)
    if len(finished) < 2:
        return None
    short, long = finished[lengths[finished].argmin()], finished[lengths[finished].argmax()]
    return (texts[short], texts[long]) if lengths[long] >= LONGER * lengths[short] else None


def _logprobs(model: Any, judge: Judge, answers: Rollouts) -> Tensor:
    scores = token_scores(model, answers, temperature=judge.sampling.temperature, eos_id=judge.eos_id)
    return masked_sum(scores.logprobs, answers.response_mask, dim=1)
