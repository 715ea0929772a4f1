"""What the over-optimisation study found: points along every run, the laws through them, and where the runs end."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kedge.evaluate.frontier import Frontier, efficiency, frontier
from kedge.experiment.laws import Curve, Form, Law, fit
from kedge.experiment.plan import Judge, Plan
from kedge.experiment.samples import Samples
from kedge.ops.bestofn import best_of_n_mean, bon_kl_bound, bon_kl_estimate
from kedge.trace.jsonl import read_json_lines
from kedge.trace.run_dir import RunDir

Floats = NDArray[np.float64]
Point = dict[str, Any]

BEST_OF = (2, 4, 8, 16, 32, 64)
NEAR = 0.05  # nats: nearer to the reference d is noise, and the laws' slope is infinite at 0


def collected(
    plan: Plan, samples: Mapping[int, Samples], folder: Callable[[Judge, float, int], RunDir]
) -> dict[str, Any]:
    """Every point, the laws and the ends of the runs; `samples` by seed, `folder` of a judge, a beta and a seed."""
    points: list[Point] = []
    for seed, drawn in samples.items():
        best = {judge: frontier(drawn.scores[judge.name]) for judge in plan.judges}
        for judge, beta in plan.runs():
            points += _policy_points(folder(judge, beta, seed), drawn, best[judge], seed, judge, beta)
        for judge in plan.judges:
            points += _best_of_points(drawn, best[judge], seed, judge)
    return {
        "study": "overoptimisation",
        "recipe": plan.given.recipe().name,
        "seeds": list(plan.seeds),
        "betas": list(plan.betas),
        "label_beta": plan.label_beta,
        "judges": [asdict(judge) | {"main": judge == plan.main} for judge in plan.judges],
        "samples": plan.samples,
        "support": statistics.fmean(frontier(drawn.scores[plan.main.name]).end for drawn in samples.values()),
        "laws": laws(plan, points, samples),
        "ends": ends(plan, points),
        "points": points,
    }


def _policy_points(
    run: RunDir, drawn: Samples, best: Frontier, seed: int, judge: Judge, beta: float
) -> Iterator[Point]:
    """One point per evaluation of a run; gains are over many answers of the reference to the same prompts."""
    start_score, start_gold = drawn.scores[judge.name].mean(), drawn.truth["gold"].mean()
    truth = {line["step"]: line for line in read_json_lines(run.truth)}
    for line in read_json_lines(run.metrics):
        if line["stage"] != "evaluation":
            continue
        known, kl = truth[line["step"]], line["evaluation/kl_per_sequence"]
        proxy = line["evaluation/score"] - start_score
        yield {
            **_point("policy", seed, judge, beta, kl, proxy, known["gold"] - start_gold, best),
            "step": line["step"],
            "correct": known["correct"],
            "length": line["evaluation/length"],
        }


def _best_of_points(drawn: Samples, best: Frontier, seed: int, judge: Judge) -> Iterator[Point]:
    """One point per n: unbiased means over all subsets of n of the answers."""
    mean = partial(_best_of_means, drawn, judge)
    start_score, start_gold = drawn.scores[judge.name].mean(), drawn.truth["gold"].mean()
    for n in _best_of(drawn):
        logprobs = torch.as_tensor(drawn.logprobs)
        kl = float(mean(n, bon_kl_estimate(logprobs, n).numpy()).mean())
        proxy = mean(n, drawn.scores[judge.name]).mean() - start_score
        gold = mean(n, drawn.truth["gold"]).mean() - start_gold
        yield {
            **_point("best_of_n", seed, judge, n, kl, proxy, gold, best),
            "kl_bound": bon_kl_bound(n),
            "correct": float(mean(n, drawn.truth["correct"]).mean()),
            "length": float(mean(n, drawn.lengths).mean()),
        }


def _point(
    optimiser: str, seed: int, judge: Judge, strength: float, kl: float, proxy: float, gold: float, best: Frontier
) -> Point:
    share = float(efficiency(proxy, kl, best))
    return {
        "optimiser": optimiser,
        "seed": seed,
        "labels": judge.labels,
        "hidden": judge.hidden,
        "strength": strength,
        "kl": float(kl),
        "root_kl": float(np.sqrt(max(kl, 0.0))),
        "proxy": float(proxy),
        "gold": float(gold),
        "efficiency": share if kl > NEAR and np.isfinite(share) else None,  # open where no sample reaches
    }


def _best_of(drawn: Samples) -> list[int]:
    return [n for n in BEST_OF if n <= drawn.logprobs.shape[1]]


def _best_of_means(drawn: Samples, judge: Judge, n: int, quantity: Floats) -> Floats:
    """[P] mean `quantity` of the best of n answers by the judge's score."""
    scores = torch.as_tensor(drawn.scores[judge.name])
    found: Floats = best_of_n_mean(scores, torch.as_tensor(quantity), n).numpy()
    return found


def laws(plan: Plan, points: Sequence[Point], samples: Mapping[int, Samples]) -> list[dict[str, Any]]:
    """The laws with intervals: policies at every beta, then each reward model's policies, then its best of n."""
    found = [_law("policies at every beta", "rl", plan.main, lambda: _run_curves(plan, points, plan.main, None))]
    for judge in plan.judges:
        curves = partial(_run_curves, plan, points, judge, plan.label_beta)
        found.append(_law(f"policies at beta {plan.label_beta:g}", "rl", judge, curves))
    for judge in plan.judges:
        found.append(_law("best of n", "best_of_n", judge, partial(_prompt_curves, points, samples, judge)))
    return found


def _law(what: str, form: Form, judge: Judge, curves: Callable[[], list[list[Curve]]]) -> dict[str, Any]:
    head = {"what": what, "form": form, **asdict(judge)}
    try:
        law: Law = fit(form, curves())
    except ValueError as error:
        return head | {"refused": str(error)}
    d = np.linspace(0, law.longest, 61)
    curve = {"d": d.tolist(), "gold": law.at(d).tolist()}
    return head | asdict(law) | {"turns": law.turns, "curve": curve}


def _run_curves(plan: Plan, points: Sequence[Point], judge: Judge, beta: float | None) -> list[list[Curve]]:
    """Runs by seed, without what is as near to the reference as noise is."""
    groups: list[list[Curve]] = []
    for seed in plan.seeds:
        mine = [p for p in points if p["optimiser"] == "policy" and p["seed"] == seed and _of(p, judge)]
        runs = [[p for p in mine if p["strength"] == one and p["kl"] > NEAR] for one in plan.betas]
        kept = [run for run in runs if run and beta in (None, run[0]["strength"])]
        groups.append([([p["root_kl"] for p in run], [p["gold"] for p in run]) for run in kept])
    return groups


def _prompt_curves(points: Sequence[Point], samples: Mapping[int, Samples], judge: Judge) -> list[list[Curve]]:
    """Prompts by seed: each one's gain in gold at the d that its seed has at each n."""
    groups: list[list[Curve]] = []
    for seed, drawn in samples.items():
        mine = [p for p in points if p["optimiser"] == "best_of_n" and p["seed"] == seed and _of(p, judge)]
        d, gold = [p["root_kl"] for p in mine], drawn.truth["gold"]
        gains = [_best_of_means(drawn, judge, n, gold) - gold.mean(axis=1) for n in _best_of(drawn)]
        groups.append([(d, prompt) for prompt in np.stack(gains, axis=1)])
    return groups


def _of(point: Point, judge: Judge) -> bool:
    return (point["labels"], point["hidden"]) == (judge.labels, judge.hidden)


def ends(plan: Plan, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Each policy and each judge's largest n: figures at the end and the highest gold, over seeds."""
    chosen: list[tuple[str, Judge, float]] = [("policy", judge, beta) for judge, beta in plan.runs()]
    most = max((p["strength"] for p in points if p["optimiser"] == "best_of_n"), default=0)
    chosen += [("best_of_n", judge, most) for judge in plan.judges]
    found = []
    for optimiser, judge, strength in chosen:
        mine = [p for p in points if p["optimiser"] == optimiser and _of(p, judge)]
        if optimiser == "policy":
            mine = [p for p in mine if p["strength"] == strength]
        series = [[p for p in mine if p["seed"] == seed] for seed in plan.seeds]
        if not all(series):
            continue
        highest = [max(one, key=lambda p: p["gold"]) for one in series]
        last = [one[-1] for one in series]
        row: dict[str, Any] = {"optimiser": optimiser, **asdict(judge), "strength": strength}
        for name in ("kl", "proxy", "gold", "correct", "length"):
            row[name] = _over_seeds([p[name] for p in last])
        row["highest_gold"] = _over_seeds([p["gold"] for p in highest])
        row["highest_at"] = _over_seeds([p["root_kl"] for p in highest])
        found.append(row)
    return found


def _over_seeds(values: Sequence[float]) -> list[float]:
    """Mean, lowest and highest."""
    return [statistics.fmean(values), min(values), max(values)]
