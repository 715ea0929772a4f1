"""The score in units of all scores so far: their mean and variance, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kedge.ops.masked import Reduce, itself
from kedge.structs import ScoredRollouts

FLOOR = 1e-8  # added to the variance, so that scores that are all the same become 0 and not NaN


@dataclass(frozen=True)
class RunningScore:
    """Mean and variance of every score observed, in double precision; part of the loop's state."""

    count: float = 0.0  # responses
    mean: float = 0.0  # score units
    squares: float = 0.0  # sum of squared deviations from the mean, score units squared

    def observe(self, scores: Tensor, reduce: Reduce = itself) -> RunningScore:
        """With a batch [B] of finite scores added, as in Chan, Golub and LeVeque (1983).

        With `reduce` the batch is that of all ranks: the same result on each of them.
        """
        batch = scores.detach().double()
        count, total = reduce(torch.stack([batch.new_tensor(float(len(batch))), batch.sum()])).tolist()
        mean = total / count
        squares = float(reduce(((batch - mean) ** 2).sum()))
        together, gap = self.count + count, mean - self.mean
        return RunningScore(
            together,
            self.mean + gap * count / together,
            self.squares + squares + gap**2 * self.count * count / together,
        )

    @property
    def deviation(self) -> float:
        """Population standard deviation of the scores so far: what one unit of the normalised score is worth."""
        return math.sqrt(self.squares / self.count + FLOOR)

    def normalised(self, scores: Tensor) -> Tensor:
        """[B] (scores - mean) / deviation, in the type of `scores`."""
        return ((scores.double() - self.mean) / self.deviation).to(scores.dtype)

    def record(self) -> dict[str, float]:
        """For a checkpoint; the same numbers come back through JSON."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, float]) -> RunningScore:
        """What `record` gave."""
        return cls(**record)


def in_running_unit(scored: ScoredRollouts, running: RunningScore) -> ScoredRollouts:
    """The rollouts with their `score` in the unit of `running`; what the score rests on stays in its own."""
    return replace(scored, scores={**scored.scores, "score": running.normalised(scored.scores["score"])})
