"""The state of policy training on disk: safetensors and JSON, complete or not there.

Everything random is a function of the run's seed and the step, so the step is also the state of every generator and
the cursor into the data.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.train.controller import KlController
from kedge.train.update import Learner


@dataclass(frozen=True)
class State:
    """What the policy loop carries from step to step, beside the learner: the next step, beta, return statistics."""

    step: int
    controller: KlController
    return_variance: Tensor | None = None  # [heads], running; None before the first batch


def save(folder: Path, learner: Learner, state: State, *, keep: int) -> None:
    """Write `folder` under a temporary name and rename it; then remove all but the `keep` newest of its siblings.

    Raises `InputError` if it cannot be written; older checkpoints then stay as they are.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tensors = _tensors(learner)
    if state.return_variance is not None:
        tensors["return_variance"] = state.return_variance
    record = {"step": state.step, "seed_scheme": "sha256(seed/purpose/step)", "controller": asdict(state.controller)}
    try:
        partial.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        what = f"the checkpoint cannot be written: {getattr(error, 'strerror', None) or error}"
        remedy = "free some space, then go on with --resume"
        raise InputError(Problem(str(folder), what, remedy)) from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    for old in _complete(folder.parent)[:-keep]:
        shutil.rmtree(old)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    found = _complete(folder)
    return found[-1] if found else None


def load(folder: Path, learner: Learner) -> State:
    """Put the learner back into the state that was saved, bit for bit, and return the loop's state."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        controller = KlController(**record["controller"])
        _restore(learner, {name: tensor.clone() for name, tensor in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what = f"the checkpoint cannot be used: {error}"
        raise InputError(Problem(str(folder), what, "remove this folder to go on from the one before")) from error
    return State(int(record["step"]), controller, tensors.get("return_variance"))


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("step-*/state.json")) if folder.exists() else []


def _parts(learner: Learner) -> dict[str, tuple[Any, torch.optim.Optimizer]]:
    parts: dict[str, tuple[Any, torch.optim.Optimizer]] = {"policy": (learner.policy, learner.optimizer)}
    if learner.critic is not None and learner.critic_optimizer is not None:
        parts["critic"] = (learner.critic, learner.critic_optimizer)
    return parts


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """Weights, buffers and optimiser moments by name; tied weights once."""
    tensors: dict[str, Tensor] = {}
    for part, (model, optimizer) in _parts(learner).items():
        named = dict(model.named_parameters()) | dict(model.named_buffers())
        tensors |= {f"{part}/{name}": tensor.detach().clone() for name, tensor in named.items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"{part}.optimizer/{index}/{name}": moment for name, moment in moments.items()}
    return tensors


@torch.no_grad()
def _restore(learner: Learner, tensors: dict[str, Tensor]) -> None:
    for part, (model, optimizer) in _parts(learner).items():
        for name, tensor in (dict(model.named_parameters()) | dict(model.named_buffers())).items():
            tensor.copy_(tensors[f"{part}/{name}"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{part}.optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
