"""The metrics of a step or an evaluation that follow from its rows, named and defined in `kedge.trace.schema`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.advantages import gae
from kedge.trace.conventions import Conventions
from kedge.trace.foreign import SCORE, Rows
from kedge.trace.writer import SampleRecord, StepRecord

Array = NDArray[Any]
_QUANTILE = 1.959964  # of the normal distribution, for 95%
_STILL = 1e-8  # variance of a return that does not vary


def policy_figures(record: StepRecord, rows: Rows, conventions: Conventions) -> dict[str, float]:
    """Metrics of stage "policy" under the conventions in force; what the rows do not tell is left out."""
    mask, absent = record.response_mask, record.absent
    rewards = record.rewards.astype(np.float64).sum(axis=1)
    figures = {
        "length/mean": float(mask.sum(axis=1).mean()),
        "reward/mean": float((record.weights * rewards).sum(axis=1).mean()),
        **_scores(record, rows),
        **_divergence(record),
        **{f"weight/{name}": float(record.weights[:, index].mean()) for index, name in enumerate(record.channels)},
    }
    if conventions.charged and conventions.kl != "none":
        figures["kl/beta"] = conventions.beta
    if "ended" not in absent:
        figures["length/ended"] = float(record.ended.mean())
    if "entropy" not in absent:
        figures["entropy/per_token"] = _mean(record.entropy, mask)
    if "advantage" not in absent:
        total = record.advantage * record.scale[:, None] + record.shift[:, None]
        figures["advantage/mean"] = _mean(total, mask)
        figures["advantage/std"] = float(total[mask].std()) if mask.any() else math.nan
    if record.critic == "scalar":
        figures |= _explained_variance(record)
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def evaluation_figures(samples: SampleRecord) -> dict[str, float]:
    """Metrics of stage "evaluation" that follow from answers beside the reference's; what is not known is left out."""
    if not len(samples.score):
        return {}
    score, other = _numbers(samples.score), _numbers(samples.reference_score)
    length, tercile = _numbers(samples.length), np.asarray(samples.tercile)
    reference = _numbers(samples.reference_tokens)
    kl = np.array([np.sum(values, dtype=np.float64) if len(values) else np.nan for values in samples.token_kl])
    figures = {
        "score": _known_mean(score),
        "score_reference": _known_mean(other),
        "kl_per_sequence": _known_mean(kl),
        "kl_per_token": _known_mean(np.concatenate([_numbers(values) for values in samples.token_kl])),
        "kl_reference": _known_mean(_numbers(samples.reference_kl)),
        "length": _known_mean(length),
        "length_reference": _known_mean(reference),
        **{f"length_p{share}": float(np.quantile(length, share / 100)) for share in (10, 50, 90)},
        **_win_rate(score, other),
    }
    for third in range(3):
        here = tercile == third
        if here.any():
            figures[f"tercile{third}/length_ratio"] = _ratio(_known_mean(length[here]), _known_mean(reference[here]))
            figures[f"tercile{third}/kl_per_sequence"] = _known_mean(kl[here])
            figures[f"tercile{third}/score"] = _known_mean(score[here])
    return {f"evaluation/{name}": value for name, value in figures.items() if math.isfinite(value)}


def _scores(record: StepRecord, rows: Rows) -> Mapping[str, float]:
    """Of the scores as they were given, with those of responses that have no token; what was not scored is left out."""
    figures: dict[str, float] = {}
    for name, score in zip(record.channels, rows.scores.values(), strict=False):
        given = np.where(record.response_mask, score, 0.0).sum(axis=1) if score.ndim == 2 else score
        known = given[np.isfinite(given)]
        if len(known):
            stem = SCORE if name == SCORE else f"rewards/{name}"
            figures |= {f"{stem}/mean": float(known.mean()), f"{stem}/std": float(known.std())}
    return figures


def _divergence(record: StepRecord) -> Mapping[str, float]:
    mask, absent = record.response_mask, record.absent
    figures: dict[str, float] = {}
    if not absent & {"old_logprob", "reference_logprob"}:
        with np.errstate(all="ignore"):
            k1 = _where(mask, record.old_logprob - record.reference_logprob)
            k3 = _where(mask, np.expm1(-k1) + k1)
        figures["kl/reference_per_sequence"] = float(k1.sum(axis=1).mean())
        figures["kl/reference_per_token"] = _mean(k1, mask)
        figures["kl/reference_per_sequence_k3"] = float(k3.sum(axis=1).mean())
    if not absent & {"behaviour_logprob", "old_logprob"}:
        with np.errstate(all="ignore"):
            figures["kl/sampler_gap"] = _mean(np.abs(record.behaviour_logprob - record.old_logprob), mask)
    return figures


def _explained_variance(record: StepRecord) -> Mapping[str, float]:
    """Of the critic: 1 - Var(return - value) / Var(return) over tokens, the return being advantage plus value."""
    index = record.channels.index("critic")
    keep = slice(index + 1)  # `rest` is no reward that a critic could have known
    values = np.where(record.response_mask, record.values[..., index], 0.0)
    advantages = gae(record.rewards[..., keep], record.values[..., keep], record.response_mask,
                     gamma=record.gamma, lam=record.lam)  # fmt: skip
    ahead = (record.weights[:, None, keep] * advantages).sum(axis=-1)[record.response_mask]
    returns = ahead + values[record.response_mask]
    if len(returns) < 2 or not returns.var() > _STILL:
        return {}
    return {"value/explained_variance.critic": float(1 - ahead.var() / returns.var())}


def _win_rate(score: Array, other: Array) -> Mapping[str, float]:
    """Share of prompts on which the score beats the reference's, ties half, with Wilson's 95% interval."""
    known = np.isfinite(score) & np.isfinite(other)
    count = int(known.sum())
    if not count:
        return {}
    share = float(((score > other) + 0.5 * (score == other))[known].mean())
    square = _QUANTILE**2 / count
    centre = (share + square / 2) / (1 + square)
    spread = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return {
        "win_rate": share,
        "win_rate_low": max(0.0, centre - spread),
        "win_rate_high": min(1.0, centre + spread),
    }


def _numbers(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)


def _where(mask: Array, values: Array) -> Array:
    return np.where(mask, values, 0.0).astype(np.float64)


def _mean(values: Array, mask: Array) -> float:
    return float(values[mask].mean(dtype=np.float64)) if mask.any() else math.nan


def _known_mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _ratio(number: float, by: float) -> float:
    return number / by if by else math.nan
