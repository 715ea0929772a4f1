"""Does the built-in desk drift when, and only when, its annotators are biased? Five seeds, four scenarios.

Writes docs/results/desk-drift.json and .md. Run from the repository root:

    python benchmarks/desk_drift.py --out runs/desk-drift --workers 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SEEDS = range(5)
RECIPES = {
    "drift": (ROOT / "src/kedge/desk/demo.toml", ()),
    "unbiased": (ROOT / "src/kedge/desk/demo.toml", ("desk.annotators.length=0.0",)),
    "exploit": (ROOT / "recipes/desk-exploit.toml", ()),
}


def carry_out(job: tuple[str, int, Path]) -> dict[str, Any]:
    """One run in a process of its own, unless it is there already; its figures."""
    scenario, seed, out = job
    folder = out / f"{scenario}-{seed}"
    if not (folder / "result.json").exists():
        if scenario == "corrected":
            code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import desk_drift; "
            code += f"desk_drift.correct({str(out)!r}, {seed})"
            command = [sys.executable, "-c", code]
        else:
            recipe, overrides = RECIPES[scenario]
            command = [sys.executable, "-m", "kedge.cli", "run", str(recipe), "--out", str(folder), "--json"]
            for setting in (f"seed={seed}", "threads=1", *overrides):
                command += ["--set", setting]
            command += ["--resume"] if folder.exists() else []
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        result = figures(folder) | {"scenario": scenario, "seed": seed}
        (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return json.loads((folder / "result.json").read_text())


def correct(out: str, seed: int) -> None:
    """PPO again from the drifted run's start, with what the rule proposes after reading its trace."""
    from kedge import recipe as recipes
    from kedge.diagnose.correction import propose
    from kedge.pipeline import run
    from kedge.progress import Interrupt, Progress
    from kedge.trace.reader import read_run

    start, folder = Path(out) / f"drift-{seed}", Path(out) / f"corrected-{seed}"
    path, overrides = RECIPES["drift"]
    proposed = propose(read_run(start)).overrides
    recipe = recipes.load(path, (f"seed={seed}", "threads=1", *overrides, *proposed))
    quiet = Progress(quiet=True)
    text = path.read_text(encoding="utf-8")
    resume = (folder / "manifest.json").exists()
    run(recipe, folder, recipe_text=text, resume=resume, progress=quiet, interrupt=Interrupt(), start=start)


def figures(folder: Path) -> dict[str, Any]:
    """What the criteria need, from the run's evaluations and the desk's truth."""
    from kedge.diagnose.correction import propose
    from kedge.trace.reader import read_run

    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in evaluations if line["stage"] == "evaluation"]
    truth = [json.loads(line) for line in (folder / "truth/evaluation.jsonl").read_text().splitlines()]
    first, last = evaluations[0], evaluations[-1]
    proposal = propose(read_run(folder))
    return {
        "score": [first["evaluation/score"], last["evaluation/score"]],
        "gold": [truth[0]["gold"], max(line["gold"] for line in truth), truth[-1]["gold"]],
        "correct": [truth[0]["correct"], truth[-1]["correct"]],
        "length_ratio": last["evaluation/length"] / last["evaluation/length_reference"],
        "kl_per_sequence": last["evaluation/kl_per_sequence"],
        "kl_by_tercile": [last[f"evaluation/tercile{i}/kl_per_sequence"] for i in range(3)],
        "proposal": list(proposal.overrides),
        "status": proposal.status,
    }


def drifted(result: dict[str, Any]) -> dict[str, bool]:
    """The classic drift, criterion by criterion."""
    kl = result["kl_by_tercile"]
    return {
        "score rises": result["score"][1] > result["score"][0],
        "length > 1.5x": result["length_ratio"] > 1.5,
        "gold >= 0.3 below best": result["gold"][2] <= result["gold"][1] - 0.3,
        "KL grows": result["kl_per_sequence"] > 1.0,
        "KL highest where reference is briefest": kl[0] == max(kl),
    }


def hacked_at_constant_length(result: dict[str, Any]) -> dict[str, bool]:
    return {
        "score rises": result["score"][1] > result["score"][0],
        "length within 0.75x to 1.33x": 0.75 < result["length_ratio"] < 1.33,
        "gold >= 0.3 below best": result["gold"][2] <= result["gold"][1] - 0.3,
    }


def render(results: list[dict[str, Any]], command: str) -> str:
    """The page; every number in it comes from `results`."""
    lines = ["# Does the desk drift when it should?", "", f"Made by `{command}`; raw figures in `desk-drift.json`.", ""]
    lines += ["512 fixed evaluation prompts; gold is [reference, best, final]; KL is k1, nats per sequence.", ""]
    columns = ["seed", "score", "gold", "correct", "length ratio", "KL", "KL by tercile", "rule proposes", "verdict"]
    for scenario in ("drift", "corrected", "unbiased", "exploit"):
        rows = [result for result in results if result["scenario"] == scenario]
        test = hacked_at_constant_length if scenario == "exploit" else drifted
        held = sum(all(test(row).values()) for row in rows)
        name = "hacked at constant length" if scenario == "exploit" else "showed the classic drift"
        lines += [f"## {scenario}: {held} of {len(rows)} {name}", "", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "--|" * len(columns)]
        for row in rows:
            missed = [name for name, ok in test(row).items() if not ok]
            cells = [
                str(row["seed"]),
                _path(row["score"]),
                _path(row["gold"]),
                _path(row["correct"]),
                f"{row['length_ratio']:.2f}",
                f"{row['kl_per_sequence']:.1f}",
                " / ".join(f"{value:.1f}" for value in row["kl_by_tercile"]),
                ", ".join(setting.removeprefix("policy.") for setting in row["proposal"]) or "nothing",
                "yes" if not missed else "not: " + "; ".join(missed),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _path(values: list[float]) -> str:
    return " -> ".join(f"{value:.2f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/desk-drift"))
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for scenarios in (("drift", "unbiased", "exploit"), ("corrected",)):
        jobs = [(scenario, seed, arguments.out) for scenario in scenarios for seed in SEEDS]
        with ThreadPoolExecutor(arguments.workers) as pool:
            for result in pool.map(carry_out, jobs):
                results.append(result)
                print(json.dumps(result), flush=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "desk-drift.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page = render(results, "python benchmarks/desk_drift.py")
    (RESULTS / "desk-drift.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
