"""What a response's length adds to the score, to be taken off again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LengthCorrection:
    """Straight lines between knots: `values[k]` score units at `lengths[k]` tokens, constant beyond the ends.

    It is subtracted from the score. Beyond the lengths it was fitted on nothing is extrapolated.
    """

    lengths: tuple[float, ...]  # increasing
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.values) or not self.lengths:
            raise ValueError(f"{len(self.lengths)} lengths, {len(self.values)} values; as many of each, at least one")
        if not np.isfinite([*self.lengths, *self.values]).all() or (np.diff(self.lengths) <= 0).any():
            raise ValueError("lengths must increase, and all numbers must be finite")

    def __call__(self, lengths: Tensor) -> Tensor:
        """[B] float32 score units at `lengths` [B] tokens."""
        at = np.interp(lengths.cpu().double().numpy(), self.lengths, self.values)
        return torch.from_numpy(at).float().to(lengths.device)

    def times(self, share: float) -> LengthCorrection:
        """The correction with all its values times `share`."""
        return LengthCorrection(self.lengths, tuple(share * value for value in self.values))
