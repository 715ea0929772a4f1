"""How fast `kedge data audit` goes through a large file, and in how much memory.

    python benchmarks/audit_speed.py --rows 2000000

Writes a JSONL file of made-up pairs into a temporary folder, audits it in a process of its own, and prints rows per
second, the peak resident memory of that process, and the last lines that it wrote about its progress. With --save the
figures go to docs/results/audit-speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
STARTS, ENDS = "ka lo mi re su ta vo ne", "ri ma don tes lin par gol he"
WORDS = [f"{start}{end}" for start in STARTS.split() for end in ENDS.split()]


def write_pairs(path: Path, rows: int, seed: int = 0) -> None:
    """Pairs of two prompts in three rows, 20 to 80 words a response, eight annotators and four domains."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, rows, 10_000):
            size = min(10_000, rows - start)
            prompts = rng.integers(0, 2 * rows // 3 + 1, size)
            lengths = rng.integers(20, 81, (size, 2))
            words = rng.integers(0, len(WORDS), lengths.sum())
            at = 0
            for row in range(size):
                texts = []
                for length in lengths[row]:
                    texts.append(" ".join(WORDS[word] for word in words[at : at + length]))
                    at += length
                number = int(prompts[row])
                judged = {
                    "prompt": f"Question {number}: " + " ".join(WORDS[(number * k) % len(WORDS)] for k in range(3, 20)),
                    "chosen": texts[0],
                    "rejected": texts[1],
                    "annotator": f"a{row % 8}",
                    "domain": f"d{number % 4}",
                    "chosen_pos": 1 + row % 2,
                }
                file.write(json.dumps(judged) + "\n")


def measure(rows: int) -> dict[str, float | int | str]:
    """Seconds, rows per second and peak resident memory of the command, whole."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, rows)
        size = path.stat().st_size
        log = Path(folder) / "progress.log"
        began = time.monotonic()
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "kedge.cli", "data", "audit", str(path)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stream)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        told = log.read_text(encoding="utf-8")
    if process.returncode:
        raise SystemExit(told)
    return {
        "rows": rows,
        "file_mib": round(size / 2**20),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds),
        "peak_mib": round(usage.ru_maxrss / 1024),  # Linux: KiB
        "first_estimate": next((line for line in told.splitlines() if "rows/s, about" in line), ""),
        "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--save", action="store_true", help="write the figures to docs/results/audit-speed.json")
    arguments = parser.parse_args()
    found = measure(arguments.rows)
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    if arguments.save:
        (RESULTS / "audit-speed.json").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
