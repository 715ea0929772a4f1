"""Runs made of NumPy and the desk's grammar alone, as large as one wants: every column, real texts, no training.

Words are tokens. Nothing in such a run is learnt: its rewards, values and log-probabilities are drawn. Used where the
cost of reading a run is measured, not what is found in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kedge.desk.grammar import ask, demonstrate
from kedge.trace.advantages import gae
from kedge.trace.jsonl import append_json
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import ProbeRecord, SampleRecord, StepRecord, TraceWriter

CHANNELS = ("score", "kl", "length", "missing_eos")
BETA, EVERY, PROBES, SAMPLES = 0.05, 20, 16, 64


@dataclass(frozen=True)
class Shape:
    """One step of a run: how many responses, and from how many to how many tokens."""

    name: str
    responses: int
    shortest: int
    longest: int

    @property
    def tokens(self) -> float:
        """Expected tokens of a step."""
        return self.responses * (self.shortest + self.longest) / 2


SMALL = Shape("96 responses of 40 to 160 tokens", 96, 40, 160)
LARGE = Shape("512 responses of 40 to 1024 tokens", 512, 40, 1024)


class Words:
    """Texts of any length, cut from the desk's own answers."""

    def __init__(self, rng: np.random.Generator, count: int = 50_000) -> None:
        self.prompts = [ask(rng).prompt for _ in range(256)]
        pool: list[str] = []
        while len(pool) < count:
            pool += demonstrate(ask(rng), rng).split()
        known = {word: number for number, word in enumerate(sorted(set(pool)), 3)}
        self._pool, self._ids = pool, np.array([known[word] for word in pool], dtype=np.int32)

    def answer(self, rng: np.random.Generator, length: int) -> tuple[str, NDArray[np.int32]]:
        """`length` words in a row, and their numbers."""
        start = int(rng.integers(len(self._pool) - length))
        return " ".join(self._pool[start : start + length]), self._ids[start : start + length]


def step_record(shape: Shape, step: int, words: Words, rng: np.random.Generator) -> StepRecord:
    """One policy step: two responses to a prompt, a critic head per channel, whitened advantages."""
    batch = shape.responses
    lengths = rng.integers(shape.shortest, shape.longest + 1, batch)
    longest = int(lengths.max())
    mask = np.arange(longest) < lengths[:, None]
    texts, ids = [], np.zeros((batch, longest), dtype=np.int32)
    for row, length in enumerate(lengths.tolist()):
        text, numbers = words.answer(rng, length)
        texts.append(text)
        ids[row, :length] = numbers
    size = (batch, longest)
    old = -rng.random(size, dtype=np.float32)
    reference = old - rng.normal(0.02, 0.1, size).astype(np.float32)
    rewards = np.zeros((*size, len(CHANNELS)), dtype=np.float32)
    rows, last = np.arange(batch), lengths - 1
    ended = rng.random(batch) < 0.95
    rewards[rows, last, 0] = rng.normal(0.002 * step, 1, batch)
    rewards[..., 1] = (old - reference) * mask
    rewards[..., 2] = mask
    rewards[rows, last, 3] = ~ended
    values = rng.normal(0, 0.3, rewards.shape).astype(np.float32) * mask[..., None]
    weights = np.tile(np.array([1.0, -BETA, 0.0, -1.0], dtype=np.float32), (batch, 1))
    total = (weights[:, None] * gae(rewards, values, mask, gamma=1.0, lam=0.95)).sum(-1)
    shift, scale = np.float32(total[mask].mean()), np.float32(total[mask].std())
    asked = np.repeat(rng.integers(len(words.prompts), size=batch // 2), 2)
    return StepRecord(
        step=step,
        policy_version=step,
        channels=CHANNELS,
        gamma=1.0,
        lam=0.95,
        critic="channels",
        group=np.arange(batch) // 2,
        prompt_ids=rng.integers(3, 90, (batch, 24), dtype=np.int32),
        prompt_mask=np.ones((batch, 24), dtype=bool),
        response_ids=ids,
        response_mask=mask,
        ended=ended,
        behaviour_logprob=old,
        old_logprob=old,
        reference_logprob=reference,
        new_logprob=old + np.float32(0.001) * rng.standard_normal(size, dtype=np.float32),
        active=rng.random(size, dtype=np.float32) < 0.9,
        old_eos_logprob=-5 * rng.random(size, dtype=np.float32),
        reference_eos_logprob=-5 * rng.random(size, dtype=np.float32),
        entropy=rng.random(size, dtype=np.float32),
        rewards=rewards,
        values=values,
        weights=weights,
        shift=np.full(batch, shift),
        scale=np.full(batch, scale),
        advantage=np.where(mask, (total - shift) / scale, 0),
        loss_beta=np.zeros(batch),
        learning={"epochs": 2, "clip": 0.2},
        prompts=[words.prompts[number] for number in asked],
        responses=texts,
    )


def _probes(step: int, words: Words, rng: np.random.Generator) -> ProbeRecord:
    count, lengths = 3 * PROBES, [20, 60, 40] * PROBES
    return ProbeRecord(
        step=step,
        beta=BETA,
        probe=[number // 3 for number in range(count)],
        variant=["brief", "verbose", "reference"] * PROBES,
        length=lengths,
        score=rng.normal(0, 1, count).tolist(),
        logprob=(-20 + rng.normal(0, 0.5, count)).tolist(),
        reference_logprob=[-20.0] * count,
        reference_length=[80.0] * count,
        tercile=[number // 3 % 3 for number in range(count)],
        prompt=[words.prompts[number // 3] for number in range(count)],
        response=[words.answer(rng, length)[0] for length in lengths],
    )


def _samples(step: int, shape: Shape, words: Words, rng: np.random.Generator) -> SampleRecord:
    lengths = rng.integers(shape.shortest, shape.longest + 1, SAMPLES).tolist()
    answers = [words.answer(rng, length)[0] for length in lengths]
    usual = np.random.default_rng(0)  # the reference's answers do not change
    return SampleRecord(
        step=step,
        prompt=words.prompts[:SAMPLES],
        response=answers,
        reference_response=[words.answer(usual, shape.shortest)[0] for _ in range(SAMPLES)],
        response_tokens=[answer.split() for answer in answers],
        token_kl=[rng.normal(0.02, 0.1, length).tolist() for length in lengths],
        score=rng.normal(0.01 * step, 1, SAMPLES).tolist(),
        reference_score=np.random.default_rng(1).normal(0, 1, SAMPLES).tolist(),
        reference_kl=rng.normal(-1, 0.1, SAMPLES).tolist(),
        length=lengths,
        reference_tokens=[shape.shortest] * SAMPLES,
        reference_length=[float(shape.shortest)] * SAMPLES,
        tercile=[number % 3 for number in range(SAMPLES)],
    )


def _metrics(record: StepRecord) -> dict[str, object]:
    tokens = record.response_mask
    kl = np.where(tokens, record.old_logprob - record.reference_logprob, 0)
    return {
        "stage": "policy",
        "step": record.step,
        "score/mean": record.rewards[..., 0].sum(1).mean(),
        "score/std": record.rewards[..., 0].sum(1).std(),
        "kl/reference_per_sequence": kl.sum(1).mean(),
        "kl/reference_per_token": kl.sum() / tokens.sum(),
        "kl/beta": BETA,
        "entropy/per_token": record.entropy[tokens].mean(),
        "length/mean": tokens.sum(1).mean(),
        "length/ended": record.ended.mean(),
        "policy/clip_fraction": 0.1,
        "policy/approx_kl": 1e-6,
        "policy/first_ratio_error": 1e-7,
        "policy/grad_norm": 1.0,
        "value/explained_variance.score": 0.3,
        "weight/kl": -BETA,
    }


def make(path: Path, tokens: int, shape: Shape, *, seed: int = 0) -> tuple[int, int]:
    """Write a run of at least `tokens` response tokens into `path`; returns its steps and tokens."""
    rng = np.random.default_rng(seed)
    words = Words(rng)
    run = RunDir.create(path)
    run.update_manifest(name=f"made, {tokens:,} tokens", seed=seed, channels=list(CHANNELS), gamma=1.0, lam=0.95)
    run.recipe_json.write_text(json.dumps({"name": "made", "policy": {"kl": {"beta": BETA}}}))
    step = written = 0
    with TraceWriter(run) as writer:
        while written < tokens:
            if step % EVERY == 0:
                writer.write_probes(_probes(step, words, rng))
                writer.write_samples(_samples(step, shape, words, rng))
            record = step_record(shape, step, words, rng)
            append_json(run.metrics, _metrics(record))
            writer.write_step(record)
            written += int(record.response_mask.sum())
            step += 1
    run.update_manifest(status="finished")
    return step, written
