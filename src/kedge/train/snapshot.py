"""All that training changes in a learner, as named tensors: to be kept, written to disk and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kedge.train.update import Learner


def snapshot(learner: Learner) -> dict[str, Tensor]:
    """Copies of weights, buffers and optimiser moments by name; tied weights once, frozen weights not at all."""
    tensors: dict[str, Tensor] = {}
    for part, (model, optimizer) in _parts(learner).items():
        tensors |= {f"{part}/{name}": tensor.detach().clone() for name, tensor in _changing(model)}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}.optimizer/{index}/{name}": moment.clone() for name, moment in moments.items()}
    return tensors


@torch.no_grad()
def restore(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot back; `tensors` stays apart from the learner. Raises `KeyError` if a tensor is missing and
    `RuntimeError` if one does not fit."""
    for part, (model, optimizer) in _parts(learner).items():
        for name, tensor in _changing(model):
            tensor.copy_(tensors[f"{part}/{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{part}.optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = tensor.clone()  # the optimiser would go on in ours
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def _parts(learner: Learner) -> dict[str, tuple[Any, torch.optim.Optimizer]]:
    parts: dict[str, tuple[Any, torch.optim.Optimizer]] = {"policy": (learner.policy, learner.optimizer)}
    if learner.critic is not None and learner.critic_optimizer is not None:
        parts["critic"] = (learner.critic, learner.critic_optimizer)
    return parts


def _changing(model: Any) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    yield from model.named_buffers()
