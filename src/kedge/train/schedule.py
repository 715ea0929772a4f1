"""Seeds and orders: everything random in training is a function of (seed, purpose, step)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def seed_of(seed: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for one purpose at one step, so that a resumed run draws what an uninterrupted one would."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seeded(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, purpose, step))


def seeded_numpy(seed: int, purpose: str, step: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, purpose, step))


def batches(lengths: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` index batches through shuffled epochs; rows of similar length share a batch to save padding.

    Batches come in random order, and which rows share one changes every epoch.
    """
    done = 0
    while done < steps:
        jitter = lengths + 12 * torch.rand(len(lengths), generator=generator)
        order = jitter.argsort()
        parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for position in torch.randperm(len(parts), generator=generator).tolist():
            if done == steps:
                return
            yield parts[position]
            done += 1
