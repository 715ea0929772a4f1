"""Simulated annotators: Bradley–Terry on gold utility plus settable biases, and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from kedge.desk.gold import Judgment


@dataclass(frozen=True)
class Bias:
    """What annotators like beyond the gold utility, in gold units; see the recipe's `desk.annotators`."""

    length: float = 0.0
    tone: float = 0.0
    refusal: float = 0.0
    position: float = 0.0
    noise: float = 0.05
    sharpness: float = 1.5

    def appeal(self, judgment: Judgment) -> float:
        """Utility as the annotator feels it."""
        return (
            judgment.utility
            + self.length * judgment.length
            + self.tone * judgment.certain
            + self.refusal * judgment.declines
        )


def first_wins(
    pairs: Sequence[tuple[Judgment, Judgment]], bias: Bias, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """For each pair, whether the response shown first is chosen."""
    difference = np.array([bias.appeal(first) - bias.appeal(second) for first, second in pairs])
    probability = expit(bias.sharpness * (difference + bias.position))
    coin = rng.random(len(pairs)) < bias.noise
    probability = np.where(coin, 0.5, probability)
    return np.asarray(rng.random(len(pairs)) < probability)
