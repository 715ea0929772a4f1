"""The optimiser steps that supervised fine-tuning and reward modelling share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kedge.errors import DivergenceError

MAX_GRAD_NORM = 1.0


class Descent:
    """AdamW with warm-up and cosine decay on all of a model's parameters, the gradient's norm held to 1."""

    def __init__(self, model: Any, *, lr: float, steps: int, warmup: int, weight_decay: float) -> None:
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=weight_decay, eps=1e-5)
        self.schedule = cosine(self.optimizer, steps, warmup)

    def step(self, loss: Tensor, where: str, remedy: str) -> None:
        """One step down `loss`. Raises `DivergenceError` if it is not finite; the model then stays as it was."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        if not math.isfinite(loss.item() + norm.item()):
            raise DivergenceError(f"{where}: loss {loss.item()}, gradient norm {norm.item()} -> {remedy}")
        self.optimizer.step()
        self.schedule.step()


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` steps, then a cosine down to a twentieth of the rate."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
