"""Write docs/metrics.md from the trace's schema and the marks of a healthy run. `tests/test_docs.py` holds it current.

Usage: python tools/render_metrics.py
"""

from __future__ import annotations

from pathlib import Path

from kedge.diagnose.health import marks
from kedge.trace.reader import Run
from kedge.trace.run_dir import RunDir
from kedge.trace.schema import METRICS

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
HEAD = """# Metrics

Everything a run counts, with its unit. `tools/render_metrics.py` writes this page from
`src/kedge/trace/schema.py`, which the writer, the reader and the plots use as well; change it there.

A name says what is averaged: `per_token` and `per_sequence` are different quantities, and KL names its estimator:
k1 = log policy − log reference on the token drawn, k3 = exp(−k1) − 1 + k1. `<channel>` stands for a reward channel
(`score`, `kl`, `length`, `missing_eos`, and the names of [rules](rewards.md)), `<head>` for a head of the critic (the
channels, or `critic` where it has only one), `<i>` for a tercile of the reference's length (0: prompts on which the
reference is briefest).
"""
STAGES = {
    "sft": ("Supervised fine-tuning", "`metrics.jsonl`, stage `sft`; `heldout/…` once, at the end"),
    "reward": ("Reward model", "`metrics.jsonl`, stage `reward`; `heldout/…` once, at the end"),
    "policy": ("Policy", "`metrics.jsonl`, stage `policy`, one line a step; step 0 is the first"),
    "evaluation": ("Evaluation", "`metrics.jsonl`, stage `evaluation`; `step` counts the updates before it"),
    "truth": ("Truth", "`truth/evaluation.jsonl`, only where a built-in world knows it; no diagnosis reads it"),
    "timings": ("Timings", "`timings.jsonl`, kept apart because they differ from run to run"),
}
MARKS = """
## What a healthy run shows

The report marks these numbers. The ranges are habits of small healthy runs, not laws
(`src/kedge/diagnose/health.py`). Evaluations count by their last line, training metrics by the mean over the last third
of the steps. Where beta is adaptive, KL is held against its target instead.
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(map(_stage, STAGES)) + MARKS + _marks()


def _stage(stage: str) -> str:
    title, where = STAGES[stage]
    rows = [(f"`{m.name}`", m.unit, m.meaning, m.reduction) for m in METRICS if m.stage == stage]
    return f"\n## {title}\n\n{where}.\n\n" + _table(("metric", "unit", "what it is", "over what"), rows)


def _marks() -> str:
    """The ranges come with every mark, so a run without data has them all."""
    rows = [(mark.name, mark.unit, mark.healthy, mark.why) for mark in marks(Run(RunDir("no such run"), {}))]
    return "\n" + _table(("mark", "unit", "healthy", "why"), rows)


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
