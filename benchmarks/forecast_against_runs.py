"""Where a forecast said reward models would push, against where PPO then went, in the built-in desk.

Reward models of annotators without a bias, and with one for length, refusals or a certain tone. Each is forecast from
64 answers of the supervised policy to 150 prompts; then PPO runs against it (the demo's settings) and is evaluated on
512 prompts as it goes. A forecast is read along its path: where the score gained is that of the run, and where the KL
is. Beside it forecasts from scores that were shuffled within each prompt: they know nothing and must be at chance.
Writes docs/results/forecast.json and .md. From the repository root:

    python benchmarks/forecast_against_runs.py --out runs/forecast --workers 2

What is done is left alone, so that the same command goes on. `--seeds 0 --only length` makes one reward model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from desk_runs import DESK, EXPLOIT, RESULTS, carry_out, lines, side_by_side
from policy_runs import table

COMMAND = "python benchmarks/forecast_against_runs.py"
BIASES: dict[str, tuple[Path, tuple[str, ...]]] = {
    "none": (DESK, ("desk.annotators.length=0",)),
    "length": (DESK, ()),
    "refusal": (DESK, ("desk.annotators.length=0.05", "desk.annotators.refusal=3.0")),
    "certainty": (EXPLOIT, ("policy.kl.beta=0.15",)),
}
RUN = ("evaluate.every=2", "policy.steps=36")
SHUFFLES = 5
NEAR = 0.1  # nats: nearer to the reference nothing has moved yet
KNOWN = ("gold", "correct")  # of the desk, for this page alone
AIM = 0.9
LEVELS = ("length", "refusals", "certainty", "gold", "correct")


@dataclass(frozen=True)
class Job:
    """One reward model."""

    bias: str
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.bias}-{self.seed}"


def start(job: Job) -> None:
    """The supervised policy of a seed."""
    carry_out("sft", DESK, job.out / f"sft-{job.seed}", (f"seed={job.seed}",))


def carried_out(job: Job) -> dict[str, Any]:
    """Forecast and run, compared; kept in the job's folder."""
    done = job.folder / "compared.json"
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    recipe, bias = BIASES[job.bias]
    settings = (f"seed={job.seed}", *bias)
    carry_out("reward", recipe, job.folder, settings + RUN, start=job.out / f"sft-{job.seed}")
    told = forecasts(job.folder)
    carry_out("policy", recipe, job.folder, settings + RUN)
    found = {"bias": job.bias, "seed": job.seed, **compared(told, realised(job.folder))}
    done.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def forecasts(run: Path) -> dict[str, Any]:
    """The forecast of a run's reward model, and those of shuffled scores; what the desk knows is among the features."""
    from kedge.data.records import prompt_text
    from kedge.experiment.answers import Answers
    from kedge.experiment.forecast import forecast
    from kedge.experiment.forecasting import Request, answers_of_run
    from kedge.experiment.fork import source_recipe
    from kedge.pipeline.tasks import inputs_of
    from kedge.progress import Interrupt, Progress

    answers: Answers = answers_of_run(run, [], Request(), Progress(quiet=True), Interrupt())[0]
    task = inputs_of(source_recipe(run)).task
    prompts = {prompt_text(prompt): prompt for prompt in task.evaluation.rows}
    known = [
        [task.truth(prompts[prompt], text) for text in row]
        for prompt, row in zip(answers.prompts, answers.texts, strict=True)
    ]
    features = answers.features()
    features |= {name: np.array([[one[name] for one in row] for row in known]) for name in KNOWN}
    (scores,) = answers.scores.values()
    rng = np.random.default_rng(0)
    return {
        "reference": float(scores.mean()),
        "told": forecast("told", scores, features),
        "shuffled": [forecast("shuffled", rng.permuted(scores, axis=1), features) for _ in range(SHUFFLES)],
    }


def realised(run: Path) -> list[dict[str, Any]]:
    """Every evaluation of a run: KL, score, and the mean of every feature with its standard error over prompts."""
    from kedge.diagnose.features import FEATURES
    from kedge.trace.reader import read_run

    read = read_run(run)
    truth = {line["step"]: line for line in lines(run / "truth/evaluation.jsonl")}
    found = []
    for step in read.sample_steps():
        samples = read.samples(step)
        texts, lengths = samples["response"].to_pylist(), samples["length"].to_numpy()
        values = {name: feature(texts, lengths) for name, feature in FEATURES.items()}
        row: dict[str, Any] = {
            "step": step,
            "kl": float(samples["kl"].to_numpy().mean()),
            "score": float(samples["score"].to_numpy().mean()),
            "features": {name: float(value.mean()) for name, value in values.items()},
            "errors": {name: float(value.std() / np.sqrt(len(value))) for name, value in values.items()},
        }
        row["features"] |= {name: truth[step][name] for name in KNOWN}
        found.append(row)
    return found


def compared(told: Mapping[str, Any], run: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Every evaluation away from the reference, beside the forecast where it has gained the same and where the KL is
    the same; both are None beyond what the answers support."""
    first = run[0]
    points = []
    for row in run:
        if row["kl"] < NEAR:
            continue
        gain = row["score"] - first["score"]
        changes = {name: value - first["features"][name] for name, value in row["features"].items()}
        points.append(
            {
                "step": row["step"],
                "kl": row["kl"],
                "gain": gain,
                "values": row["features"],
                "errors": row["errors"],
                "changes": changes,
                "by_score": _at(told["told"], "score", gain),
                "by_kl": _at(told["told"], "kl", row["kl"]),
                "shuffled": [_at(one, "kl", min(row["kl"], one.end)) for one in told["shuffled"]],
            }
        )
    forecast = told["told"]
    return {
        "support": forecast.end,
        "least_beta": forecast.least_beta,
        "reference": {name: value.value for name, value in forecast.start.values.items()},
        "not_checked": dict(forecast.unknown),
        "points": points,
    }


def _at(forecast: Any, column: str, value: float) -> dict[str, Any] | None:
    """The path where `column` has a value, linearly between its points; None outside it."""
    x = np.array([getattr(place, column) for place in forecast.path])
    if not 0 < value <= x[-1]:
        return None
    found: dict[str, Any] = {"kl": float(np.interp(value, x, [place.kl for place in forecast.path]))}
    found["changes"] = {
        name: [
            float(np.interp(value, x, [getattr(place.changes[name], part) for place in forecast.path]))
            for part in ("value", "low", "high")
        ]
        for name in forecast.start.values
    }
    return found


# The page


def calls(found: Sequence[Mapping[str, Any]], key: str, *, last: bool) -> list[dict[str, Any]]:
    """Every feature that a forecast says moves (its interval excludes 0), beside how it moved; of each run the last
    evaluation inside the stated range, or all of them."""
    made = []
    for one in found:
        inside = [point for point in one["points"] if point[key] is not None]
        for point in inside[-1:] if last else inside:
            for name, (value, low, high) in point[key]["changes"].items():
                moved = point["changes"][name]
                sure = name in point["errors"] and abs(moved) > 2 * point["errors"][name]
                row = {"bias": one["bias"], "seed": one["seed"], "feature": name, "told": value, "moved": moved}
                made.append(row | {"called": low > 0 or high < 0, "sure": sure or name in KNOWN})
    return made


def shuffled_calls(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of shuffled scores, every feature, at the last evaluation of each run."""
    made = []
    for one in found:
        for forecast in one["points"][-1]["shuffled"] if one["points"] else ():
            for name, (value, low, high) in (forecast or {"changes": {}})["changes"].items():
                moved = one["points"][-1]["changes"][name]
                made.append({"told": value, "moved": moved, "called": low > 0 or high < 0, "feature": name})
    return made


def right(made: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many moved as they were told to, of how many."""
    moved = [row for row in made if row["moved"] != 0]
    return sum(row["told"] * row["moved"] > 0 for row in moved), len(moved)


def share(made: Sequence[Mapping[str, Any]]) -> str:
    """The share with Wilson's interval."""
    from kedge.evaluate.intervals import wilson

    hits, count = right(made)
    if not count:
        return "none"
    low, high = wilson(hits / count, count)
    return f"{hits / count:.2f} ({hits} of {count}; {low:.2f} to {high:.2f})"


def render(found: list[dict[str, Any]]) -> str:
    """The page; every number in it comes from `found`."""
    seeds = len({one["seed"] for one in found})
    page = ["# Forecast against runs", "", f"Made by `{COMMAND}`; raw figures in `forecast.json`.", ""]
    page += [
        f"Reward models of the built-in desk: {len(found)} (annotators' bias: "
        f"{', '.join(dict.fromkeys(one['bias'] for one in found))}; seeds: {seeds}).",
        "Each was forecast from 64 answers to 150 prompts before PPO ran against it for 36 steps.",
        "A feature is *called* where the forecast's 95% interval of its change excludes 0. *By score*: read",
        "where the forecast has gained as much score as the run; *by KL*: where it is as far from the reference.",
        "Beyond what the answers support nothing is told, and nothing is counted. Gold and correct are known to the",
        "desk and used on this page alone.",
        "",
        "## Signs",
        "",
    ]
    by_score, by_kl = (calls(found, key, last=True) for key in ("by_score", "by_kl"))
    rows = [
        ("called, last evaluation inside the range, by score", _called(by_score)),
        ("of these, what `kedge forecast` tells by itself", _among(_called(by_score), known=False)),
        ("of these, gold and correct", _among(_called(by_score), known=True)),
        ("the same, by KL", _called(by_kl)),
        (
            "called, and moved by more than two standard errors, by score",
            [row for row in _called(by_score) if row["sure"]],
        ),
        ("called, every evaluation inside the range, by score", _called(calls(found, "by_score", last=False))),
        ("every feature, called or not, by score", by_score),
        ("scores shuffled within each prompt: every feature", shuffled_calls(found)),
        ("scores shuffled within each prompt: called", _called(shuffled_calls(found))),
    ]
    page += table(("what", "signs right (95%)"), [(name, share(made)) for name, made in rows])
    page += ["", "By feature (called, last evaluation inside the range, by score):", ""]
    names = list(dict.fromkeys(row["feature"] for row in by_score))
    page += table(("feature", "signs right"), [(name, share(_of(_called(by_score), name))) for name in names])
    page += ["", "## Levels", "", "At the last evaluation inside the range, told by score; in brackets what came.", ""]
    page += _levels(found)
    page += ["", "## Reading", "", *_reading(found, by_score)]
    return "\n".join([*page, ""])


def _called(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in made if row["called"]]


def _among(made: Sequence[dict[str, Any]], *, known: bool) -> list[dict[str, Any]]:
    return [row for row in made if (row["feature"] in KNOWN) == known]


def _of(made: Sequence[dict[str, Any]], feature: str) -> list[dict[str, Any]]:
    return [row for row in made if row["feature"] == feature]


def _levels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for one in found:
        inside = [point for point in one["points"] if point["by_score"] is not None]
        if not inside:
            rows.append([f"{one['bias']}, {one['seed']}", "none inside", *["–"] * len(LEVELS)])
            continue
        point = inside[-1]
        cells = [f"{point['by_score']['kl']:.2f} ({point['kl']:.2f})"]
        for name in LEVELS:
            change = point["by_score"]["changes"].get(name)
            told = "–" if change is None else f"{one['reference'][name] + change[0]:.2f}"
            cells.append(f"{told} ({point['values'][name]:.2f})")
        rows.append([f"{one['bias']}, {one['seed']}", *cells])
    return table(("annotators, seed", "KL, nats", *LEVELS), rows)


def _reading(found: Sequence[Mapping[str, Any]], by_score: Sequence[dict[str, Any]]) -> list[str]:
    hits, count = right(_called(by_score))
    said = []
    if count:
        met = "met" if hits / count >= AIM else "missed"
        said.append(
            f"- The aim, {AIM} of the called signs right, is {met}: {hits / count:.2f}, gold and correct included."
        )
    misses = [row for row in _called(by_score) if row["told"] * row["moved"] <= 0]
    for row in misses:
        what = f"{row['feature']} ({row['bias']}, seed {row['seed']})"
        said.append(f"- Missed: {what}, told {row['told']:+.3f}, came {row['moved']:+.3f}.")
    inside = [[point for point in one["points"] if point["by_score"] is not None] for one in found]
    ratios = [points[-1]["kl"] / points[-1]["by_score"]["kl"] for points in inside if points]
    if ratios:
        said.append(
            f"- For the same score PPO was {statistics.median(ratios):.1f} times as many nats away as the path "
            "(median, last evaluation inside the range): read by KL, a forecast runs ahead."
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/forecast"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(BIASES), default=list(BIASES), metavar="BIAS")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the page")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    side_by_side(start, [Job("none", seed, given.out) for seed in given.seeds], given.workers)
    jobs = [Job(bias, seed, given.out) for seed in given.seeds for bias in given.only]
    found = side_by_side(partial(carried_out), jobs, given.workers)
    found.sort(key=lambda one: (list(BIASES).index(one["bias"]), one["seed"]))
    path = given.results / "forecast.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main()
