"""What the studies of the built-in desk share: commands carried out once, and the figures they left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
DESK = ROOT / "src/kedge/desk/demo.toml"
EXPLOIT = ROOT / "recipes/desk-exploit.toml"
# Only the ends are compared; nobody looks in between.
QUIET = ("threads=1", "evaluate.every=1000", "trace.probes_every=1000", "checkpoint.every=1000")

T = TypeVar("T")
U = TypeVar("U")


def carry_out(
    stage: str, recipe: Path, out: Path, settings: Sequence[str], *, start: Path | None = None, inputs: Any = None
) -> None:
    """One stage of a recipe in the folder `out`, unless it has been done."""
    from kedge import pipeline
    from kedge import recipe as recipes
    from kedge.progress import Interrupt, Progress

    done = out / f"{stage}.done"
    if done.exists():
        return
    pipeline.run(
        recipes.load(recipe, (*QUIET, *settings)),
        out,
        recipe_text=recipe.read_text(encoding="utf-8"),
        stages=(stage,),
        resume=out.exists(),
        progress=Progress(quiet=True),
        interrupt=Interrupt(),
        start=start,
        inputs=inputs,
    )
    done.touch()


def figures(folder: Path) -> dict[str, float]:
    """The start and the end of a policy run: gold, share of correct answers, length over the reference's, KL, score."""
    evaluations = [line for line in lines(folder / "metrics.jsonl") if line["stage"] == "evaluation"]
    truth = lines(folder / "truth/evaluation.jsonl")
    first, last = evaluations[0], evaluations[-1]
    return {
        "gold_start": truth[0]["gold"],
        "gold": truth[-1]["gold"],
        "correct_start": truth[0]["correct"],
        "correct": truth[-1]["correct"],
        "length_ratio": last["evaluation/length"] / last["evaluation/length_reference"],
        "kl_per_sequence": last["evaluation/kl_per_sequence"],
        "score": last["evaluation/score"] - first["evaluation/score"],
    }


def reward_figures(folder: Path) -> dict[str, float]:
    """What the reward model got on held-out pairs."""
    found = [line for line in lines(folder / "metrics.jsonl") if "heldout/accuracy" in line]
    return {name.removeprefix("heldout/"): value for name, value in found[-1].items() if name.startswith("heldout/")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def side_by_side(work: Callable[[T], U], jobs: Sequence[T], workers: int) -> list[U]:
    """The results in order, from processes of their own; each is named on stderr as it is there."""
    results: list[U] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for job, result in zip(jobs, pool.map(work, jobs), strict=True):
            print(f"{len(results) + 1}/{len(jobs)} {job}", file=sys.stderr, flush=True)
            results.append(result)
    return results
