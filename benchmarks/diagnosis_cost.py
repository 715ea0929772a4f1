"""What `kedge diagnose` costs: seconds and memory on runs of 0.1 to 30 million tokens.

Makes each run (`made_run.py`), diagnoses it in a process of its own, removes it, and writes
docs/results/diagnosis-cost.json, .md and .svg. What is measured already is kept in the folder and not done again:

    python benchmarks/diagnosis_cost.py --out runs/diagnosis-cost
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from made_run import LARGE, SMALL, Shape, make

from kedge.report.plots import Line, line_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
TARGET_S, TARGET_GB = 10.0, 1.0  # at a million tokens
FAR = 100_000_000
STYLE = (
    "<style>text{font:11px sans-serif;fill:#333}.grid{stroke:#ddd;fill:none}.axis{stroke:#333;fill:none}"
    ".line{fill:none;stroke-width:2}.s-policy{stroke:#0072b2}.f-policy{fill:#0072b2}"
    ".s-drift{stroke:#d55e00}.f-drift{fill:#d55e00}</style>"
)


def measure(folder: Path) -> dict[str, float]:
    """One diagnosis in a child process: wall and CPU seconds, and the child's largest resident set."""
    command = [sys.executable, "-m", "kedge.cli", "diagnose", str(folder), "--no-html", "--json"]
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 1):  # 1: a check fails, as it may on numbers drawn by chance
        raise SystemExit(f"kedge diagnose {folder} ended with {child.returncode}")
    return {
        "wall_s": round(wall, 2),
        "user_s": round(used.ru_utime, 2),
        "system_s": round(used.ru_stime, 2),
        "peak_mb": round(used.ru_maxrss / 1024, 1),
    }


def run_of(shape: Shape, size: int, out: Path) -> dict[str, Any]:
    """Make, measure, remove."""
    shutil.rmtree(out, ignore_errors=True)
    # Made elsewhere: what a process has held at most is handed down to its children's account.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        steps, tokens = pool.submit(make, out, size, shape).result()
    disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    found = {"shape": shape.name, "asked": size, "tokens": tokens, "steps": steps} | measure(out)
    shutil.rmtree(out)
    return found | {"disk_mb": round(disk / 2**20, 1), "load": round(os.getloadavg()[0], 1)}


def fitted(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of one shape: seconds = start + rate x tokens; the exponent of what is above the start; memory by tokens."""
    tokens, user, peak = (np.array([row[name] for row in rows], float) for name in ("tokens", "user_s", "peak_mb"))
    rate, start = np.polyfit(tokens, user, 1, w=1 / user)  # relative errors: the smallest run counts as the largest
    above = user - start
    keep = above > 0.2 * user
    exponent = float(np.polyfit(np.log(tokens[keep]), np.log(above[keep]), 1)[0]) if keep.sum() > 1 else float("nan")
    large = tokens >= 1e6
    slope, level = np.polyfit(tokens[large], peak[large], 1) if large.sum() > 1 else (float("nan"), peak[-1])
    return {
        "start_s": float(start),
        "user_s_per_million": float(rate * 1e6),
        "exponent": exponent,
        "mb_per_million": float(slope * 1e6),
        "mb_at_100_million": float(level + max(slope, 0) * FAR),
    }


def drawing(rows: list[dict[str, Any]]) -> str:
    """User seconds over tokens, one line a shape."""
    lines = []
    for shape, tone in ((SMALL, "policy"), (LARGE, "drift")):
        mine = [row for row in rows if row["shape"] == shape.name]
        x, y = (np.array([row[name] for row in mine], float) for name in ("tokens", "user_s"))
        lines.append(Line(shape.name, x / 1e6, y, tone))
    chart = line_chart("kedge diagnose", lines, x="million tokens", y="user CPU seconds")
    found = re.search(r"<svg class=\"plot\" (.*?)>(.*?)</svg>", chart, re.DOTALL)
    assert found is not None
    return f'<svg xmlns="http://www.w3.org/2000/svg" {found[1]}>{STYLE}{found[2]}</svg>\n'


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What a diagnosis costs",
        "",
        "Made by `python benchmarks/diagnosis_cost.py`; raw figures in `diagnosis-cost.json`.",
        "",
        f"{result['cores']} cores, Python {result['python']}. Runs made of the desk's words with every column drawn, "
        f"probes and evaluations every 20 steps; one process a run. {result['load']}",
        "",
        f"![User CPU seconds of kedge diagnose over tokens](diagnosis-cost.svg) Blue: {SMALL.name} a step; orange: "
        f"{LARGE.name}.",
        "",
        "| a step | tokens | steps | on disk, MB | wall, s | user CPU, s | system, s | peak memory, MB |",
        "|--|--|--|--|--|--|--|--|",
    ]
    lines += [
        f"| {row['shape']} | {row['tokens']:,} | {row['steps']:,} | {row['disk_mb']:.0f} | {row['wall_s']:.1f} "
        f"| {row['user_s']:.1f} | {row['system_s']:.1f} | {row['peak_mb']:.0f} |"
        for row in result["rows"]
    ]
    lines += [
        "",
        "Seconds = start + rate × tokens, fitted with relative errors; the exponent is that of the seconds above the "
        "start. Memory at a hundred million tokens is the line through the runs of a million tokens and more.",
        "",
        "| a step | start, s | user CPU, s per million tokens | exponent | memory, MB per million tokens "
        "| MB at 100 million tokens |",
        "|--|--|--|--|--|--|",
    ]
    lines += [
        f"| {shape} | {fit['start_s']:.1f} | {fit['user_s_per_million']:.2f} | {fit['exponent']:.2f} "
        f"| {fit['mb_per_million']:.2f} | {fit['mb_at_100_million']:.0f} |"
        for shape, fit in result["fits"].items()
    ]
    million = [row for row in result["rows"] if 0.9e6 < row["tokens"] < 1.5e6]
    worst_s, worst_mb = max(row["user_s"] for row in million), max(row["peak_mb"] for row in million)
    held = worst_s < TARGET_S and worst_mb < 1024 * TARGET_GB
    lines += [
        "",
        f"A million tokens take at most {worst_s:.1f} s of user CPU and {worst_mb:.0f} MB; the target is less than "
        f"{TARGET_S:g} s and {TARGET_GB:g} GB: {'held' if held else 'missed'} where nothing else runs.",
        "",
        "Memory is that of one step and its intermediate arrays; what grows with a run are some hundred numbers "
        "a step, of checks and metrics. A diagnosis holds one step at a time, so the size of a step sets the level.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/diagnosis-cost"))
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="tokens of the largest run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    for size in SIZES:
        for shape in (SMALL, LARGE):
            fits = size <= given.largest and (shape is SMALL or size > 2 * shape.tokens)
            if fits and not any((row["shape"], row["asked"]) == (shape.name, size) for row in rows):
                rows.append(run_of(shape, size, given.out / "run"))
                with kept.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    rows.sort(key=lambda row: (row["shape"] != SMALL.name, row["tokens"]))
    busiest = max(row["load"] for row in rows)
    load = f"Load of the machine up to {busiest:.1f}: wall seconds hold others' work."
    fits = {
        shape.name: fitted([row for row in rows if row["shape"] == shape.name])
        for shape in (SMALL, LARGE)
        if sum(row["shape"] == shape.name for row in rows) > 1
    }
    result = {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": load,
        "rows": rows,
        "fits": fits,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "diagnosis-cost.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "diagnosis-cost.md").write_text(page(result))
    (RESULTS / "diagnosis-cost.svg").write_text(drawing(rows))


if __name__ == "__main__":
    main()
