"""Where a reward model has been trained: how far from that a response is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.ops.distance import mahalanobis, shrunk_covariance

FILE = "support.safetensors"
LIMIT = 99  # the percentile beyond which a response counts as unlike the training data


@dataclass(frozen=True)
class Support:
    """The states that a reward model's head read on its training responses, and how long these were.

    `percentiles` are of the distance of responses held out from training, so that a share beyond the 99th of them is
    one in a hundred where nothing has changed.
    """

    mean: Tensor  # [D] float64
    factor: Tensor  # [D, D] float64, lower Cholesky factor of the shrunk covariance
    percentiles: Tensor  # [101] float64
    longest: float  # tokens, the 99th percentile of training responses

    def distance(self, states: Tensor) -> Tensor:
        """[B] Mahalanobis distance of states [B, D], in standard deviations of the training states."""
        mean, factor = self.mean.to(states.device), self.factor.to(states.device)
        return mahalanobis(states.double(), mean, factor).float()

    @property
    def limit(self) -> float:
        """The distance beyond which a response counts as unlike the training data."""
        return float(self.percentiles[LIMIT])


def support_of(training: Tensor, held_out: Tensor, lengths: Tensor) -> Support:
    """The support from states [N, D] of training responses, states of held-out ones, and all training lengths [L].

    Raises `InputError` where the states do not vary.
    """
    states = training.double()
    covariance, _ = shrunk_covariance(states)
    if not float(covariance.trace()) > 0:
        what = f"its states on {len(states)} training responses do not vary"
        raise InputError(Problem("reward model", what, "give it more judgments, and responses that differ"))
    mean, factor = states.mean(dim=0), torch.linalg.cholesky(covariance)
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    distances = mahalanobis(held_out.double(), mean, factor).cpu()
    longest = float(np.percentile(lengths.cpu().numpy(), LIMIT))
    return Support(mean.cpu(), factor.cpu(), torch.quantile(distances, shares), longest)


def save_support(support: Support, folder: Path) -> None:
    """Write `support.safetensors` into a folder that is being filled."""
    tensors = {"mean": support.mean, "factor": support.factor, "percentiles": support.percentiles}
    tensors["longest"] = torch.tensor([support.longest], dtype=torch.float64)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)


def load_support(folder: Path) -> Support | None:
    """What `save_support` wrote, or None where there is no such file. Raises `InputError` if it is damaged."""
    path = folder / FILE
    if not path.exists():
        return None
    remedy = "take it from a copy, or remove it: the score does not need it"
    try:
        tensors = load_file(path)
        mean, factor, percentiles, longest = (tensors[k] for k in ("mean", "factor", "percentiles", "longest"))
    except (SafetensorError, OSError, KeyError) as error:
        raise InputError(Problem(str(path), f"cannot be read: {error}", remedy)) from error
    shapes = [tuple(tensor.shape) for tensor in (mean, factor, percentiles, longest)]
    width = len(mean)
    if shapes != [(width,), (width, width), (101,), (1,)] or not all(t.isfinite().all() for t in tensors.values()):
        raise InputError(Problem(str(path), "not the numbers that Kedge writes", remedy))
    return Support(mean.double(), factor.double(), percentiles.double(), float(longest))
