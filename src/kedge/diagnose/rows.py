"""Small statistics of one step's rows, which checks share."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import StepTrace

Array = NDArray[Any]
SMALL = 1e-8


def at_last(step: StepTrace) -> Array:
    """[B, T] true on the last token of each response."""
    mask = step.response_mask
    last = mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)
    found = np.zeros_like(mask)
    found[np.arange(len(mask)), last] = True
    return np.asarray(found & mask)


def log_ratio(step: StepTrace) -> Array:
    """[B, T] log policy - log reference of the tokens, nats; zero outside the mask."""
    gap = step.tokens["old_logprob"].astype(np.float64) - step.tokens["reference_logprob"]
    return np.where(step.response_mask, gap, 0.0)


def moved(step: StepTrace) -> Array:
    """[B, T] log-probability of the tokens as the update last saw it, minus that before; zero outside the mask."""
    gap = step.tokens["new_logprob"].astype(np.float64) - step.tokens["old_logprob"]
    return np.where(step.response_mask, gap, 0.0)


def paid(step: StepTrace, *, without: tuple[str, ...] = ("kl",)) -> Array:
    """[B] reward of each response, weights included, over all channels but those named."""
    sums = step.weights * step.rewards.astype(np.float64).sum(axis=1)
    keep = [index for index, name in enumerate(step.channels) if name not in without]
    return np.asarray(sums[:, keep].sum(axis=1))


def channel(step: StepTrace, name: str) -> Array | None:
    """[B, T] token rewards of a channel in its own unit, or None where the run has no such channel."""
    if name not in step.channels:
        return None
    return np.asarray(step.rewards[..., step.channels.index(name)].astype(np.float64))


def weight(step: StepTrace, name: str) -> Array | None:
    """[B] reward per unit of a channel, or None where the run has no such channel."""
    if name not in step.channels:
        return None
    return np.asarray(step.weights[:, step.channels.index(name)].astype(np.float64))


def beta_of(step: StepTrace) -> float:
    """The KL's coefficient in the reward and in the loss together, reward per nat; nan where nothing is known of it.

    A whitened advantage is in units of its deviation, and a KL beside it in the loss is divided by the same: it is
    brought back by that deviation. A deviation per group stays, as GRPO is written.
    """
    channel_weight = weight(step, "kl")
    inside = 0.0 if channel_weight is None else -float(channel_weight.mean())
    if not np.isfinite(step.loss_beta).any():
        return inside if channel_weight is not None else np.nan
    unit = step.scale if np.ptp(step.scale) <= SMALL else 1.0
    return inside + float(np.nanmean(step.loss_beta * unit))


def divided(number: float, by: float) -> float:
    """Their ratio; nan where the divisor is next to nothing."""
    return number / by if abs(by) > SMALL else np.nan
