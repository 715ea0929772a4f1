"""The best of several answers: nothing is trained, the score chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kedge.rollout.engine import RolloutEngine
from kedge.structs import Prompts, Rollouts, Sampling


class BestOf:
    """An engine that draws `n` answers to every prompt from another one and returns the one with the highest score.

    Log-probabilities are those of the plain policy: the kept answers are not a sample of it.
    """

    def __init__(self, engine: RolloutEngine, n: int, score: Callable[[Rollouts], Tensor]) -> None:
        if n < 1:
            raise ValueError(f"the best of {n} answers")
        self.engine, self.n, self.score = engine, n, score

    def generate(
        self, policy: Any, prompts: Prompts, sampling: Sampling, generator: torch.Generator, policy_version: int = 0
    ) -> Rollouts:
        """One response per row of `prompts`; of equal scores the first drawn."""
        count = len(prompts)
        repeated = prompts.rows(torch.arange(count).repeat_interleave(self.n))
        drawn = self.engine.generate(policy, repeated, sampling, generator, policy_version)
        best = self.score(drawn).view(count, self.n).argmax(dim=1)
        return drawn.rows(torch.arange(count) * self.n + best)
