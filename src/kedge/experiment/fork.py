"""A run that leaves another one at a checkpoint, under changed settings: what happened before is the same to the bit.

A fork shares models, trace and metrics with its source up to the step of the checkpoint. With no changes and branch 0
it goes on as the source did; another branch draws other prompts and responses from there on (a null fork).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge import pipeline
from kedge import recipe as recipes
from kedge.errors import InputError, Problem
from kedge.pipeline.policy import controllers
from kedge.progress import Interrupt, Progress
from kedge.recipe import Recipe
from kedge.trace.jsonl import append_json, write_atomically
from kedge.trace.run_dir import RunDir

BEFORE_POLICY = ("seed", "world", "desk", "data", "model", "sft", "pairs")  # a fork cannot change what came before


@dataclass(frozen=True)
class Fork:
    """Where a fork leaves its source, what it changes (`key=value`), and how long it goes on."""

    source: Path
    step: int  # of a checkpoint of the source: policy steps done
    changes: tuple[str, ...]
    steps: int  # policy steps to carry out
    branch: int = 0

    @property
    def until(self) -> int:
        """The number of policy steps after which it ends."""
        return self.step + self.steps


def checkpoint_steps(source: RunDir) -> list[int]:
    """The policy steps from which `source` can be forked."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in source.checkpoints.glob("step-*/state.json"))


def require_checkpoint(source: RunDir, step: int) -> None:
    """Raise `InputError` unless `source` has a checkpoint after `step` policy steps."""
    found = checkpoint_steps(source)
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "there is none"
        remedy = "choose one of them; checkpoint.every and checkpoint.keep say which are kept"
        raise InputError(Problem(f"{source.path}: checkpoint of step {step}", there, remedy))


def forked_recipe(fork: Fork) -> Recipe:
    """The recipe of the fork. Raises `InputError` for changes to what its source did before its policy stage."""
    source = RunDir(fork.source)
    try:
        settings = json.loads(source.recipe_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            Problem(str(source.recipe_json), f"not readable: {error}", "give the folder of a run")
        ) from None
    early = [change for change in fork.changes if change.partition("=")[0].split(".")[0] in BEFORE_POLICY]
    if early:
        what = "was settled before the policy stage, which is where a fork begins"
        raise InputError([Problem(f"--set {change}", what, "change it in a run of its own") for change in early])
    changes = (*fork.changes, *((f"policy.branch={fork.branch}",) if fork.branch else ()))
    return recipes.build(settings, changes, source=str(source.recipe_json))


def carry_out(fork: Fork, out: Path, *, progress: Progress, interrupt: Interrupt) -> RunDir:
    """Make the fork in the folder `out`, or go on with it; returns the run. What `reward.*` changes is trained anew."""
    recipe, run = forked_recipe(fork), RunDir(out)
    if not run.recipe_json.exists():
        _begin(fork, recipe, run)
    stages = ("reward", "policy")
    pipeline.run(
        recipe,
        out,
        recipe_text=run.recipe_toml.read_text(encoding="utf-8"),
        stages=stages,
        resume=True,
        progress=progress,
        interrupt=interrupt,
        until=fork.until,
    )
    return run


def _begin(fork: Fork, recipe: Recipe, run: RunDir) -> None:
    """Everything the source had at the step, with the recipe of the fork; the resolved recipe comes last."""
    source = RunDir(fork.source)
    require_checkpoint(source, fork.step)
    shutil.rmtree(run.path, ignore_errors=True)
    before = json.loads(source.recipe_json.read_text(encoding="utf-8"))
    anew = before["reward"] != recipe.model_dump(mode="json")["reward"]
    for folder in (run.trace, run.checkpoints, run.models):
        folder.mkdir(parents=True)
    manifest = source.read_manifest()
    stages = {name: "done" for name in ("sft", "reward") if manifest["stages"].get(name) == "done"}
    if anew:
        stages.pop("reward", None)
    run.write_manifest({**manifest, "status": "running", "stages": stages, "forked_from": source.path.name})
    for model in source.models.iterdir():
        if model.name != "policy" and not (anew and model.name == "reward"):
            _linked(model, run.models / model.name)
    _linked(source.checkpoint(fork.step), run.checkpoint(fork.step))
    for kind in ("step", "probes", "samples"):
        for _, path in source.files(kind):
            _link(path, run.trace / path.name)
    for name in ("metrics", "timings", "events", "truth"):
        path: Path = getattr(source, name)
        if path.exists():
            place: Path = getattr(run, name)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
    for name in ("recipe.toml", "pairs.jsonl"):
        if (source.path / name).exists():
            shutil.copy(source.path / name, run.path / name)
    run.truncate(fork.step)
    if before["policy"]["kl"] != recipe.model_dump(mode="json")["policy"]["kl"]:
        _steer_anew(run, fork.step, recipe)
    message = f"left {source.path.name} after step {fork.step}, with {', '.join(fork.changes) or 'no changes'}"
    append_json(run.events, {"stage": "policy", "step": fork.step, "event": "forked", "message": message})
    write_atomically(run.recipe_json, (recipe.model_dump_json(indent=2) + "\n").encode())


def _steer_anew(run: RunDir, step: int, recipe: Recipe) -> None:
    """Let the checkpoint begin with the controller of the changed recipe instead of the one it saved."""
    path = run.checkpoint(step) / "state.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    record["controller"] = controllers(recipe.policy.kl).record()
    write_atomically(path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def _linked(source: Path, place: Path) -> None:
    """A folder with the same files, which share their space on disk where it can be shared."""
    for path in source.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)


def _link(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another disk, or one without links
        shutil.copy(source, place)


def names_of(changes: Sequence[str]) -> str:
    """What a fork changes, for people."""
    return ", ".join(changes) or "nothing"
