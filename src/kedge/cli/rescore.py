"""`kedge rescore`: columns that a trainer did not record, computed offline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress


def rescore(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a recorded or imported run.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="RUN2", help="Folder of the run to write.", show_default=False)],
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="DIR", help="Model folder of the reference.", show_default=False),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="DIR",
            help="Model folder of each step's policy, {step} in its name.",
            show_default=False,
        ),
    ] = None,
    reward: Annotated[
        Path | None, typer.Option("--reward", metavar="DIR", help="Folder of a reward model.", show_default=False)
    ] = None,
    eos: Annotated[bool, typer.Option("--eos", help="Also the log-probability of ending at each token.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="That the run was sampled at, where it does not say.", show_default=False),
    ] = None,
    microbatch: Annotated[
        int | None,
        typer.Option(
            "--microbatch", min=1, help="Responses a forward pass; as memory allows if absent.", show_default=False
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Replace columns that are there.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before it begins.")] = False,
    as_json: Json = False,
) -> None:
    """Fill in what a trainer did not record, from model folders; says first what that costs."""

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.experiment.rescore import Asked, plan
        from kedge.experiment.rescore import rescore as carry_out

        asked = Asked(reference, policy, reward, eos, temperature, again, microbatch)
        planned = plan(folder, out, asked, ask_temperature=None if yes or not _asking() else _temperature)
        for line in planned.cost.lines():
            progress.note(line)
        if planned.steps and not yes:
            _confirm()
        found = carry_out(planned, progress=progress, interrupt=interrupt)
        return found | {"cost": vars(planned.cost)}

    execute(work, as_json=as_json)


def _asking() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _temperature() -> float:
    return float(typer.prompt("At which temperature was the run sampled?", type=float, err=True))


def _confirm() -> None:
    if not _asking():
        raise InputError(Problem("kedge rescore", "nobody is there to say yes", "add --yes to begin"))
    if not typer.confirm("Begin?", err=True):
        raise InputError(Problem("kedge rescore", "nothing was done", "the figures above are an estimate"))
