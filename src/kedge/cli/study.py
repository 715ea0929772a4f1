"""`kedge study`: experiments that carry out many runs and compare them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.cli.runs import Resume, open_folder
from kedge.progress import Interrupt, Progress

MARKS = ("study.json",)


def overoptimisation(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="[RECIPE]", help="A recipe of the built-in desk; the demo's if absent."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the study.")] = Path("runs/overoptimisation"),
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", min=1, help="Number of seeds; 3, or 1 with --quick, if absent.", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter runs, to see that it works.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs at a time, one core each.")] = 2,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Score and gold against the KL: over betas, best-of-n and reward models, with fitted laws."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        given = _given(recipe)
        from kedge.experiment.overoptimisation import study
        from kedge.experiment.plan import Given, plan

        planned = plan(Given(*given), seeds=seeds or (1 if quick else 3), quick=quick)
        open_folder(out, resume=resume, marks=MARKS)
        at_once = min(workers, os.cpu_count() or 1)
        return study(planned, out, workers=at_once, resume=resume, progress=progress, interrupt=interrupt)

    execute(work, as_json=as_json)


def _given(path: Path | None) -> tuple[str, str, Path | None]:
    """A recipe's text, its name in errors, and where its paths start."""
    if path is None:
        from importlib.resources import files

        return (files("kedge.desk") / "demo.toml").read_text(encoding="utf-8"), "the demo's recipe", None
    from kedge.recipe import load

    load(path)  # says what is wrong with the file
    return path.read_text(encoding="utf-8-sig"), str(path), path.parent
