"""The story in two acts: a run that drifts, the correction its trace suggests, and the corrected run beside it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from kedge import recipe as recipes
from kedge.diagnose.correction import propose
from kedge.pipeline.run import run
from kedge.pipeline.summary import lines
from kedge.progress import Interrupt, Progress
from kedge.report.html import write_comparison
from kedge.trace.jsonl import write_atomically
from kedge.trace.reader import read_run

RECIPE = files("kedge.desk") / "demo.toml"


def demo(out: Path, *, seed: int, resume: bool, progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
    """Both acts in `out`, with one report; returns what the command prints as JSON, plus `lines` for people."""
    text = RECIPE.read_text(encoding="utf-8")
    first, second = out / "drift", out / "corrected"

    def act(folder: Path, name: str, overrides: tuple[str, ...], start: Path | None = None) -> dict[str, Any]:
        recipe = recipes.parse(text, (f"seed={seed}", f"name={name}", *overrides), source="the demo's recipe")
        going_on = resume and (folder / "manifest.json").exists()
        return run(
            recipe, folder, recipe_text=text, resume=going_on, progress=progress, interrupt=interrupt, start=start
        )

    progress.note("act one: the desk's annotators like long answers")
    drift = act(first, "drift", ())
    proposal = propose(read_run(first))
    write_atomically(out / "proposal.json", (json.dumps(proposal.to_dict(), indent=2) + "\n").encode())
    result: dict[str, Any] = {"drift": drift, "corrected": None, "run_dir": str(out), "proposal": proposal.to_dict()}
    if not proposal.overrides:
        return result | {"report": drift["report"], "lines": [*lines("drift", drift), *proposal.words]}
    progress.note(f"act two: the same start with {', '.join(proposal.overrides)}")
    corrected = act(second, "corrected", proposal.overrides, start=first)
    report = write_comparison(first, second, out / "report.html", proposal)
    shown = [
        *lines("drift", drift),
        lines("corrected", corrected)[1],
        f"why: {proposal.words[0]}",
        f"what changed: {', '.join(proposal.overrides)}",
    ]
    return result | {"corrected": corrected, "report": str(report), "lines": shown}
