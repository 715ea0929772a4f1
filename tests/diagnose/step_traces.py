"""Steps of a trace made of numbers, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.trace.reader import StepTrace

Array = NDArray[Any]


def step_trace(
    rewards: Array,
    mask: Array,
    *,
    values: Array | None = None,
    channels: Sequence[str] = ("score", "kl"),
    weights: Array | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    critic: str = "channels",
    shift: Array | None = None,
    scale: Array | None = None,
    learning: Mapping[str, Any] | None = None,
    loss_beta: Array | None = None,
    active: Array | None = None,
    responses: Sequence[str | None] | None = None,
    prompts: Sequence[str | None] | None = None,
    ids: Array | None = None,
    step: int = 0,
    **tokens: Array,
) -> StepTrace:
    """A step from rewards [B, T, C] and a mask [B, T]; log-probabilities not given are 0."""
    batch = len(mask)
    nothing = np.zeros(mask.shape)
    weights = np.ones((batch, len(channels))) if weights is None else weights
    names = ("behaviour", "old", "reference", "new", "old_eos", "reference_eos")
    logs = {f"{name}_logprob": np.asarray(tokens.get(name, nothing), dtype=float) for name in names}
    made = StepTrace(
        path=Path("nowhere"),
        step=step,
        channels=tuple(channels),
        gamma=gamma,
        lam=lam,
        critic=critic,
        group=np.arange(batch),
        prompts=tuple([None] * batch if prompts is None else prompts),
        responses=tuple([None] * batch if responses is None else responses),
        response_mask=mask,
        ended=np.ones(batch, dtype=bool),
        active=mask if active is None else active,
        tokens=logs | {"entropy": tokens.get("entropy", nothing)},
        rewards=rewards,
        values=np.zeros_like(rewards) if values is None else values,
        weights=weights,
        shift=np.zeros(batch) if shift is None else shift,
        scale=np.ones(batch) if scale is None else scale,
        advantage_sum=np.zeros(batch),
        advantage_abs_sum=np.zeros(batch),
        members=np.zeros((batch, 0)),
        disagreement=np.full(batch, np.nan),
        support_distance=np.full(batch, np.nan),
        loss_beta=np.zeros(batch) if loss_beta is None else loss_beta,
        learning=dict(learning or {}),
        response_ids=ids,
    )
    made.advantage_sum[:] = made.advantage().sum(axis=1)
    made.advantage_abs_sum[:] = np.abs(made.advantage()).sum(axis=1)
    return made


def random_step(
    rng: np.random.Generator,
    *,
    batch: int = 6,
    width: int = 7,
    channels: Sequence[str] = ("score", "kl", "length"),
    critic: str = "channels",
    whiten: bool = True,
    holes: bool = True,
    step: int = 0,
    **given: Any,
) -> StepTrace:
    """A step of float32 numbers: holes in the mask, rows of unequal length, one of them perhaps empty."""
    lengths = rng.integers(1, width + 1, batch)
    mask = np.arange(width) < lengths[:, None]
    if holes:
        mask &= rng.random(mask.shape) < 0.8
    mask[0, 0] = True

    def normal(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    names = (*channels, "critic") if critic == "scalar" else tuple(channels)
    rewards = normal(batch, width, len(names)) * mask[..., None]
    values = normal(batch, width, len(names)) * mask[..., None]
    if critic == "scalar":
        rewards[..., -1], values[..., :-1] = 0, 0
    if critic == "none":
        values[:] = 0
    old, reference = -np.abs(normal(batch, width)), -np.abs(normal(batch, width))
    if "kl" in names:
        rewards[..., names.index("kl")] = (old - reference) * mask
    weights = normal(batch, len(names))
    weights[:, -1] = 1.0 if critic == "scalar" else weights[:, -1]
    shift, scale = (normal(1)[0], abs(normal(1)[0]) + 0.1) if whiten else (0.0, 1.0)
    settings: dict[str, Any] = {
        "values": values,
        "channels": names,
        "weights": weights,
        "gamma": float(rng.choice([1.0, 0.9])),
        "lam": float(rng.choice([0.0, 0.95, 1.0])),
        "critic": critic,
        "shift": np.full(batch, shift),
        "scale": np.full(batch, scale),
        "old": old,
        "reference": reference,
        "new": old + 0.1 * normal(batch, width),
        "entropy": np.abs(normal(batch, width)),
        "prompts": [f"prompt {row // 2}" for row in range(batch)],
        "active": mask & (rng.random(mask.shape) < 0.7),
        "step": step,
    }
    return step_trace(rewards, mask, **(settings | given))
