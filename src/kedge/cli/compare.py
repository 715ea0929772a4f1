"""`kedge compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.progress import Interrupt, Progress


def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of runs.", show_default=False)],
    at: Annotated[
        int | None,
        typer.Option("--at", min=0, help="Evaluations after at most this many updates; the last ones if absent."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Settings that differ, figures side by side, and differences on the same evaluation prompts."""

    def work(_progress: Progress, _interrupt: Interrupt) -> dict[str, Any]:
        from kedge.diagnose.compare import compare as compared
        from kedge.trace.reader import read_run

        found = compared([read_run(folder) for folder in folders], at=at)
        return found.to_dict() | {"lines": found.lines()}

    execute(work, as_json=as_json)
