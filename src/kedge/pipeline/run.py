"""A recipe carried out: its stages in order, what is already done left alone, and a summary at the end."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kedge import __version__
from kedge.errors import DivergenceError, InputError, Interrupted, Problem, StoppedByGuard
from kedge.models.load import require_same_tokens
from kedge.pipeline.context import Context
from kedge.pipeline.direct import require_comparisons
from kedge.pipeline.policy import optimised
from kedge.pipeline.reward import rewarded
from kedge.pipeline.sft import supervised
from kedge.pipeline.summary import summary
from kedge.pipeline.tasks import Inputs, inputs_of
from kedge.progress import Interrupt, Progress
from kedge.recipe import Recipe
from kedge.report.html import write_report
from kedge.rollout.rules import rule_reward
from kedge.trace.jsonl import append_json, read_json_lines, write_atomically
from kedge.trace.run_dir import RunDir
from kedge.train.experience import channel_names

SHARED = ("seed", "world", "desk", "data", "model")  # what a run and the one it starts from have in common
STAGES = ("sft", "reward", "policy", "evaluate")


def run(
    recipe: Recipe,
    out: Path,
    *,
    recipe_text: str,
    stages: Sequence[str] = STAGES,
    resume: bool,
    progress: Progress,
    interrupt: Interrupt,
    start: Path | None = None,
    inputs: Inputs | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Carry out `stages` of `recipe` in the folder `out` and return the summary.

    With `resume`, finished stages are left alone and the policy stage goes on from its newest checkpoint; the result
    equals that of an uninterrupted run, byte for byte. Input is read and checked before anything is written. `start`
    is a run whose supervised policy, and reward model if it has one, this one takes over. `inputs` are texts other than
    those the recipe names. `until` ends the policy stage after that many steps.
    """
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    if resume:
        _refuse_changes(RunDir(out), recipe)
    if start is not None:
        _refuse_start(RunDir(start), recipe)
    inputs = inputs or inputs_of(recipe)
    _require_same_tokens(recipe, inputs, start)
    require_comparisons(recipe, inputs.task)
    rules = {name: rule_reward(name, rule) for name, rule in recipe.rewards.items()}
    folder = RunDir.create(out, resume=resume)
    _sweep(folder)
    if not folder.recipe_json.exists():
        _begin(folder, recipe, recipe_text)
    context = Context(recipe, folder, inputs.task, inputs.tokenizer, progress, interrupt, rules, until)
    for line in inputs.left_out:
        context.event("data", 0, "rejected_rows", line)
    try:
        with _status(context):
            if start is not None:
                _start_from(RunDir(start), folder)
            for stage in stages:
                if stage != "evaluate":
                    _carry_out(context, stage)
    except StoppedByGuard:
        if "evaluate" in stages:
            write_report(folder.path)
        raise
    if "evaluate" in stages:
        write_report(folder.path)
    return summary(folder, stages)


def _refuse_changes(folder: RunDir, recipe: Recipe) -> None:
    """Raise `InputError` if the run in `folder` began with other settings."""
    if not folder.recipe_json.exists():
        return
    remedy = "give the settings it began with, or choose another --out"
    _refuse(folder, _differences(_began_with(folder), recipe.model_dump(mode="json")), remedy)


def _refuse_start(folder: RunDir, recipe: Recipe) -> None:
    """Raise `InputError` if the models in `folder` speak of other data, or in other tokens."""
    before, now = (
        {name: given[name] for name in SHARED} for given in (_began_with(folder), recipe.model_dump(mode="json"))
    )
    for given in (before, now):
        given["desk"] = {"demonstrations": given["desk"]["demonstrations"]}
    _refuse(folder, _differences(before, now), "give the settings it was made with, or leave --start out")


def _require_same_tokens(recipe: Recipe, inputs: Inputs, start: Path | None) -> None:
    """Raise `InputError` if a model that others have made reads other token ids than this run's texts become."""
    if start is not None:
        remedy = "give the settings it was made with, or leave --start out"
        require_same_tokens(RunDir(start).models / "sft", inputs.tokenizer, remedy)
    for key, named in (("reward.init", recipe.reward.init), ("policy.reference", recipe.policy.reference)):
        if named != "sft":
            require_same_tokens(Path(named), inputs.tokenizer, f"give a model of this run's tokenizer as {key}")


def _began_with(folder: RunDir) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(folder.recipe_json.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "take it from a copy, or choose another folder"
        raise InputError(Problem(str(folder.recipe_json), f"not readable: {error}", remedy)) from None
    return settings


def _refuse(folder: RunDir, differences: Iterator[tuple[str, Any, Any]], remedy: str) -> None:
    problems = [Problem(f"{folder.path}: {key}", f"was {old!r}, now {new!r}", remedy) for key, old, new in differences]
    if problems:
        raise InputError(problems)


def _sweep(folder: RunDir) -> None:
    """Remove what a kill left half written among models and checkpoints."""
    for parent in (folder.models, folder.checkpoints):
        for partial in parent.glob(".*"):
            shutil.rmtree(partial)


def _begin(folder: RunDir, recipe: Recipe, recipe_text: str) -> None:
    """What a new run says about itself. The resolved recipe comes last: with it, a run has begun."""
    write_atomically(folder.recipe_toml, recipe_text.encode())
    names = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")
    folder.update_manifest(
        kedge=__version__,
        name=recipe.name,
        seed=recipe.seed,
        world=recipe.world,
        versions={"python": platform.python_version(), **{name: version(name) for name in names}},
        stages={},
        channels=list(channel_names(("score", *recipe.rewards))),
        gamma=recipe.policy.gamma,
        lam=recipe.policy.lam,
        critic=recipe.policy.critic,
        score_unit="standard deviations of the reward model's score over the reference's answers",
    )
    write_atomically(folder.recipe_json, (recipe.model_dump_json(indent=2) + "\n").encode())


def _start_from(source: RunDir, folder: RunDir) -> None:
    """Copy the models that `source` has finished before PPO, with the metrics of the stages that made them."""
    done = dict(folder.read_manifest()["stages"])
    finished = source.read_manifest()["stages"]
    taken = [name for name in ("sft", "reward") if finished.get(name) == "done" and name not in done]
    if not taken:
        return
    folder.drop_stages(*taken)
    for name in taken:
        for model in source.models.glob(f"{name}*"):  # with earlier checkpoints that sample pairs
            shutil.copytree(model, folder.models / model.name, dirs_exist_ok=True)
    if "reward" in taken and (source.path / "pairs.jsonl").exists():
        shutil.copy(source.path / "pairs.jsonl", folder.path)  # DPO learns from them
    for line in read_json_lines(source.metrics):
        if line["stage"] in taken:
            append_json(folder.metrics, line)
    folder.update_manifest(stages={**done, **dict.fromkeys(taken, "done")}, started_from=source.path.name)


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**now, **before}:  # a rule that is gone is a difference, too
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, dict) or isinstance(new, dict):
            yield from _differences(old or {}, new or {}, f"{name}.")
        elif old != new:
            yield name, old, new


@contextmanager
def _status(context: Context) -> Iterator[None]:
    """Keep the manifest's status true whatever happens."""
    folder = context.run
    folder.update_manifest(status="running")
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as error:
        folder.update_manifest(status="interrupted")
        append_json(folder.events, {"stage": "run", "step": 0, "event": "interrupted", "message": str(error)})
        raise
    except StoppedByGuard:
        folder.update_manifest(status="stopped by guard")
        raise
    except DivergenceError as error:
        folder.update_manifest(status="failed")
        append_json(folder.events, {"stage": "run", "step": 0, "event": "diverged", "message": str(error)})
        raise
    except Exception:
        folder.update_manifest(status="failed")
        raise
    done = folder.read_manifest()["stages"]
    folder.update_manifest(status="finished" if "policy" in done else "partial")


def _carry_out(context: Context, stage: str) -> None:
    """One stage, unless it is done; then mark it done."""
    folder = context.run
    done = dict(folder.read_manifest()["stages"])
    if done.get(stage) == "done":
        return
    work, needs = _STAGES[stage]
    for needed in needs:
        if not (folder.models / needed).is_dir():
            remedy = f"run `kedge {needed}` on this recipe with the same --out first"
            raise InputError(Problem(str(folder.models / needed), f"stage {stage} needs this model", remedy))
    if stage != "policy":
        folder.drop_stages(stage)
    work(context)
    folder.update_manifest(stages={**done, stage: "done"})


_STAGES: dict[str, tuple[Callable[[Context], None], tuple[str, ...]]] = {
    "sft": (supervised, ()),
    "reward": (rewarded, ("sft",)),
    "policy": (optimised, ("sft", "reward")),
}
