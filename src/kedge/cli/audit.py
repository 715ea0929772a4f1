"""What a file of judgments would teach a reward model beside quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kedge.cli.output import Json, execute
from kedge.errors import InputError, Problem
from kedge.progress import Interrupt, Progress

TONES = {"bad": "red", "look": "yellow", "ok": "green", "not checked": "bright_black"}


def audit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pairs, rankings, ratings or verdicts.")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Judgments that measure: what do they share?")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", metavar="PROMPTS", help="Prompts one deploys on: how far away?")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT.html", help="Write a page as well.")] = None,
    as_json: Json = False,
) -> None:
    """Say what the labels in a file would teach a reward model beside quality."""
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise InputError(Problem(f"--html {html}", "is not the name of an HTML file", "end it in .html"))

    def work(progress: Progress, interrupt: Interrupt) -> dict[str, Any]:
        from kedge.data.audit.lines import lines
        from kedge.data.audit.whole import as_json as figures
        from kedge.data.audit.whole import audit as look

        found = look(file, evaluation=evaluation, against=against, progress=progress, interrupt=interrupt)
        result = figures(found) | {"lines": [_coloured(line) for line in lines(found)]}
        if html is not None:
            from kedge.report.audit import write_audit

            result["report"] = write_audit(found, html)
        return result

    execute(work, as_json=as_json)


def _coloured(line: str) -> str:
    """The line with its status in colour, which typer leaves out where stdout is no terminal."""
    for status, tone in TONES.items():
        if line.startswith(f"{status} "):
            return typer.style(status, fg=tone, bold=True) + line[len(status) :]
    return line
