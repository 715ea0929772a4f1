"""A small run made of numpy alone, with known answers: the probe slope, the KL margin and the lengths are settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kedge.trace.advantages import gae
from kedge.trace.jsonl import append_json
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import ProbeRecord, SampleRecord, StepRecord, TraceWriter

CHANNELS = ("score", "kl", "length", "missing_eos")


@dataclass(frozen=True)
class World:
    """What the run shows. Defaults: length drift whose matched net margin stays positive."""

    seed: int = 0
    steps: int = 12
    batch: int = 24
    every: int = 3
    probes: int = 16
    beta: float = 0.05
    penalty: float = 0.0
    reference_length: int = 10
    last_ratio: float = 2.5
    slope: float = 0.06  # score per token of a probe answer
    kl_margin: float = 10.0  # nats at the end, verbose minus brief
    gold_drop: float = 1.5
    critic: str = "channels"


HEALTHY = World(last_ratio=1.0, slope=-0.02, gold_drop=-0.5)
BRIEF, VERBOSE = 6, 26


def step_record(world: World, step: int, rng: np.random.Generator, ratio: float = 1.0) -> StepRecord:
    """One policy step with random rewards and values, holes in the mask and unequal lengths."""
    batch, channels = world.batch, CHANNELS + (("critic",) if world.critic == "scalar" else ())
    longest = max(4, int(world.reference_length * ratio * 2))
    lengths = rng.integers(2, longest + 1, size=batch)
    mask = np.arange(longest) < lengths[:, None]
    mask[0, 1] = lengths[0] == 2  # a hole, unless it would be the last token
    shape = (batch, longest)
    old = -rng.random(shape)
    reference = old - rng.normal(0.2, 0.1, shape)
    last = lengths - 1
    rewards = np.zeros((*shape, len(channels)))
    rewards[np.arange(batch), last, 0] = 0.05 * lengths + rng.normal(0, 0.3, batch)
    rewards[..., 1] = (old - reference) * mask
    rewards[..., 2] = mask
    rewards[np.arange(batch), last, 3] = rng.random(batch) < 0.1
    values = rng.normal(0, 0.5, rewards.shape) * mask[..., None]
    weights = np.tile([1.0, -world.beta, -world.penalty, -1.0, 1.0][: len(channels)], (batch, 1))
    if world.critic == "scalar":
        rewards[..., 4] = 0
        values[..., :4] = 0
    rewards, values, weights = (array.astype(np.float32) for array in (rewards, values, weights))
    total = (weights[:, None] * gae(rewards, values, mask, gamma=1.0, lam=0.95)).sum(-1)
    shift, scale = np.float32(total[mask].mean()), np.float32(total[mask].std())
    zeros = np.zeros(shape)
    return StepRecord(
        step=step,
        policy_version=step,
        channels=channels,
        gamma=1.0,
        lam=0.95,
        critic=world.critic,
        group=np.arange(batch) // 2,
        prompt_ids=rng.integers(3, 90, (batch, 7)),
        prompt_mask=np.arange(7) >= rng.integers(0, 4, (batch, 1)),
        response_ids=rng.integers(3, 90, shape),
        response_mask=mask,
        ended=rng.random(batch) < 0.9,
        behaviour_logprob=old,
        old_logprob=old,
        reference_logprob=reference,
        new_logprob=old + 0.01,
        active=rng.random(shape) < 0.8,
        old_eos_logprob=zeros - 3,
        reference_eos_logprob=zeros - 2,
        entropy=zeros + 0.5,
        rewards=rewards,
        values=values,
        weights=weights,
        shift=np.full(batch, shift),
        scale=np.full(batch, scale),
        advantage=np.where(mask, (total - shift) / scale, 0),
        loss_beta=np.zeros(batch),
        learning={"epochs": 2, "clip": 0.2},
        prompts=[f"prompt {row // 2}" for row in range(batch)],
        responses=[f"response {row}" for row in range(batch)],
    )


def probe_record(world: World, step: int, rng: np.random.Generator) -> ProbeRecord:
    """Brief, verbose and reference answers; the score's slope on length is `world.slope` exactly."""
    fraction = step / world.steps
    count = world.probes
    base = rng.normal(0, 0.5, count)
    lengths = {"brief": BRIEF, "verbose": VERBOSE, "reference": world.reference_length}
    variants = tuple(lengths)
    kl = {"brief": 0.0, "verbose": world.kl_margin * fraction, "reference": 0.0}
    jitter = rng.normal(0, 0.1, count) - 0.0
    return ProbeRecord(
        step=step,
        beta=world.beta,
        probe=[probe for probe in range(count) for _ in variants],
        variant=[variant for _ in range(count) for variant in variants],
        length=[lengths[variant] for _ in range(count) for variant in variants],
        score=[float(base[probe] + world.slope * lengths[variant]) for probe in range(count) for variant in variants],
        logprob=[
            float(-20 + kl[variant] + (jitter[probe] if variant == "verbose" else 0))
            for probe in range(count)
            for variant in variants
        ],
        reference_logprob=[-20.0] * (3 * count),
        reference_length=[float(world.reference_length)] * (3 * count),
        tercile=[probe % 3 for probe in range(count) for _ in variants],
        prompt=[f"probe {probe}" for probe in range(count) for _ in variants],
        response=[f"{variant} answer" for _ in range(count) for variant in variants],
    )


def sample_record(step: int, response: str = "yes , you can .", prompt: str = "can i cancel ?") -> SampleRecord:
    count = 9
    tokens = response.split()
    return SampleRecord(
        step=step,
        prompt=[f"{prompt} {number}" for number in range(count)],
        response=[response] * count,
        reference_response=["yes ."] * count,
        response_tokens=[tokens] * count,
        token_kl=[[0.3 * index - 0.2 for index in range(len(tokens))] for _ in range(count)],
        score=[0.5 + 0.1 * number for number in range(count)],
        reference_score=[0.0] * count,
        reference_kl=[-0.1] * count,
        length=[len(tokens)] * count,
        reference_tokens=[2] * count,
        reference_length=[2.0] * count,
        tercile=[number % 3 for number in range(count)],
    )


def policy_metrics(world: World, step: int, length: float) -> dict[str, object]:
    fraction = step / world.steps
    return {
        "stage": "policy",
        "step": step,
        "score/mean": 1.5 * fraction,
        "kl/reference_per_sequence": 8 * fraction,
        "kl/reference_per_token": 0.3 * fraction,
        "kl/beta": world.beta,
        "entropy/per_token": 0.5,
        "length/mean": length,
        "length/ended": 0.97,
        "policy/clip_fraction": 0.1,
        "policy/first_ratio_error": 1e-7,
        "value/explained_variance.score": 0.3,
        "value/explained_variance.kl": 0.2,
        "weight/length": -world.penalty,
        "weight/kl": -world.beta,
    }


def evaluation_metrics(world: World, step: int, ratio: float) -> dict[str, object]:
    fraction = step / world.steps
    metrics: dict[str, object] = {
        "stage": "evaluation",
        "step": step,
        "evaluation/score": 1.5 * fraction,
        "evaluation/score_reference": 0.0,
        "evaluation/kl_per_sequence": 8 * fraction,
        "evaluation/kl_per_token": 0.3 * fraction,
        "evaluation/entropy": 0.5,
        "evaluation/length": world.reference_length * ratio,
        "evaluation/length_reference": float(world.reference_length),
        "evaluation/ended": 0.97,
        "evaluation/win_rate": 0.5 + 0.3 * fraction,
        "evaluation/win_rate_low": 0.45 + 0.3 * fraction,
        "evaluation/win_rate_high": 0.55 + 0.3 * fraction,
    }
    for tercile in range(3):
        metrics[f"evaluation/tercile{tercile}/length_ratio"] = ratio * (1.2 - 0.2 * tercile)
        metrics[f"evaluation/tercile{tercile}/kl_per_sequence"] = 8 * fraction * (1.3 - 0.3 * tercile)
        metrics[f"evaluation/tercile{tercile}/score"] = 1.5 * fraction
    return metrics


def truth_metrics(world: World, step: int) -> dict[str, object]:
    fraction = step / world.steps
    gold = 0.4 + 0.3 * min(1.0, 3 * fraction) - world.gold_drop * max(0.0, fraction - 0.3)
    metrics: dict[str, object] = {"step": step, "gold": gold, "gold_reference": 0.4, "correct": 0.7, "answered": 0.9}
    for tercile in range(3):
        metrics |= {f"tercile{tercile}/correct": 0.7 - 0.1 * tercile, f"tercile{tercile}/answered": 0.9}
    return metrics


def make_run(path: Path, world: World = World(), *, truth: bool = True, finished: bool = True) -> Path:
    """Write a run of `world` into `path` with the production writer."""
    rng = np.random.default_rng(world.seed)
    run = RunDir.create(path)
    run.update_manifest(name="synthetic", seed=world.seed, channels=list(CHANNELS), gamma=1.0, lam=0.95, world="desk")
    run.recipe_json.write_text(json.dumps({"name": "synthetic", "policy": {"kl": {"beta": world.beta}}}))
    with TraceWriter(run) as writer:
        for step in range(world.steps + 1):
            ratio = 1 + (world.last_ratio - 1) * step / world.steps
            if step % world.every == 0:
                append_json(run.metrics, evaluation_metrics(world, step, ratio))
                writer.write_probes(probe_record(world, step, rng))
                if truth:
                    append_json(run.truth, truth_metrics(world, step))
            if step in (0, world.steps):
                writer.write_samples(sample_record(step))
            if step < world.steps:
                record = step_record(world, step, rng, ratio)
                append_json(run.metrics, policy_metrics(world, step, float(record.response_mask.sum(1).mean())))
                append_json(run.timings, {"stage": "policy", "step": step, "step_s": 1.0})
                writer.write_step(record)
    run.update_manifest(status="finished" if finished else "running")
    return path


__all__ = ["HEALTHY", "World", "make_run", "replace", "step_record"]
