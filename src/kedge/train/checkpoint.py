"""The state of policy training on disk: safetensors and JSON, complete or not there.

Everything random is a function of the run's seed and the step, so the step is also the state of every generator and
the cursor into the data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedge.errors import InputError, Problem
from kedge.trace.jsonl import write_atomically
from kedge.train.controller import Controllers
from kedge.train.limit import Past
from kedge.train.normalise import RunningScore
from kedge.train.snapshot import restore, snapshot
from kedge.train.update import Learner

HELD = "held/"  # before the names of the tensors that a rollback returns to
REFERENCE = "reference/"  # before those of a reference that moves


@dataclass(frozen=True)
class Watched:
    """What the recipe's guard did so far. The loop does not read it: whoever drives the loop hands it on."""

    branch: int = 0  # returns to an earlier checkpoint; each opens other random draws
    alarms: Mapping[str, int] = field(default_factory=dict)  # looks in a row at which a check failed
    acted: int = 0
    stopped: str = ""  # why the guard ended the stage


@dataclass(frozen=True)
class State:
    """What the policy loop carries from step to step, beside the learner.

    The next step, what sets beta, the statistics of returns and scores, what the guard at the limit did so far, and
    what the recipe's guard did.
    """

    step: int
    controller: Controllers
    return_variance: Tensor | None = None  # [heads], running; None before the first batch
    score: RunningScore | None = None  # None where the score has another unit than that of all scores so far
    past: Past = Past()  # noqa: RUF009 - frozen
    guard: Watched = Watched()


def save(folder: Path, learner: Learner, state: State, *, keep: int) -> None:
    """Write `folder` under a temporary name and rename it; then remove all but the `keep` newest of its siblings.

    Raises `InputError` if it cannot be written; older checkpoints then stay as they are.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    tensors = snapshot(learner) | {HELD + name: tensor for name, tensor in state.past.held.items()}
    if state.return_variance is not None:
        tensors["return_variance"] = state.return_variance
    if learner.reference is not None:
        tensors |= {REFERENCE + name: tensor for name, tensor in _moving(learner.reference).items()}
    record = _record(state)
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


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries of a checkpoint's record; its tensors stay as they are."""
    path = folder / "state.json"
    record = json.loads(path.read_text(encoding="utf-8")) | changes
    write_atomically(path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`."""
    found = _complete(folder)
    return found[-1] if found else None


def steps(folder: Path) -> list[int]:
    """The steps of all complete checkpoints in `folder`, in order."""
    return [int(path.name.removeprefix("step-")) for path in _complete(folder)]


def load(folder: Path, learner: Learner) -> State:
    """Put the learner back into the state that was saved, bit for bit, and return the loop's state."""
    try:
        record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
        state = _state(record, tensors)
        restore(learner, tensors)
        if learner.reference is not None:
            for name, tensor in _moving(learner.reference).items():
                tensor.copy_(tensors[REFERENCE + name])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what = f"the checkpoint cannot be used: {error}"
        raise InputError(Problem(str(folder), what, "remove this folder to go on from the one before")) from error
    return state


def _complete(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("step-*/state.json")) if folder.exists() else []


def _record(state: State) -> dict[str, Any]:
    """All of the state but its tensors, for JSON."""
    return {
        "step": state.step,
        "seed_scheme": "sha256(seed/purpose/step)",
        "controller": state.controller.record(),
        "score": None if state.score is None else state.score.record(),
        "limit": {"rejected": state.past.rejected, "branch": state.past.branch, "held_step": state.past.held_step},
        "guard": asdict(state.guard),
    }


def _moving(reference: Any) -> dict[str, Tensor]:
    """The weights of a reference that moves, by name; tied ones once."""
    return {name: weight.detach() for name, weight in reference.named_parameters()}


def _state(record: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    held = {name.removeprefix(HELD): tensor for name, tensor in tensors.items() if name.startswith(HELD)}
    return State(
        int(record["step"]),
        Controllers.from_record(record["controller"]),
        tensors.get("return_variance"),
        None if record["score"] is None else RunningScore.from_record(record["score"]),
        Past(**record["limit"], held=held),
        Watched(**record.get("guard", {})),
    )
