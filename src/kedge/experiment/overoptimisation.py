"""The over-optimisation study (Gao, Schulman and Hilton 2022) in a world that knows the gold utility.

What a policy is trained for, the score, goes on rising while what people want, gold, turns. The study takes policies at
several strengths of the KL penalty, and the best of n answers, from reward models that learnt from fewer and from more
labels and are narrower than the policy; plots both against d = sqrt(KL); and fits the laws of `kedge.experiment.laws`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kedge import pipeline
from kedge.errors import InputError, Problem
from kedge.experiment.jobs import Job, carry_out
from kedge.experiment.plan import Judge, Plan
from kedge.experiment.points import collected
from kedge.experiment.samples import Samples, reference_samples
from kedge.progress import Interrupt, Progress
from kedge.report.study import write_study
from kedge.trace.jsonl import write_atomically
from kedge.trace.run_dir import RunDir

MARK = "study.json"


def study(
    plan: Plan, out: Path, *, workers: int, resume: bool, progress: Progress, interrupt: Interrupt
) -> dict[str, Any]:
    """Carry out what is not done yet, and write `overoptimisation.json`, `overoptimisation.md` and `report.html`.

    Returns the figures without the points, with `report` and `lines` for people.
    """
    _begin(plan, out, resume=resume)
    carry_out(jobs(plan, out), out / "done", workers=workers, progress=progress, interrupt=interrupt)
    progress.note("fitting the laws")
    samples = {seed: Samples.load(_samples(out, seed)) for seed in plan.seeds}
    found = collected(plan, samples, lambda judge, beta, seed: RunDir(out / _run_name(judge, beta, seed)))
    write_atomically(out / "overoptimisation.json", (json.dumps(_plain(found), indent=1) + "\n").encode())
    report = write_study(_plain(found), out)
    return {name: found[name] for name in ("seeds", "laws", "ends")} | {"report": str(report), "lines": lines(found)}


def _begin(plan: Plan, out: Path, *, resume: bool) -> None:
    mark, described = out / MARK, plan.described()
    if resume and mark.exists() and json.loads(mark.read_text(encoding="utf-8")) != described:
        remedy = "give the recipe and options it began with, or choose another --out"
        raise InputError(Problem(str(mark), "the study in this folder began with other settings", remedy))
    write_atomically(mark, (json.dumps(described, indent=2) + "\n").encode())


# What is carried out


def jobs(plan: Plan, out: Path) -> list[Job]:
    """Supervised policies first, then what waits for them, seeds in turn, so that no core idles."""
    found = []
    widths = sorted({judge.hidden for judge in plan.judges}, reverse=True)
    for seed in plan.seeds:
        for width in widths:
            out_of = out / _sft_name(plan, width, seed)
            work = partial(_stage, plan, seed, "sft", out_of, None, (f"model.hidden={width}",))
            found.append(Job(out_of.name, work))
    for seed in plan.seeds:
        sft = out / f"sft-{seed}"
        for judge in sorted(plan.judges, key=lambda judge: -judge.labels * judge.hidden):
            name, base = f"{judge.name}-{seed}", _sft_name(plan, judge.hidden, seed)
            work = partial(_stage, plan, seed, "reward", out / name, sft, _settings(plan, judge, seed, out))
            found.append(Job(name, work, tuple({sft.name, base})))
    for seed in plan.seeds:
        needs = tuple(f"{judge.name}-{seed}" for judge in plan.judges)
        found.append(Job(f"samples-{seed}", partial(_sample, plan, seed, out), needs))
        for judge, beta in plan.runs():
            start, name = out / f"{judge.name}-{seed}", _run_name(judge, beta, seed)
            settings = (*_settings(plan, judge, seed, out), "policy.kl.mode=fixed", f"policy.kl.beta={beta}")
            work = partial(_stage, plan, seed, "policy", out / name, start, settings)
            found.append(Job(name, work, (start.name,)))
    return found


def _sft_name(plan: Plan, width: int, seed: int) -> str:
    return f"sft-{seed}" if width == plan.main.hidden else f"sft-width-{width}-{seed}"


def _settings(plan: Plan, judge: Judge, seed: int, out: Path) -> tuple[str, ...]:
    """The overrides that make a reward model."""
    labels = f"pairs.prompts={judge.labels}"
    if judge.hidden == plan.main.hidden:
        return (labels,)
    return labels, f"reward.init={(out / _sft_name(plan, judge.hidden, seed) / 'models/sft').resolve()}"


def _run_name(judge: Judge, beta: float, seed: int) -> str:
    return f"{judge.name}-beta-{beta}-{seed}"


def _stage(
    plan: Plan, seed: int, stage: str, out: Path, start: Path | None, settings: tuple[str, ...], interrupt: Interrupt
) -> None:
    pipeline.run(
        plan.given.recipe(*plan.settings(seed), *settings),
        out,
        recipe_text=plan.given.text,
        stages=(stage,),
        resume=out.exists(),
        progress=Progress(quiet=True),
        interrupt=interrupt,
        start=start,
    )


def _sample(plan: Plan, seed: int, out: Path, interrupt: Interrupt) -> None:
    recipe = plan.given.recipe(*plan.settings(seed))
    models = {judge.name: out / f"{judge.name}-{seed}" for judge in plan.judges}
    quiet = Progress(quiet=True)
    reference_samples(recipe, out / f"sft-{seed}", models, plan.samples, quiet, interrupt).save(_samples(out, seed))


def _samples(out: Path, seed: int) -> Path:
    return out / f"samples-{seed}.npz"


def lines(found: Mapping[str, Any]) -> list[str]:
    """What the study says to people."""
    said = ["gains over the supervised policy, mean over seeds: score / gold at the end, highest gold at sqrt(KL)"]
    for row in found["ends"]:
        what = f"beta {row['strength']:g}" if row["optimiser"] == "policy" else f"best of {row['strength']:g}"
        judge = f"{row['labels']} labels, width {row['hidden']}"
        said.append(
            f"{what:<11} {judge:<22} score {row['proxy'][0]:+.2f}  gold {row['gold'][0]:+.2f}  "
            f"highest {row['highest_gold'][0]:+.2f} at {row['highest_at'][0]:.2f}"
        )
    for law in found["laws"]:
        judge = f"{law['labels']} labels, width {law['hidden']}"
        name = f"{law['what']}, {judge}"
        if "refused" in law:
            said.append(f"{name}: no law fitted: {law['refused']}")
        else:
            said.append(f"{name}: alpha {_interval(law['alpha'])}  beta {_interval(law['beta'])}")
    return said


def _interval(estimate: Mapping[str, float | None]) -> str:
    low, high = estimate["low"], estimate["high"]
    between = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{estimate['value']:.2f}{between}"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
