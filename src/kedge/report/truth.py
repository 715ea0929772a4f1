"""What a built-in world knows about a run. Only reports read it; training and diagnosis never do."""

from __future__ import annotations

from kedge.trace.jsonl import read_json_lines
from kedge.trace.reader import Run, Series, series


def read_truth(run: Run) -> dict[str, Series]:
    """Gold utility, correctness and the like by name (`schema.METRICS`, stage "truth"); empty where nobody knows."""
    return series(iter(read_json_lines(run.dir.truth)))
