"""`kedge trace`: what a run keeps on disk of the words in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

if TYPE_CHECKING:
    from kedge.trace.redact import Redaction

SHOWN = 20  # names of files


def redact(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)],
    text: Annotated[
        Literal["hashed", "none"] | None,
        typer.Option("--text", help="What stays of prompts and responses.", show_default=False),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", metavar="N", min=1, help="Remove all but the newest N step files.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="RUN2", help="Write a new folder instead of changing the run.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take the words out of a run and leave the numbers."""
    if text is None and keep is None:
        raise InputError(Problem("kedge trace redact", "is not told what to do", "give --text, --keep or both"))

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:  # noqa: ARG001 (the shape execute wants)
        from kedge.trace.redact import redact

        done = redact(folder, text=text, keep=keep, out=out)
        return vars(done) | {"run": str(out or folder), "lines": _lines(done, folder, out)}

    execute(work, as_json=as_json)


def _lines(done: Redaction, folder: Path, out: Path | None) -> list[str]:
    lines = [f"{out or folder}: {len(done.rewritten)} files rewritten, {len(done.already)} as they were"]
    if done.text is not None:
        kept = "hashes of texts" if done.text == "hashed" else "no text"
        lines.append(f"the trace keeps {kept}, no token ids and no token strings; its numbers are the same")
    for what, names in (("removed", done.removed), ("not in the new folder", done.left_behind)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{what}: {', '.join(names[:SHOWN])}{more}")
    if done.models and out is None:
        folders = " and ".join(f"{name}/" for name in done.models)
        lines.append(f"not touched: {folders}; weights may remember texts they were trained on")
    return lines
