"""The KL coefficient over a run: fixed, or steered towards a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kedge.ops.kl import adapted_coefficient


@dataclass(frozen=True)
class KlController:
    """`beta` in reward per nat; `target` in nats per sequence, `horizon` in episodes (adaptive mode only)."""

    mode: Literal["fixed", "adaptive"]
    beta: float
    target: float
    horizon: float

    def observe(self, kl_per_sequence: float, episodes: int) -> KlController:
        """The controller after a batch of `episodes` responses with this mean k1, in nats per sequence."""
        if self.mode == "fixed":
            return self
        beta = adapted_coefficient(self.beta, kl_per_sequence, self.target, episodes=episodes, horizon=self.horizon)
        return replace(self, beta=beta)
