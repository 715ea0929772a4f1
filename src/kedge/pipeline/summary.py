"""What a run came to, in figures and in lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kedge.trace.jsonl import read_json_lines
from kedge.trace.run_dir import RunDir

_FIGURES = {
    "proxy": "evaluation/score",
    "kl_per_sequence": "evaluation/kl_per_sequence",
    "length": "evaluation/length",
}
_SHOWN = (
    ("gold", "gold", 2, ""),
    ("proxy", "score", 2, ""),
    ("kl_per_sequence", "KL", 1, " nats"),
    ("length", "length", 1, " tokens"),
)


def summary(folder: RunDir, stages: Sequence[str]) -> dict[str, Any]:
    """Figures on the fixed evaluation set as `[reference, at the highest gold, final]`, and where the report is.

    Without a world that knows the gold utility the middle entry is at the highest score.
    """
    result: dict[str, Any] = {"run_dir": str(folder.path)}
    evaluations = [line for line in read_json_lines(folder.metrics) if line["stage"] == "evaluation"]
    if "policy" in stages and evaluations:
        result |= figures(folder, evaluations)
    if "evaluate" in stages:
        result["report"] = str(folder.report)
    return result


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """What the figures of a run say to people, in two lines."""
    columns = [f"{label} {_path(found[key], digits)}{unit}" for key, label, digits, unit in _SHOWN if key in found]
    middle = "gold" if "gold" in found else "score"
    return [
        f"reference -> at the highest {middle} -> final, on the fixed evaluation set",
        f"{name:<9}  {'   '.join(columns)}",
    ]


def _path(values: Sequence[float], digits: int) -> str:
    return " -> ".join(f"{value:.{digits}f}" for value in values)


def figures(folder: RunDir, evaluations: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Each figure at the reference (step 0), at the best evaluation and at the last."""
    truth = {line["step"]: line for line in read_json_lines(folder.truth)}
    worth = {line["step"]: truth.get(line["step"], {}).get("gold", line["evaluation/score"]) for line in evaluations}
    best = max(worth, key=lambda step: worth[step])
    by_step = {line["step"]: line for line in evaluations}
    chosen = [min(by_step), best, max(by_step)]
    found = {name: [by_step[step][metric] for step in chosen] for name, metric in _FIGURES.items()}
    if truth:
        found["gold"] = [truth[step]["gold"] for step in chosen]
    return found
