"""Does a replay foretell what a short fork does? Desk runs, forked at checkpoints under changed settings.

Two runs a seed, one whose small beta lets it drift and one that is held. At each checkpoint every change is replayed on
the rollouts logged there and carried out in a fork of a few steps, beside a null fork with the same draws. What is
compared is the mean length on the evaluation prompts. A stopped study goes on: what has a file is left alone.
Writes docs/results/replay.json and .md. From the repository root:

    python benchmarks/replay_against_trials.py --out runs/replay --workers 2
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from desk_runs import DESK, RESULTS, side_by_side
from scipy.stats import spearmanr

COMMAND = "python benchmarks/replay_against_trials.py"
BETAS = {"drifting": 0.05, "held": 0.35}
CHECKPOINTS = (3, 12, 24)
STEPS = 5
LOGGED = 2  # policy steps that are replayed: the last before the checkpoint and the one drawn at it
SOURCE = ("threads=1", "evaluate.every=3", "trace.probes_every=12", "checkpoint.every=3", "checkpoint.keep=100")
QUIET = ("evaluate.every=1000", "trace.probes_every=1000", "checkpoint.every=1000", "guard.checks=[]")
DRAWS = 2000
NULL, OTHER = "null", "null, other draws"


@dataclass(frozen=True)
class Change:
    """One change: what a fork is told, what a replay is told, and whose reward model both take."""

    fork: tuple[str, ...]
    replay: tuple[str, ...] | None = None  # None: as the fork
    judge: str = ""  # name of a reward model trained anew; "" for the run's own
    rescored: bool = False  # the replay scores with that reward model


def changes(beta: float) -> dict[str, Change]:
    """The changes at every checkpoint of a run with this `beta`, by what they are called."""
    scaled = {f"beta x {times:g}": Change((f"policy.kl.beta={times * beta:g}",)) for times in (0.25, 0.5, 2, 4)}
    return {
        NULL: Change(()),
        OTHER: Change(()),
        **scaled,
        "length penalty 0.04": Change(("policy.length_penalty=0.04",)),
        "lambda 1": Change(("policy.lam=1.0",)),
        "no whitening": Change(("policy.whiten=false",)),
        "no penalty for truncation": Change(("policy.missing_eos_penalty=0.0",)),
        "score without length": Change(("reward.length=residual",), ("score=residual_length",), "residual"),
        "annotators without bias": Change(("desk.annotators.length=0.0",), (), "unbiased", rescored=True),
    }


JUDGES = {"residual": "reward.length=residual", "unbiased": "desk.annotators.length=0.0"}


@dataclass(frozen=True)
class Case:
    """A change at a checkpoint of one run."""

    out: Path
    seed: int
    run: str
    checkpoint: int
    change: str

    @property
    def source(self) -> Path:
        return self.out / f"seed-{self.seed}" / self.run

    @property
    def result(self) -> Path:
        name = self.change.replace(" ", "-").replace(",", "")
        return self.out / f"seed-{self.seed}" / "cases" / f"{self.run}-{self.checkpoint}-{name}.json"

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.run}, step {self.checkpoint}: {self.change}"


@dataclass(frozen=True)
class Seed:
    """What all cases of a seed need: models, source runs, reward models trained anew."""

    out: Path
    number: int
    runs: tuple[str, ...]
    judges: tuple[str, ...]

    def __str__(self) -> str:
        return f"seed {self.number}: sources"


def prepared(seed: Seed) -> None:
    """Make the start, the two source runs and the reward models of a seed, each once."""
    folder = seed.out / f"seed-{seed.number}"
    common = (*SOURCE, f"seed={seed.number}")
    start = folder / "start"
    for stage in ("sft", "reward"):
        _stage(stage, start, common)
    for name in seed.runs:
        _stage("policy", folder / name, (*common, f"policy.kl.beta={BETAS[name]}"), start=start)
    for judge in seed.judges:
        _judge(folder, judge)


def _stage(stage: str, out: Path, settings: Sequence[str], start: Path | None = None) -> None:
    from kedge import pipeline
    from kedge import recipe as recipes
    from kedge.progress import Interrupt, Progress

    done = out / f"{stage}.done"
    if done.exists():
        return
    pipeline.run(
        recipes.load(DESK, settings),
        out,
        recipe_text=DESK.read_text(encoding="utf-8"),
        stages=(stage,),
        resume=out.exists(),
        progress=Progress(quiet=True),
        interrupt=Interrupt(),
        start=start,
    )
    done.touch()


def _judge(folder: Path, name: str) -> None:
    from kedge.experiment.fork import Fork, carry_out_reward
    from kedge.progress import Interrupt, Progress

    place = folder / f"judge-{name}"
    if (done := place / "judge.done").exists():
        return
    source = next(folder / run for run in BETAS if (folder / run).exists())  # before the policy stage all are alike
    fork = Fork(source, 0, (JUDGES[name],), 1)
    carry_out_reward(fork, place, progress=Progress(quiet=True), interrupt=Interrupt())
    done.touch()


def carried_out(case: Case) -> None:
    """Replay and fork one case, unless its file is there."""
    if case.result.exists():
        return
    change = changes(BETAS[case.run])[case.change]
    found = {
        "seed": case.seed,
        "run": case.run,
        "checkpoint": case.checkpoint,
        "change": case.change,
        "before": _length(case.source, case.checkpoint),
        "after": _forked(case, change),
        **_replayed(case, change),
    }
    case.result.parent.mkdir(exist_ok=True)
    partial = case.result.with_suffix(".tmp")
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partial.replace(case.result)


def _replayed(case: Case, change: Change) -> dict[str, Any]:
    """What a replay of the steps up to the checkpoint says of length: both predictors, logged and changed."""
    from kedge.experiment.replay import replayed
    from kedge.trace.reader import read_run

    judge = case.source.parent / f"judge-{change.judge}" / "models" / "reward" if change.rescored else None
    found = replayed(
        read_run(case.source),
        change.fork if change.replay is None else change.replay,
        reward=judge,
        first=case.checkpoint - LOGGED + 1,
        last=case.checkpoint,
    )
    effect = found.effects["length"]
    return {
        "predictor": effect.predictor,
        "return": [one.value for one in effect.returns],
        "push": [one.value for one in effect.pushes],
        "expected": list(effect.expected),
        "effective": found.effective[1],
    }


def _forked(case: Case, change: Change) -> float:
    """Mean length on the evaluation prompts after the fork's steps; its folder is removed again."""
    from kedge.experiment.fork import Fork, carry_out
    from kedge.progress import Interrupt, Progress

    place = case.result.with_suffix(".fork")
    judge = case.source.parent / f"judge-{change.judge}" if change.judge else None
    branch = 2 if case.change == OTHER else 1
    fork = Fork(case.source, case.checkpoint, (*change.fork, *QUIET), STEPS, branch, judge)
    shutil.rmtree(place, ignore_errors=True)
    carry_out(fork, place, progress=Progress(quiet=True), interrupt=Interrupt())
    length = _length(place, case.checkpoint + STEPS)
    shutil.rmtree(place)
    return length


def _length(run: Path, step: int) -> float:
    from kedge.trace.reader import read_run

    series = read_run(run).metrics("evaluation")["evaluation/length"]
    return float(series.values[series.steps == step][-1])


# What they came to


@dataclass(frozen=True)
class Point:
    """What was foretold of length at a checkpoint, and what came of it."""

    change: str
    logged: dict[str, float]  # covariance with length by predictor
    changed: dict[str, float]
    moved: float  # tokens, the fork's end less its beginning
    against: float  # tokens, the fork's end less the null fork's

    def right(self, predictor: str) -> float:
        """Whether the sign of the change of length is right; a half where nothing is foretold."""
        return _agree(self.changed[predictor], self.moved)

    def right_against(self, predictor: str) -> float:
        """The same of its difference from the null fork."""
        return _agree(self.changed[predictor] - self.logged[predictor], self.against)


PREDICTORS = ("decided", "return", "push")


def points(rows: Sequence[dict[str, Any]]) -> tuple[list[list[Point]], float]:
    """By checkpoint, the null fork first, and the standard deviation of two null forks with other draws, in tokens."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["seed"], row["run"], row["checkpoint"]), {})[row["change"]] = row
    whole = [group for group in groups.values() if NULL in group]
    noise = [group[OTHER]["after"] - group[NULL]["after"] for group in whole if OTHER in group]
    found = [
        [_point(group[name], group[NULL]) for name in (NULL, *(n for n in group if n not in (NULL, OTHER)))]
        for group in whole
    ]
    return found, float(np.sqrt(np.mean(np.square(noise)))) if noise else float("nan")


def _point(row: dict[str, Any], null: dict[str, Any]) -> Point:
    """Covariances of returns and of pushes have other units: where the push decides, what it says is put into those of
    the return, as the logged return times changed over logged push."""
    sides = []
    for side in (0, 1):
        known = {"return": row["return"][side], "push": row["push"][side]}
        scaled = row["return"][0] * row["push"][side] / row["push"][0] if row["push"][0] else known["push"]
        # A negative quotient of the logged ones would turn signs around: then the push speaks for itself.
        scaled = scaled if row["return"][0] * row["push"][0] > 0 else known["push"]
        sides.append(known | {"decided": known["return"] if row["predictor"] == "return" else scaled})
    if row["change"] == NULL:  # nothing is changed, so that either may speak; all forks share the logged return
        sides = [one | {"decided": one["return"]} for one in sides]
    return Point(row["change"], sides[0], sides[1], row["after"] - row["before"], row["after"] - null["after"])


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Signs and ranks by predictor, with 95% intervals over resampled checkpoints."""
    groups, noise = points(rows)
    changed = [[point for point in group if point.change != NULL] for group in groups]
    found: dict[str, Any] = {"cases": sum(map(len, changed)), "checkpoints": len(groups), "noise": noise}
    for predictor in PREDICTORS:
        found[predictor] = {
            "sign": _interval([[point.right(predictor) for point in group] for group in changed]),
            "moved": _interval([[p.right(predictor) for p in group if abs(p.moved) > noise] for group in changed]),
            "against": _interval([[point.right_against(predictor) for point in group] for group in changed]),
            "beyond": _interval(
                [[p.right_against(predictor) for p in group if abs(p.against) > 2 * noise] for group in changed]
            ),
            "spearman": _interval([[_ranks(group, predictor)] for group in groups if len(group) > 3]),
        }
    found["as the null fork went"] = _interval(
        [[_agree(group[0].moved, point.moved) for point in group[1:]] for group in groups]
    )
    return found


def _agree(foretold: float, realised: float) -> float:
    return 0.5 if foretold == 0 else float(np.sign(foretold) == np.sign(realised))


def _ranks(group: Sequence[Point], predictor: str) -> float:
    return float(spearmanr([p.changed[predictor] for p in group], [p.moved for p in group]).statistic)


def _interval(groups: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean with a 95% interval over resampled checkpoints."""
    kept = [np.array(group) for group in groups if len(group)]
    if not kept:
        return {"mean": float("nan"), "low": float("nan"), "high": float("nan"), "count": 0}
    sums, counts = np.array([group.sum() for group in kept]), np.array([len(group) for group in kept])
    draws = np.random.default_rng(0).integers(0, len(kept), (DRAWS, len(kept)))
    low, high = np.quantile(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), [0.025, 0.975])
    count = int(counts.sum())
    return {"mean": float(sums.sum() / count), "low": float(low), "high": float(high), "count": count}


ROWS = {
    "sign": "sign of the change of length right",
    "moved": "the same, where length moved by more than the noise",
    "against": "sign of the difference from the null fork right",
    "beyond": "the same, where that is more than twice the noise",
    "spearman": "rank correlation over the changes at a checkpoint",
}


def render(found: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The page; every number in it comes from `found` and `rows`."""
    page = ["# Replay against forks", "", f"Made by `{COMMAND}`; raw figures in `replay.json`.", ""]
    page += [
        f"{found['cases']} changes at {found['checkpoints']} checkpoints of desk runs (seeds "
        f"{', '.join(map(str, sorted({row['seed'] for row in rows})))}); forks of {STEPS} steps, lengths",
        "on the evaluation prompts, replay of the steps at the checkpoint. Intervals (95%) are over resampled",
        f"checkpoints. Null forks with other draws differ by {found['noise']:.2f} tokens (rms): the noise.",
        "*return*: covariance of length with what a response earns; *push*: with its token weights; *decided*:",
        "whichever `kedge replay` goes by.",
        "",
        "| | " + " | ".join(PREDICTORS) + " |",
        "|--" * (len(PREDICTORS) + 1) + "|",
    ]
    for key, words in ROWS.items():
        page.append("| " + " | ".join([words, *(_cell(found[predictor][key]) for predictor in PREDICTORS)]) + " |")
    page += [
        "",
        f"Taking every change to go as the null fork went is right in {_cell(found['as the null fork went'])}.",
    ]
    page += [
        "",
        "| change | cases | sign right | right against null | length less the null fork's |",
        "|--|--|--|--|--|",
    ]
    every = [point for group in points(rows)[0] for point in group]
    for name in changes(1.0):
        mine = [point for point in every if point.change == name]
        if name == NULL or not mine:
            continue
        right = np.mean([point.right("decided") for point in mine])
        against = np.mean([point.right_against("decided") for point in mine])
        gap = np.mean([point.against for point in mine])
        page.append(f"| {name} | {len(mine)} | {right:.2f} | {against:.2f} | {gap:+.2f} |")
    return "\n".join([*page, ""])


def _cell(one: dict[str, float]) -> str:
    return f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}] of {one['count']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/replay"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", nargs="+", choices=BETAS, default=list(BETAS))
    parser.add_argument("--checkpoints", type=int, nargs="+", default=list(CHECKPOINTS))
    parser.add_argument("--changes", nargs="+", choices=changes(1.0), default=list(changes(1.0)))
    parser.add_argument(
        "--try", dest="trial", action="store_true", help="print the page, write nothing to docs/results"
    )
    given = parser.parse_args()
    judges = {changes(1.0)[name].judge for name in given.changes} - {""}
    seeds = [Seed(given.out, seed, tuple(given.runs), tuple(sorted(judges))) for seed in given.seeds]
    side_by_side(prepared, seeds, given.workers)
    cases = [
        Case(given.out, seed, run, checkpoint, change)
        for seed in given.seeds
        for run in given.runs
        for checkpoint in given.checkpoints
        for change in given.changes
    ]
    side_by_side(carried_out, cases, given.workers)
    rows = [json.loads(case.result.read_text(encoding="utf-8")) for case in cases]
    found = summary(rows)
    page = render(found, rows)
    if given.trial:
        print(page)
        return
    record = {"made_by": COMMAND, "summary": found, "cases": rows}
    RESULTS.joinpath("replay.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    RESULTS.joinpath("replay.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
