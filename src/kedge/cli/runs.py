"""Commands that carry out a recipe, and the report of what they left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.errors import OS_REMEDIES
from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress
from kedge.trace.run_dir import NotARun

STAGES = ("sft", "reward", "policy", "evaluate")
# Any of these in a folder says that a run of Kedge began there.
MARKS = ("manifest.json", "recipe.toml", "recipe.json", "drift")

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as a TOML file.", show_default=False)]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of the run; runs/NAME of the recipe if absent.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as policy.kl.beta=0.1; repeatable."),
]
Start = Annotated[
    Path | None,
    typer.Option("--start", metavar="RUN", help="Take over the models this run has before PPO.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")]


def demo(
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of both runs.")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder of the two runs.")] = Path("runs/demo"),
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Two short runs on the built-in support desk: one that drifts, and its correction."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge import pipeline

        open_folder(out, resume=resume)
        return pipeline.demo(out, seed=seed, resume=resume, progress=progress, interrupt=interrupt)

    execute(work, as_json=as_json)


def run(
    recipe: RecipeFile,
    out: Out = None,
    settings: Settings = None,
    start: Start = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run every stage of a recipe and write its report."""
    _run_stages(recipe, STAGES, out, settings, start, resume=resume, as_json=as_json)


def sft(
    recipe: RecipeFile, out: Out = None, settings: Settings = None, resume: Resume = False, as_json: Json = False
) -> None:
    """Only supervised fine-tuning on the demonstrations."""
    _run_stages(recipe, ("sft",), out, settings, None, resume=resume, as_json=as_json)


def reward(
    recipe: RecipeFile,
    out: Out = None,
    settings: Settings = None,
    start: Start = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Only the reward model; with --resume, from the supervised policy already in the folder."""
    _run_stages(recipe, ("reward",), out, settings, start, resume=resume, as_json=as_json)


def policy(
    recipe: RecipeFile,
    out: Out = None,
    settings: Settings = None,
    start: Start = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Only the policy's optimisation and its evaluation; with --resume, from the models already in the folder."""
    _run_stages(recipe, ("policy", "evaluate"), out, settings, start, resume=resume, as_json=as_json)


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The HTML file; RUN/report.html if absent.")
    ] = None,
) -> None:
    """Write the report of a run again, from its trace alone."""
    if not _holds_run(folder):
        what = "there is no run of Kedge here"
        raise NotARun(folder, Problem(str(folder), what, "give the folder that a run wrote"))
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--out {out}", "is not the name of an HTML file", "end it in .html"))
    from kedge.report.html import write_report

    typer.echo(str(write_report(folder, out)))


def _run_stages(
    path: Path,
    stages: tuple[str, ...],
    out: Path | None,
    settings: list[str] | None,
    start: Path | None,
    *,
    resume: bool,
    as_json: bool,
) -> None:
    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge import recipe

        loaded = recipe.load(path, settings or ())
        if missing := recipe.missing_files(loaded, str(path)):
            raise InputError(missing)
        if start is not None and not _holds_run(start):
            raise InputError(Problem(f"--start {start}", "there is no run of Kedge here", "give the folder of a run"))
        from kedge import pipeline

        folder = Path("runs") / loaded.name if out is None else out
        open_folder(folder, resume=resume)
        text = path.read_text(encoding="utf-8-sig")
        result = pipeline.run(
            loaded,
            folder,
            recipe_text=text,
            stages=stages,
            resume=resume,
            progress=progress,
            interrupt=interrupt,
            start=start,
        )
        return result | ({"lines": pipeline.lines(loaded.name, result)} if "proxy" in result else {})

    execute(work, as_json=as_json)


def open_folder(out: Path, *, resume: bool, marks: Sequence[str] = MARKS) -> None:
    """Make the folder of a run; refuse to write into what is already there, unless it is a run to go on with.

    Any of `marks` in it says so.
    """
    if out.exists() and not out.is_dir():
        raise InputError(Problem(str(out), "is a file, not a folder", "choose another --out"))
    if out.is_dir() and any(not entry.name.endswith(".tmp") for entry in out.iterdir()):
        if not resume:
            remedy = "choose another --out, or go on with the run in it with --resume"
            raise InputError(Problem(str(out), "is not empty, and nothing is overwritten", remedy))
        if not _holds_run(out, marks):
            raise InputError(Problem(str(out), "holds files but no run of Kedge to resume", "choose another --out"))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"cannot be made: {(error.strerror or str(error)).lower()}"
        raise InputError(Problem(str(out), what, OS_REMEDIES.get(error.errno or 0, "choose another --out"))) from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(Problem(str(out), "cannot be written", "change its permissions or choose another --out"))


def _holds_run(folder: Path, marks: Sequence[str] = MARKS) -> bool:
    return any((folder / mark).exists() for mark in marks)
