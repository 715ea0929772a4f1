"""A change tried: short forks of a run with it, beside null forks without it that draw the same.

Null forks leave the same checkpoint, keep the run's settings and take the same numbers from the same streams. What is
left between the two arms is the change and chance; intervals over forks and over prompts tell one from the other.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kedge.errors import InputError, Problem
from kedge.experiment.effects import Measured, compared, measured, said
from kedge.experiment.fork import (
    Fork,
    begin,
    carry_out,
    carry_out_reward,
    forked_recipe,
    require_checkpoint,
    retrains,
    source_recipe,
)
from kedge.experiment.jobs import Job
from kedge.experiment.jobs import carry_out as carry_out_jobs
from kedge.progress import Interrupt, Progress
from kedge.recipe import Recipe
from kedge.trace.jsonl import read_json_lines, write_atomically
from kedge.trace.run_dir import RunDir

Floats = NDArray[np.float64]

VERSION = 1
MARK = "trial.json"
NOT_TRAINING = ("name", "threads", "evaluate", "trace", "checkpoint")  # a change of these changes no policy
# Only ends are compared. A guard would change a fork by itself.
PLAIN = ("threads=1", "checkpoint.keep=1", "evaluate.every=1000000", "guard.checks=[]")
JUDGED = "judged.npz"  # the answers of a fork, scored by the reward model of the run it left
START_SECONDS = 4.0  # a process imports its libraries and reads its models


@dataclass(frozen=True)
class Plan:
    """What a trial consists of; `arms` holds the changes of each, `settings` what all forks have besides the run's."""

    source: Path
    step: int
    steps: int
    seeds: int
    arms: tuple[tuple[str, ...], ...]
    settings: tuple[str, ...] = ()

    @property
    def until(self) -> int:
        return self.step + self.steps

    @property
    def name(self) -> str:
        """The name of its file and folder: where it starts, how far it goes, what it changes."""
        changes = [change for arm in self.arms for change in arm]
        readable = "-".join(re.sub(r"[^\w.]+", "-", change) for change in changes)[:80].strip("-.")
        digest = hashlib.sha256(json.dumps(self.described(), sort_keys=True).encode()).hexdigest()[:6]
        return f"from-{self.step}-to-{self.until}-{readable}-{digest}"

    def fork(self, arm: int | None, branch: int, out: Path) -> Fork:
        """The fork of an arm, or the null fork, on a branch; `out` is where a reward model trained anew would be."""
        changes = () if arm is None else self.arms[arm]
        anew = arm is not None and self.retrained(arm)
        return Fork(
            source=self.source,
            step=self.step,
            changes=(*PLAIN, *self.settings, *changes),
            steps=self.steps,
            branch=branch,
            judge=out / _judge(arm) if anew and arm is not None and branch else None,
        )

    def retrained(self, arm: int) -> bool:
        """Whether an arm trains its reward model anew."""
        fork = Fork(self.source, self.step, (*self.settings, *self.arms[arm]), self.steps)
        return retrains(source_recipe(self.source), forked_recipe(fork))

    def described(self) -> dict[str, Any]:
        """What a trial that goes on must have in common with its beginning; seeds may be added."""
        return {
            "trial": self.source.resolve().name,
            "from": self.step,
            "steps": self.steps,
            "arms": [list(arm) for arm in self.arms],
            "settings": list(self.settings),
        }


@dataclass(frozen=True)
class Cost:
    """What a trial is estimated to take, before it starts."""

    seconds: float  # of one core
    wall: float  # seconds, with the workers given
    bytes: int  # on disk beyond what is shared with the run
    forks: int
    parts: Mapping[str, float]  # core seconds by what they go into

    def words(self) -> str:
        """For people."""
        parts = ", ".join(f"{name} {_clock(seconds)}" for name, seconds in self.parts.items() if seconds >= 1)
        return (
            f"{self.forks} forks: about {_clock(self.wall)}, {_clock(self.seconds)} of core time ({parts}), "
            f"and {self.bytes / 2**20:.0f} MiB on disk"
        )


def plan(source: Path, step: int, *, steps: int, seeds: int, arms: Sequence[Sequence[str]]) -> Plan:
    """A trial of `arms`, each of `key=value` changes. Raises `InputError` for what cannot be tried on this run."""
    recipe = source_recipe(source)
    require_checkpoint(RunDir(source), step)
    if not arms or not all(arms):
        raise InputError(Problem("--set", "a trial needs a change", "give --set KEY=VALUE, such as policy.kl.beta=0.2"))
    idle = [change for arm in arms for change in arm if change.partition("=")[0].split(".")[0] in NOT_TRAINING]
    if idle:
        what = "changes what is looked at, not what is trained"
        raise InputError([Problem(f"--set {change}", what, "leave it out") for change in idle])
    longer = (f"policy.steps={step + steps}",) if step + steps > recipe.policy.steps else ()
    found = Plan(source, step, steps, seeds, tuple(tuple(arm) for arm in arms), longer)
    for arm in range(len(found.arms)):
        if forked_recipe(found.fork(arm, 0, source)) == forked_recipe(found.fork(None, 0, source)):
            what = "the run has these settings already"
            raise InputError(Problem(f"--set {' --set '.join(found.arms[arm])}", what, "change something"))
    return found


def trial(
    plan: Plan, out: Path, *, workers: int, resume: bool, progress: Progress, interrupt: Interrupt
) -> dict[str, Any]:
    """Carry out what is not done yet, and write `RUN/trials/NAME.json`; returns what it holds, with `lines`.

    Forks are in `out`. The cost is told before anything is trained.
    """
    cost = estimate(plan, workers)
    progress.note(cost.words())
    _begin(plan, out, resume=resume)
    jobs = _jobs(plan, out)
    began = time.monotonic()
    carry_out_jobs(jobs, out / "done", workers=workers, progress=progress, interrupt=interrupt)
    taken = time.monotonic() - began
    found = collected(plan, out)
    found["cost"] = {
        "estimated_seconds": cost.wall,
        "taken_seconds": round(taken, 1),
        "bytes": cost.bytes,
        "workers": workers,
    }
    path = results_file(plan)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(_plain(found), indent=1, allow_nan=False) + "\n").encode())
    return {"trial": str(path), **found, "lines": lines(found)}


def results_file(plan: Plan) -> Path:
    """Where a trial's results are, in the run that it tries a change of."""
    return plan.source / "trials" / f"{plan.name}.json"


def _begin(plan: Plan, out: Path, *, resume: bool) -> None:
    """Take from the run all that its forks begin with, before it can go."""
    mark, described = out / MARK, plan.described()
    if resume and mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != described:
        remedy = "give the options it began with, or choose another --out"
        raise InputError(Problem(str(mark), "the trial in this folder began with other settings", remedy))
    write_atomically(mark, (json.dumps(described, indent=2) + "\n").encode())
    for fork, folder in _forks(plan, out):
        begin(fork, folder)


# What is carried out


def _judge(arm: int | None) -> str:
    return f"reward-{arm}"


def _folder(arm: int | None, branch: int) -> str:
    return f"null-{branch}" if arm is None else f"changed-{arm}-{branch}"


def _forks(plan: Plan, out: Path) -> list[tuple[Fork, Path]]:
    """Every fork and its folder: arms in turn on each branch, so that what is compared is done at about one time."""
    arms: list[int | None] = [None, *range(len(plan.arms))]
    found = [(plan.fork(arm, 0, out), out / _judge(arm)) for arm in arms if arm is not None and plan.retrained(arm)]
    branches = range(1, plan.seeds + 1)
    return found + [(plan.fork(arm, branch, out), out / _folder(arm, branch)) for branch in branches for arm in arms]


def _jobs(plan: Plan, out: Path) -> list[Job]:
    found = []
    for fork, folder in _forks(plan, out):
        if not fork.branch:
            found.append(Job(folder.name, partial(_reward_job, fork, folder)))
            continue
        needs = () if fork.judge is None else (fork.judge.name,)
        found.append(Job(folder.name, partial(_fork_job, fork, folder), needs))
    return found


def _reward_job(fork: Fork, folder: Path, interrupt: Interrupt) -> None:
    carry_out_reward(fork, folder, progress=Progress(quiet=True), interrupt=interrupt)


def _fork_job(fork: Fork, folder: Path, interrupt: Interrupt) -> None:
    run = carry_out(fork, folder, progress=Progress(quiet=True), interrupt=interrupt)
    if fork.judge is not None:
        _judge_anew(fork, run)


def _judge_anew(fork: Fork, run: RunDir) -> None:
    """The answers of the last evaluation, drawn once more as it drew them, under the run's own reward model."""
    from kedge.models.reward import load_reward_model
    from kedge.pipeline.context import Context
    from kedge.pipeline.tasks import inputs_of
    from kedge.rollout.reward import scores
    from kedge.train.schedule import seeded

    recipe = forked_recipe(fork)
    inputs = inputs_of(recipe)
    context = Context(recipe, run, inputs.task, inputs.tokenizer, Progress(quiet=True), Interrupt())
    prompts = context.encode_prompts(inputs.task.evaluation.rows)
    policy = context.policy(run.models / "policy")
    answers = context.engine.generate(policy, prompts, context.sampling, seeded(recipe.seed, "evaluation"))
    own = scores(load_reward_model(fork.source / "models" / "reward"), answers)
    place = run.path / f".{JUDGED}"
    with place.open("wb") as file:
        np.savez_compressed(file, score=own.double().numpy())
    place.replace(run.path / JUDGED)


# What it costs


def estimate(plan: Plan, workers: int) -> Cost:
    """From the run's own timings; where it has none, nothing but the start of the processes can be told."""
    source = RunDir(plan.source)
    recipe = forked_recipe(plan.fork(None, 1, plan.source))
    seconds = _median_seconds(source)
    rows = recipe.policy.prompts_per_step * recipe.policy.samples_per_prompt
    arms = 1 + len(plan.arms)
    forks = arms * plan.seeds
    drawn = seconds["generate_s"] / rows  # per answer
    looked = recipe.evaluate.prompts * (2 * drawn + seconds["score_s"] / rows)  # per evaluation
    looks = 1 if plan.step else 2  # at the end, and at the start of the policy
    ready = recipe.evaluate.prompts * (recipe.evaluate.reference_samples + 1) * drawn
    anew = sum(plan.retrained(arm) for arm in range(len(plan.arms)))
    parts = {
        "training": forks * plan.steps * seconds["step_s"],
        "evaluation": forks * (ready + looks * looked),
        "reward models": anew * _reward_seconds(recipe, drawn, seconds["update_s"] / rows),
        "starting": forks * START_SECONDS,
    }
    total = sum(parts.values())
    wall = parts["reward models"] / max(1, min(workers, anew)) + (total - parts["reward models"]) / max(1, workers)
    return Cost(total, wall, _bytes(plan, source, forks, anew), forks, parts)


def _median_seconds(source: RunDir) -> dict[str, float]:
    lines = [line for line in read_json_lines(source.timings) if line.get("stage") == "policy"]
    names = ("step_s", "generate_s", "score_s", "update_s")
    return {name: statistics.median([line[name] for line in lines if name in line] or [0.0]) for name in names}


def _reward_seconds(recipe: Recipe, drawn: float, updated: float) -> float:
    """Two answers drawn for each pair, and passes over them that cost about half of a policy's update each (policy and
    critic are two models)."""
    trunks = 1 if recipe.reward.trunk == "shared" else recipe.reward.members
    passes = 2 * recipe.pairs.prompts * recipe.reward.epochs * trunks
    update = updated / max(1, recipe.policy.epochs) / 2
    return recipe.pairs.prompts * recipe.pairs.candidates * drawn + passes * update


def _bytes(plan: Plan, source: RunDir, forks: int, anew: int) -> int:
    """Two checkpoints while one replaces the other, a model and the rows of the steps in each fork."""
    checkpoints = [_size(folder) for folder in source.checkpoints.glob("step-*")]
    steps = [path.stat().st_size for _, path in source.files("step")]
    samples = [path.stat().st_size for kind in ("samples", "probes") for _, path in source.files(kind)]
    model = _size(source.models / "sft")
    own = max(checkpoints, default=6 * model) * 2 + model
    own += plan.steps * (max(steps, default=0) + max(samples, default=0))
    return forks * own + anew * _size(source.models / "reward")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# What it found


def collected(plan: Plan, out: Path) -> dict[str, Any]:
    """The results of forks that are done."""
    branches = range(1, plan.seeds + 1)
    nulls = [measured(out / _folder(None, branch), plan.until) for branch in branches]
    arms = []
    for arm, changes in enumerate(plan.arms):
        folders = [out / _folder(arm, branch) for branch in branches]
        found, anew = [measured(folder, plan.until) for folder in folders], plan.retrained(arm)
        if anew:
            found = [_by_the_runs_judge(one, folder) for one, folder in zip(found, folders, strict=True)]
        rows = compared(nulls, found, anew=anew)
        arms.append({"changes": list(changes), "retrained": anew, "rows": rows, "sentences": said(changes, rows)})
    return {
        "version": VERSION,
        "run": plan.source.resolve().name,
        "from": plan.step,
        "steps": plan.steps,
        "until": plan.until,
        "seeds": plan.seeds,
        "null": "null forks: the same checkpoint, settings and draws, without the change",
        "settings": list(plan.settings),
        "prompts": len(nulls[0].by_prompt["length"]),
        "notes": _notes(plan, [bool(arm["retrained"]) for arm in arms]),
        "arms": arms,
    }


def _by_the_runs_judge(one: Measured, folder: Path) -> Measured:
    with np.load(folder / JUDGED) as found:
        return one.rescored(found["score"])


def _notes(plan: Plan, anew: Sequence[bool]) -> list[str]:
    notes = [
        "Differences are changed minus null, at the same step, on the same evaluation prompts with the same draws. "
        "Intervals are 95% each: among twenty figures that nothing moved, one is expected to exclude 0."
    ]
    if plan.seeds == 1:
        notes.append("With one seed there is no interval over seeds, and nothing is called caused.")
    elif plan.seeds == 2:
        notes.append("With two seeds an interval over seeds is very wide; three or more serve better.")
    if plan.settings:
        what = f"The run's recipe ends after {source_recipe(plan.source).policy.steps} steps; both arms go on to"
        notes.append(f"{what} {plan.until}, over which the learning rates fall.")
    if any(anew):
        notes.append(
            "Where the reward model was trained anew, it was trained once: intervals do not hold what another training "
            "would give. Score and win rate are then by the run's own reward model in both arms; the net margin is by "
            "each arm's own."
        )
    return notes


def lines(found: Mapping[str, Any]) -> list[str]:
    """What a trial says to people."""
    shown = [f"{found['run']}, forked at step {found['from']} for {found['steps']} steps, {found['seeds']} seed(s)"]
    for arm in found["arms"]:
        shown += ["", " ".join(arm["changes"]), _HEAD]
        shown += [_row(row) for row in arm["rows"]]
        shown += ["", *arm["sentences"]]
    return [*shown, "", *found["notes"]]


_HEAD = f"{'figure':<18} {'null':>9} {'changed':>9} {'change':>9}  {'95% over seeds':<20} {'95% over prompts':<20}"


def _row(row: Mapping[str, Any]) -> str:
    name = f"{row['figure']}{' (truth)' if row['truth'] else ''}"
    figures = " ".join(f"{_figure(row[key]):>9}" for key in ("null", "changed"))
    difference = f"{_figure(row['difference'], sign=True):>9}"
    spans = " ".join(f"{_span(row[key]):<20}" for key in ("over_seeds", "over_prompts"))
    return f"{name:<18} {figures} {difference}  {spans}{'caused' if row['caused'] else ''}".rstrip()


def _figure(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:{'+' if sign else ''}.3f}"


def _span(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "-"
    return f"{interval['low']:+.3f} to {interval['high']:+.3f}"


def _clock(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
