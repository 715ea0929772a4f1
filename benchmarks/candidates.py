"""What can labels teach, depending on how the answers that are compared were found?

The built-in desk with unbiased annotators and the same prompts for every scheme: how many labels it yields and how
different their answers are, what the reward model learns (on held-out pairs of its own kind and on pairs sampled
plainly), and the gold that PPO ends at. Writes docs/results/candidates.json and .md. From the repository root:

    python benchmarks/candidates.py --out runs/candidates --workers 2
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from desk_runs import DESK, RESULTS, carry_out, figures, lines, reward_figures, side_by_side

SEEDS = (0, 1, 2)
SCHEMES: dict[str, tuple[str, ...]] = {
    "temperature 0.5": ("pairs.temperature=0.5",),
    "temperature 1": (),
    "temperature 1.5": ("pairs.temperature=1.5",),
    "best 2 of 4 beams": ("pairs.method=beam", "pairs.candidates=4"),
    "3 checkpoints": ("pairs.checkpoints=3",),
    "best of 4 against another": ("pairs.method=best_of", "pairs.candidates=4"),
}
WORLD = ("desk.annotators.length=0",)
PLAIN = "temperature 1"


@dataclass(frozen=True)
class Job:
    """One scheme under one seed; `out` holds all of them."""

    scheme: str
    seed: int
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / f"{self.seed}" / "".join(c if c.isalnum() else "-" for c in self.scheme)


def carried_out(job: Job) -> dict[str, Any]:
    settings = (f"seed={job.seed}", *WORLD, *SCHEMES[job.scheme])
    carry_out("reward", DESK, job.folder, settings, start=job.out / f"sft-{job.seed}")
    carry_out("policy", DESK, job.folder, settings)
    found = [line for line in lines(job.folder / "metrics.jsonl") if "pairs/two_answers" in line][-1]
    diversity = {name.removeprefix("pairs/"): found[name] for name in found if name.startswith("pairs/")}
    measured = {"diversity": diversity, "reward": reward_figures(job.folder), "policy": figures(job.folder)}
    return {"scheme": job.scheme, "seed": job.seed, "pairs": len(lines(job.folder / "pairs.jsonl")), **measured}


def common_accuracy(job: Job) -> float:
    """Accuracy of the scheme's reward model on held-out prompts of the plainly sampled pairs."""
    from kedge import recipe as recipes
    from kedge.data.records import Preference
    from kedge.data.split import is_held_out
    from kedge.models.reward import load_reward_model
    from kedge.pipeline.context import Context
    from kedge.pipeline.tasks import inputs_of
    from kedge.progress import Interrupt, Progress
    from kedge.rollout.reward import scores
    from kedge.trace.run_dir import RunDir

    given = recipes.load(DESK, (f"seed={job.seed}", *WORLD))
    inputs = inputs_of(given)
    context = Context(given, RunDir(job.folder), inputs.task, inputs.tokenizer, Progress(quiet=True), Interrupt())
    plain = Job(PLAIN, job.seed, job.out).folder / "pairs.jsonl"
    rows = [Preference(row["prompt"], row["chosen"], row["rejected"]) for row in lines(plain)]
    judgments = context.encode_judgments([row for row in rows if is_held_out(row.prompt, given.reward.holdout)])
    found = scores(load_reward_model(context.run.models / "reward"), judgments.responses)[judgments.index]
    return float((found[:, 0] > found[:, 1]).float().mean())


def render(results: list[dict[str, Any]], command: str) -> str:
    """The page; every number in it comes from `results`."""
    page = ["# How candidates are found, and what their labels teach", ""]
    page += [f"Made by `{command}`; raw figures in `candidates.json`.", ""]
    page += [
        f"{len(SEEDS)} seeds, unbiased annotators, the same prompts for every scheme. Two answers: share of prompts",
        "with two different ones. Word distance: mean 1 - Jaccard of the two answers' words. Accuracy is the reward",
        "model's on held-out pairs of the scheme's own kind, and on held-out pairs at temperature 1. In brackets",
        "lowest and highest seed.",
        "",
        "| scheme | pairs | two answers | word distance | own accuracy | common accuracy "
        "| gold | correct | length | KL |",
        "|" + "--|" * 10,
    ]
    for scheme in SCHEMES:
        mine = [row for row in results if row["scheme"] == scheme]
        cells = [_spread([row["pairs"] for row in mine], 0)]
        cells += [_spread([row["diversity"][name] for row in mine]) for name in ("two_answers", "word_distance")]
        cells += [_spread([row["reward"]["accuracy"] for row in mine])]
        cells += [_spread([row["common_accuracy"] for row in mine])]
        names = ("gold", "correct", "length_ratio", "kl_per_sequence")
        cells += [_spread([row["policy"][name] for row in mine]) for name in names]
        page.append("| " + " | ".join([scheme, *cells]) + " |")
    return "\n".join([*page, ""])


def _spread(values: list[float], digits: int = 2) -> str:
    low, mean, high = (f"{value:.{digits}f}" for value in (min(values), sum(values) / len(values), max(values)))
    return f"{mean} ({low}, {high})"


def _supervised(out: Path, seed: int) -> None:
    """With checkpoints on the way, from which one of the schemes samples."""
    carry_out("sft", DESK, out / f"sft-{seed}", (f"seed={seed}", "pairs.checkpoints=3"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/candidates"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    side_by_side(partial(_supervised, out), SEEDS, arguments.workers)
    jobs = [Job(scheme, seed, out) for scheme in SCHEMES for seed in SEEDS]
    results = side_by_side(carried_out, jobs, arguments.workers)
    shared = side_by_side(common_accuracy, jobs, arguments.workers)
    results = [row | {"common_accuracy": value} for row, value in zip(results, shared, strict=True)]
    RESULTS.joinpath("candidates.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = render(results, "python benchmarks/candidates.py")
    RESULTS.joinpath("candidates.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
