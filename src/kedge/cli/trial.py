"""`kedge trial`: a change tried on short forks of a run, beside null forks."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.cli.runs import Resume, Settings, open_folder
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

MARKS = ("trial.json",)


def trial(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    step: Annotated[
        int, typer.Option("--from", min=0, metavar="STEP", help="Checkpoint to fork at; 0 is the start of the policy.")
    ],
    settings: Settings = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar='"KEY=VALUE ..."', help="Several changes as one more arm; repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Policy steps of each fork.")] = 10,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Changed forks, and as many null forks.")] = 3,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Forks at a time, one core each.")] = 2,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the forks; RUN/trials/NAME if absent.", show_default=False),
    ] = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Try a change on short forks of a run, beside null forks that draw the same: what did it cause?"""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        arms = ([tuple(settings)] if settings else []) + [_changes(one) for one in arm or ()]
        from kedge.experiment import trial as trials

        planned = trials.plan(folder, step, steps=steps, seeds=seeds, arms=arms)
        place = folder / "trials" / planned.name if out is None else out
        open_folder(place, resume=resume, marks=MARKS)
        at_once = min(workers, os.cpu_count() or 1)
        return trials.trial(planned, place, workers=at_once, resume=resume, progress=progress, interrupt=interrupt)

    execute(work, as_json=as_json)


def _changes(text: str) -> Sequence[str]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        what = f"cannot be read: {error}"
        raise InputError(Problem(f"--arm {text!r}", what, 'write --arm "policy.kl.beta=0.3 policy.lr=1e-4"')) from None
