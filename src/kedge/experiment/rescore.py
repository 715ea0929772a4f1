"""Columns that a trainer did not record, computed offline from model folders, step by step.

Reads one run and writes another. A step is written when it is complete, under its own name at once, so that whatever
is there after a kill is done and is left alone. Dimensions: B responses, T response tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from kedge.errors import InputError, Interrupted, Problem
from kedge.experiment.rescore_models import (
    JUDGED,
    Judge,
    LanguageModel,
    check_agreement,
    check_fit,
    judge_in,
    language_model,
    rollouts_of,
    seconds_per_token,
    tokens_of,
)
from kedge.progress import Interrupt, Progress
from kedge.structs import Rollouts, TokenScores
from kedge.trace.conventions import Conventions
from kedge.trace.explained import KL
from kedge.trace.filled import (
    Stored,
    absent_in,
    channels_in,
    charged_beta,
    conventions_in,
    figures,
    filled,
    read_stored,
)
from kedge.trace.foreign import RESERVED, SCORE
from kedge.trace.jsonl import append_json, keep_json_lines, read_json_lines, temporary_name
from kedge.trace.reader import StepTrace
from kedge.trace.run_dir import RunDir
from kedge.trace.writer import StepRecord, step_table, write_table

Array = NDArray[Any]

STEP = "{step}"
ON = "run the same command again to go on"
_COPIED = ("recipe_toml", "recipe_json", "timings", "events")
_FOREIGN = "a run that a recorder or `kedge import` wrote"


@dataclass(frozen=True)
class Asked:
    """What to fill in, and from which folders. `policy` may hold `{step}`, the number of a step of the run."""

    reference: Path | None = None
    policy: str | None = None
    reward: Path | None = None
    eos: bool = False
    temperature: float | None = None  # that divided the logits in sampling; None: as the run says
    again: bool = False  # replace what is there
    microbatch: int | None = None  # responses a forward pass; None: as many as fit into memory set aside for them

    def __post_init__(self) -> None:
        if self.reference is None and self.policy is None and self.reward is None:
            raise InputError(Problem("kedge rescore", "no model is named", "give --reference, --policy or --reward"))
        if self.eos and self.reference is None and self.policy is None:
            what = "the log-probability of ending is a language model's"
            raise InputError(Problem("--eos", what, "give --reference or --policy"))

    def columns(self) -> dict[str, tuple[str, ...]]:
        """What each model gives, by option."""
        end = ("reference_eos_logprob",) if self.eos else ()
        own_end = ("old_eos_logprob",) if self.eos else ()
        given = {
            "reference": ("reference_logprob", *end) if self.reference else (),
            "policy": ("old_logprob", "entropy", *own_end) if self.policy else (),
            "reward": (SCORE,) if self.reward else (),
        }
        return {option: columns for option, columns in given.items() if columns}

    def told(self, temperature: float) -> dict[str, Any]:
        """For the manifest, which says what a run that is gone on with was begun with."""
        folders = {"reference": self.reference, "policy": self.policy, "reward": self.reward}
        named = {option: str(folder) for option, folder in folders.items() if folder is not None}
        return {
            **named,
            "eos": self.eos,
            "temperature": temperature,
            "again": self.again,
            "microbatch": self.microbatch,
        }


@dataclass(frozen=True)
class Cost:
    """What is still to be done."""

    steps: int
    responses: int
    tokens: int  # of prompts and responses, which every model reads
    seconds: float  # from one timed batch of each model
    parameter_bytes: int  # of all models, in memory together
    batch_bytes: int  # log-probabilities of one forward pass over the vocabulary

    def lines(self) -> list[str]:
        """For people, before it begins."""
        memory = f"{_size(self.parameter_bytes)} of weights and up to {_size(self.batch_bytes)} a batch"
        return [
            f"to do: {self.steps} steps, {self.responses:,} responses, {self.tokens:,} tokens of prompts and responses",
            f"memory: {memory}; about {_duration(self.seconds)} at the speed of one timed batch",
        ]


@dataclass(frozen=True)
class Models:
    """Loaded models by option; `policy` is None where every step has its own."""

    reference: LanguageModel | None = None
    policy: LanguageModel | None = None
    reward: Judge | None = None


@dataclass(frozen=True)
class Plan:
    """A run, what is asked of it, and the models that are to answer."""

    source: RunDir
    out: RunDir
    asked: Asked
    temperature: float
    conventions: Conventions
    models: Models
    steps: tuple[int, ...]  # to do
    done: int  # steps that are there already
    cost: Cost


def plan(folder: Path, out: Path, asked: Asked, *, ask_temperature: Callable[[], float] | None = None) -> Plan:
    """Load the models, check that they fit the run, time a batch of each; nothing is written.

    `ask_temperature` is asked for the sampling temperature where neither `asked` nor the run tells it. Raises
    `InputError` where the run's ids were left out, where models do not fit, or where there is nothing to fill in.
    """
    source = RunDir(folder)
    manifest = source.read_manifest()
    conventions = _foreign(source, manifest)
    steps = [step for step, _ in source.files("step")]
    if not steps:
        raise InputError(Problem(str(folder), "it has no step files", f"give {_FOREIGN}"))
    _expect_policies(asked, steps)
    _expect_gaps(source, steps, asked)
    temperature = _temperature(source, asked, ask_temperature)
    run = RunDir(out)
    done = _done(source, run, asked.told(temperature))
    left = tuple(step for step in steps if step not in done)
    models = _load(asked) if left else Models()
    cost = _cost(source, left, asked, models, temperature)
    return Plan(source, run, asked, temperature, conventions, models, left, len(done), cost)


def rescore(plan: Plan, *, progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
    """Carry out what is left of a plan. Returns its figures.

    Raises `Interrupted` between two steps, after which the same plan goes on, and `InputError` where a model turns out
    not to be the one that a trainer recorded.
    """
    manifest = plan.source.read_manifest()
    _begin(plan, manifest)
    lines = _policy_lines(plan.source)
    total = len(plan.steps) + plan.done
    with progress.stage("rescoring", total, start=plan.done) as stage:
        for number, step in enumerate(plan.steps, start=plan.done):
            if interrupt.requested:
                raise Interrupted(f"step {step}", ON)
            record, conventions = _filled(plan, step, lines.get(step, {}), manifest)
            line = lines.get(step, {"stage": "policy", "step": step})
            append_json(plan.out.metrics, _merged(line, figures(record, conventions), plan.asked))
            write_table(step_table(record), plan.out.step_file(step))
            stage.advance(number)
    return _finish(plan, manifest)


def _load(asked: Asked) -> Models:
    return Models(
        reference=language_model(asked.reference) if asked.reference else None,
        policy=language_model(Path(asked.policy)) if asked.policy and STEP not in asked.policy else None,
        reward=judge_in(asked.reward) if asked.reward else None,
    )


def _foreign(source: RunDir, manifest: Mapping[str, Any]) -> Conventions:
    """The run's conventions, after it is seen that its tokens can be read again."""
    where = str(source.path)
    conventions = conventions_in(manifest)
    if conventions is None:
        raise InputError(Problem(where, "a run of Kedge's own, which has every column", f"give {_FOREIGN}"))
    if conventions.positions == "words":
        what = "its positions are words: it was made from text alone, and models read token ids"
        raise InputError(Problem(where, what, "import it again with --tokenizer"))
    if manifest.get("text", "full") != "full":
        what = f"text and token ids were left out (text = {manifest['text']!r})"
        raise InputError(Problem(where, what, "rescore before redacting, or record with text = 'full'"))
    return conventions


def _temperature(source: RunDir, asked: Asked, ask: Callable[[], float] | None) -> float:
    """What divided the logits in sampling."""
    found = asked.temperature
    if found is None and source.recipe_json.exists():
        try:
            settings = json.loads(source.recipe_json.read_text(encoding="utf-8"))
            found = settings.get("policy", {}).get("temperature")
        except (ValueError, OSError, AttributeError):
            found = None
    if asked.reference is None and asked.policy is None:
        return 1.0 if found is None else float(found)  # a reward model has none
    if found is None and ask is not None:
        found = ask()
    if found is None:
        what = "the run does not say at which temperature it was sampled"
        raise InputError(Problem(str(source.path), what, "give --temperature, such as --temperature 1"))
    if not (math.isfinite(float(found)) and float(found) > 0):
        raise InputError(Problem("--temperature", f"{found} is not above 0", "give the one that was sampled with"))
    return float(found)


def _expect_policies(asked: Asked, steps: Sequence[int]) -> None:
    """One model did not sample several steps: the policy moved between them."""
    if asked.policy is None:
        return
    if STEP in asked.policy:
        if not any(_policy_folder(asked.policy, step).is_dir() for step in steps):
            what = f"no step from {steps[0]} to {steps[-1]} has such a folder"
            raise InputError(Problem(f"--policy {asked.policy}", what, "{step} is a step's number, counted from 0"))
    elif len(steps) > 1:
        what = f"one model did not sample all {len(steps)} steps"
        raise InputError(Problem(f"--policy {asked.policy}", what, "name a folder for each, with {step} in it"))


def _policy_folder(pattern: str, step: int) -> Path:
    return Path(pattern.replace(STEP, str(step)))


def _expect_gaps(source: RunDir, steps: Sequence[int], asked: Asked) -> None:
    """Raise InputError for a model that has nothing to fill in, and for a score among several of other names."""
    absent = [absent_in(source.step_file(step)) for step in steps]
    problems = []
    for option, columns in asked.columns().items():
        if not asked.again and not any(set(columns) & gone for gone in absent):
            what = f"every step has {' and '.join(columns)} already"
            problems.append(Problem(f"--{option}", what, "--again replaces what is there"))
    if problems:
        raise InputError(problems)


def _done(source: RunDir, out: RunDir, told: Mapping[str, Any]) -> frozenset[int]:
    """Steps that an earlier, stopped rescoring has written. Raises InputError where the folder holds another."""
    if not out.path.exists() or all(entry.name.endswith(".tmp") for entry in out.path.iterdir()):
        return frozenset()
    where = str(out.path)
    if not out.manifest.exists():
        raise InputError(Problem(where, "the folder is not empty; nothing was overwritten", "choose another --out"))
    before = out.read_manifest().get("rescored")
    if not isinstance(before, dict) or before.get("run") != str(source.path.resolve()):
        raise InputError(Problem(where, "it holds another run; nothing was overwritten", "choose another --out"))
    changed = [name for name in sorted({*told, *before} - {"run"}) if told.get(name) != before.get(name)]
    if changed:
        name = changed[0]
        what = f"it was begun with {name} {before.get(name)!r}, and is asked for {told.get(name)!r}"
        raise InputError(Problem(where, what, "ask for the same, or choose another --out"))
    return frozenset(step for step, _ in out.files("step"))


def _cost(source: RunDir, steps: Sequence[int], asked: Asked, models: Models, temperature: float) -> Cost:
    """Count what is left, and time a batch of its first step under each model."""
    responses = tokens = 0
    speed = 0.0
    weights = batch = 0
    for number, step in enumerate(steps):
        stored, rollouts = _read(source, step)
        responses, tokens = responses + len(rollouts), tokens + tokens_of(rollouts)
        if number:
            continue
        readers = _readers(models, asked, step)
        for reader in readers:
            check_fit(reader, stored.trace, rollouts)
            speed += _speed(reader, rollouts, asked.microbatch, temperature)
            weights += reader.parameter_bytes
            if isinstance(reader, LanguageModel):
                batch = max(batch, reader.batch_bytes(rollouts, asked.microbatch))
    return Cost(len(steps), responses, tokens, tokens * speed, weights, batch)


def _readers(models: Models, asked: Asked, step: int) -> list[LanguageModel | Judge]:
    """Every model that reads a step."""
    policy = _policy(models, asked, step)
    return [one for one in (models.reference, policy, models.reward) if one is not None]


def _policy(models: Models, asked: Asked, step: int) -> LanguageModel | None:
    """The policy that sampled a step; None where it was not kept, or is not asked."""
    if asked.policy is None or STEP not in asked.policy:
        return models.policy
    folder = _policy_folder(asked.policy, step)
    return language_model(folder) if folder.is_dir() else None


def _speed(reader: LanguageModel | Judge, rollouts: Rollouts, microbatch: int | None, temperature: float) -> float:
    """Seconds a token of one batch."""
    if isinstance(reader, Judge):
        return seconds_per_token(
            lambda part: reader.scores(part, microbatch=microbatch), rollouts, microbatch or JUDGED
        )
    size = microbatch or reader.microbatch(rollouts)
    return seconds_per_token(lambda part: reader.scores(part, temperature=temperature, microbatch=size), rollouts, size)


def _read(source: RunDir, step: int) -> tuple[Stored, Rollouts]:
    """A step and its token ids as models read them."""
    stored = read_stored(source.step_file(step))
    if stored.prompt_ids is None:
        what = "token ids were left out; models read nothing else"
        raise InputError(Problem(str(stored.trace.path), what, "record with text = 'full', or import with --tokenizer"))
    return stored, rollouts_of(stored.trace, stored.prompt_ids)


def _filled(
    plan: Plan, step: int, line: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[StepRecord, Conventions]:
    """A step with its columns, and the conventions with its beta."""
    stored, rollouts = _read(plan.source, step)
    trace = stored.trace
    policy = _policy(plan.models, plan.asked, step)
    columns = _columns(plan, trace, rollouts, policy)
    conventions = _with_beta(trace, plan.conventions, line)
    derived = manifest.get("advantage") == "derived" or "advantage" in trace.absent
    record = filled(stored, conventions, columns, advantage=None if derived else trace.advantage())
    return record, conventions


def _columns(plan: Plan, trace: StepTrace, rollouts: Rollouts, policy: LanguageModel | None) -> dict[str, Array]:
    """What the models say of a step, of what it lacks or is to be replaced."""
    wanted = {
        option: [name for name in names if plan.asked.again or name in trace.absent]
        for option, names in plan.asked.columns().items()
    }
    found: dict[str, Array] = {}
    for option, model in (("reference", plan.models.reference), ("policy", policy)):
        if model is None or not wanted.get(option):
            continue
        check_fit(model, trace, rollouts)
        scores = model.scores(rollouts, temperature=plan.temperature, microbatch=plan.asked.microbatch)
        _expect_same(plan, trace, option, model, scores)
        own = "reference" if option == "reference" else "old"
        given = {
            f"{own}_logprob": scores.logprobs,
            f"{own}_eos_logprob": scores.eos_logprobs,
            "entropy": scores.entropy,
        }
        found |= {name: given[name].double().numpy() for name in wanted[option]}
    if plan.models.reward is not None and wanted.get("reward"):
        _expect_one_score(trace, plan.asked)
        check_fit(plan.models.reward, trace, rollouts)
        found[SCORE] = plan.models.reward.scores(rollouts, microbatch=plan.asked.microbatch).double().numpy()
    return found


def _expect_same(plan: Plan, trace: StepTrace, option: str, model: LanguageModel, scores: TokenScores) -> None:
    """A policy is checked against what its trainer recorded of it, a reference where its column stays."""
    recorded = ("old_logprob", "behaviour_logprob") if option == "policy" else ("reference_logprob",)
    if option == "reference" and plan.asked.again:
        return
    for name in recorded:
        if name not in trace.absent:
            computed = scores.logprobs.double().numpy()
            check_agreement(model.folder, computed, trace.tokens[name], trace, plan.temperature)
            return


def _expect_one_score(trace: StepTrace, asked: Asked) -> None:
    """Which of several rewards a model's score would stand for is not known."""
    others = [name for name in trace.channels if name not in RESERVED and name != SCORE]
    if others:
        what = f"{trace.path.name} has rewards of other names already: {', '.join(others)}"
        raise InputError(Problem(f"--reward {asked.reward}", what, "leave --reward out"))


def _with_beta(trace: StepTrace, conventions: Conventions, line: Mapping[str, Any]) -> Conventions:
    """The conventions with what a nat cost in this step, where the run tells."""
    told = line.get("kl/beta")
    beta = float(told) if told is not None else charged_beta(trace, conventions)
    return replace(conventions, beta=beta) if math.isfinite(beta) else conventions


def _policy_lines(source: RunDir) -> dict[int, dict[str, Any]]:
    """The metrics of each policy step."""
    lines = read_json_lines(source.metrics)
    return {int(line["step"]): line for line in lines if line.get("stage") == "policy" and "step" in line}


def _merged(line: Mapping[str, Any], found: Mapping[str, float], asked: Asked) -> dict[str, Any]:
    """A line of metrics with what the new columns give. A trainer's own figure of a score stays."""
    own = () if asked.reward else ("score/", "rewards/")
    kept = {name: value for name, value in line.items() if name != f"weight/{KL}"}
    return {**kept, **{name: value for name, value in found.items() if not (name in line and name.startswith(own))}}


def _begin(plan: Plan, manifest: Mapping[str, Any]) -> None:
    """The folder with everything but the steps, as it would be if it were begun now; safe to repeat."""
    out = plan.out
    out.path.mkdir(parents=True, exist_ok=True)
    told = {"run": str(plan.source.path.resolve()), **plan.asked.told(plan.temperature)}
    out.write_manifest(
        {**manifest, "rescored": told, "status": "running"}
    )  # first: with it the folder can be gone on with
    out.trace.mkdir(exist_ok=True)
    for name in _COPIED:
        given: Path = getattr(plan.source, name)
        if given.exists():
            shutil.copyfile(given, getattr(out, name))
    for kind in ("probes", "samples"):
        for _, path in plan.source.files(kind):
            shutil.copyfile(path, out.trace / path.name)
    labels = plan.source.path / "labels"
    if labels.is_dir():
        shutil.copytree(labels, out.path / "labels", dirs_exist_ok=True)
    there = {step for step, _ in out.files("step")}
    keep_json_lines(out.metrics, lambda line: line.get("stage") == "policy" and line.get("step") in there)


def _finish(plan: Plan, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of the other stages, in their order, and a manifest that is true of the steps."""
    out = plan.out
    kept = {int(line["step"]): line for line in read_json_lines(out.metrics) if line.get("stage") == "policy"}
    partial = temporary_name(out.metrics)
    partial.unlink(missing_ok=True)
    for line in read_json_lines(plan.source.metrics):
        policy = line.get("stage") == "policy"
        append_json(partial, kept.pop(int(line["step"]), line) if policy else line)
    for line in kept.values():  # of steps without metrics in the source
        append_json(partial, line)
    partial.replace(out.metrics)
    files = [path for _, path in out.files("step")]
    absent = sorted(frozenset.intersection(*map(absent_in, files)))
    channels = [*dict.fromkeys(name for path in files for name in channels_in(path))]
    before = manifest.get("advantage", "recorded")
    now = "derived" if before == "absent" and "advantage" not in absent else before
    out.update_manifest(absent=absent, channels=channels, advantage=now, status=manifest.get("status", "finished"))
    filled_in = sorted(set(manifest.get("absent", ())) - set(absent))
    shown = [f"{len(files)} steps in {out.path}", f"filled in: {', '.join(filled_in) or 'nothing new'}"]
    if absent:
        shown.append(f"still missing: {', '.join(absent)}")
    return {
        "run": str(out.path),
        "steps": len(files),
        "filled": filled_in,
        "absent": absent,
        "temperature": plan.temperature,
        "lines": shown,
    }


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
