"""How far a state is from a sample of states."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SHRINKAGE = 1e-6  # keeps the covariance invertible where a layer norm has made a direction constant


def shrunk_covariance(rows: Tensor) -> tuple[Tensor, float]:
    """(1 - a) S + a (tr S / D) I of rows [N, D], S over N, and the shrinkage a (Ledoit and Wolf 2004).

    a = min(b^2, d^2) / d^2 with d^2 = |S - (tr S / D) I|^2 and b^2 = sum_k |x_k x_k' - S|^2 / N^2, x_k centred, squared
    Frobenius norms.
    """
    count, width = rows.shape
    centred = rows - rows.mean(dim=0)
    sample = centred.T @ centred / count
    target = sample.trace() / width * torch.eye(width, dtype=rows.dtype, device=rows.device)
    dispersion = float((sample - target).square().sum())
    error = float(centred.square().sum(dim=1).square().sum() - count * sample.square().sum()) / count**2
    shrinkage = min(1.0, max(_LEAST_SHRINKAGE, error / dispersion)) if dispersion > 0 else 1.0
    return (1 - shrinkage) * sample + shrinkage * target, shrinkage


def mahalanobis(rows: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """sqrt((x - mean)' C^-1 (x - mean)) for rows [N, D]; `factor` [D, D] is the lower Cholesky factor of C."""
    whitened = torch.linalg.solve_triangular(factor, (rows - mean).T, upper=False)
    distance: Tensor = torch.linalg.vector_norm(whitened, dim=0)
    return distance
