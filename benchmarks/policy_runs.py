"""What the studies of policy optimisers share: one start per seed, runs from it, their figures and KL efficiency.

A start is a supervised policy, a reward model and many scored answers of that policy, from which the frontier comes:
the most score that any policy can gain at a KL (`kedge.evaluate.frontier`).
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from desk_runs import DESK, RESULTS, carry_out, lines, side_by_side

ANSWERS = 256  # of the supervised policy, per evaluation prompt: they support the frontier up to about 2.9 nats
NEAR = 0.1  # nats: nearer to the reference an efficiency is noise
LAST = 3  # evaluations that stand for the end of a run

Settings = tuple[str, ...]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One row of a table under one seed."""

    name: str
    settings: Settings
    seed: int
    world: Settings  # what reward model and runs have in common
    out: Path

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}" / "".join(c if c.isalnum() else "-" for c in self.name)


def start(job: Job) -> None:
    """The supervised policy, the reward model and the answers of a seed; what is there is left alone."""
    from kedge import recipe as recipes
    from kedge.experiment.samples import reference_samples
    from kedge.progress import Interrupt, Progress

    base = job.out / f"seed-{job.seed}" / "start"
    settings = (f"seed={job.seed}", *job.world)
    carry_out("sft", DESK, base, settings)
    carry_out("reward", DESK, base, settings)
    if not _samples(job).exists():
        recipe = recipes.load(DESK, ("threads=1", *settings))
        quiet = Progress(quiet=True)
        reference_samples(recipe, base, {"start": base}, ANSWERS, quiet, Interrupt()).save(_samples(job))


def carried_out(job: Job) -> Row:
    """The run of a job and what it came to."""
    settings = (f"seed={job.seed}", *job.world, *job.settings)
    carry_out("policy", DESK, job.folder, settings, start=job.out / f"seed-{job.seed}" / "start")
    return {"name": job.name, "seed": job.seed, "settings": list(job.settings), **figures(job)}


def figures(job: Job) -> Row:
    """Gains over the supervised policy on the same prompts, at every evaluation and at the end."""
    from kedge.evaluate.frontier import efficiency, frontier, least_efficiency, shortfall
    from kedge.experiment.samples import Samples

    drawn = Samples.load(_samples(job))
    scores = drawn.scores["start"]
    best = frontier(scores)
    truth = {line["step"]: line for line in lines(job.folder / "truth/evaluation.jsonl")}
    metrics = lines(job.folder / "metrics.jsonl")
    curve = []
    for line in metrics:
        if line["stage"] != "evaluation":
            continue
        kl, gain = line["evaluation/kl_per_sequence"], line["evaluation/score"] - scores.mean()
        known = truth[line["step"]]
        beyond = kl > best.end
        share = (least_efficiency if beyond else efficiency)(gain, kl, best)
        curve.append(
            {
                "step": line["step"],
                "kl": kl,
                "score": gain,
                "gold": known["gold"] - drawn.truth["gold"].mean(),
                "correct": known["correct"],
                "length_ratio": line["evaluation/length"] / drawn.lengths.mean(),
                "efficiency": float(share) if kl > NEAR else None,
                "beyond": beyond,  # the efficiency is at least that: the samples do not reach so far
            }
        )
    names = ("kl", "score", "gold", "correct", "length_ratio")
    last = [point for point in curve[-LAST:] if point["step"] > 0]
    steps = [line for line in metrics if line["stage"] == "policy"]
    return {
        **{name: statistics.fmean(point[name] for point in last) for name in names},
        "gold_start": float(drawn.truth["gold"].mean()),
        "correct_start": float(drawn.truth["correct"].mean()),
        "efficiency": _efficiency(last),
        "support": best.end,
        "shortfall": float(shortfall(scores, min(2.0, best.end))),
        "curve": curve,
        **_controls(steps),
    }


def _controls(steps: Sequence[Mapping[str, Any]]) -> Row:
    """What controllers and limits did: mean KL of the last half's training batches, what was not done."""
    half = [line["kl/reference_per_sequence"] for line in steps[len(steps) // 2 :] if _known(line)]
    last = steps[-1] if steps else {}
    return {
        "last_half_kl": statistics.fmean(half) if half else None,
        "largest_kl": max((line["kl/reference_per_sequence"] for line in steps if _known(line)), default=None),
        "beta": last.get("kl/beta"),
        "left_out": sum(line.get("policy/left_out") or 0 for line in steps),
        "rejected": last.get("kl/rejected"),
        "returns": last.get("kl/branch"),
    }


def _known(line: Mapping[str, Any]) -> bool:
    return line.get("kl/reference_per_sequence") is not None


def _efficiency(points: Sequence[Row]) -> Row:
    """Mean over evaluations, and whether it is only a lower bound."""
    found = [point for point in points if point["efficiency"] is not None]
    value = statistics.fmean(point["efficiency"] for point in found) if found else None
    return {"value": value, "at_least": any(point["beyond"] for point in found)}


def along(curve: Sequence[Row], first: float, last: float) -> Row:
    """The efficiency over a part of the run, from a share of its steps to another."""
    end = max(point["step"] for point in curve)
    return _efficiency([point for point in curve if first * end < point["step"] <= last * end])


def _samples(job: Job) -> Path:
    return job.out / f"seed-{job.seed}" / "samples.npz"


# Tables


def study(
    name: str, rows: Mapping[str, Settings], world: Settings, seeds: Sequence[int], only: Sequence[str], out: Path,
    workers: int, render: Callable[[list[Row]], str],
) -> None:  # fmt: skip
    """Carry out `rows` under every seed and write docs/results/NAME.json and .md.

    With `only` those rows are made again and the others are kept as the JSON has them; nothing else is.
    """
    if unknown := set(only) - set(rows):
        raise SystemExit(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    path = RESULTS / f"{name}.json"
    out.mkdir(parents=True, exist_ok=True)
    jobs = [Job(row, rows[row], seed, world, out) for row in only or rows for seed in seeds]
    for job in jobs if only else ():
        shutil.rmtree(job.folder, ignore_errors=True)
    side_by_side(start, [Job("start", (), seed, world, out) for seed in seeds], workers)
    made = side_by_side(carried_out, jobs, workers)
    kept = json.loads(path.read_text(encoding="utf-8")) if only and path.exists() else []
    remade = {(row["name"], row["seed"]) for row in made}
    found = [row for row in kept if (row["name"], row["seed"]) not in remade and row["name"] in rows] + made
    order = list(rows)
    found.sort(key=lambda row: (order.index(row["name"]), row["seed"]))
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(render(found), encoding="utf-8")


def of(found: Sequence[Row], name: str) -> list[Row]:
    return [row for row in found if row["name"] == name]


def spread(values: Sequence[float | None], places: int = 2) -> str:
    """The mean, in brackets the lowest and the highest seed; a dash where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{places}f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.{places}f}, {max(known):.{places}f})"


def shares(efficiencies: Sequence[Row]) -> str:
    """Efficiencies of several seeds; ≥ where the frontier is only bounded."""
    mark = "≥ " if any(one["at_least"] for one in efficiencies) else ""
    text = spread([one["value"] for one in efficiencies])
    return text if text == "–" else mark + text


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(heads) + " |",
        "|" + "--|" * len(heads),
        *["| " + " | ".join(row) + " |" for row in rows],
    ]


def options(parser: Any, out: str) -> Callable[..., None]:
    """The options of a study; returns `study` with what they say filled in."""
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="make only these rows again")
    given = parser.parse_args()
    return partial(study, seeds=given.seeds, only=given.only, out=given.out, workers=given.workers)
