"""How long the demo takes, what of it the trace costs, and whether the same seed gives the same metrics.

Runs `kedge demo --seed 0` twice, each in a process of its own, and writes docs/results/demo-time.json and .md:

    python benchmarks/demo_time.py --out runs/demo-time
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
ACTS = ("drift", "corrected")


def measure(folder: Path) -> dict[str, Any]:
    """One demo: wall and CPU seconds, and the share of the policy steps that the loop spent on the trace."""
    shutil.rmtree(folder, ignore_errors=True)
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "kedge.cli", "demo", "--seed", "0", "--out", str(folder), "--json"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    timings = [json.loads(line) for act in ACTS for line in (folder / act / "timings.jsonl").read_text().splitlines()]
    steps = sum(line["step_s"] for line in timings)
    return {
        "wall_s": time.monotonic() - began,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "policy_steps_s": steps,
        "trace_share": sum(line["trace_s"] for line in timings) / steps,
        "figures": json.loads(printed.splitlines()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-time"))
    out = parser.parse_args().out
    runs = [measure(out / name) for name in ("first", "second")]
    same = all(
        (out / "first" / act / "metrics.jsonl").read_bytes() == (out / "second" / act / "metrics.jsonl").read_bytes()
        for act in ACTS
    )
    result = {"cores": os.cpu_count(), "python": platform.python_version(), "same_metrics": same, "runs": runs}
    for run in runs:
        for name in ("run_dir", "report", "proposal"):
            run["figures"].pop(name, None)
        for act in ACTS:
            run["figures"][act] = {k: v for k, v in run["figures"][act].items() if isinstance(v, list)}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo-time.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "demo-time.md").write_text(render(result), encoding="utf-8")
    print(json.dumps(result))


def render(result: dict[str, Any]) -> str:
    """The page; every number in it comes from `result`."""
    lines = [
        "# What the demo takes",
        "",
        "Made by `python benchmarks/demo_time.py`; raw figures in `demo-time.json`.",
        "",
    ]
    lines += [f"{result['cores']} cores, Python {result['python']}, both acts, seed 0.", ""]
    lines += ["| run | wall, s | CPU, s | policy steps, s | of which trace |", "|--|--|--|--|--|"]
    for number, run in enumerate(result["runs"], start=1):
        share = f"{run['trace_share']:.1%}"
        lines.append(f"| {number} | {run['wall_s']:.0f} | {run['cpu_s']:.0f} | {run['policy_steps_s']:.0f} | {share} |")
    verdict = "byte for byte the same" if result["same_metrics"] else "NOT the same"
    lines += ["", f"`metrics.jsonl` of the two runs: {verdict}.", ""]
    lines += ["`[reference, at the highest gold, final]` on the 512 evaluation prompts:", ""]
    lines += ["| act | gold | score | KL, nats per sequence | length, tokens |", "|--|--|--|--|--|"]
    for act in ACTS:
        figures = result["runs"][0]["figures"][act]
        cells = [" -> ".join(f"{v:.2f}" for v in figures[k]) for k in ("gold", "proxy", "kl_per_sequence", "length")]
        lines.append(f"| {act} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
