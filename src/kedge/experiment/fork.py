"""A run that leaves another one at a checkpoint, under changed settings: what happened before is the same to the bit.

A fork shares models, trace and metrics with its source up to the step of the checkpoint. With no changes and branch 0
it goes on as the source did; another branch draws other prompts and responses from there on (a null fork). Step 0 is
the start of the policy stage, which every run with a supervised policy and a reward model can be forked from.
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
from kedge.trace.jsonl import append_json, keep_json_lines, read_json_lines, write_atomically
from kedge.trace.run_dir import RunDir
from kedge.train.methods import METHODS
from kedge.train.normalise import RunningScore

# What was settled before the reward model. `data` would change the tokens that models read, too.
BEFORE_REWARD = ("seed", "world", "desk.demonstrations", "data", "model", "sft", "pairs.checkpoints")


@dataclass(frozen=True)
class Fork:
    """Where a fork leaves its source, what it changes (`key=value`), and how long it goes on.

    `judge` is a run whose reward model the fork takes over where its own would be trained anew.
    """

    source: Path
    step: int  # of a checkpoint of the source: policy steps done; 0 is the start
    changes: tuple[str, ...]
    steps: int  # policy steps to carry out
    branch: int = 0
    judge: Path | None = None

    @property
    def until(self) -> int:
        """The number of policy steps after which it ends."""
        return self.step + self.steps


def checkpoint_steps(source: RunDir) -> list[int]:
    """The policy steps from which `source` can be forked."""
    saved = (int(path.parent.name.removeprefix("step-")) for path in source.checkpoints.glob("step-*/state.json"))
    return sorted({*saved, *((0,) if _has_start(source) else ())})


def require_checkpoint(source: RunDir, step: int) -> None:
    """Raise `InputError` unless `source` has a checkpoint after `step` policy steps."""
    found = checkpoint_steps(source)
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "there is none"
        remedy = "choose one of them; checkpoint.every and checkpoint.keep say which are kept"
        raise InputError(Problem(f"{source.path}: checkpoint of step {step}", there, remedy))


def forked_recipe(fork: Fork) -> Recipe:
    """The recipe of the fork.

    Raises `InputError` for changes to what its source did before its reward model, for those that the state in a
    checkpoint cannot follow, and for more steps than the recipe has.
    """
    settings = _settings(RunDir(fork.source))
    early = [change for change in fork.changes if _is_early(change.partition("=")[0].strip())]
    if early:
        what = "was settled before the reward model, and a fork begins after it"
        raise InputError([Problem(f"--set {change}", what, "change it in a run of its own") for change in early])
    changes = (*fork.changes, *((f"policy.branch={fork.branch}",) if fork.branch else ()))
    recipe = recipes.build(settings, changes, source=str(RunDir(fork.source).recipe_json))
    if fork.step:
        _require_same_learner(recipes.build(settings), recipe)
    if fork.steps < 1 or fork.until > recipe.policy.steps:
        what = f"{fork.steps} steps from step {fork.step}; the recipe has {recipe.policy.steps} in all"
        remedy = f"fork for 1 step or more, and set policy.steps to {max(fork.until, fork.step + 1)} or more"
        raise InputError(Problem(f"{fork.source}: policy.steps", what, remedy))
    return recipe


def retrains(source: Recipe, recipe: Recipe) -> bool:
    """Whether the reward model of `recipe` is another: its settings, its pairs or its annotators differ."""
    return any(
        one != other
        for one, other in (
            (source.reward, recipe.reward),
            (source.pairs, recipe.pairs),
            (source.desk.annotators, recipe.desk.annotators),
        )
    )


def source_recipe(source: Path) -> Recipe:
    """The recipe of a run. Raises `InputError` where there is none."""
    run = RunDir(source)
    return recipes.build(_settings(run), source=str(run.recipe_json))


def carry_out(fork: Fork, out: Path, *, progress: Progress, interrupt: Interrupt) -> RunDir:
    """Make the fork in the folder `out`, or go on with it; returns the run.

    What `reward`, `pairs` and the annotators say anew is trained anew. `out` must be new, empty or this fork's.
    """
    return _carry_out(fork, out, ("reward", "policy"), progress, interrupt)


def carry_out_reward(fork: Fork, out: Path, *, progress: Progress, interrupt: Interrupt) -> RunDir:
    """As `carry_out`, but only up to the fork's reward model: a `judge` for other forks."""
    return _carry_out(fork, out, ("reward",), progress, interrupt)


def begin(fork: Fork, out: Path) -> RunDir:
    """Put all that the source had at the step into `out`; a fork that has begun there is left alone.

    Files are shared with the source, so that they stay when it removes its own. Nothing writes into a shared file.
    """
    recipe, run = forked_recipe(fork), RunDir(out)
    if run.recipe_json.exists():
        _require_this_fork(fork, run)
        return run
    require_checkpoint(RunDir(fork.source), fork.step)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(Problem(str(out), "is not empty, and nothing is overwritten", "choose another folder"))
    partial = RunDir(out.with_name(f".{out.name}.partial"))
    shutil.rmtree(partial.path, ignore_errors=True)
    _fill(fork, recipe, partial)
    partial.path.replace(out)
    return run


def _carry_out(fork: Fork, out: Path, stages: Sequence[str], progress: Progress, interrupt: Interrupt) -> RunDir:
    run = begin(fork, out)
    if fork.judge is not None:
        _take_over(RunDir(fork.judge), run)
    pipeline.run(
        forked_recipe(fork),
        out,
        recipe_text=run.recipe_toml.read_text(encoding="utf-8"),
        stages=stages,
        resume=True,
        progress=progress,
        interrupt=interrupt,
        until=fork.until,
    )
    return run


# What is refused


def _settings(source: RunDir) -> dict[str, Any]:
    source.read_manifest()  # says what is wrong with a folder that is no run
    try:
        settings: dict[str, Any] = json.loads(source.recipe_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "give the folder of a run"
        raise InputError(Problem(str(source.recipe_json), f"not readable: {error}", remedy)) from None
    return settings


def _is_early(key: str) -> bool:
    return any(key == early or key.startswith(f"{early}.") for early in BEFORE_REWARD)


def _require_same_learner(source: Recipe, recipe: Recipe) -> None:
    """Raise `InputError` if a checkpoint of `source` does not hold what `recipe` trains."""
    before, now = _learner(source), _learner(recipe)
    what = "changes what is trained, which the checkpoint holds of another kind"
    problems = [
        Problem(f"{key} = {now[key]}, was {before[key]}", what, "fork from step 0, the start of the policy stage")
        for key in before
        if before[key] != now[key]
    ]
    if problems:
        raise InputError(problems)


def _learner(recipe: Recipe) -> dict[str, Any]:
    """What the tensors of a checkpoint belong to, by the key that decides it."""
    policy = recipe.policy
    shaping = [
        name
        for name, penalty in (
            ("overlong_penalty", policy.overlong_penalty),
            ("target_penalty", policy.target_penalty),
            ("repetition_penalty", policy.repetition_penalty),
        )
        if penalty
    ]
    channels = ", ".join(["score", *recipe.rewards, *shaping])
    criticless = policy.method not in METHODS or METHODS[policy.method].baseline is not None
    return {
        "policy.method": policy.method if criticless else "one with a critic",
        "policy.critic": policy.critic,
        "policy.lora_rank": policy.lora_rank,
        "policy.reference_every": "0" if not policy.reference_every else "above 0",
        "reward.init": recipe.reward.init,  # the critic begins as the reward model
        "reward channels": channels if not criticless and policy.critic == "channels" else "",
    }


def _has_start(source: RunDir) -> bool:
    return all((source.models / name).is_dir() for name in ("sft", "reward"))


def _require_this_fork(fork: Fork, run: RunDir) -> None:
    """Raise `InputError` if the run in the folder did not begin as this fork; its recipe is compared later."""
    manifest = run.read_manifest()
    began = manifest.get("forked_from"), manifest.get("forked_at")
    if began != (fork.source.resolve().name, fork.step):
        what = "holds a run that is no fork" if began[0] is None else f"left {began[0]} after step {began[1]}"
        raise InputError(Problem(str(run.path), what, "choose another folder for this fork"))


# What a fork begins with


def _fill(fork: Fork, recipe: Recipe, run: RunDir) -> None:
    source = RunDir(fork.source)
    before = source_recipe(fork.source)
    anew = retrains(before, recipe)
    for folder in (run.trace, run.checkpoints, run.models):
        folder.mkdir(parents=True)
    manifest = source.read_manifest()
    kept = ("sft",) if anew else ("sft", "reward")
    stages = {name: "done" for name in kept if manifest["stages"].get(name) == "done"}
    origin = {"forked_from": fork.source.resolve().name, "forked_at": fork.step}
    run.write_manifest({**manifest, "status": "running", "stages": stages, **origin})
    for model in source.models.iterdir():
        if model.name.startswith("sft") or (model.name == "reward" and not anew):
            _share_folder(model, run.models / model.name)
    if fork.step:
        _share_folder(source.checkpoint(fork.step), run.checkpoint(fork.step))
    for kind in ("step", "probes", "samples"):
        for _, path in source.files(kind):
            _share(path, run.trace / path.name)
    _copy_lines(source, run, fork.step)
    run.truncate(fork.step)
    if fork.step:
        _steer_anew(run, fork.step, before, recipe)
    message = f"left {source.path.name} after step {fork.step}, with {', '.join(fork.changes) or 'no changes'}"
    append_json(run.events, {"stage": "policy", "step": fork.step, "event": "forked", "message": message})
    write_atomically(run.recipe_json, (recipe.model_dump_json(indent=2) + "\n").encode())


def _copy_lines(source: RunDir, run: RunDir, step: int) -> None:
    """What grows line by line is copied, with what the source says of later steps left out."""
    for name in ("metrics", "timings", "events", "truth"):
        path: Path = getattr(source, name)
        if path.exists():
            place: Path = getattr(run, name)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(path, place)
    for name in ("recipe.toml", "pairs.jsonl"):
        if (source.path / name).exists():
            shutil.copy(source.path / name, run.path / name)
    keep_json_lines(run.events, lambda line: line.get("stage") != "policy" or int(line.get("step", 0)) <= step)


def _steer_anew(run: RunDir, step: int, before: Recipe, recipe: Recipe) -> None:
    """Let what the checkpoint saved of a changed setting begin as the recipe has it: controller, unit of the score."""
    path = run.checkpoint(step) / "state.json"
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if before.policy.kl != recipe.policy.kl:
        record["controller"] = controllers(recipe.policy.kl).record()
    if before.policy.score_normalisation != recipe.policy.score_normalisation:
        running = recipe.policy.score_normalisation == "running"
        record["score"] = RunningScore().record() if running else None
    write_atomically(path, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())


def _take_over(judge: RunDir, run: RunDir) -> None:
    """The reward model that another fork has trained, unless this one has its own."""
    done = dict(run.read_manifest()["stages"])
    if done.get("reward") == "done":
        return
    shutil.rmtree(run.models / "reward", ignore_errors=True)
    _share_folder(judge.models / "reward", run.models / "reward")
    if (judge.path / "pairs.jsonl").exists():
        shutil.copy(judge.path / "pairs.jsonl", run.path / "pairs.jsonl")
    run.drop_stages("reward")
    for line in read_json_lines(judge.metrics):
        if line["stage"] == "reward":
            append_json(run.metrics, line)
    run.update_manifest(stages={**done, "reward": "done"})


def _share_folder(source: Path, place: Path) -> None:
    """A folder with the same files, which share their space on disk where it can be shared."""
    for path in source.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            _share(path, target)


def _share(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # another disk, or one without links
        shutil.copy(source, place)
